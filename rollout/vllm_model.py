"""A Kimi Linear hybrid as a vLLM model, on CPUs and NVIDIA GPUs."""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid

from deltarl.rollout.vllm_ffn import DenseFFN, MoEFFN
from deltarl.rollout.vllm_layers import GatedDeltaNet, KimiDeltaAttention, LatentAttention, rotations
from deltarl.rollout.vllm_states import LayerStates, pending_place, state_groups
from deltarl.rollout.vllm_weights import Embedding, Head, RMSNorm


class Layer(nn.Module):
    def __init__(self, config, index: int, attention: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention
        if config.is_moe and index >= config.first_k_dense_replace and index % config.moe_layer_freq == 0:
            self.block_sparse_moe = MoEFFN(config)
        else:
            self.mlp = DenseFFN(config.hidden_size, config.intermediate_size)
        self.ffn_name = "block_sparse_moe" if hasattr(self, "block_sparse_moe") else "mlp"
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, rotation: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output is the sum of both tensors, which the next norm makes."""
        x, residual = self.input_layernorm.after(x, residual)
        x = self.self_attn(x, rotation)
        x, residual = self.post_attention_layernorm.after(x, residual)
        return getattr(self, self.ffn_name)(x), residual


class Decoder(nn.Module):
    def __init__(self, config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        linear = GatedDeltaNet if config.linear_attn_config.get("gdn_layers") else KimiDeltaAttention
        attention: dict[int, nn.Module] = {}
        pending = pending_place(vllm_config)
        for group in state_groups(config):  # vLLM wants one number in a cached layer's name
            states = LayerStates(config, vllm_config, f"{prefix}.layers.{group[0]}.states", pending)
            attention |= {index: linear(config, states, place) for place, index in enumerate(group)}
        for index in range(config.num_hidden_layers):
            if index not in attention:
                attention[index] = LatentAttention(config, vllm_config, f"{prefix}.layers.{index}.self_attn")
        self.layers = nn.ModuleList(Layer(config, index, attention[index]) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if vllm_config.additional_config.get("record_routing"):
            self.record_routing(vllm_config.scheduler_config.max_num_batched_tokens)

    def record_routing(self, tokens: int) -> None:
        """From now on, before any graph is captured, each forward pass leaves its choice of experts in `routing`."""
        sparse = [module for module in self.modules() if isinstance(module, MoEFFN)]
        self.routing = torch.zeros(tokens, len(sparse), self.config.num_experts_per_token, dtype=torch.int16)
        for index, module in enumerate(sparse):
            module.routing = self.routing[:, index]

    def forward(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        residual = rotation = None
        if not self.config.mla_use_nope:
            rotation = rotations(positions, self.config.qk_rope_head_dim, self.config.rope_parameters["rope_theta"])
        for layer in self.layers:
            x, residual = layer(x, residual, rotation)
        return self.norm.after(x, residual)[0]


class KimiLinearForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """Reads the same config.json and checkpoint as vLLM's own class."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if vllm_config.parallel_config.pipeline_parallel_size != 1:
            raise ValueError("the engine serves Kimi Linear without pipeline stages: set pipeline_parallel_size=1")
        self.config = vllm_config.model_config.hf_config
        if self.config.tie_word_embeddings:
            raise ValueError("Kimi Linear has no tied embeddings: write lm_head.weight and tie_word_embeddings=false")
        self.model = Decoder(self.config, vllm_config, f"{prefix}.model" if prefix else "model")
        self.lm_head = Head(self.config.vocab_size, self.config.hidden_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors=None,
        inputs_embeds: torch.Tensor | None = None,
        **_,
    ) -> torch.Tensor:
        return self.model(positions, self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden_states)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return LayerStates.dtypes(vllm_config)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return LayerStates.shapes(vllm_config)

    @classmethod
    def get_mamba_state_copy_func(cls):
        return MambaStateCopyFuncCalculator.kda_state_copy_func()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy a checkpoint into the parameters; through `weight_loader`, which vLLM's own reload wraps."""
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            parameters[name].weight_loader(parameters[name], tensor)
            loaded.add(name)
        return loaded
