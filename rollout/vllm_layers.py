"""The layers of a Kimi Linear hybrid for vLLM's CPU engine: KDA, NoPE-MLA expanded to multi-head attention, FFNs.

Every weight is an ordinary parameter under its checkpoint name. Projections of one input are views into one matrix
(`FusedLinear`), so a decode step makes one matrix product for them and a load in place needs no repacking.
"""

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
    is_conv_state_dim_first,
)
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from deltarl.kernels import causal_conv1d, causal_conv1d_decode_, gated_rms_norm, kda_chunk, kda_decode_


def parameter(data: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=False)


class Weight(nn.Module):
    """A module that holds one parameter `weight`, which may be a view into a larger tensor."""

    def __init__(self, data: torch.Tensor) -> None:
        super().__init__()
        self.weight = parameter(data)


class FusedLinear:
    """One [sum(sizes), in] matrix whose row blocks are the weights of several linear layers of one input."""

    def __init__(self, in_features: int, sizes: list[int]) -> None:
        self.sizes = sizes
        self.matrix = torch.empty(sum(sizes), in_features)

    def modules(self) -> list[Weight]:
        return [Weight(block) for block in self.matrix.split(self.sizes)]

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return F.linear(x, self.matrix).split(self.sizes, -1)


class RMSNorm(nn.Module):
    """y = weight · x / sqrt(mean(x²) + eps), in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class KdaStates(MambaBase):
    """The cached states of all KDA layers, which vLLM manages as one layer's.

    vLLM's scheduler does its bookkeeping per sequence and group of layers; one group instead of one per KDA layer
    halves its time. Layer i of L owns heads [i·H, (i+1)·H) of L·H.
    """

    def __init__(self, config, vllm_config: VllmConfig, prefix: str) -> None:
        self.model_config, self.cache_config = vllm_config.model_config, vllm_config.cache_config
        self.config, self.prefix = config, prefix
        self.kv_cache: tuple[torch.Tensor, ...] = ()
        vllm_config.compilation_config.static_forward_context[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.GDN_ATTN

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self.dtypes(self.model_config, self.cache_config)

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return self.shapes(self.config)

    @staticmethod
    def dtypes(model_config, cache_config) -> tuple[torch.dtype, ...]:
        """Dtypes of the convolution cache and the states."""
        return MambaStateDtypeCalculator.kda_state_dtype(
            model_config.dtype, cache_config.mamba_cache_dtype, cache_config.mamba_ssm_cache_dtype
        )

    @staticmethod
    def shapes(config) -> tuple[tuple[int, ...], ...]:
        """Shapes of one sequence's convolution cache and states, all KDA layers together."""
        kda = config.linear_attn_config
        layers = len(kda["kda_layers"])
        return MambaStateShapeCalculator.kda_state_shape(
            1, layers * kda["num_heads"], kda["head_dim"], conv_kernel_size=kda["short_conv_kernel_size"]
        )

    def of_layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """KDA layer `index`'s cached convolution inputs [slots, 3·H·D, width-1] and states [slots, H, D, D]."""
        kda = self.config.linear_attn_config
        heads, size = kda["num_heads"], 3 * kda["num_heads"] * kda["head_dim"]
        conv, state = self.kv_cache
        conv = conv if is_conv_state_dim_first() else conv.transpose(-1, -2)
        return conv[:, index * size : (index + 1) * size], state[:, index * heads : (index + 1) * heads]


class KimiDeltaAttention(nn.Module):
    """KDA (Kimi Linear 2025, eq. 1) over vLLM's state cache; its state update is `deltarl.kernels`'."""

    def __init__(self, config, states: KdaStates, index: int) -> None:
        super().__init__()
        self.states, self.index = states, index
        kda = config.linear_attn_config
        self.num_heads, self.head_dim, self.conv_width = (
            kda["num_heads"],
            kda["head_dim"],
            kda["short_conv_kernel_size"],
        )
        self.size = self.num_heads * self.head_dim
        self.gate_lower_bound = getattr(config, "gate_lower_bound", None)
        self.in_proj = FusedLinear(config.hidden_size, [3 * self.size, self.head_dim, self.head_dim, self.num_heads])
        qkv, f_a, g_a, b = self.in_proj.matrix.split(self.in_proj.sizes)
        self.q_proj, self.k_proj, self.v_proj = (Weight(block) for block in qkv.chunk(3))
        self.f_a_proj, self.g_a_proj, self.b_proj = Weight(f_a), Weight(g_a), Weight(b)
        self.conv_weight = torch.empty(3 * self.size, self.conv_width)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (Weight(w) for w in self.conv_weight.unsqueeze(1).chunk(3))
        self.f_b_proj = nn.Linear(self.head_dim, self.size, bias=False)
        self.g_b_proj = nn.Linear(self.head_dim, self.size, bias=False)
        self.A_log = parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.dt_bias = parameter(torch.empty(self.size, dtype=torch.float32))
        self.o_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.o_proj = nn.Linear(self.size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden] -> [tokens, hidden], the batch's sequences one after another."""
        qkv, f, gate, beta = self.in_proj(x)
        decay = self.f_b_proj(f)
        gate = self.g_b_proj(gate).view(-1, self.num_heads, self.head_dim)
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # vLLM's profiling run has no cache
            return torch.zeros_like(x)
        return self.o_proj(self.attend(metadata[self.states.prefix], qkv, decay, beta, gate).flatten(-2))

    def attend(
        self,
        metadata: GDNAttentionMetadata,
        qkv: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        gate: torch.Tensor,
    ) -> torch.Tensor:
        """qkv [tokens, 3·H·D] before the convolution, decay [tokens, H·D], beta [tokens, H] and the output's gate
        [tokens, H, D] raw -> [tokens, H, D], normed and gated.

        vLLM orders a batch: sequences that advance by one token first, then those that read (a part of) a prompt.
        """
        slots = metadata.non_spec_state_indices_tensor
        decodes, prefills = metadata.num_decodes, metadata.num_prefills
        parts = []
        if decodes:
            rows = slice(decodes)
            parts.append(self.decode(qkv[rows], decay[rows], beta[rows], gate[rows], slots[rows]))
        if prefills:
            rows = slice(decodes, metadata.num_actual_tokens)
            parts.append(
                self.prefill(
                    qkv[rows],
                    decay[rows],
                    beta[rows],
                    gate[rows],
                    slots[decodes : decodes + prefills],
                    metadata.non_spec_query_start_loc[decodes : decodes + prefills + 1] - decodes,
                    metadata.has_initial_state[decodes : decodes + prefills],
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return qkv.view(*qkv.shape[:-1], 3, self.num_heads, self.head_dim).unbind(-3)

    def decode(
        self, qkv: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, gate: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        conv_cache, state_cache = self.states.of_layer(self.index)
        q, k, v = self.heads(causal_conv1d_decode_(qkv, self.conv_weight, conv_cache, slots))
        return kda_decode_(
            q,
            k,
            v,
            decay.view(-1, self.num_heads, self.head_dim),
            beta,
            state_cache,
            slots,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            gate_lower_bound=self.gate_lower_bound,
            norm_weight=self.o_norm.weight,
            norm_gate=gate,
            norm_eps=self.o_norm.eps,
        )

    def prefill(
        self,
        qkv: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        gate: torch.Tensor,
        slots: torch.Tensor,
        cu_seqlens: torch.Tensor,
        has_state: torch.Tensor,
    ) -> torch.Tensor:
        conv_cache, state_cache = self.states.of_layer(self.index)
        y, conv = causal_conv1d(
            qkv.unsqueeze(0),
            self.conv_weight,
            cu_seqlens=cu_seqlens,
            initial_state=conv_cache[slots] * has_state[:, None, None],
            output_final_state=True,
        )
        conv_cache[slots] = conv
        q, k, v = self.heads(y)
        out, state = kda_chunk(
            q,
            k,
            v,
            decay.view(1, -1, self.num_heads, self.head_dim),
            beta.unsqueeze(0),
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            gate_lower_bound=self.gate_lower_bound,
            initial_state=state_cache[slots] * has_state[:, None, None, None],
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
        state_cache[slots] = state
        return gated_rms_norm(out.squeeze(0), gate, self.o_norm.weight, eps=self.o_norm.eps)


class LatentAttention(nn.Module):
    """MLA without position encoding (DeepSeek-V2 2024, section 2.1; Kimi Linear 2025), expanded to one key per head.

    vLLM's CPU attention wants one size for keys and values, so values are padded to the keys' size.
    """

    def __init__(self, config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        if not config.mla_use_nope or config.q_lora_rank is not None:
            raise ValueError("the CPU engine serves MLA without rotary encoding and without q_lora_rank only")
        self.num_heads = config.num_attention_heads
        self.nope, self.rope, self.v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.qk_dim = self.nope + self.rope
        if self.v_dim > self.qk_dim:
            raise ValueError(f"v_head_dim {self.v_dim} exceeds qk_nope_head_dim + qk_rope_head_dim = {self.qk_dim}")
        self.in_proj = FusedLinear(config.hidden_size, [self.num_heads * self.qk_dim, config.kv_lora_rank + self.rope])
        self.q_proj, self.kv_a_proj_with_mqa = self.in_proj.modules()
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, self.num_heads * (self.nope + self.v_dim), bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.v_dim, config.hidden_size, bias=False)
        self.attn = Attention(
            self.num_heads,
            self.qk_dim,
            self.qk_dim**-0.5,
            num_kv_heads=self.num_heads,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden] -> [tokens, hidden]."""
        tokens = x.shape[0]
        q, latent = self.in_proj(x)
        latent, k_shared = latent.split([latent.shape[-1] - self.rope, self.rope], -1)
        k_nope, v = (
            self.kv_b_proj(self.kv_a_layernorm(latent))
            .view(tokens, self.num_heads, -1)
            .split([self.nope, self.v_dim], -1)
        )
        k = torch.cat([k_nope, k_shared.unsqueeze(1).expand(-1, self.num_heads, -1)], -1)
        v = F.pad(v, (0, self.qk_dim - self.v_dim))
        out = self.attn(q, k.view(tokens, -1), v.reshape(tokens, -1))
        out = out.view(tokens, self.num_heads, self.qk_dim)[..., : self.v_dim].reshape(tokens, -1)
        return self.o_proj(out)


class DenseFFN(nn.Module):
    """SwiGLU: down(silu(gate x) · up x) (Shazeer 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.in_proj = FusedLinear(hidden_size, [intermediate_size] * 2)
        self.gate_proj, self.up_proj = self.in_proj.modules()
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.in_proj(x)
        return self.down_proj(F.silu(gate) * up)


class Expert(nn.Module):
    """One routed expert's SwiGLU: w2(silu(w1 x) · w3 x)."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.in_proj = FusedLinear(hidden_size, [intermediate_size] * 2)
        self.w1, self.w3 = self.in_proj.modules()
        self.w2 = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.in_proj(x)
        return self.w2(F.silu(gate) * up)


class Router(nn.Module):
    """Sigmoid scores in fp32; a bias steers the choice of experts, not their weights (DeepSeek-V3 2024, 2.1.2)."""

    def __init__(self, config) -> None:
        super().__init__()
        if config.moe_router_activation_func != "sigmoid" or (config.num_expert_group or 1) != 1:
            raise ValueError("the CPU engine serves sigmoid routing in one expert group only")
        self.top_k, self.renormalize = config.num_experts_per_token, config.moe_renormalize
        self.scale = config.routed_scaling_factor
        self.weight = parameter(torch.empty(config.num_experts, config.hidden_size))
        self.e_score_correction_bias = parameter(torch.empty(config.num_experts, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [tokens, hidden] -> expert ids and their weights, each [tokens, top_k]."""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        ids = (scores + self.e_score_correction_bias).topk(self.top_k, -1).indices
        weights = scores.gather(1, ids)
        if self.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids, weights * self.scale


class MoEFFN(nn.Module):
    """Routed experts, each over the tokens that chose it, and a shared one over all."""

    def __init__(self, config) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = nn.ModuleList(
            Expert(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        self.shared_experts = (
            DenseFFN(config.hidden_size, config.moe_intermediate_size * config.num_shared_experts)
            if config.num_shared_experts
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.gate(x)
        out = torch.zeros_like(x) if self.shared_experts is None else self.shared_experts(x)
        for expert in ids.unique().tolist():
            token, choice = (ids == expert).nonzero(as_tuple=True)
            y = self.experts[expert](x[token]) * weights[token, choice, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out
