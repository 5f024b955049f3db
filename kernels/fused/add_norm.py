"""`add_rms_norm_` for NVIDIA GPUs: one program a row, which is read and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltarl.kernels.add_norm import check_add_norm
from deltarl.kernels.fused.configs import CONFIGS


@triton.jit
def add_norm_kernel(x, residual, weight, y, x_stride, eps, D: tl.constexpr, BD: tl.constexpr, ADD: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    inside = column < D
    stream = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        stream += tl.load(residual + row * D + column, mask=inside, other=0.0)
        tl.store(residual + row * D + column, stream, mask=inside)
    rstd = 1.0 / tl.sqrt(tl.sum(stream * stream, 0) / D + eps)
    b_weight = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * D + column, (stream * rstd * b_weight).to(y.dtype.element_ty), mask=inside)


def add_rms_norm_(x: Tensor, weight: Tensor, *, eps: float, residual: Tensor | None = None) -> Tensor:
    """Same arguments, shapes and errors as `deltarl.kernels.add_norm.add_rms_norm_`; x of 16 or 32 bits."""
    check_add_norm(x, weight, residual)
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, width = x.shape
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        add_norm_kernel[(rows,)](
            x, residual, weight, y, x.stride(0), eps,
            D=width, BD=triton.next_power_of_2(width), ADD=residual is not None, **CONFIGS["add_norm"].launch(),
        )  # fmt: skip
    return y
