"""The one place that chooses which implementation of an operator runs, by the device of its first argument.

`TORCH` runs anywhere. A device type listed in `BY_DEVICE` overrides the operators it names, with the same signatures.
"""

from collections.abc import Callable, Mapping
from functools import wraps

from deltarl.kernels import chunk, conv, recurrent

TORCH: Mapping[str, Callable] = {
    "kda_chunk": chunk.kda_chunk,
    "kda_recurrent": recurrent.kda_recurrent,
    "kda_decode_": recurrent.kda_decode_,
    "causal_conv1d": conv.causal_conv1d,
}
BY_DEVICE: Mapping[str, Mapping[str, Callable]] = {}


def _dispatched(name: str) -> Callable:
    @wraps(TORCH[name])
    def operator(x, *args, **kwargs):
        return BY_DEVICE.get(x.device.type, TORCH).get(name, TORCH[name])(x, *args, **kwargs)

    return operator


kda_chunk = _dispatched("kda_chunk")
kda_recurrent = _dispatched("kda_recurrent")
kda_decode_ = _dispatched("kda_decode_")
causal_conv1d = _dispatched("causal_conv1d")
