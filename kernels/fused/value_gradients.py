"""What needs all values of a chunk at once, in the notation of `gradients`: the gradients of v and beta, and the
products that become the gradients of q, k and g there."""

import triton
import triton.language as tl

from deltarl.kernels.fused.tiles import (
    before,
    column_offsets,
    load_rows,
    not_after,
    raw_rows,
    store_rows,
    tile_offsets,
    write_strengths,
)


@triton.jit
def power_of_2(x):
    """The largest power of 2 that is at most x >= 0, within 2^-60 and 2^60."""
    bits = tl.minimum(tl.maximum(x, 2.0**-60), 2.0**60).to(tl.int32, bitcast=True) & 0x7F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def store_in_range(x, out, unit):
    """x [C, D] to the pointers `out`, divided by a power of 2 of its own, which goes to `unit`."""
    b_unit = power_of_2(tl.max(tl.abs(x)))
    tl.store(unit, b_unit)
    tl.store(out, (x * (1.0 / b_unit)).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["H", "beta_stride"])
def value_gradients_kernel(
    v, beta, o, do, factor, erase, inverse, new, dnew, states, dstates,
    pairs, unit, along, by_state, units, total, chunk_row, chunk_size, dv, dbeta, v_stride, beta_stride,
    H, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, RAW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for one head of one chunk. Writes dv [rows, H, V], dbeta [rows, H] in fp32 (unless RAW, without what
    came through w) and, for `gradients_kernel`,

        along     q . q' and k . k'                                                            [chunks, H, 2, C]
        pairs     P', its transpose, and beta A' plus its transpose, divided by `unit`         [chunks, H, 3, C, C]
        by_state  new dS'^T, solved S^T and do S^T, each WIDTH channels divided by a `units`   [chunks, H, 3, C, K]
        total     the sum of S dS' over the values                                             [chunks, H, K]

    with unit [chunks, H] and units [chunks, H, K / WIDTH, 3]. Pairs, by_state and total are divided by `factor`
    [chunks, H] too, as `do` is when it is read."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    tile = chunk * H + head
    DT: tl.constexpr = new.dtype.element_ty
    first = tl.load(chunk_row + chunk)
    rows = tl.arange(0, C)
    valid = rows < tl.load(chunk_size + chunk)
    b_beta = write_strengths(beta, first, beta_stride, head, valid, C, RAW)
    b_factor = tl.load(factor + tile)
    solve = tl.trans(tl.load(inverse + tile_offsets(tile, C, C)))
    values = tile_offsets(tile, C, V)
    b_dnew, b_new = tl.load(dnew + values), tl.load(new + values)
    b_do = (load_rows(do + head * V, first, H * V, valid, C, V) * (1.0 / b_factor)).to(DT)
    b_v = raw_rows(v + head * V, first, v_stride, valid, C, V)
    b_o = raw_rows(o + head * V, first, H * V, valid, C, V)
    along_q = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    tl.store(along + tile * 2 * C + rows, along_q * b_factor)
    solved = tl.dot(solve, b_dnew, input_precision=PRECISION)
    by_v = tl.sum(solved * b_v.to(tl.float32), 1)
    by_new = tl.sum(solved * b_new.to(tl.float32), 1)
    store_rows(dv + head * V, solved * (b_beta * b_factor)[:, None], first, H * V, valid, C, V)
    solved = solved.to(DT)
    tl.store(along + tile * 2 * C + C + rows, (2.0 * by_new - b_beta * by_v) * b_factor)

    erased = tl.dot(solved, tl.trans(b_new), input_precision=PRECISION)
    attended = tl.dot(b_do, tl.trans(b_new), input_precision=PRECISION)
    later = before(C)
    erased = tl.where(later, -erased, 0.0)
    b_dbeta = by_new * (1.0 - b_beta)
    if not RAW:
        b_dbeta = by_v + tl.sum(erased * tl.load(erase + tile_offsets(tile, C, C)).to(tl.float32), 1)
    tl.store(dbeta + (first + rows).to(tl.int64) * H + head, b_dbeta * b_factor, mask=valid)
    erased *= b_beta[:, None]
    attended = tl.where(not_after(C), attended, 0.0)
    b_unit = power_of_2(tl.maximum(tl.max(tl.abs(erased)), tl.max(tl.abs(attended))))
    tl.store(unit + tile, b_unit)
    smaller = 1.0 / b_unit
    here = tile_offsets(tile * 3, C, C)
    tl.store(pairs + here, (attended * smaller).to(pairs.dtype.element_ty))
    attended_back = tl.dot(b_new, tl.trans(b_do), input_precision=PRECISION)
    attended_back = tl.where(later, 0.0, attended_back * smaller)
    tl.store(pairs + C * C + here, attended_back.to(pairs.dtype.element_ty))
    erased_back = tl.dot(b_new, tl.trans(solved), input_precision=PRECISION)
    erased_back = tl.where(not_after(C), 0.0, -erased_back * b_beta[None, :])
    tl.store(pairs + 2 * C * C + here, ((erased + erased_back) * smaller).to(pairs.dtype.element_ty))

    tl.debug_barrier()  # no loads from below it above it: they would take registers
    for column in tl.range(0, K, WIDTH, num_stages=1):
        corner = column * V + column_offsets(tile * (K // WIDTH), 0, WIDTH, V, V)
        b_dstate, b_state = tl.load(dstates + corner), tl.load(states + corner)
        crossing = tl.sum(b_state.to(tl.float32) * b_dstate.to(tl.float32), 1)
        tl.store(total + tile * K + column + tl.arange(0, WIDTH), crossing)
        b_units = units + (tile * (K // WIDTH) + column // WIDTH) * 3
        out = by_state + column_offsets(tile * 3, column, C, K, WIDTH)
        store_in_range(tl.dot(b_new, tl.trans(b_dstate), input_precision=PRECISION), out, b_units)
        b_state = tl.trans(b_state)
        store_in_range(tl.dot(solved, b_state, input_precision=PRECISION), out + C * K, b_units + 1)
        store_in_range(tl.dot(b_do, b_state, input_precision=PRECISION), out + 2 * C * K, b_units + 2)
