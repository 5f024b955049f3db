"""The one place that chooses which implementation of an operator runs, by the device of its first tensor.

`TORCH` runs anywhere. A device type listed in `BY_DEVICE` overrides the operators it names, with the same signatures:
Triton's on CUDA where DELTARL_KERNELS=triton is set. They are not the default until their whole test table passes on a
GPU (docs/results/kernels.md).
Autocast is off inside: every operator chooses its own precision.
"""

import os
from collections.abc import Callable, Mapping
from functools import wraps

import torch

from deltarl.kernels import chunk, conv, gated_norm, gdn, recurrent

TORCH: Mapping[str, Callable] = {
    "kda_chunk": chunk.kda_chunk,
    "kda_recurrent": recurrent.kda_recurrent,
    "kda_decode_": recurrent.kda_decode_,
    "gdn_chunk": gdn.gdn_chunk,
    "gdn_recurrent": gdn.gdn_recurrent,
    "gdn_decode_": gdn.gdn_decode_,
    "causal_conv1d": conv.causal_conv1d,
    "causal_conv1d_decode_": conv.causal_conv1d_decode_,
    "gated_rms_norm": gated_norm.gated_rms_norm,
}


def _by_device() -> Mapping[str, Mapping[str, Callable]]:
    """Triton's operators where DELTARL_KERNELS=triton asks for them. Raises ValueError for another value."""
    choice = os.environ.get("DELTARL_KERNELS", "torch")
    if choice == "torch":
        return {}
    if choice != "triton":
        raise ValueError(f"DELTARL_KERNELS is {choice!r}: use torch, or triton")
    from deltarl.kernels.fused import operators

    names = ("kda_chunk", "kda_decode_", "gdn_chunk", "gdn_decode_")
    names += ("causal_conv1d", "causal_conv1d_decode_", "gated_rms_norm")
    return {"cuda": {name: getattr(operators, name) for name in names}}


BY_DEVICE: Mapping[str, Mapping[str, Callable]] = _by_device()


def _dispatched(name: str) -> Callable:
    @wraps(TORCH[name])
    def operator(*args, **kwargs):
        device = next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        with torch.autocast(device, enabled=False):
            return BY_DEVICE.get(device, TORCH).get(name, TORCH[name])(*args, **kwargs)

    return operator


kda_chunk = _dispatched("kda_chunk")
kda_recurrent = _dispatched("kda_recurrent")
kda_decode_ = _dispatched("kda_decode_")
gdn_chunk = _dispatched("gdn_chunk")
gdn_recurrent = _dispatched("gdn_recurrent")
gdn_decode_ = _dispatched("gdn_decode_")
causal_conv1d = _dispatched("causal_conv1d")
causal_conv1d_decode_ = _dispatched("causal_conv1d_decode_")
gated_rms_norm = _dispatched("gated_rms_norm")
