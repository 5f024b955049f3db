"""What passes from one segment of a sequence to the next, found for all segments at once before they are scanned.

Over a segment S' = M S + E. A first pass finds E, the end from a zero state, and M, the ends of the identity's columns
with nothing to write; joining them gives the state after each segment. Backward dS = M^T dS' + F with the same M. The
first segment of a sequence starts, and the last one ends, with what is known: no M of theirs is needed.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltarl.kernels.fused.call import Inputs, Tiles
from deltarl.kernels.fused.launch import launch
from deltarl.kernels.fused.ranges import Scaled
from deltarl.kernels.fused.segments import Segments
from deltarl.kernels.fused.step import (
    backward_step,
    by_columns,
    columns_at,
    columns_of_tokens,
    decay_of,
    forward_step,
    state_if,
)


@dataclass(frozen=True)
class Passage:
    """Of each segment: `after` [segments, H, K, V] the state after it, `through` [segments, H, K, K] its M, fp32.
    Places that nothing needs are not filled: the last of a sequence, and M of the first."""

    after: Tensor
    through: Tensor


@triton.jit(do_not_specialize=["H"])
def ends_kernel(
    w, u, writer, decay, initial, after, through, early, opens, bounds,
    H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, HAS_INITIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for BV columns of E, or of M, of one head of one segment."""
    column, head, segment = (
        tl.program_id(0) * BV,
        tl.program_id(1),
        tl.load(early + tl.program_id(2)),
    )
    sequence, of_state = tl.load(opens + segment), column < V
    row = column - V + tl.arange(0, BV)
    state = (row[:, None] == tl.arange(0, K)[None, :]).to(tl.float32)
    if HAS_INITIAL:
        state += state_if(of_state & (sequence >= 0), initial, sequence * H + head, column, K, V, BV)
    first, last = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    last = tl.where(of_state | (sequence < 0), last, first)
    b_decay = decay_of(decay, tl.where(first < last, first, 0) * H + head, K)
    for chunk in range(first, last):
        tile = chunk * H + head
        next_decay = decay_of(decay, tl.minimum(chunk + 1, last - 1) * H + head, K)
        b_u = tl.load(columns_at(u, tile, column, C, V, BV), mask=(row < 0)[None, :], other=0.0)
        state, _, _ = forward_step(state, b_u, b_decay, w, writer, tile, K, C, PRECISION)
        b_decay = next_decay
    if of_state:
        tl.store(columns_at(after, segment * H + head, column, K, V, BV), tl.trans(state))
    elif sequence < 0:
        tl.store(
            columns_at(through, segment * H + head, column - V, K, K, BV),
            tl.trans(state),
        )


@triton.jit(do_not_specialize=["H"])
def ends_backward_kernel(
    w, reader, writer, attend, decay, do, factor, dfinal, dafter, late, closes, bounds, chunk_row, chunk_size,
    H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, HAS_FINAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for BV columns of F of one head of one segment, written to the place of the segment before. `do` is
    divided by `factor` as in `scan_backward_kernel`."""
    column, head, segment = (
        tl.program_id(0) * BV,
        tl.program_id(1),
        tl.load(late + tl.program_id(2)),
    )
    DT: tl.constexpr = w.dtype.element_ty
    dstate = tl.zeros((BV, K), tl.float32)
    if HAS_FINAL:
        sequence = tl.load(closes + segment)
        dstate += state_if(sequence >= 0, dfinal, sequence * H + head, column, K, V, BV)
    first, last = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    row = tl.load(chunk_row + last - 1, mask=first < last)
    size = tl.load(chunk_size + last - 1, mask=first < last)
    b_decay = decay_of(decay, tl.where(first < last, last - 1, 0) * H + head, K)
    smaller = 1.0 / tl.load(factor + tl.where(first < last, last - 1, 0) * H + head)
    for step in range(last - first):
        tile = (last - 1 - step) * H + head
        next_decay = decay_of(decay, tl.maximum(last - 2 - step, first) * H + head, K)
        b_do = columns_of_tokens(do, row - step * C, tl.where(step == 0, size, C), head, column, H, V, C, BV)
        b_do = (b_do.to(tl.float32) * smaller).to(DT)
        dstate, _, _ = backward_step(dstate, b_do, b_decay, w, reader, writer, attend, tile, K, C, PRECISION)
        b_decay = next_decay
    tl.store(columns_at(dafter, (segment - 1) * H + head, column, K, V, BV), tl.trans(dstate))


@triton.jit(do_not_specialize=["H"])
def join_kernel(
    after, through, of_sequence, H, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for BV columns of one head of one sequence; `after` [segments, H, K, V] holds E or F, of F's segment
    s in place s - 1, and is left holding the state after each segment but the last, or that state's gradient."""
    column, head, sequence = tl.program_id(0) * BV, tl.program_id(1), tl.program_id(2)
    first = tl.load(of_sequence + sequence)
    joints = tl.load(of_sequence + sequence + 1) - 1 - first
    row, channel = tl.arange(0, K)[:, None], tl.arange(0, K)[None, :]
    offsets = channel * K + row if BACKWARD else row * K + channel
    if joints > 1:
        place = first + joints - 1 if BACKWARD else first
        state = tl.load(columns_at(after, place * H + head, column, K, V, BV))
        for _ in range(1, joints):
            segment = place if BACKWARD else place + 1
            place += -1 if BACKWARD else 1
            b_through = tl.load(through + (segment * H + head).to(tl.int64) * (K * K) + offsets)
            here = columns_at(after, place * H + head, column, K, V, BV)
            state = tl.dot(b_through, state, tl.load(here), input_precision=PRECISION)
            tl.store(here, state)


def passage_of(x: Inputs, tiles: Tiles, initial: Tensor | None, segments: Segments) -> Passage | None:
    """None where every sequence is one segment."""
    if not len(segments.early):
        return None
    after, through = (empty_states(x, segments, columns) for columns in (x.value, x.key))
    width, options = by_columns("ends", x)
    launch(
        ends_kernel, ((x.value + x.key) // width, x.heads, len(segments.early)),
        tiles.w, tiles.u, tiles.writer, tiles.decay, initial, after, through,
        segments.early, segments.opens, segments.bounds,
        **x.sizes(), BV=width, HAS_INITIAL=initial is not None, PRECISION=x.precision(), **options,
    )  # fmt: skip
    join(x, after, through, segments, backward=False)
    return Passage(after, through)


def passage_gradient(
    x: Inputs,
    tiles: Tiles,
    out: Scaled,
    passage: Passage,
    segments: Segments,
) -> Tensor:
    """The gradient of the state after each segment but the last of its sequence, [segments, H, K, V]."""
    dafter, chunks = torch.empty_like(passage.after), x.options.chunks
    width, options = by_columns("ends_backward", x)
    launch(
        ends_backward_kernel, (x.value // width, x.heads, len(segments.late)),
        tiles.w, tiles.reader, tiles.writer, tiles.attend, tiles.decay, out.do, out.by_chunk, out.dfinal, dafter,
        segments.late, segments.closes, segments.bounds, chunks.row, chunks.size,
        **x.sizes(), BV=width, HAS_FINAL=out.dfinal is not None, PRECISION=x.precision(), **options,
    )  # fmt: skip
    join(x, dafter, passage.through, segments, backward=True)
    return dafter


def join(x: Inputs, after: Tensor, through: Tensor, segments: Segments, *, backward: bool) -> None:
    sequences = len(segments.of_sequence) - 1
    width, options = by_columns("join", x)
    launch(
        join_kernel, (x.value // width, x.heads, sequences),
        after, through, segments.of_sequence, x.heads, K=x.key, V=x.value, BV=width, BACKWARD=backward,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32x3", **options,
    )  # fmt: skip


def empty_states(x: Inputs, segments: Segments, columns: int) -> Tensor:
    return torch.empty(segments.count, x.heads, x.key, columns, dtype=torch.float32, device=x.q.device)
