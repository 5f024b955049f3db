"""`causal_conv1d` for NVIDIA GPUs. It is bound by bytes: forward reads each input once, backward too.

    total_t = sum_k tap_k x_{t-k}        y_t = act(total_t)                      tap_k = weight[:, W - 1 - k]
    dtotal_t = dy_t act'(total_t)        dx_t = sum_k tap_k dtotal_{t+k}         dtap_k = sum_t dtotal_t x_{t-k}

A program walks down a block of one sequence's tokens, four rows at a time, with the rows that the next four need in
registers. Backward computes total anew. States are [N, W-1, D] in here, so that channels are neighbours.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltarl.kernels.conv import check_conv
from deltarl.kernels.fused.configs import CONFIGS, Config

# Tokens of a program; backward leaves a sum of dweight for each. With fewer programs than this, they take fewer tokens.
FORWARD_TOKENS, BACKWARD_TOKENS, FEWEST_TOKENS, PROGRAMS = 64, 128, 16, 1024


@triton.jit
def place_of(table, D, BD: tl.constexpr):
    """The row of `block_table` and the channels [BD] of this program; the next program has the channels beside them."""
    parts = tl.cdiv(D, BD)
    block = tl.program_id(0) // parts
    channel = tl.program_id(0) % parts * BD + tl.arange(0, BD)
    entry = table + block * 4
    first, begin, end, sequence = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    return block, channel, first, begin, end, sequence.to(tl.int64)


@triton.jit
def present(channel, D, condition):
    """[BD]: the channels below D if the condition holds, else none."""
    return channel < tl.where(condition, D, 0)


@triton.jit
def taps_of(weight, channel, D, W: tl.constexpr):
    """tap_0 to tap_3 [BD] in fp32; those from W on stand for nothing. All W of a channel are one load, as they lie."""
    column = tl.arange(0, 2 if W == 2 else 4)[None, :]
    inside = (channel < D)[:, None] & (column < W)
    b_weight = tl.load(weight + channel[:, None] * W + column, mask=inside, other=0.0).to(tl.float32)
    if W == 2:
        w0, w1 = tl.split(b_weight)
        return w1, w0, w0, w0
    else:
        even, odd = tl.split(tl.reshape(b_weight, (channel.shape[0], 2, 2)))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        if W == 3:
            return w2, w1, w0, w0
        else:
            return w3, w2, w1, w0


@triton.jit
def input_row(x, initial, row, begin, stride, D, channel, W: tl.constexpr, INITIAL: tl.constexpr):
    """[BD]: row `row` of the sequence that begins at row `begin` of x; before that, of its initial state, or zero."""
    value = tl.load(x + row.to(tl.int64) * stride + channel, mask=present(channel, D, row >= begin), other=0.0)
    if INITIAL:
        early = tl.load(initial + (row - begin + W - 1) * D + channel, mask=present(channel, D, row < begin), other=0.0)
        value = tl.where(row < begin, early, value)
    return value


@triton.jit
def rows_before(x, initial, first, begin, stride, D, channel, W: tl.constexpr, INITIAL: tl.constexpr):
    """The three rows before row `first` in fp32, the nearest one first; those from W - 1 on stand for nothing."""
    x1 = input_row(x, initial, first - 1, begin, stride, D, channel, W, INITIAL).to(tl.float32)
    x2, x3 = x1, x1
    if W > 2:
        x2 = input_row(x, initial, first - 2, begin, stride, D, channel, W, INITIAL).to(tl.float32)
    if W > 3:
        x3 = input_row(x, initial, first - 3, begin, stride, D, channel, W, INITIAL).to(tl.float32)
    return x1, x2, x3


@triton.jit
def tapped(taps, x0, x1, x2, x3, W: tl.constexpr):
    """sum_k tap_k x_k over k < W, the last first."""
    total = taps[1] * x1 + taps[0] * x0
    if W == 3:
        total = taps[2] * x2 + taps[1] * x1 + taps[0] * x0
    if W == 4:
        total = taps[3] * x3 + taps[2] * x2 + taps[1] * x1 + taps[0] * x0
    return total


@triton.jit
def tapped_back(taps, d0, d1, d2, d3, W: tl.constexpr):
    """sum_k tap_k d_{W-1-k}: the gradient of the row W - 1 before that of d0."""
    total = taps[0] * d1 + taps[1] * d0
    if W == 3:
        total = taps[0] * d2 + taps[1] * d1 + taps[2] * d0
    if W == 4:
        total = taps[0] * d3 + taps[1] * d2 + taps[2] * d1 + taps[3] * d0
    return total


@triton.jit
def activated(total, SILU: tl.constexpr):
    if SILU:
        return total / (1.0 + tl.exp(-total))
    else:
        return total


@triton.jit
def total_gradient(x_row, dy_row, valid, taps, x1, x2, x3, W: tl.constexpr, SILU: tl.constexpr):
    """x_t and dtotal_t in fp32, zero where not valid."""
    x0 = tl.load(x_row, mask=valid, other=0.0).to(tl.float32)
    dtotal = tl.load(dy_row, mask=valid, other=0.0).to(tl.float32)
    if SILU:
        total = tapped(taps, x0, x1, x2, x3, W)
        gate = 1.0 / (1.0 + tl.exp(-total))
        dtotal *= gate * (1.0 + total * (1.0 - gate))
    return x0, dtotal


@triton.jit
def with_final_gradient(dx, dfinal, row, left, D, channel, W: tl.constexpr, DFINAL: tl.constexpr):
    """dx of a row with what comes from the final state, if it is one of the last W - 1 of those `left`."""
    if DFINAL:
        tap = row - left + W - 1
        here = present(channel, D, (tap >= 0) & (tap < W - 1))
        dx += tl.load(dfinal + tap * D + channel, mask=here, other=0.0).to(tl.float32)
    return dx


@triton.jit
def conv_kernel(
    x, weight, initial, table, y, final, stride, D,
    W: tl.constexpr, SILU: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """One program for BT tokens and BD channels; the last of a sequence leaves its final state."""
    _, channel, first, begin, end, sequence = place_of(table, D, BD)
    inside = channel < D
    if INITIAL:
        initial += sequence * (W - 1) * D
    taps = taps_of(weight, channel, D, W)
    x1, x2, x3 = rows_before(x, initial, first, begin, stride, D, channel, W, INITIAL)

    size = tl.minimum(end - first, BT)
    x_rows, y_rows = x + first.to(tl.int64) * stride + channel, y + first.to(tl.int64) * D + channel
    for row in range(0, size, 4):
        valid_b, valid_c, valid_d = (
            present(channel, D, row + 1 < size),
            present(channel, D, row + 2 < size),
            present(channel, D, row + 3 < size),
        )
        a = tl.load(x_rows + row * stride, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x_rows + (row + 1) * stride, mask=valid_b, other=0.0).to(tl.float32)
        c = tl.load(x_rows + (row + 2) * stride, mask=valid_c, other=0.0).to(tl.float32)
        d = tl.load(x_rows + (row + 3) * stride, mask=valid_d, other=0.0).to(tl.float32)
        y_a = activated(tapped(taps, a, x1, x2, x3, W), SILU)
        y_b = activated(tapped(taps, b, a, x1, x2, W), SILU)
        y_c = activated(tapped(taps, c, b, a, x1, W), SILU)
        y_d = activated(tapped(taps, d, c, b, a, W), SILU)
        tl.store(y_rows + row * D, y_a.to(y.dtype.element_ty), mask=inside)
        tl.store(y_rows + (row + 1) * D, y_b.to(y.dtype.element_ty), mask=valid_b)
        tl.store(y_rows + (row + 2) * D, y_c.to(y.dtype.element_ty), mask=valid_c)
        tl.store(y_rows + (row + 3) * D, y_d.to(y.dtype.element_ty), mask=valid_d)
        x1, x2, x3 = d, c, b

    if FINAL:
        kept = present(channel, D, first + BT >= end)
        for tap in tl.static_range(W - 1):
            last = input_row(x, initial, end - (W - 1) + tap, begin, stride, D, channel, W, INITIAL)
            tl.store(final + (sequence * (W - 1) + tap) * D + channel, last, mask=kept)


@triton.jit
def conv_backward_kernel(
    x, weight, initial, dy, dfinal, table, dx, dinitial, dweight, stride, dy_stride, D,
    W: tl.constexpr, SILU: tl.constexpr, INITIAL: tl.constexpr, DFINAL: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """One program for dx of BT tokens and BD channels, from dtotal of these and the W - 1 tokens after them.

    Its part of dweight is that of the tokens W - 1 on, up to the W - 1 after its own; and of the first W - 1 where the
    sequence begins.
    """
    block, channel, first, begin, end, sequence = place_of(table, D, BD)
    inside = channel < D
    if INITIAL:
        initial += sequence * (W - 1) * D
        dinitial += sequence * (W - 1) * D
    if DFINAL:
        dfinal += sequence * (W - 1) * D
    taps = taps_of(weight, channel, D, W)
    x1, x2, x3 = rows_before(x, initial, first, begin, stride, D, channel, W, INITIAL)
    zero = tl.zeros((BD,), tl.float32)
    d1, d2, d3 = zero, zero, zero
    dtap0, dtap1, dtap2, dtap3 = zero, zero, zero, zero

    left = end - first
    x_rows, dy_rows = x + first.to(tl.int64) * stride + channel, dy + first.to(tl.int64) * dy_stride + channel
    for row in tl.static_range(W - 1):
        valid = present(channel, D, row < left)
        x0, d0 = total_gradient(x_rows + row * stride, dy_rows + row * dy_stride, valid, taps, x1, x2, x3, W, SILU)
        counted = tl.where(first == begin, d0, 0.0)
        dtap0 += counted * x0
        dtap1 += counted * x1
        dtap2 += counted * x2
        dtap3 += counted * x3
        if INITIAL:
            early = tapped_back(taps, d0, d1, d2, d3, W)
            early = with_final_gradient(early, dfinal, row - (W - 1), left, D, channel, W, DFINAL)
            tl.store(
                dinitial + row * D + channel,
                early.to(dinitial.dtype.element_ty),
                mask=present(channel, D, first == begin),
            )
        x1, x2, x3 = x0, x1, x2
        d1, d2, d3 = d0, d1, d2

    size = tl.minimum(left, BT)
    x_rows, dy_rows = x_rows + (W - 1) * stride, dy_rows + (W - 1) * dy_stride
    dx_rows = dx + first.to(tl.int64) * D + channel
    for row in range(0, size, 4):
        x_row, dy_row, ahead = x_rows + row * stride, dy_rows + row * dy_stride, left - (W - 1) - row
        xa, da = total_gradient(x_row, dy_row, present(channel, D, ahead > 0), taps, x1, x2, x3, W, SILU)
        x_row, dy_row = x_row + stride, dy_row + dy_stride
        xb, db = total_gradient(x_row, dy_row, present(channel, D, ahead > 1), taps, xa, x1, x2, W, SILU)
        x_row, dy_row = x_row + stride, dy_row + dy_stride
        xc, dc = total_gradient(x_row, dy_row, present(channel, D, ahead > 2), taps, xb, xa, x1, W, SILU)
        x_row, dy_row = x_row + stride, dy_row + dy_stride
        xd, dd = total_gradient(x_row, dy_row, present(channel, D, ahead > 3), taps, xc, xb, xa, W, SILU)
        dtap0 += da * xa + db * xb + dc * xc + dd * xd
        dtap1 += da * x1 + db * xa + dc * xb + dd * xc
        dtap2 += da * x2 + db * x1 + dc * xa + dd * xb
        dtap3 += da * x3 + db * x2 + dc * x1 + dd * xa
        dxa, dxb = tapped_back(taps, da, d1, d2, d3, W), tapped_back(taps, db, da, d1, d2, W)
        dxc, dxd = tapped_back(taps, dc, db, da, d1, W), tapped_back(taps, dd, dc, db, da, W)
        dxa = with_final_gradient(dxa, dfinal, row, left, D, channel, W, DFINAL)
        dxb = with_final_gradient(dxb, dfinal, row + 1, left, D, channel, W, DFINAL)
        dxc = with_final_gradient(dxc, dfinal, row + 2, left, D, channel, W, DFINAL)
        dxd = with_final_gradient(dxd, dfinal, row + 3, left, D, channel, W, DFINAL)
        tl.store(dx_rows + row * D, dxa.to(dx.dtype.element_ty), mask=inside)
        tl.store(dx_rows + (row + 1) * D, dxb.to(dx.dtype.element_ty), mask=present(channel, D, row + 1 < size))
        tl.store(dx_rows + (row + 2) * D, dxc.to(dx.dtype.element_ty), mask=present(channel, D, row + 2 < size))
        tl.store(dx_rows + (row + 3) * D, dxd.to(dx.dtype.element_ty), mask=present(channel, D, row + 3 < size))
        x1, x2, x3 = xd, xc, xb
        d1, d2, d3 = dd, dc, db

    dweight += block.to(tl.int64) * W * D + channel
    tl.store(dweight + (W - 1) * D, dtap0, mask=inside)
    tl.store(dweight + (W - 2) * D, dtap1, mask=inside)
    if W > 2:
        tl.store(dweight + (W - 3) * D, dtap2, mask=inside)
    if W > 3:
        tl.store(dweight, dtap3, mask=inside)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    activation: str | None = "silu",
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Same arguments, shapes and errors as `deltarl.kernels.conv.causal_conv1d`; W is 2, 3 or 4, x of 16 or 32 bits."""
    lengths = tuple(check_conv(x, weight, activation, cu_seqlens, initial_state))
    initial = None if initial_state is None else initial_state.to(x.dtype).transpose(1, 2).contiguous()
    y, final = Convolution.apply(x, weight, initial, lengths, activation == "silu", output_final_state)
    return y, None if final is None else final.transpose(1, 2)


class Convolution(torch.autograd.Function):
    """As `causal_conv1d`, with states [N, W-1, D]."""

    @staticmethod
    def forward(ctx, x, weight, initial, lengths: tuple[int, ...], silu: bool, keep_final: bool):
        x, weight = even_rows(x), weight.contiguous()
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        width = weight.shape[1]
        final = y.new_empty(len(lengths), width - 1, x.shape[2]) if keep_final else None
        table, grid, sizes = launch(x, lengths, FORWARD_TOKENS, CONFIGS["conv"])
        conv_kernel[grid](
            x, weight, initial, table, y, final, row_stride(x), x.shape[2],
            W=width, SILU=silu, INITIAL=initial is not None, FINAL=keep_final, **sizes,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, initial)
        ctx.lengths, ctx.silu = lengths, silu
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, dfinal: Tensor | None):
        x, weight, initial = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else even_rows(dy)
        dfinal = None if dfinal is None else dfinal.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dinitial = None if initial is None else torch.empty_like(initial)
        table, grid, sizes = launch(x, ctx.lengths, BACKWARD_TOKENS, CONFIGS["conv_backward"])
        dweight = torch.empty(len(table), *weight.shape[::-1], dtype=torch.float32, device=x.device)
        conv_backward_kernel[grid](
            x, weight, initial, dy, dfinal, table, dx, dinitial, dweight, row_stride(x), row_stride(dy), x.shape[2],
            W=weight.shape[1], SILU=ctx.silu, INITIAL=initial is not None, DFINAL=dfinal is not None, **sizes,
        )  # fmt: skip
        return dx, dweight.sum(0).t().to(weight.dtype).contiguous(), dinitial, None, None, None


def even_rows(x: Tensor) -> Tensor:
    """x [B, T, D] itself if its rows (b, t) lie at one distance and each is in one piece, else a copy."""
    together = x.stride(2) == 1 and (x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if together else x.contiguous()


def row_stride(x: Tensor) -> int:
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def launch(
    x: Tensor, lengths: tuple[int, ...], tokens: int, config: Config
) -> tuple[Tensor, tuple[int], dict[str, int]]:
    """The block table, the grid, and the sizes of a program of up to `tokens` tokens."""
    parts, sizes = channel_blocks(x.shape[2], config)
    while tokens > FEWEST_TOKENS and x.shape[0] * x.shape[1] * parts < PROGRAMS * tokens:
        tokens //= 2
    table = block_table(lengths, tokens, x.device)
    return table, (len(table) * parts,), {"BT": tokens, **sizes}


def channel_blocks(channels: int, config: Config) -> tuple[int, dict[str, int]]:
    """How many blocks of channels there are, and their sizes; narrow ones have fewer warps."""
    width = min(config.block, triton.next_power_of_2(channels))
    warps = max(1, config.num_warps * width // config.block)
    return triton.cdiv(channels, width), {"BD": width, "num_warps": warps, "num_stages": config.num_stages}


@lru_cache(maxsize=64)
def block_table(lengths: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """int32 [blocks, 4]: of each block of up to `block` tokens the first one, the first and the end of its sequence,
    and which sequence that is. An empty sequence has one block too: its final state is its initial one."""
    length = torch.tensor(lengths, dtype=torch.int64)
    per_sequence = ((length + block - 1) // block).clamp(min=1)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), per_sequence)
    place = torch.arange(len(sequence)) - (per_sequence.cumsum(0) - per_sequence)[sequence]
    end = length.cumsum(0)[sequence]
    begin = end - length[sequence]
    table = torch.stack((begin + place * block, begin, end, sequence), 1)
    return table.to(torch.int32).to(device, non_blocking=True)
