"""The one place that chooses which implementation of an operator runs, by the device of its first tensor.

`TORCH` runs anywhere. On NVIDIA GPUs of the generation that the Triton kernels were tested on (Hopper) they take what
`fused.operators` knows them to be right for. DELTARL_KERNELS=torch turns them off, DELTARL_KERNELS=triton has them run
on other GPUs too. Autocast is off inside: every operator chooses its own precision.
"""

import os
from collections.abc import Callable, Mapping
from functools import cache, wraps

import torch

from deltarl.kernels import add_norm, chunk, conv, gated_norm, gdn, recurrent

TORCH: Mapping[str, Callable] = {
    "add_rms_norm_": add_norm.add_rms_norm_,
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


TESTED_CAPABILITY = (9, 0)
CHOICE = os.environ.get("DELTARL_KERNELS")
if CHOICE not in (None, "torch", "triton"):
    raise ValueError(f"DELTARL_KERNELS is {CHOICE!r}: use torch, or triton")


def takes_triton(capability: tuple[int, int]) -> bool:
    """Whether GPUs of this compute capability run the Triton kernels."""
    hopper = torch.version.hip is None and capability == TESTED_CAPABILITY
    return CHOICE == "triton" or (hopper and CHOICE is None)


@cache
def cuda_operators() -> Mapping[str, Callable]:
    """What runs on the GPU of this process."""
    if not takes_triton(torch.cuda.get_device_capability()):
        return TORCH
    from deltarl.kernels.fused import operators

    return {name: getattr(operators, name, TORCH[name]) for name in TORCH}


def _dispatched(name: str) -> Callable:
    @wraps(TORCH[name])
    def operator(*args, **kwargs):
        device = next(x.device.type for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))
        chosen = cuda_operators() if device == "cuda" else TORCH
        with torch.autocast(device, enabled=False):
            return chosen[name](*args, **kwargs)

    return operator


add_rms_norm_ = _dispatched("add_rms_norm_")
kda_chunk = _dispatched("kda_chunk")
kda_recurrent = _dispatched("kda_recurrent")
kda_decode_ = _dispatched("kda_decode_")
gdn_chunk = _dispatched("gdn_chunk")
gdn_recurrent = _dispatched("gdn_recurrent")
gdn_decode_ = _dispatched("gdn_decode_")
causal_conv1d = _dispatched("causal_conv1d")
causal_conv1d_decode_ = _dispatched("causal_conv1d_decode_")
gated_rms_norm = _dispatched("gated_rms_norm")
