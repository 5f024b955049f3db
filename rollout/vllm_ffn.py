"""The feed-forward layers of a Kimi Linear hybrid for vLLM: dense SwiGLU, and a mixture of experts."""

import torch
import torch.nn.functional as F
from torch import nn

from deltarl.rollout.vllm_weights import (
    RowLinear,
    Weight,
    parameter,
    share,
    silu_and_multiply,
    sum_over_ranks,
)


class DenseFFN(nn.Module):
    """SwiGLU: down(silu(gate x) · up x) (Shazeer 2020)."""

    def __init__(self, hidden_size: int, intermediate_size: int, reduce: bool = True) -> None:
        super().__init__()
        width = share(intermediate_size, "intermediate_size")
        self.in_proj = torch.empty(2 * width, hidden_size)
        self.gate_proj, self.up_proj = (Weight(block, cut=0) for block in self.in_proj.chunk(2))
        self.down_proj = RowLinear(width, hidden_size, reduce)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(silu_and_multiply(F.linear(x, self.in_proj)))


class Expert(nn.Module):
    """The weights of one routed expert's SwiGLU, w2(silu(w1 x) · w3 x), as views into those of all experts."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.w1, self.w3 = (Weight(block, cut=0) for block in gate_up.chunk(2))
        self.w2 = Weight(down, cut=1)


class Router(nn.Module):
    """Sigmoid scores in fp32; a bias steers the choice of experts, not their weights (DeepSeek-V3 2024, 2.1.2)."""

    def __init__(self, config) -> None:
        super().__init__()
        if config.moe_router_activation_func != "sigmoid" or (config.num_expert_group or 1) != 1:
            raise ValueError("the engine serves sigmoid routing in one expert group only")
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
    """Routed experts and a shared one; on a GPU the routed ones are vLLM's fused kernels over the same weights."""

    def __init__(self, config) -> None:
        super().__init__()
        experts, hidden = config.num_experts, config.hidden_size
        width = share(config.moe_intermediate_size, "moe_intermediate_size")
        self.gate = Router(config)
        self.gate_up = torch.empty(experts, 2 * width, hidden)
        self.down = torch.empty(experts, hidden, width)
        self.experts = nn.ModuleList(map(Expert, self.gate_up, self.down))
        self.routing: torch.Tensor | None = None  # [tokens, top_k], for whoever wants to know the choice
        self.shared_experts = None
        if config.num_shared_experts:
            shared = config.moe_intermediate_size * config.num_shared_experts
            self.shared_experts = DenseFFN(hidden, shared, reduce=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids, weights = self.gate(x)
        if self.routing is not None:
            self.routing[: len(ids)] = ids
        routed = self.fused(x, ids, weights) if x.is_cuda else self.one_by_one(x, ids, weights)
        return sum_over_ranks(routed if self.shared_experts is None else routed + self.shared_experts(x))

    def fused(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        from vllm.model_executor.layers.fused_moe import fused_experts

        return fused_experts(x, self.gate_up, self.down, weights, ids.int())

    def one_by_one(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            token, choice = (ids == expert).nonzero(as_tuple=True)
            y = F.linear(silu_and_multiply(F.linear(x[token], self.gate_up[expert])), self.down[expert])
            out.index_add_(0, token, (y * weights[token, choice, None]).to(out.dtype))
        return out
