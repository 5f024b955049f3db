"""One chunk of the recurrence and of its gradient. Columns of the state are independent.

new = u - w S        o = reader S + P new        S' = decay S + writer^T new

dnew = P^T do + writer dS'        dS = decay dS' + reader^T do - w^T dnew

The steps hold S^T and dS^T, [columns, K]: a product then leaves its result where the next takes its first factor,
in registers, and only what comes from memory passes through shared memory.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from deltarl.kernels.fused.call import Inputs
from deltarl.kernels.fused.configs import CONFIGS, NARROW, SHARED_MEMORY


@triton.jit
def tile_at(x, tile, R: tl.constexpr, D: tl.constexpr):
    """Pointers [R, D] to a tile of a contiguous [tiles, R, D] tensor."""
    return x + tile.to(tl.int64) * (R * D) + (tl.arange(0, R)[:, None] * D + tl.arange(0, D)[None, :])


@triton.jit
def columns_at(x, tile, column, R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Pointers [R, BD] to the columns column.. of a tile of a contiguous [tiles, R, D] tensor."""
    return x + (tile.to(tl.int64) * (R * D) + column) + (tl.arange(0, R)[:, None] * D + tl.arange(0, BD)[None, :])


@triton.jit
def tokens_at(x, first, head, column, H, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr):
    """Pointers [C, BV] to the columns column.. of a head of x [tokens, H, V], from the token `first` on."""
    offsets = tl.arange(0, C)[:, None] * (H * V) + tl.arange(0, BV)[None, :]
    return x + (first.to(tl.int64) * (H * V) + head * V + column) + offsets


@triton.jit
def columns_of_tokens(x, first, count, head, column, H, V: tl.constexpr, C: tl.constexpr, BV: tl.constexpr):
    """[BV, C] of x [tokens, H, V]: `count` tokens from `first` on, zero after them."""
    offsets = tl.arange(0, BV)[:, None] + tl.arange(0, C)[None, :] * (H * V)
    there = x + (first.to(tl.int64) * (H * V) + head * V + column) + offsets
    return tl.load(there, mask=(tl.arange(0, C) < count)[None, :], other=0.0)


@triton.jit
def decay_of(decay, tile, K: tl.constexpr):
    """[K]; the kernels load it a step ahead of its use, as the compiler does what the products read."""
    return tl.load(decay + tile.to(tl.int64) * K + tl.arange(0, K))


@triton.jit
def state_if(there, states, place, column, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """Columns of a state [K, V] among `states`, transposed; zero if not `there`."""
    mask = (tl.arange(0, BV) < tl.where(there, BV, 0))[None, :]
    return tl.trans(tl.load(columns_at(states, place, column, K, V, BV), mask=mask, other=0.0)).to(tl.float32)


@triton.jit
def forward_step(
    state,
    b_u,
    b_decay,
    w,
    writer,
    tile,
    K: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S^T after the chunk; S^T before it and new^T [columns, C] in the type of products. b_u [C, columns]."""
    DT: tl.constexpr = w.dtype.element_ty
    b_state = state.to(DT)
    erased = tl.dot(b_state, tl.trans(tl.load(tile_at(w, tile, C, K))), input_precision=PRECISION)
    b_new = (tl.trans(b_u).to(tl.float32) - erased).to(DT)
    b_writer = tl.load(tile_at(writer, tile, C, K))
    state = tl.dot(b_new, b_writer, state * b_decay[None, :], input_precision=PRECISION)
    return state, b_state, b_new


@triton.jit
def backward_step(
    dstate,
    b_do,
    b_decay,
    w,
    reader,
    writer,
    attend,
    tile,
    K: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dS^T before the chunk; dS'^T after it and dnew^T [columns, C] in the type of products. b_do [columns, C]."""
    DT: tl.constexpr = w.dtype.element_ty
    b_dstate = dstate.to(DT)
    b_dnew = tl.dot(b_do, tl.load(tile_at(attend, tile, C, C)), input_precision=PRECISION)
    b_writer = tl.trans(tl.load(tile_at(writer, tile, C, K)))
    b_dnew = tl.dot(b_dstate, b_writer, b_dnew, input_precision=PRECISION)
    b_reader = tl.load(tile_at(reader, tile, C, K))
    dstate = tl.dot(b_do, b_reader, dstate * b_decay[None, :], input_precision=PRECISION)
    b_w = tl.load(tile_at(w, tile, C, K))
    dstate = tl.dot((-b_dnew).to(DT), b_w, dstate, input_precision=PRECISION)
    return dstate, b_dstate, b_dnew.to(DT)


def by_columns(name: str, x: Inputs) -> tuple[int, dict[str, int]]:
    """How many columns of the state a program of the kernel `name` holds, and its launch options."""
    config = CONFIGS["scan_fp32" if x.dtype == torch.float32 else name]
    if x.q.is_cuda and shared_memory(x.q.device) < SHARED_MEMORY:
        config = NARROW.get(name, config)
    width = min(config.block, x.key, x.value)
    return width, {
        **config.launch(),
        "num_warps": max(4, config.num_warps * width // config.block),
    }


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
