"""A Kimi Linear hybrid as a vLLM model for the CPU engine, where vLLM's own class (Triton kernels) cannot run."""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid

from deltarl.rollout.vllm_layers import (
    DenseFFN,
    KdaStates,
    KimiDeltaAttention,
    LatentAttention,
    MoEFFN,
    RMSNorm,
    Weight,
)


def kda_layers(config) -> list[int]:
    return [index for index in range(config.num_hidden_layers) if config.is_kda_layer(index)]


class Layer(nn.Module):
    def __init__(self, config, vllm_config: VllmConfig, prefix: str, index: int, states: KdaStates | None) -> None:
        super().__init__()
        if config.is_kda_layer(index):
            self.self_attn = KimiDeltaAttention(config, states, kda_layers(config).index(index))
        else:
            self.self_attn = LatentAttention(config, vllm_config, f"{prefix}.self_attn")
        if config.is_moe and index >= config.first_k_dense_replace and index % config.moe_layer_freq == 0:
            self.block_sparse_moe = MoEFFN(config)
        else:
            self.mlp = DenseFFN(config.hidden_size, config.intermediate_size)
        self.ffn_name = "block_sparse_moe" if hasattr(self, "block_sparse_moe") else "mlp"
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + getattr(self, self.ffn_name)(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.embed_tokens = Weight(torch.empty(config.vocab_size, config.hidden_size))
        states = None
        if linear := kda_layers(config):  # vLLM wants one number in a cached layer's name
            states = KdaStates(config, vllm_config, f"{prefix}.layers.{linear[0]}.kda_states")
        self.layers = nn.ModuleList(
            Layer(config, vllm_config, f"{prefix}.layers.{index}", index, states)
            for index in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class KimiLinearForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """Reads the same config.json and checkpoint as vLLM's own class; one process, no tensor parallelism."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if vllm_config.parallel_config.world_size != 1:
            raise ValueError("the CPU engine serves Kimi Linear in one process: set tensor_parallel_size=1")
        self.config = vllm_config.model_config.hf_config
        if self.config.tie_word_embeddings:
            raise ValueError("Kimi Linear has no tied embeddings: write lm_head.weight and tie_word_embeddings=false")
        self.model = Decoder(self.config, vllm_config, f"{prefix}.model" if prefix else "model")
        self.lm_head = Weight(torch.empty(self.config.vocab_size, self.config.hidden_size))

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(input_ids, self.model.embed_tokens.weight)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors=None,
        inputs_embeds: torch.Tensor | None = None,
        **_,
    ) -> torch.Tensor:
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.model.layers:
            x = layer(x)
        return self.model.norm(x)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.lm_head.weight)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return KdaStates.dtypes(vllm_config.model_config, vllm_config.cache_config)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return KdaStates.shapes(vllm_config.model_config.hf_config)

    @classmethod
    def get_mamba_state_copy_func(cls):
        return MambaStateCopyFuncCalculator.kda_state_copy_func()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy a checkpoint into the parameters; through `weight_loader`, which vLLM's own reload wraps."""
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            param = parameters[name]
            loader = getattr(param, "weight_loader", default_weight_loader)
            loader(param, tensor.reshape(param.shape))
            loaded.add(name)
        return loaded
