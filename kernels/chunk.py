"""Kimi Delta Attention in chunks, in plain torch: exact, vectorised over sequences, heads and chunks.

Within a chunk (Kimi Linear, arXiv 2510.26692, section 3; the WY form of DeltaNet, arXiv 2406.06484), with
G_i the log-decay summed over tokens 1..i of the chunk and S the state before it:

    A_ij = beta_i (k_i . k_j exp(G_i - G_j))  for j < i        X = (I + A)^-1
    written = X (beta v) - X (beta k exp(G)) S
    o = (q exp(G)) S + P written              P_ij = q_i . k_j exp(G_i - G_j)  for j <= i
    S' = exp(G_C) S + (k exp(G_C - G))^T written

A and P need a decay for every pair of tokens and channel. They are built by halving: the pairs that straddle the
middle of a block share the middle as a reference, so their decay is a product of two factors,

    exp(G_i - G_j) = exp(sum of g from the middle to i) * exp(sum of g from j to the middle),

each at most 1. A block of C tokens thus costs log2(C) exponentials per channel, no [C, C, K] tensor, never an
exponential of a positive number and never a difference of two large sums.
"""

import torch
import torch.nn.functional as F
from deltarl.kernels.inputs import initial_or_zero, prepare, sequence_lengths
from torch import Tensor

CHUNK = 32


def kda_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    gate_lower_bound: float | None = None,
    scale: float | None = None,
    use_qk_l2norm: bool = True,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over whole sequences: o [B, T, H, V] in v's dtype, and the final state [N, H, K, V] if asked for.

    q, k [B, T, H, K], v [B, T, H, V], g [B, T, H, K], beta [B, T, H], `initial_state` [N, H, K, V]. Packed input has
    B = 1 and `cu_seqlens` int [N + 1], else N = B. With `A_log` [H] (and `dt_bias` [H*K]) given, g and beta are raw
    projections: the gate (softplus, or bounded below by `gate_lower_bound` < 0) and the sigmoid are applied here.
    Without, g is the log-decay (<= 0) and beta the writing strength. `scale` multiplies q and is K**-0.5 unless given.
    Computes in fp32 (fp64 for fp64 q). Raises ValueError on shapes that do not fit.
    """
    x = prepare(q, k, v, g, beta, A_log, dt_bias, gate_lower_bound, scale, use_qk_l2norm)
    batch, tokens = q.shape[:2]
    lengths = [tokens] * batch if cu_seqlens is None else sequence_lengths(cu_seqlens, batch, tokens)
    layout = _Layout(lengths, packed=cu_seqlens is not None, device=q.device)
    state = initial_or_zero(initial_state, len(lengths), x)
    q, k, v, g, beta = (layout.to_chunks(t) for t in (x.q, x.k, x.v, x.g, x.beta.unsqueeze(-1)))
    o, state = _attend(q, k, v, g, beta, layout.sort(state), layout.active)
    return layout.to_tokens(o).to(v.dtype), layout.unsort(state) if output_final_state else None


class _Layout:
    """Where each token lies among the chunks.

    Chunks are ordered by their place in their sequence, then by sequence, longest sequence first, so that the n-th
    chunks of all sequences that have one are contiguous: `active[n]` of them, of the first `active[n]` states.
    """

    def __init__(self, lengths: list[int], packed: bool, device: torch.device):
        self.packed, self.tokens, self.batch = packed, max(lengths, default=0), len(lengths)
        chunks = [-(-length // CHUNK) for length in lengths]
        order = sorted(range(len(lengths)), key=lambda i: -chunks[i])
        self.active = [sum(c > n for c in chunks) for n in range(max(chunks, default=0))]
        if packed:
            starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
            self.order = torch.tensor(order, device=device)
            rows = [
                (starts[i] + n * CHUNK, min(CHUNK, lengths[i] - n * CHUNK))
                for n, count in enumerate(self.active)
                for i in order[:count]
            ]
            first, size = torch.tensor(rows, device=device).reshape(-1, 2, 1).unbind(1)
            place = torch.arange(CHUNK, device=device)
            self.source = torch.where(place < size, first + place, starts[-1]).flatten()
            self.target = torch.empty(starts[-1] + 1, dtype=torch.long, device=device)
            self.target[self.source] = torch.arange(len(self.source), device=device)
            self.target = self.target[:-1]

    def to_chunks(self, x: Tensor) -> Tensor:
        """[B, T, H, D] -> [chunks, H, C, D]; what lies past the end of a sequence is zero."""
        if self.packed:
            return F.pad(x[0], (0, 0, 0, 0, 0, 1))[self.source].unflatten(0, (-1, CHUNK)).transpose(1, 2).contiguous()
        x = F.pad(x, (0, 0, 0, 0, 0, -self.tokens % CHUNK)).unflatten(1, (-1, CHUNK))  # B N C H D
        return x.permute(1, 0, 3, 2, 4).flatten(0, 1).contiguous()

    def to_tokens(self, o: Tensor) -> Tensor:
        """[chunks, H, C, D] -> [B, T, H, D]."""
        o = o.transpose(1, 2)
        if self.packed:
            return o.flatten(0, 1)[self.target].unsqueeze(0)
        return o.unflatten(0, (-1, self.batch)).transpose(0, 1).flatten(1, 2)[:, : self.tokens]

    def sort(self, state: Tensor) -> Tensor:
        return state[self.order] if self.packed else state

    def unsort(self, state: Tensor) -> Tensor:
        return state[self.order.argsort()] if self.packed else state


def _attend(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, active: list[int]
) -> tuple[Tensor, Tensor]:
    """[chunks, H, C, D] tensors (beta with D = 1) and sorted states -> o of v's shape and the states after."""
    attend, solve, since_start, to_end = _intra_chunk(q, k, g, beta)
    k_start = k * since_start.exp()
    written, erased = (solve @ (beta * torch.cat((v, k_start), -1))).split((v.shape[-1], k.shape[-1]), -1)
    readers = torch.cat((erased, q * since_start.exp()), -2)
    k_end = (k * to_end.exp()).transpose(-1, -2)
    decay = since_start[..., -1, :].exp().unsqueeze(-1)

    outputs, finished, first = [], [], 0
    for count in active:
        if count < len(state):
            finished.append(state[count:])
            state = state[:count]
        here = slice(first, first + count)
        recalled, answered = (readers[here] @ state).chunk(2, -2)
        new = written[here] - recalled
        outputs.append(answered + attend[here] @ new)
        state = decay[here] * state + k_end[here] @ new
        first += count
    o = torch.cat(outputs) if outputs else torch.zeros_like(v)
    return o, torch.cat([state, *reversed(finished)])


def _intra_chunk(q: Tensor, k: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, X [.., C, C], and the log-decays from a chunk's start to each token and from each token to its end [.., C, K].

    Works upward from blocks of one token; every tensor here is [.., blocks, block, *] until the last squeeze.
    """
    writers = beta * k
    attend = (q * k).sum(-1)[..., None, None]
    solve = torch.ones_like(attend)
    since_start = g.unsqueeze(-2)
    to_end = torch.zeros_like(since_start)
    half = 1
    while half < g.shape[-2]:
        early_start, late_start = _pairs(since_start)
        early_end, late_end = _pairs(to_end)
        decay = late_start.exp()
        early = (_pairs(k.unflatten(-2, (-1, half)))[0] * early_end.exp()).transpose(-1, -2)
        cross_attend = _pairs(q.unflatten(-2, (-1, half)))[1] * decay @ early
        cross_solve = _pairs(writers.unflatten(-2, (-1, half)))[1] * decay @ early
        solve_early, solve_late = _pairs(solve)
        solve = _join(solve_early, -solve_late @ cross_solve @ solve_early, solve_late)
        attend_early, attend_late = _pairs(attend)
        attend = _join(attend_early, cross_attend, attend_late)
        since_start, to_end = (
            torch.cat((early_start, late_start + early_start[..., -1:, :]), -2),
            torch.cat((early_end + late_start[..., -1:, :], late_end), -2),
        )
        half *= 2
    return attend.squeeze(-3), solve.squeeze(-3), since_start.squeeze(-3), to_end.squeeze(-3)


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbouring blocks, [.., blocks, block, *] -> the earlier and the later ones, each [.., blocks/2, block, *]."""
    return x.unflatten(-3, (-1, 2)).unbind(-3)


def _join(early: Tensor, cross: Tensor, late: Tensor) -> Tensor:
    """[[early, 0], [cross, late]], block by block."""
    return torch.cat((F.pad(early, (0, early.shape[-1])), torch.cat((cross, late), -1)), -2)
