"""Decoding several tokens in a row, with the states written once.

With S the state before the first of them and G_j the sum of their log-decays up to the j-th, after the j-th token

    S_j = Diag(exp G_j) S + sum_{i <= j} Diag(exp(G_j - G_i)) k_i new_i^T

so that what a token reads of S_{j-1} can be had from S and the k_i, G_i and new_i of the few before it: 2K + V numbers
each, where a state has K x V. Every exponent is at most 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Pending(NamedTuple):
    """The last tokens of each of N sequences, which their states do not have yet.

    tokens: fp32 [at least N, H, most, K + W + V], k, G and new of each, by the row of a sequence in the batch (not by
    its slot); W is K, or 1 with one decay a head. place: int32 [2] on the same device, how many are pending, the same
    number for all rows, and whether the next one stays pending too (1) or the states take all of them in (0), after
    which `tokens` hold nothing of use.
    """

    tokens: Tensor
    place: Tensor


def check_pending(pending: Pending, count: int, heads: int, width: int) -> None:
    """Raises ValueError unless it has room for a token of `width` numbers for each of `heads` heads of `count` rows."""
    tokens, place = pending
    if tokens.ndim != 4 or len(tokens) < count or tokens.shape[1::2] != (heads, width) or tokens.dtype != torch.float32:
        raise ValueError(
            f"pending tokens must be fp32 [{count} or more, {heads}, most, {width}], "
            f"got {tokens.dtype} {tuple(tokens.shape)}"
        )
    if place.shape != (2,) or place.dtype != torch.int32:
        raise ValueError(f"pending place must be int32 [2], got {place.dtype} {tuple(place.shape)}")
