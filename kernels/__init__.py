"""Kimi Delta Attention operators: a reference, torch code for any device, and the dispatcher above them."""

from deltarl.kernels.dispatch import (
    causal_conv1d,
    gdn_chunk,
    gdn_decode_,
    gdn_recurrent,
    kda_chunk,
    kda_decode_,
    kda_recurrent,
)
from deltarl.kernels.reference import dplr_reference, kda_reference

__all__ = [
    "causal_conv1d",
    "dplr_reference",
    "gdn_chunk",
    "gdn_decode_",
    "gdn_recurrent",
    "kda_chunk",
    "kda_decode_",
    "kda_recurrent",
    "kda_reference",
]
