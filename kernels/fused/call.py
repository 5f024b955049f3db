"""What the launchers of the chunk kernels hand to one another."""

from dataclasses import dataclass

import torch
from torch import Tensor

from deltarl.kernels.fused.chunks import CHUNK, Chunks


@dataclass(frozen=True)
class Options:
    chunks: Chunks
    scale: float
    bound: float | None
    l2norm: bool
    keep_final: bool


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call, and the type of the factors of matrix products."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    A_log: Tensor | None
    dt_bias: Tensor | None
    options: Options
    dtype: torch.dtype

    @property
    def heads(self) -> int:
        return self.v.shape[2]

    @property
    def shared(self) -> int:
        """How many heads of v read one head of q and k."""
        return self.v.shape[2] // self.q.shape[2]

    @property
    def key(self) -> int:
        return self.q.shape[3]

    @property
    def value(self) -> int:
        return self.v.shape[3]

    def tiles(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised [chunks, H, *shape]."""
        shape = (self.options.chunks.count, self.heads, *shape)
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.q.device)

    def state_shape(self) -> tuple[int, int, int, int]:
        return len(self.options.chunks.bounds) - 1, self.heads, self.key, self.value

    def strides(self) -> list[int]:
        return [x.stride(1) for x in (self.q, self.k, self.v, self.g, self.beta)]

    def sizes(self) -> dict[str, int]:
        return {"H": self.heads, "K": self.key, "V": self.value, "C": CHUNK}

    def switches(self) -> dict[str, bool]:
        return {
            "RAW": self.A_log is not None,
            "BIAS": self.dt_bias is not None,
            "BOUNDED": self.options.bound is not None,
            "L2NORM": self.options.l2norm,
        }

    def kind(self) -> tuple:
        """What the forms of the kernels that this call needs depend on."""
        types = tuple(x.dtype for x in (self.q, self.k, self.v, self.g, self.beta))
        return types, self.key, self.value, self.shared, *self.switches().values(), self.options.keep_final

    def precision(self) -> str:
        return "ieee" if self.dtype == torch.float32 else "tf32"


@dataclass(frozen=True)
class Tiles:
    """What `prepare` leaves for the scans."""

    w: Tensor
    u: Tensor
    reader: Tensor
    writer: Tensor
    attend: Tensor
    decay: Tensor
    inverse: Tensor | None
    erase: Tensor | None = None
    factors: Tensor | None = None
