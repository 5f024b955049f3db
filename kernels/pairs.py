"""Products of every pair of tokens of a chunk under the decay between them, with their own backward.

    P_ij = q_i . (k_j exp(G_i - G_j))   for j <= i           G_i = g_1 + ... + g_i, per channel
    A_ij = w_i . (k_j exp(G_i - G_j))   for j < i

A decay for every pair and channel would be a [C, C, K] tensor. Instead the chunk is halved again and again: the pairs
that straddle the middle of a block share that middle as a reference, so that their decay is a product of two factors,

    exp(G_i - G_j) = exp(sum of g from the middle to i) * exp(sum of g from j to the middle),

each at most 1 for g <= 0. A chunk of C tokens costs log2(C) exponentials per channel; no exponential is of a positive
number, no sum is a difference of large ones, and so no strength of decay overflows or cancels.
"""

from functools import lru_cache

import torch
from torch import Tensor

from deltarl.kernels.inputs import decay_of


def decayed_pairs(q: Tensor, w: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """q, w, k, g [N, C, K], C a power of two -> P, A [N, C, C], zero above the diagonal (A also on it)."""
    return _DecayedPairs.apply(q, w, k, g)


def evenly_decayed_pairs(q: Tensor, w: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The same for one decay per token, g [N, C, 1]: the decay between two tokens is then a sum over those between."""
    size = q.shape[1]
    after = torch.ones(size, size, dtype=torch.bool, device=q.device).tril(-1)  # [t, j]: t later than j
    between = (g * after).cumsum(1)  # [N, i, j]: the sum of g from j + 1 to i
    decay = decay_of(between).tril()
    return decay * (q @ k.transpose(1, 2)), (decay * (w @ k.transpose(1, 2))).tril(-1)


class _DecayedPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, w: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        count, size = q.shape[:2]
        pairs_q, pairs_w = q.new_zeros(count, size, size), q.new_zeros(count, size, size)
        for level, spans in enumerate(_spans(size, q.device, q.dtype)):
            half = 1 << level
            late, early, _ = _factors(q, w, k, g, spans, half)
            cross = (late.flatten(1, 2) @ early.transpose(1, 2)).view(count, -1, 2, half, half)
            _straddling(pairs_q, half).copy_(cross[:, :, 0])
            _straddling(pairs_w, half).copy_(cross[:, :, 1])
        pairs_q.diagonal(dim1=1, dim2=2).copy_((q * k).sum(-1))
        ctx.save_for_backward(q, w, k, g)
        return pairs_q, pairs_w

    @staticmethod
    def backward(ctx, dpairs_q: Tensor, dpairs_w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, w, k, g = ctx.saved_tensors
        count, size, width = q.shape
        diagonal = dpairs_q.diagonal(dim1=1, dim2=2).unsqueeze(-1)
        dq, dw, dk, dg = diagonal * k, torch.zeros_like(w), diagonal * q, torch.zeros_like(g)
        for level, spans in enumerate(_spans(size, q.device, q.dtype)):
            half = 1 << level
            late, early, decay = _factors(q, w, k, g, spans, half)
            dcross = torch.stack((_straddling(dpairs_q, half), _straddling(dpairs_w, half)), 2)
            dcross = dcross.view(-1, 2 * half, half)
            dlate = (dcross @ early).view(-1, 2, half, width)
            dearly = dcross.transpose(1, 2) @ late.flatten(1, 2)
            _halves(dq, half)[:, 1].addcmul_(dlate[:, 0], decay[:, 1])
            _halves(dw, half)[:, 1].addcmul_(dlate[:, 1], decay[:, 1])
            _halves(dk, half)[:, 0].addcmul_(dearly, decay[:, 0])
            dsums = torch.stack((dearly * early, (dlate * late).sum(1)), 1)
            dg.baddbmm_(spans.t().expand(count, size, size), dsums.view(count, size, width))
        return dq, dw, dk, dg


@lru_cache(maxsize=16)
def _spans(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[levels, C, C] of 0 and 1: row t sums the tokens between t and the middle of its block, blocks of 2, 4 .. C."""
    token, other = torch.arange(size).unsqueeze(1), torch.arange(size)
    levels = []
    for half in (1 << level for level in range(size.bit_length() - 1)):
        same_half = token // half == other // half
        is_late = token // half % 2 == 1
        levels.append(same_half & torch.where(is_late, other <= token, other > token))
    return torch.stack(levels).to(device, dtype)


def _factors(q: Tensor, w: Tensor, k: Tensor, g: Tensor, spans: Tensor, half: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each block of 2 * half tokens: q and w of its late half [blocks, 2, half, K] and k of its early half
    [blocks, half, K], decayed towards its middle, and the decays [blocks, 2, half, K] themselves."""
    decay = _halves(decay_of(torch.matmul(spans, g)), half)
    late = torch.empty_like(decay)
    torch.mul(_halves(q, half)[:, 1], decay[:, 1], out=late[:, 0])
    torch.mul(_halves(w, half)[:, 1], decay[:, 1], out=late[:, 1])
    return late, _halves(k, half)[:, 0] * decay[:, 0], decay


def _halves(x: Tensor, half: int) -> Tensor:
    return x.view(-1, 2, half, x.shape[-1])


def _straddling(pairs: Tensor, half: int) -> Tensor:
    """A view of the pairs (late, early) of every block: [N, C, C] -> [N, blocks, half, half]."""
    count, size = pairs.shape[:2]
    blocks = pairs.view(count, size // (2 * half), 2, half, size // (2 * half), 2, half).diagonal(dim1=1, dim2=4)
    return blocks[:, 1, :, 0].permute(0, 3, 1, 2)
