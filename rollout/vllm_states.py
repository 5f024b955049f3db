"""The cached states of linear-attention layers in vLLM, and what the layers are told about each batch.

vLLM's own metadata for gated delta networks is not used: it is made for other kernels, differs between the versions we
support, and in 0.26 takes the one token of a new sequence for one that goes on from a state.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator, is_conv_state_dim_first
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID, mamba_get_block_table_tensor

from deltarl.kernels import Pending

PENDING = "pending_tokens"
"""Of vLLM's additional_config: how many tokens of a sequence the states may lack between two steps of a burst."""

PADDING = -1
"""The slot that the decode kernels of `deltarl.kernels` pass over."""


@dataclass
class StateMetadata:
    """A batch as the layers see it: first `decodes` sequences of one token, then `prefills` of any number.

    slots [rows] int32: each sequence's place in the cache, PADDING for rows without a sequence. tokens: of all
    sequences. cu_seqlens: int32 [prefills + 1] on the host. resumed: bool [prefills] on the device, which prefills go
    on from a state; None if none does.
    """

    slots: torch.Tensor
    decodes: int
    prefills: int
    tokens: int
    cu_seqlens: torch.Tensor | None = None
    resumed: torch.Tensor | None = None


class StateMetadataBuilder(AttentionMetadataBuilder[StateMetadata]):
    """Makes a batch's `StateMetadata`. Slots lie where they lay before: a CUDA graph of a decode batch reads them."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    reorder_batch_threshold = 1
    holds_for_bursts: ClassVar[bool] = True
    """What is built for a step says all there is to know in the next one of the same sequences."""

    def __init__(self, kv_cache_spec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if vllm_config.speculative_config is not None:
            raise ValueError("linear-attention states cannot be wound back: leave speculative decoding off")
        largest_graph = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        rows = max(vllm_config.scheduler_config.max_num_seqs, largest_graph)
        self.slots = torch.full((rows,), PADDING, dtype=torch.int32, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StateMetadata:
        """Rows are ordered: sequences that advance by one token, then longer ones, then padding without tokens."""
        common = common_attn_metadata
        slots = self.current_slots(common)
        starts = common.query_start_loc_cpu[: common.num_reqs + 1]
        lengths = starts.diff()
        total = common.seq_lens_cpu_upper_bound[: common.num_reqs]
        rows = int((lengths > 0).sum())
        longer = (lengths[:rows] != 1).nonzero()
        decodes = int(longer[0]) if len(longer) else rows
        fresh = total[:decodes] == 1
        if fresh.any():
            self.clear(slots[:decodes][fresh.to(slots.device)])
        if decodes == rows:
            return StateMetadata(slots, decodes, 0, int(starts[rows]))
        prefills = slice(decodes, rows)
        resumed = total[prefills] > lengths[prefills]
        return StateMetadata(
            slots,
            decodes,
            rows - decodes,
            int(starts[rows]),
            (starts[decodes : rows + 1] - starts[decodes]).int(),
            resumed.to(slots.device, non_blocking=True) if resumed.any() else None,
        )

    def current_slots(self, common: CommonAttentionMetadata) -> torch.Tensor:
        table = mamba_get_block_table_tensor(
            common.block_table_tensor,
            common.seq_lens,
            self.kv_cache_spec,
            self.vllm_config.cache_config.mamba_cache_mode,
        )
        found = table[: common.num_reqs, 0]
        slots = self.slots[: common.num_reqs]
        slots.copy_(torch.where(found == NULL_BLOCK_ID, PADDING, found), non_blocking=True)
        return slots

    def clear(self, slots: torch.Tensor) -> None:
        """Zero the states in these slots: a sequence's first token must not read what an earlier one left."""
        layers = self.vllm_config.compilation_config.static_forward_context
        slots = slots[slots >= 0].long()
        for name in self.layer_names:
            for cache in layers[name].kv_cache:
                cache[slots] = 0


class StateBackend(AttentionBackend):
    """What vLLM asks about a layer with states."""

    @staticmethod
    def get_name() -> str:
        return "GDN_ATTN"

    @staticmethod
    def get_builder_cls() -> type[StateMetadataBuilder]:
        return StateMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class LayerStates(MambaBase):
    """The cached states of several linear-attention layers, which vLLM manages as one layer's.

    vLLM's scheduler does its bookkeeping per sequence and group of layers, and its groups are as large as the smallest
    kind of layer is frequent: with as many of these as there are attention layers, there are two groups in all.
    Layer i of n owns heads [i·H, (i+1)·H) of n·H.

    place: int32 [2] on the device, that of `Pending`, one for all; None where every step writes the states.
    """

    def __init__(self, config, vllm_config: VllmConfig, prefix: str, place: torch.Tensor | None = None) -> None:
        if vllm_config.cache_config.enable_prefix_caching:
            raise ValueError("states of linear attention are kept at a sequence's end only: leave prefix caching off")
        self.config, self.vllm_config, self.prefix, self.place = config, vllm_config, prefix, place
        self.kv_cache: tuple[torch.Tensor, ...] = ()
        vllm_config.compilation_config.static_forward_context[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.GDN_ATTN

    def get_attn_backend(self) -> type[AttentionBackend]:
        return StateBackend

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self.dtypes(self.vllm_config)

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return self.shapes(self.vllm_config)

    @staticmethod
    def dtypes(vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Dtypes of the convolutions' inputs and of the states."""
        return vllm_config.model_config.dtype, torch.float32

    @staticmethod
    def shapes(vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """Shapes of one sequence's convolution inputs and states, all layers of one `LayerStates` together."""
        config = vllm_config.model_config.hf_config
        linear = config.linear_attn_config
        layers = len(state_groups(config)[0])
        return MambaStateShapeCalculator.kda_state_shape(
            vllm_config.parallel_config.tensor_parallel_size,
            layers * linear["num_heads"],
            linear["head_dim"],
            conv_kernel_size=linear["short_conv_kernel_size"],
        )

    def of_layer(self, place: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The convolution inputs [slots, 3·H·D, width-1] and states [slots, H, D, D] of the layer at `place` here."""
        size = 3 * heads * self.config.linear_attn_config["head_dim"]
        conv, state = self.kv_cache
        conv = conv if is_conv_state_dim_first() else conv.transpose(-1, -2)
        return conv[:, place * size : (place + 1) * size], state[:, place * heads : (place + 1) * heads]

    def room(self, heads: int, width: int) -> Pending | None:
        """For the tokens, of `width` numbers a head, that the states of a layer do not have yet."""
        if self.place is None:
            return None
        rows, most = self.vllm_config.scheduler_config.max_num_seqs, self.vllm_config.additional_config[PENDING]
        return Pending(torch.empty(rows, heads, most, width, dtype=torch.float32), self.place)


def pending_place(vllm_config: VllmConfig) -> torch.Tensor | None:
    """`place` for the states of a model that is being made."""
    return torch.zeros(2, dtype=torch.int32) if vllm_config.additional_config.get(PENDING) else None


def linear_layers(config) -> list[int]:
    return [index for index in range(config.num_hidden_layers) if config.is_kda_layer(index)]


def state_groups(config) -> list[list[int]]:
    """The linear-attention layers, cut into equal runs (the last may be shorter), one for each `LayerStates`."""
    linear = linear_layers(config)
    if not linear:
        return []
    attention = config.num_hidden_layers - len(linear)
    size = -(-len(linear) // min(len(linear), max(attention, 1)))
    return [linear[begin : begin + size] for begin in range(0, len(linear), size)]
