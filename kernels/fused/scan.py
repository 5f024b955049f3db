"""The state from chunk to chunk, and its gradient from chunk to chunk backwards, for all segments at once."""

import triton
import triton.language as tl
from torch import Tensor

from deltarl.kernels.fused.call import Inputs, Tiles
from deltarl.kernels.fused.chunks import CHUNK
from deltarl.kernels.fused.launch import launch
from deltarl.kernels.fused.passage import Passage, passage_gradient, passage_of
from deltarl.kernels.fused.ranges import Scaled
from deltarl.kernels.fused.segments import Segments, segments_of
from deltarl.kernels.fused.step import (
    backward_step,
    by_columns,
    columns_at,
    columns_of_tokens,
    decay_of,
    forward_step,
    state_if,
    tile_at,
    tokens_at,
)


@triton.jit(do_not_specialize=["H"])
def scan_kernel(
    w, u, reader, writer, attend, decay, initial, after, final, o, states,
    chunk_row, chunk_size, bounds, opens, closes,
    H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    HAS_INITIAL: tl.constexpr, CUT: tl.constexpr, KEEP_FINAL: tl.constexpr, KEEP_STATES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for BV columns of one head of one segment; CUT: some start from what `after` holds.

    KEEP_STATES: instead of o, the state before each chunk [chunks, H, K, V] is written, and u becomes `new`.
    """
    column, head, segment = tl.program_id(0) * BV, tl.program_id(1), tl.program_id(2)
    opened = tl.load(opens + segment)
    state = tl.zeros((BV, K), tl.float32)
    if HAS_INITIAL:
        state += state_if(opened >= 0, initial, opened * H + head, column, K, V, BV)
    if CUT:
        state += state_if(opened < 0, after, (segment - 1) * H + head, column, K, V, BV)
    first, last = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    row = tl.load(chunk_row + first, mask=first < last)
    size = tl.load(chunk_size + last - 1, mask=first < last)
    b_decay = decay_of(decay, tl.where(first < last, first, 0) * H + head, K)
    for chunk in range(first, last):
        tile = chunk * H + head
        next_decay = decay_of(decay, tl.minimum(chunk + 1, last - 1) * H + head, K)
        b_u = tl.load(columns_at(u, tile, column, C, V, BV))
        state, b_state, b_new = forward_step(state, b_u, b_decay, w, writer, tile, K, C, PRECISION)
        if KEEP_STATES:
            tl.store(columns_at(states, tile, column, K, V, BV), tl.trans(b_state))
            tl.store(columns_at(u, tile, column, C, V, BV), tl.trans(b_new))
        else:
            b_o = tl.dot(
                b_state,
                tl.trans(tl.load(tile_at(reader, tile, C, K))),
                input_precision=PRECISION,
            )
            b_o = tl.dot(
                b_new,
                tl.trans(tl.load(tile_at(attend, tile, C, C))),
                b_o,
                input_precision=PRECISION,
            )
            valid = tl.arange(0, C) < tl.where(chunk == last - 1, size, C)
            b_o = tl.trans(b_o.to(o.dtype.element_ty))
            tl.store(
                tokens_at(o, row + (chunk - first) * C, head, column, H, V, C, BV),
                b_o,
                mask=valid[:, None],
            )
        b_decay = next_decay
    if KEEP_FINAL:
        closed = tl.load(closes + segment)
        if closed >= 0:
            tl.store(columns_at(final, closed * H + head, column, K, V, BV), tl.trans(state))


@triton.jit(do_not_specialize=["H"])
def scan_backward_kernel(
    w, reader, writer, attend, decay, do, factor, dfinal, dafter, dinitial, dstates, dnew,
    chunk_row, chunk_size, bounds, opens, closes,
    H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    HAS_FINAL: tl.constexpr, CUT: tl.constexpr, KEEP_INITIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes dS' of each chunk to `dstates` [chunks, H, K, V] and dnew [chunks, H, C, V]. `do` is divided by `factor`
    [chunks, H], the same in all chunks of a segment."""
    column, head, segment = tl.program_id(0) * BV, tl.program_id(1), tl.program_id(2)
    DT: tl.constexpr = w.dtype.element_ty
    closed = tl.load(closes + segment)
    dstate = tl.zeros((BV, K), tl.float32)
    if HAS_FINAL:
        dstate += state_if(closed >= 0, dfinal, closed * H + head, column, K, V, BV)
    if CUT:
        dstate += state_if(closed < 0, dafter, segment * H + head, column, K, V, BV)
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
        dstate, b_dstate, b_dnew = backward_step(
            dstate, b_do, b_decay, w, reader, writer, attend, tile, K, C, PRECISION
        )
        tl.store(columns_at(dstates, tile, column, K, V, BV), tl.trans(b_dstate))
        tl.store(columns_at(dnew, tile, column, C, V, BV), tl.trans(b_dnew))
        b_decay = next_decay
    if KEEP_INITIAL:
        opened = tl.load(opens + segment)
        if opened >= 0:
            tl.store(
                columns_at(dinitial, opened * H + head, column, K, V, BV),
                tl.trans(dstate),
            )


def scan(
    x: Inputs,
    tiles: Tiles,
    initial: Tensor | None,
    *,
    final: Tensor | None = None,
    o: Tensor | None = None,
    states: Tensor | None = None,
    passage: Passage | None = None,
) -> Passage | None:
    """Fills o and the final state, or (backward) `states`, making `tiles.u` the values written.

    Returns what passes between segments, None where no sequence is cut; an earlier scan's `passage` saves finding it.
    """
    segments, chunks = segments_for(x), x.options.chunks
    passage = passage or passage_of(x, tiles, initial, segments)
    width, options = by_columns("scan", x)
    launch(
        scan_kernel, (x.value // width, x.heads, segments.count),
        tiles.w, tiles.u, tiles.reader, tiles.writer, tiles.attend, tiles.decay, initial,
        passage and passage.after, final, o, states,
        chunks.row, chunks.size, segments.bounds, segments.opens, segments.closes,
        **x.sizes(), BV=width, HAS_INITIAL=initial is not None, CUT=passage is not None, KEEP_FINAL=final is not None,
        KEEP_STATES=states is not None, PRECISION=x.precision(), **options,
    )  # fmt: skip
    return passage


def scan_backward(
    x: Inputs,
    tiles: Tiles,
    out: Scaled,
    dinitial: Tensor | None,
    passage: Passage | None,
) -> tuple[Tensor, Tensor]:
    """dS' of each chunk and dnew; fills dinitial. `passage` is the forward scan's."""
    segments, chunks = segments_for(x), x.options.chunks
    dafter = None if passage is None else passage_gradient(x, tiles, out, passage, segments)
    width, options = by_columns("scan_backward", x)
    dstates, dnew = x.tiles(x.key, x.value), x.tiles(CHUNK, x.value)
    launch(
        scan_backward_kernel, (x.value // width, x.heads, segments.count),
        tiles.w, tiles.reader, tiles.writer, tiles.attend, tiles.decay, out.do, out.by_chunk, out.dfinal, dafter,
        dinitial, dstates, dnew,
        chunks.row, chunks.size, segments.bounds, segments.opens, segments.closes,
        **x.sizes(), BV=width, HAS_FINAL=out.dfinal is not None, CUT=dafter is not None,
        KEEP_INITIAL=dinitial is not None, PRECISION=x.precision(), **options,
    )  # fmt: skip
    return dstates, dnew


def segments_for(x: Inputs) -> Segments:
    width, _ = by_columns("scan", x)
    return segments_of(x.options.chunks.per_sequence, x.heads * (x.value // width), x.q.device)
