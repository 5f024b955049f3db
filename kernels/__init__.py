"""Kimi Delta Attention operators: a reference, torch code for any device, and the dispatcher above them."""

from deltarl.kernels.dispatch import (
    add_rms_norm_,
    causal_conv1d,
    causal_conv1d_decode_,
    gated_rms_norm,
    gdn_chunk,
    gdn_decode_,
    gdn_recurrent,
    kda_chunk,
    kda_decode_,
    kda_recurrent,
)
from deltarl.kernels.pending import Pending
from deltarl.kernels.reference import dplr_reference, kda_reference

__all__ = [
    "Pending",
    "add_rms_norm_",
    "causal_conv1d",
    "causal_conv1d_decode_",
    "dplr_reference",
    "gated_rms_norm",
    "gdn_chunk",
    "gdn_decode_",
    "gdn_recurrent",
    "kda_chunk",
    "kda_decode_",
    "kda_recurrent",
    "kda_reference",
]
