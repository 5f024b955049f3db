"""Kimi Delta Attention in chunks, in plain torch: exact, vectorised over sequences, heads and chunks.

Within a chunk (Kimi Linear, arXiv 2510.26692, section 3; the WY form of DeltaNet, arXiv 2406.06484), with
G_i the log-decay summed over tokens 1..i of the chunk and S the state before it:

    A_ij = beta_i (k_i . k_j exp(G_i - G_j))  for j < i        X = (I + A)^-1
    written = X (beta v) - X (beta k exp(G)) S
    o = (q exp(G)) S + P written              P_ij = q_i . k_j exp(G_i - G_j)  for j <= i
    S' = exp(G_C) S + (k exp(G_C - G))^T written

P and A come from `deltarl.kernels.pairs`, which says why no decay overflows; X is applied by forward substitution.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from deltarl.kernels.inputs import decay_of, initial_or_zero, prepare, sequence_lengths
from deltarl.kernels.pairs import decayed_pairs, evenly_decayed_pairs

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
    B = 1 and `cu_seqlens` int [N + 1], else N = B. v, g, beta and the states may have a multiple HV of the H heads of
    q and k: value head i then reads query and key head i * H // HV. With `A_log` [H] (and `dt_bias` [H*K]) given, g and
    beta are raw projections: the gate (softplus, or bounded below by `gate_lower_bound` < 0) and the sigmoid are
    applied here. Without, g is the log-decay (<= 0) and beta the writing strength. `scale` multiplies q and is K**-0.5
    unless given.
    Computes in fp32 (fp64 for fp64 q). Raises ValueError on shapes that do not fit.
    """
    x = prepare(q, k, v, g, beta, A_log, dt_bias, gate_lower_bound, scale, use_qk_l2norm)
    batch, tokens = q.shape[:2]
    lengths = [tokens] * batch if cu_seqlens is None else sequence_lengths(cu_seqlens, batch, tokens)
    layout = _Layout(lengths, packed=cu_seqlens is not None, device=q.device)
    state = initial_or_zero(initial_state, len(lengths), x)
    chunked = (layout.to_chunks(t) for t in (x.q, x.k, x.v, x.g, x.beta.unsqueeze(-1)))
    o, state = _attend(*chunked, layout.sort(state), layout.active)
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
    if not active:
        return torch.zeros_like(v), state
    since_start = g.cumsum(-2)
    to_end = torch.ones(CHUNK, CHUNK, device=g.device, dtype=g.dtype).triu(1) @ g
    writers = beta * k
    pairs = decayed_pairs if g.shape[-1] == k.shape[-1] else evenly_decayed_pairs
    attend, erase = (p.unflatten(0, k.shape[:2]) for p in pairs(*(x.flatten(0, 1) for x in (q, writers, k, g))))
    start_decay = decay_of(since_start)
    targets = torch.cat((beta * v, writers * start_decay), -1)
    solved = torch.linalg.solve_triangular(erase, targets, upper=False, unitriangular=True)
    written, erased = solved.split((v.shape[-1], k.shape[-1]), -1)
    readers = torch.cat((erased, q * start_decay), -2)
    k_end = (k * decay_of(to_end)).transpose(-1, -2)
    decay = start_decay[..., -1, :].unsqueeze(-1)

    outputs, finished = [], []
    chunks = zip(*(x.split(active) for x in (readers, written, attend, decay, k_end)), strict=True)
    for count, (reader, target, attended, decayed, key) in zip(active, chunks, strict=True):
        if count < len(state):
            finished.append(state[count:])
            state = state[:count]
        recalled, answered = (reader @ state).chunk(2, -2)
        new = target - recalled
        outputs.append(answered + attended @ new)
        state = decayed * state + key @ new
    return torch.cat(outputs), torch.cat([state, *reversed(finished)])
