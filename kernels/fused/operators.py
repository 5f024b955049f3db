"""What the dispatcher runs on NVIDIA GPUs: Triton for inputs its kernels were measured right with, else torch.

What is taken here is what the tables in tests/gpu passed. fp32 stays with torch: its kernels would spill everything.
"""

from typing import Any

import torch
from torch import Tensor

from deltarl.kernels.add_norm import add_rms_norm_ as add_rms_norm_torch
from deltarl.kernels.chunk import kda_chunk as kda_chunk_torch
from deltarl.kernels.conv import causal_conv1d as causal_conv1d_torch
from deltarl.kernels.conv import causal_conv1d_decode_ as causal_conv1d_decode_torch
from deltarl.kernels.fused.add_norm import add_rms_norm_ as add_rms_norm_triton
from deltarl.kernels.fused.chunk import kda_chunk as kda_chunk_triton
from deltarl.kernels.fused.conv import causal_conv1d as causal_conv1d_triton
from deltarl.kernels.fused.conv_decode import causal_conv1d_decode_ as causal_conv1d_decode_triton
from deltarl.kernels.fused.decode import kda_decode_ as kda_decode_triton
from deltarl.kernels.fused.gated_norm import gated_rms_norm as gated_rms_norm_triton
from deltarl.kernels.fused.gdn import gdn_chunk as gdn_chunk_triton
from deltarl.kernels.gated_norm import gated_rms_norm as gated_rms_norm_torch
from deltarl.kernels.gdn import gdn_chunk as gdn_chunk_torch
from deltarl.kernels.recurrent import kda_decode_ as kda_decode_torch

SHORT = (torch.bfloat16, torch.float16, torch.float32)
CONV_WIDTHS = (2, 3, 4)


def kda_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """See `deltarl.kernels.kda_chunk`. Triton's: inputs of 16 bits, K and V up to 128."""
    proven = (
        all(x.dtype in (torch.bfloat16, torch.float16) for x in (q, k, v, g, beta))
        and q.ndim == v.ndim == 4
        and max(q.shape[-1], v.shape[-1]) <= 128
        and q.shape[1] > 0
    )
    return (kda_chunk_triton if proven else kda_chunk_torch)(q, k, v, g, beta, **options)


def gdn_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """See `deltarl.kernels.gdn_chunk`. Triton's: as for `kda_chunk`, q and k of one type."""
    proven = (
        all(x.dtype in (torch.bfloat16, torch.float16) for x in (q, k, v, g, beta))
        and q.dtype == k.dtype
        and q.ndim == v.ndim == 4
        and max(q.shape[-1], v.shape[-1]) <= 128
        and q.shape[1] > 0
    )
    return (gdn_chunk_triton if proven else gdn_chunk_torch)(q, k, v, g, beta, **options)


def kda_decode_(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, slots: Tensor, **options: Any
) -> Tensor:
    """See `deltarl.kernels.kda_decode_`. Triton's: inputs of 16 and 32 bits, K and V of 32, 64, 128 and 256, fp32
    states that are each in one piece."""
    proven = (
        all(x.dtype in (torch.bfloat16, torch.float16, torch.float32) for x in (q, k, v, g, beta))
        and q.ndim == v.ndim == 3
        and {q.shape[-1], v.shape[-1]} <= {32, 64, 128, 256}
        and state.dtype == torch.float32
        and state[:1].is_contiguous()
        and (options.get("pending") is None or options["pending"].tokens.is_contiguous())
    )
    return (kda_decode_triton if proven else kda_decode_torch)(q, k, v, g, beta, state, slots, **options)


def gdn_decode_(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, slots: Tensor, **options: Any
) -> Tensor:
    """See `deltarl.kernels.gdn_decode_`: `kda_decode_` with one decay a head."""
    return kda_decode_(q, k, v, g.unsqueeze(-1), beta, state, slots, **options)


def causal_conv1d(x: Tensor, weight: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """See `deltarl.kernels.causal_conv1d`. Triton's: x of 16 or 32 bits, W of 2, 3 and 4."""
    taken = x.dtype in SHORT and weight.shape[-1] in CONV_WIDTHS
    return (causal_conv1d_triton if taken else causal_conv1d_torch)(x, weight, **options)


def causal_conv1d_decode_(x: Tensor, weight: Tensor, state: Tensor, slots: Tensor, **options: Any) -> Tensor:
    """See `deltarl.kernels.causal_conv1d_decode_`. Triton's: x and states of 16 or 32 bits, W of 2, 3 and 4."""
    taken = x.dtype in SHORT and state.dtype in SHORT and weight.shape[-1] in CONV_WIDTHS
    return (causal_conv1d_decode_triton if taken else causal_conv1d_decode_torch)(x, weight, state, slots, **options)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """See `deltarl.kernels.gated_rms_norm`. Triton's: x and gate of 16 or 32 bits, rows of up to 1024 numbers."""
    taken = x.dtype in SHORT and gate.dtype in SHORT and 0 < weight.numel() <= 1024
    return (gated_rms_norm_triton if taken else gated_rms_norm_torch)(x, gate, weight, **options)


def add_rms_norm_(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    """See `deltarl.kernels.add_rms_norm_`. Triton's: x of 16 or 32 bits."""
    return (add_rms_norm_triton if x.dtype in SHORT else add_rms_norm_torch)(x, weight, **options)
