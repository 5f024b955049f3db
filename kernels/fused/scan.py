"""The state from chunk to chunk, and its gradient from chunk to chunk backwards. Columns of the state are independent.

new = u - w S        o = reader S + P new        S' = decay S + writer^T new

dnew = P^T do + writer dS'        dS = decay dS' + reader^T do - w^T dnew
"""

import triton
import triton.language as tl
from torch import Tensor

from deltarl.kernels.fused.call import Inputs, Tiles
from deltarl.kernels.fused.chunks import CHUNK
from deltarl.kernels.fused.configs import CONFIGS
from deltarl.kernels.fused.tiles import column_offsets, load_rows, store_rows, tile_offsets


@triton.jit(do_not_specialize=["H"])
def scan_kernel(
    w, u, reader, writer, attend, decay, initial, final, o, states, chunk_row, chunk_size, bounds,
    H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    HAS_INITIAL: tl.constexpr, KEEP_FINAL: tl.constexpr, KEEP_STATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for BV columns of one head of one sequence.

    KEEP_STATES: instead of o, the state before each chunk [chunks, H, K, V] is written, and u becomes `new`.
    """
    column, head, sequence = tl.program_id(0) * BV, tl.program_id(1), tl.program_id(2)
    DT: tl.constexpr = w.dtype.element_ty
    state = tl.zeros((K, BV), tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial + column_offsets(sequence * H + head, column, K, V, BV)).to(tl.float32)
    for chunk in range(tl.load(bounds + sequence), tl.load(bounds + sequence + 1)):
        tile = chunk * H + head
        b_state = state.to(DT)
        b_w = tl.load(w + tile_offsets(tile, C, K))
        b_u = tl.load(u + column_offsets(tile, column, C, V, BV))
        b_new = (b_u.to(tl.float32) - tl.dot(b_w, b_state, input_precision=PRECISION)).to(DT)
        if KEEP_STATES:
            tl.store(states + column_offsets(tile, column, K, V, BV), b_state)
            tl.store(u + column_offsets(tile, column, C, V, BV), b_new)
        else:
            b_o = tl.dot(tl.load(reader + tile_offsets(tile, C, K)), b_state, input_precision=PRECISION)
            b_o += tl.dot(tl.load(attend + tile_offsets(tile, C, C)), b_new, input_precision=PRECISION)
            valid = tl.arange(0, C) < tl.load(chunk_size + chunk)
            store_rows(o + head * V + column, b_o, tl.load(chunk_row + chunk), H * V, valid, C, BV)
        b_decay = tl.load(decay + tile * K + tl.arange(0, K))
        b_writer = tl.trans(tl.load(writer + tile_offsets(tile, C, K)))
        state = state * b_decay[:, None] + tl.dot(b_writer, b_new, input_precision=PRECISION)
    if KEEP_FINAL:
        tl.store(final + column_offsets(sequence * H + head, column, K, V, BV), state)


@triton.jit(do_not_specialize=["H"])
def scan_backward_kernel(
    w, reader, writer, attend, decay, do, dfinal, dinitial, dstates, dnew, chunk_row, chunk_size, bounds,
    H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr,
    HAS_FINAL: tl.constexpr, KEEP_INITIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes dS' of each chunk to `dstates` [chunks, H, K, V] and dnew [chunks, H, C, V]."""
    column, head, sequence = tl.program_id(0) * BV, tl.program_id(1), tl.program_id(2)
    DT: tl.constexpr = w.dtype.element_ty
    dstate = tl.zeros((K, BV), tl.float32)
    if HAS_FINAL:
        dstate += tl.load(dfinal + column_offsets(sequence * H + head, column, K, V, BV)).to(tl.float32)
    first, last = tl.load(bounds + sequence), tl.load(bounds + sequence + 1)
    for step in range(0, last - first):
        chunk = last - 1 - step
        tile = chunk * H + head
        b_dstate = dstate.to(DT)
        tl.store(dstates + column_offsets(tile, column, K, V, BV), b_dstate)
        valid = tl.arange(0, C) < tl.load(chunk_size + chunk)
        b_do = load_rows(do + head * V + column, tl.load(chunk_row + chunk), H * V, valid, C, BV).to(DT)
        b_writer = tl.load(writer + tile_offsets(tile, C, K))
        b_dnew = tl.dot(b_writer, b_dstate, input_precision=PRECISION)
        b_attend = tl.trans(tl.load(attend + tile_offsets(tile, C, C)))
        b_dnew += tl.dot(b_attend, b_do, input_precision=PRECISION)
        tl.store(dnew + column_offsets(tile, column, C, V, BV), b_dnew.to(DT))
        b_decay = tl.load(decay + tile * K + tl.arange(0, K))
        dstate = dstate * b_decay[:, None]
        dstate += tl.dot(tl.trans(tl.load(reader + tile_offsets(tile, C, K))), b_do, input_precision=PRECISION)
        b_w = tl.trans(tl.load(w + tile_offsets(tile, C, K)))
        dstate -= tl.dot(b_w, b_dnew.to(DT), input_precision=PRECISION)
    if KEEP_INITIAL:
        tl.store(dinitial + column_offsets(sequence * H + head, column, K, V, BV), dstate)


def scan(
    x: Inputs,
    tiles: Tiles,
    initial: Tensor | None,
    *,
    final: Tensor | None = None,
    o: Tensor | None = None,
    states: Tensor | None = None,
) -> None:
    """Fills o and the final state, or (backward) `states`, making `tiles.u` the values written."""
    chunks, config = x.options.chunks, CONFIGS["scan"]
    width = min(config.block, x.value)
    scan_kernel[(triton.cdiv(x.value, width), x.heads, len(chunks.bounds) - 1)](
        tiles.w, tiles.u, tiles.reader, tiles.writer, tiles.attend, tiles.decay, initial, final, o, states,
        chunks.row, chunks.size, chunks.bounds,
        **x.sizes(), BV=width, HAS_INITIAL=initial is not None, KEEP_FINAL=final is not None,
        KEEP_STATES=states is not None, PRECISION=x.precision(), **config.launch(),
    )  # fmt: skip


def scan_backward(
    x: Inputs, tiles: Tiles, do: Tensor, dfinal: Tensor | None, dinitial: Tensor | None
) -> tuple[Tensor, Tensor]:
    chunks, config = x.options.chunks, CONFIGS["scan_backward"]
    width = min(config.block, x.value)
    dstates, dnew = x.tiles(x.key, x.value), x.tiles(CHUNK, x.value)
    scan_backward_kernel[(triton.cdiv(x.value, width), x.heads, len(chunks.bounds) - 1)](
        tiles.w, tiles.reader, tiles.writer, tiles.attend, tiles.decay, do, dfinal, dinitial, dstates, dnew,
        chunks.row, chunks.size, chunks.bounds,
        **x.sizes(), BV=width, HAS_FINAL=dfinal is not None, KEEP_INITIAL=dinitial is not None,
        PRECISION=x.precision(), **config.launch(),
    )  # fmt: skip
    return dstates, dnew
