"""Weights of the engine's model: ordinary parameters under checkpoint names, each this rank's part of the whole.

Projections of one input are views into one matrix (`FusedLinear`), so a step makes one matrix product for them and a
load in place needs no repacking. Tensor parallelism cuts a parameter along `cut`; every rank is given whole tensors
and keeps its own part.
"""

import torch
import torch.nn.functional as F
from torch import nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)

from deltarl.kernels import add_rms_norm_

ROW_STEP = 16
"""Rows of a fused matrix are filled up to a multiple of this: 32 bytes, which the matrix products' fast paths want."""


def share(count: int, what: str) -> int:
    """This rank's part of `count` things; ValueError when they cannot be shared evenly."""
    parts = get_tensor_model_parallel_world_size()
    if count % parts:
        raise ValueError(f"{what} {count} cannot be shared by {parts} ranks: choose another tensor_parallel_size")
    return count // parts


def parameter(data: torch.Tensor, cut: int | None = None) -> nn.Parameter:
    """A parameter that `load_weight` fills; `cut` is the dimension along which ranks share it (None: all hold it)."""
    param = nn.Parameter(data, requires_grad=False)
    param.cut = cut
    param.weight_loader = load_weight
    return param


def load_weight(param: nn.Parameter, tensor: torch.Tensor) -> None:
    """Copy a checkpoint's whole tensor, or this rank's part of it, into a parameter."""
    param.data.copy_(own_part(param, tensor))


def own_part(param: nn.Parameter, tensor: torch.Tensor) -> torch.Tensor:
    """The part of a checkpoint's whole tensor that `param` holds; dimensions of size 1 may differ."""
    shape, parts = list(param.shape), get_tensor_model_parallel_world_size()
    if param.cut is None or parts == 1:
        return tensor.reshape(shape)
    shape[param.cut] *= parts
    return tensor.reshape(shape).chunk(parts, param.cut)[get_tensor_model_parallel_rank()]


class Weight(nn.Module):
    """A module that holds one parameter `weight`, which may be a view into a larger tensor."""

    def __init__(self, data: torch.Tensor, cut: int | None = None) -> None:
        super().__init__()
        self.weight = parameter(data, cut)


class RowLinear(Weight):
    """x @ weight.T for an input whose features the ranks share; the sum over ranks unless `reduce` is false."""

    def __init__(self, in_features: int, out_features: int, reduce: bool = True) -> None:
        super().__init__(torch.empty(out_features, in_features), cut=1)
        self.reduce = reduce

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight)
        return sum_over_ranks(y) if self.reduce else y


class HeadsUp(Weight):
    """x @ weight.T with this rank's heads as output, called and read as vLLM's latent attention does."""

    quant_method = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(torch.empty(out_features, in_features), cut=0)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return F.linear(x, self.weight), None


class Embedding(Weight):
    """Rows of a [vocabulary, hidden] table whose columns the ranks share."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__(torch.empty(vocab_size, share(hidden_size, "hidden_size")), cut=1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return gather_over_ranks(F.embedding(ids, self.weight))


class Head(Weight):
    """Logits over a vocabulary that the ranks share, in fp32: rounded to bf16 one of 20 would be off by up to 0.06."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__(torch.empty(share(vocab_size, "vocab_size"), hidden_size), cut=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gather_over_ranks(self._logits(x))

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32:
            return F.linear(x, self.weight)
        if x.is_cuda:
            return torch.mm(x, self.weight.t(), out_dtype=torch.float32)
        return F.linear(x.float(), self.weight.float())


class FusedLinear:
    """One [sum(sizes), in] matrix whose row blocks are the weights of several linear layers of one input."""

    def __init__(self, in_features: int, sizes: list[int]) -> None:
        used = sum(sizes)
        self.sizes = [*sizes, -used % ROW_STEP]
        self.matrix = torch.empty(used + self.sizes[-1], in_features)

    def blocks(self) -> list[torch.Tensor]:
        return list(self.matrix.split(self.sizes)[:-1])

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        return list(F.linear(x, self.matrix).split(self.sizes, -1)[:-1])


class RMSNorm(nn.Module):
    """y = weight · x / sqrt(mean(x²) + eps) of x [N, D], with weights in fp32 as the learner has them."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter(torch.empty(size, dtype=torch.float32))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return add_rms_norm_(x, self.weight, eps=self.eps)

    def after(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual), the sum in fp32 and in the residual's memory; residual None is zero."""
        if residual is None:
            return self(x), x.to(torch.float32, copy=True)
        return add_rms_norm_(x, self.weight, eps=self.eps, residual=residual), residual


def silu_and_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up of [..., 2·n] gate and up side by side, in one kernel on a GPU."""
    gate, up = gate_up.chunk(2, -1)
    if not gate_up.is_cuda:
        return F.silu(gate) * up
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    torch.ops._C.silu_and_mul(y, gate_up)
    return y


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    return x if get_tensor_model_parallel_world_size() == 1 else tensor_model_parallel_all_reduce(x)


def gather_over_ranks(x: torch.Tensor) -> torch.Tensor:
    return x if get_tensor_model_parallel_world_size() == 1 else tensor_model_parallel_all_gather(x, -1)
