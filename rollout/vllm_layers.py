"""The attention layers of a hybrid for vLLM: KDA and GDN over vLLM's state cache, and latent attention."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadataBuilder

from deltarl.kernels import (
    causal_conv1d,
    causal_conv1d_decode_,
    gated_rms_norm,
    gdn_chunk,
    gdn_decode_,
    kda_chunk,
    kda_decode_,
)
from deltarl.rollout.vllm_states import LayerStates, StateMetadata
from deltarl.rollout.vllm_weights import FusedLinear, HeadsUp, RMSNorm, RowLinear, Weight, parameter, share

CONTEXT_ROWS = 64 * 1024


class DeltaAttention(nn.Module):
    """What KDA and GDN share over vLLM's state cache; the update of the states is `deltarl.kernels`'."""

    def __init__(self, config, states: LayerStates, place: int, gates: list[int], decays: int) -> None:
        """gates: rows of the projections that `self.gates` is given, after q, k and v. decays: for each head."""
        super().__init__()
        self.states, self.place = states, place
        linear, hidden = config.linear_attn_config, config.hidden_size
        self.heads, self.head_dim = local_heads(config), linear["head_dim"]
        self.size, width = self.heads * self.head_dim, linear["short_conv_kernel_size"]
        self.gate_lower_bound = getattr(config, "gate_lower_bound", None)
        self.in_proj = FusedLinear(hidden, [3 * self.size, *gates, self.heads])
        qkv, *_, beta = self.in_proj.blocks()
        self.q_proj, self.k_proj, self.v_proj = (Weight(block, cut=0) for block in qkv.chunk(3))
        self.b_proj = Weight(beta, cut=0)
        self.conv_weight = torch.empty(3 * self.size, width, dtype=torch.float32)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (Weight(w, 0) for w in self.conv_weight.unsqueeze(1).chunk(3))
        self.A_log = parameter(torch.empty(self.heads, dtype=torch.float32), cut=0)
        self.o_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = RowLinear(self.size, hidden)
        self.pending = states.room(self.heads, 2 * self.head_dim + decays)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
        """x [tokens, hidden] -> [tokens, hidden], the batch's sequences one after another."""
        qkv, *gates, beta = self.in_proj(x)
        decay, gate = self.gates(*gates)
        inputs = qkv, decay, beta, gate
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM's run for measuring memory, which has no cache
            out = self.chunk(*inputs, None)[0] if x.is_cuda else torch.zeros_like(gate)
        else:
            out = self.attend(metadata[self.states.prefix], *inputs)
        return self.o_proj(out.flatten(-2))

    def attend(self, batch: StateMetadata, *inputs: torch.Tensor) -> torch.Tensor:
        """inputs: qkv [tokens, 3·H·D] before the convolution, decay [tokens, H, D] (GDN: [tokens, H]), beta [tokens, H]
        and the output's gate [tokens, H, D], all raw -> [tokens, H, D], normed and gated."""
        parts = []
        if batch.decodes:
            parts.append(self.decode(*(x[: batch.decodes] for x in inputs), batch.slots[: batch.decodes]))
        if batch.prefills:
            parts.append(self.prefill(batch, *(x[batch.decodes : batch.tokens] for x in inputs)))
        rows = len(inputs[0])
        if batch.tokens < rows:  # padding
            parts.append(inputs[0].new_zeros(rows - batch.tokens, self.heads, self.head_dim))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return qkv.unflatten(-1, (3, self.heads, self.head_dim)).unbind(-3)

    def decode(
        self, qkv: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, gate: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        conv_cache, state_cache = self.states.of_layer(self.place, self.heads)
        q, k, v = self.split(causal_conv1d_decode_(qkv, self.conv_weight, conv_cache, slots))
        return self.decode_step_(
            q,
            k,
            v,
            decay,
            beta,
            state_cache,
            slots,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            gate_lower_bound=self.gate_lower_bound,
            norm_weight=self.o_norm.weight,
            norm_gate=gate,
            norm_eps=self.o_norm.eps,
            pending=self.pending,
        )

    def prefill(
        self, batch: StateMetadata, qkv: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        conv_cache, state_cache = self.states.of_layer(self.place, self.heads)
        slots = batch.slots[batch.decodes : batch.decodes + batch.prefills]
        conv = state = None
        if batch.resumed is not None:
            conv = torch.where(batch.resumed[:, None, None], conv_cache[slots], 0)
            state = torch.where(batch.resumed[:, None, None, None], state_cache[slots], 0)
        out, conv, state = self.chunk(qkv, decay, beta, gate, batch.cu_seqlens, conv, state)
        conv_cache[slots] = conv.to(conv_cache.dtype)
        state_cache[slots] = state
        return out

    def chunk(
        self,
        qkv: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        gate: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        conv: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sequences (one without cu_seqlens) from these convolution inputs and states on; None is zeros."""
        y, conv = causal_conv1d(
            qkv.unsqueeze(0), self.conv_weight, cu_seqlens=cu_seqlens, initial_state=conv, output_final_state=True
        )
        q, k, v = self.split(y)
        out, state = self.chunk_scan(
            q,
            k,
            v,
            decay.unsqueeze(0),
            beta.unsqueeze(0),
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            gate_lower_bound=self.gate_lower_bound,
            initial_state=state,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        out = gated_rms_norm(out.squeeze(0), gate, self.o_norm.weight, eps=self.o_norm.eps)
        return out, conv, state


class KimiDeltaAttention(DeltaAttention):
    """KDA (Kimi Linear 2025, eq. 1): a decay per channel, through a low-rank projection as the output's gate."""

    chunk_scan, decode_step_ = staticmethod(kda_chunk), staticmethod(kda_decode_)

    def __init__(self, config, states: LayerStates, place: int) -> None:
        rank = config.linear_attn_config["head_dim"]
        super().__init__(config, states, place, [2 * rank], decays=rank)
        self.f_a_proj, self.g_a_proj = (Weight(block) for block in self.in_proj.blocks()[1].chunk(2))
        self.low_rank_up = torch.empty(2, self.size, rank)
        self.f_b_proj, self.g_b_proj = (Weight(matrix, cut=0) for matrix in self.low_rank_up)
        self.dt_bias = parameter(torch.empty(self.size, dtype=torch.float32), cut=0)

    def gates(self, low_rank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low_rank = low_rank.unflatten(-1, (2, self.head_dim)).transpose(0, 1)
        decay, gate = torch.bmm(low_rank, self.low_rank_up.transpose(1, 2)).unflatten(-1, (-1, self.head_dim))
        return decay, gate


class GatedDeltaNet(DeltaAttention):
    """Gated DeltaNet (Yang, Kautz and Hatamizadeh 2024, eq. 10) in KDA's layer: one decay a head."""

    chunk_scan, decode_step_ = staticmethod(gdn_chunk), staticmethod(gdn_decode_)

    def __init__(self, config, states: LayerStates, place: int) -> None:
        rank = config.linear_attn_config["head_dim"]
        super().__init__(config, states, place, [local_heads(config), rank], decays=1)
        _, decay, low_rank, _ = self.in_proj.blocks()
        self.a_proj, self.g_a_proj = Weight(decay, cut=0), Weight(low_rank)
        self.g_b_proj = Weight(torch.empty(self.size, rank), cut=0)
        self.dt_bias = parameter(torch.empty(self.heads, dtype=torch.float32), cut=0)

    def gates(self, decay: torch.Tensor, low_rank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return decay, F.linear(low_rank, self.g_b_proj.weight).unflatten(-1, (-1, self.head_dim))


@cache
def keep_context_room_small() -> None:
    """Have vLLM's latent attention keep room for CONTEXT_ROWS latents that prefills find in the cache, where there can
    be none: where prompts are read whole and no prefix is cached.

    0.26 keeps room for a cache block of each sequence, and for what that expands to in all heads. In a hybrid a block
    is as large as a state: with 1024 sequences and states of 3 layers of 8 heads of 128, 1.46M rows, 1.7 and 6.0 GB.
    0.32 keeps as much as here.
    """
    vllm_s = MLACommonMetadataBuilder.determine_chunked_prefill_workspace_size

    def rows(vllm_config: VllmConfig) -> int:
        found = vllm_s(vllm_config)
        if vllm_config.scheduler_config.enable_chunked_prefill or vllm_config.cache_config.enable_prefix_caching:
            return found
        block = vllm_config.cache_config.block_size
        return min(found, -(-CONTEXT_ROWS // block) * block)

    MLACommonMetadataBuilder.determine_chunked_prefill_workspace_size = staticmethod(rows)


def local_heads(config) -> int:
    return share(config.linear_attn_config["num_heads"], "linear_attn_config.num_heads")


class LatentAttention(nn.Module):
    """MLA (DeepSeek-V2 2024, section 2.1) without position encoding, or with rotary positions.

    On a GPU vLLM's latent attention runs over a cache of latents. On a CPU its kernel takes latents of 512 + 64 only,
    so there it is expanded to one key per head; its attention wants one size for keys and values: values are padded.
    """

    def __init__(self, config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        if config.q_lora_rank is not None:
            raise ValueError("the engine serves MLA without q_lora_rank only: set it to null")
        self.heads = share(config.num_attention_heads, "num_attention_heads")
        self.nope, self.rope, self.v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.qk_dim, self.latent = self.nope + self.rope, config.kv_lora_rank
        self.in_proj = FusedLinear(config.hidden_size, [self.heads * self.qk_dim, self.latent + self.rope])
        query, latent = self.in_proj.blocks()
        self.q_proj, self.kv_a_proj_with_mqa = Weight(query, cut=0), Weight(latent)
        self.kv_a_layernorm = RMSNorm(self.latent, config.rms_norm_eps)
        self.kv_b_proj = HeadsUp(self.latent, self.heads * (self.nope + self.v_dim))
        self.o_proj = RowLinear(self.heads * self.v_dim, config.hidden_size)
        self.expanded = not vllm_config.model_config.use_mla
        make = self.expanded_attention if self.expanded else self.latent_attention
        self.attn = make(vllm_config, f"{prefix}.attn")

    def latent_attention(self, vllm_config: VllmConfig, prefix: str) -> MLAAttention:
        keep_context_room_small()
        return MLAAttention(
            num_heads=self.heads,
            scale=self.qk_dim**-0.5,
            qk_nope_head_dim=self.nope,
            qk_rope_head_dim=self.rope,
            v_head_dim=self.v_dim,
            q_lora_rank=None,
            kv_lora_rank=self.latent,
            kv_b_proj=self.kv_b_proj,
            cache_config=vllm_config.cache_config,
            prefix=prefix,
        )

    def expanded_attention(self, vllm_config: VllmConfig, prefix: str) -> Attention:
        if self.v_dim > self.qk_dim:
            raise ValueError(f"v_head_dim {self.v_dim} exceeds qk_nope_head_dim + qk_rope_head_dim = {self.qk_dim}")
        return Attention(
            self.heads,
            self.qk_dim,
            self.qk_dim**-0.5,
            num_kv_heads=self.heads,
            cache_config=vllm_config.cache_config,
            prefix=prefix,
        )

    def forward(self, x: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
        """x [tokens, hidden] -> [tokens, hidden]; rotation of `rotations`, or None."""
        q, latent = self.in_proj(x)
        q = q.unflatten(-1, (self.heads, self.qk_dim))
        latent, shared_key = latent.split([self.latent, self.rope], -1)
        latent = self.kv_a_layernorm(latent)
        if rotation is not None:
            turned = rotate(torch.cat((q[..., self.nope :], shared_key.unsqueeze(1)), 1), rotation)
            q[..., self.nope :] = turned[:, :-1]
            shared_key = turned[:, -1].to(q.dtype)
        if self.expanded:
            out = self.attend_expanded(q.flatten(1), latent, shared_key)
        else:
            out = self.attn(q, latent, shared_key.unsqueeze(1), output_shape=(len(x), self.heads * self.v_dim))
        return self.o_proj(out)

    def attend_expanded(self, q: torch.Tensor, latent: torch.Tensor, shared_key: torch.Tensor) -> torch.Tensor:
        expanded = self.kv_b_proj(latent)[0].unflatten(-1, (self.heads, -1))
        k_nope, v = expanded.split([self.nope, self.v_dim], -1)
        k = torch.cat([k_nope, shared_key.unsqueeze(1).expand(-1, self.heads, -1)], -1)
        v = F.pad(v, (0, self.qk_dim - self.v_dim))
        out = self.attn(q, k.flatten(1), v.flatten(1))
        return out.unflatten(-1, (self.heads, self.qk_dim))[..., : self.v_dim].flatten(1)


def rotations(positions: torch.Tensor, size: int, theta: float) -> torch.Tensor:
    """exp(i·p·theta^(-2c/size)) for positions p [tokens] and channel pairs c: complex64 [tokens, size / 2]."""
    pairs = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32)
    angle = positions.unsqueeze(-1) * theta ** (-pairs / size)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotary positions (RoFormer 2021, eq. 34): channels 2c and 2c + 1 of x [tokens, heads, size] turned, in fp32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation.unsqueeze(1)).flatten(-2)
