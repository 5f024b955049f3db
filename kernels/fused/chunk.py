"""`kda_chunk` for NVIDIA GPUs: `prepare` works on all chunks at once, `scan` passes the state from one to the next.

For backward, forward keeps its inputs, o and the tiles of `prepare`: with K = V = 128 and 16-bit inputs 1282 and 1296
bytes a token and head (1424 where g is a log-decay). All of it is kept by save_for_backward: where activations are
computed again (torch.utils.checkpoint), nothing is held meanwhile, and memory too short for the tiles is won back.
Backward makes the states of the chunks anew, passes the gradient of the state back from chunk to chunk and finds all
other gradients for all chunks at once. It uses the tiles up: a second backward through one graph makes them anew.

Products of 16-bit inputs have fp16 factors, gradients among them brought into its range, and are summed in fp32; the
states between the chunks are fp32.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from deltarl.kernels.fused.call import Inputs, Options, Tiles
from deltarl.kernels.fused.chunks import CHUNK, chunks_of, spans
from deltarl.kernels.fused.configs import CONFIGS
from deltarl.kernels.fused.gradients import gradients_kernel
from deltarl.kernels.fused.launch import compiled_together, launch
from deltarl.kernels.fused.passage import Passage
from deltarl.kernels.fused.prepare import prepare_kernel, solve_kernel
from deltarl.kernels.fused.ranges import Scaled, into_range
from deltarl.kernels.fused.scan import scan, scan_backward
from deltarl.kernels.fused.value_gradients import value_gradients_kernel
from deltarl.kernels.inputs import check_arguments, sequence_lengths

WIDTH = 64  # channels of products with states that share a power of 2


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
    """Same arguments, shapes and errors as `deltarl.kernels.chunk.kda_chunk`; K and V are at most 128, T > 0."""
    check_arguments(q, k, v, g, beta, A_log, dt_bias, gate_lower_bound)
    g, dt_bias = decay_per_channel(q, g, dt_bias)
    batch, tokens, _, key = q.shape
    heads, value = v.shape[2:]
    lengths = [tokens] * batch if cu_seqlens is None else sequence_lengths(cu_seqlens, batch, tokens)
    expected = (len(lengths), heads, key, value)
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state must be {expected}, got {tuple(initial_state.shape)}")
    options = Options(
        chunks_of(tuple(lengths), q.device),
        key**-0.5 if scale is None else scale,
        gate_lower_bound,
        use_qk_l2norm,
        output_final_state,
    )
    q, k, g, v = (widened(x, 0) for x in (q, k, g, v))
    if dt_bias is not None:
        dt_bias = widened(dt_bias.view(heads, key), 0).flatten()
    if initial_state is not None:
        initial_state = widened(widened(initial_state, 0), 1)
    o, state = ChunkAttention.apply(q, k, v, g, beta, A_log, dt_bias, initial_state, options)
    return o[..., :value], None if state is None else state[..., :key, :value]


def widened(x: Tensor, place: int) -> Tensor:
    """x with the dimension that is `place` from its last filled up with zeros to 64 or 128, the widths of the kernels:
    products of narrower tiles are not to be trusted (docs/kernels-notes.md)."""
    size = x.shape[-1 - place]
    missing = (64 if size <= 64 else 128) - size
    return F.pad(x, (0, 0) * place + (0, missing)) if missing else x


def decay_per_channel(q: Tensor, g: Tensor, dt_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """g and dt_bias with a decay per head spread over its channels."""
    if g.shape[3] == q.shape[3]:
        return g, dt_bias
    return g.expand(*g.shape[:3], q.shape[3]), None if dt_bias is None else dt_bias.repeat_interleave(q.shape[3])


class ChunkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, A_log, dt_bias, initial, options: Options) -> tuple[Tensor, Tensor | None]:
        q, k, v, g, beta = (packed_rows(x) for x in (q, k, v, g, beta))
        initial = None if initial is None else initial.contiguous()
        inputs = Inputs(q, k, v, g, beta, A_log, dt_bias, options, product_dtype(q))
        training = any(ctx.needs_input_grad)

        def work() -> tuple[Tensor, Tensor | None, Passage | None, Tiles]:
            o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
            final = None
            if options.keep_final:
                final = torch.empty(inputs.state_shape(), dtype=torch.float32, device=v.device)
            tiles = prepare(inputs, for_backward=training)
            return o, final, scan(inputs, tiles, initial, final=final, o=o), tiles

        key = ("kda_chunk", training, inputs.kind(), initial is None)
        o, final, passage, tiles = compiled_together(key, v.device, work)
        between = (None, None) if passage is None else (passage.after, passage.through)
        ctx.save_for_backward(q, k, v, g, beta, A_log, dt_bias, initial, o, *between, *vars(tiles).values())
        ctx.options = options
        return o, final

    @staticmethod
    def backward(ctx, do: Tensor, dfinal: Tensor | None):
        saved = ctx.saved_tensors
        *tensors, initial, o, after, through = saved[:11]
        inputs = Inputs(*tensors, ctx.options, product_dtype(tensors[0]))
        dfinal = dfinal.contiguous() if ctx.options.keep_final else None
        passage = None if after is None else Passage(after, through)
        work = partial(all_gradients, inputs, initial, o, do.contiguous(), dfinal, passage, Tiles(*saved[11:]))
        return compiled_together(("kda_chunk backward", inputs.kind(), initial is None), do.device, work)


def all_gradients(
    x: Inputs,
    initial: Tensor | None,
    o: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
    passage: Passage | None,
    tiles: Tiles,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, g, beta, A_log, dt_bias and the initial state (None where there is no such input), None.
    Uses `tiles` up, and makes them anew if that has happened before."""
    if not tiles.w.untyped_storage().size():
        tiles = prepare(x, for_backward=True)
    states = x.tiles(x.key, x.value)
    scan(x, tiles, initial, states=states, passage=passage)
    dinitial = None if initial is None else torch.empty_like(initial, dtype=torch.float32)
    out = into_range(x, do, dfinal)
    dstates, dnew = scan_backward(x, tiles, out, dinitial, passage)
    for used_up in (tiles.w, tiles.reader, tiles.writer, tiles.attend):
        used_up.untyped_storage().resize_(0)  # the graph still refers to them
    dv, dbeta, found = value_gradients(x, tiles, o, out, states, dstates, dnew)
    del states, dstates, dnew  # before as much memory is needed for other gradients
    dq, dk, dg, dA_log, ddt_bias = channel_gradients(x, tiles, out.by_chunk, found, dbeta)
    if initial is not None:
        dinitial = (dinitial * out.by_sequence[..., None, None]).to(initial.dtype)
    dbeta = dbeta.sum(0) if len(dbeta) > 1 else dbeta[0]
    return dq, dk, dv, dg, dbeta.to(x.beta.dtype), dA_log, ddt_bias, dinitial, None


def product_dtype(q: Tensor) -> torch.dtype:
    return torch.float32 if q.dtype == torch.float32 else torch.float16


def packed_rows(x: Tensor) -> Tensor:
    """x [B, T, H, ...] itself if its rows (b, t) lie at one distance and each row is contiguous, else a copy."""
    wanted = 1
    for size, stride in zip(x.shape[:1:-1], x.stride()[:1:-1], strict=True):
        if size > 1 and stride != wanted:
            return x.contiguous()
        wanted *= size
    return x if x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()


def prepare(x: Inputs, for_backward: bool) -> Tiles:
    tiles = Tiles(
        w=x.tiles(CHUNK, x.key),
        u=x.tiles(CHUNK, x.value),
        reader=x.tiles(CHUNK, x.key),
        writer=x.tiles(CHUNK, x.key),
        attend=x.tiles(CHUNK, CHUNK),
        decay=x.tiles(x.key, dtype=torch.float32),
        erase=x.tiles(CHUNK, CHUNK),
        inverse=x.tiles(CHUNK, CHUNK) if for_backward else None,
        factors=x.tiles(2, CHUNK, dtype=torch.float32) if for_backward else None,
    )
    chunks, switches = x.options.chunks, x.switches()
    q_stride, k_stride, v_stride, g_stride, beta_stride = x.strides()
    launch(
        prepare_kernel, (x.heads, chunks.count),
        x.q, x.k, x.g, x.A_log, x.dt_bias, chunks.row, chunks.size, spans(x.q.device),
        tiles.w, tiles.reader, tiles.writer, tiles.attend, tiles.erase, tiles.factors, tiles.decay,
        q_stride, k_stride, g_stride, x.options.scale, x.options.bound,
        H=x.heads, SHARED=x.shared, K=x.key, C=CHUNK, **switches, KEEP_FACTORS=for_backward, PRECISION=x.precision(),
        **CONFIGS["prepare"].launch(),
    )  # fmt: skip
    launch(
        solve_kernel, (x.heads, chunks.count),
        x.v, x.beta, chunks.row, chunks.size, tiles.erase, tiles.w, tiles.u, tiles.inverse, v_stride, beta_stride,
        **x.sizes(), RAW=switches["RAW"], KEEP_INVERSE=for_backward, PRECISION=x.precision(),
        **CONFIGS["solve"].launch(),
    )  # fmt: skip
    return replace(tiles, erase=None) if switches["RAW"] else tiles  # dbeta is found without it


@dataclass(frozen=True)
class FromValues:
    """What `value_gradients_kernel` leaves for `gradients_kernel`."""

    pairs: Tensor
    unit: Tensor
    along: Tensor
    by_state: Tensor
    units: Tensor
    total: Tensor


def value_gradients(
    x: Inputs, tiles: Tiles, o: Tensor, out: Scaled, states: Tensor, dstates: Tensor, dnew: Tensor
) -> tuple[Tensor, Tensor, FromValues]:
    """dv; dbeta [parts, B, T, H] in fp32, only the first part filled; what else it found."""
    dv = torch.empty(x.v.shape, dtype=x.v.dtype, device=x.v.device)
    parts = 1 if x.A_log is not None else 1 + x.key // channels_of_program()
    dbeta = x.v.new_empty(parts, *x.beta.shape, dtype=torch.float32)
    found = FromValues(
        pairs=x.tiles(3, CHUNK, CHUNK),
        unit=x.tiles(dtype=torch.float32),
        along=x.tiles(2, CHUNK, dtype=torch.float32),
        by_state=x.tiles(3, CHUNK, x.key),
        units=x.tiles(x.key // WIDTH, 3, dtype=torch.float32),
        total=x.tiles(x.key, dtype=torch.float32),
    )
    chunks, (_, _, v_stride, _, beta_stride) = x.options.chunks, x.strides()
    launch(
        value_gradients_kernel, (x.heads, chunks.count),
        x.v, x.beta, o, out.do, out.by_chunk, tiles.erase, tiles.inverse, tiles.u, dnew, states, dstates,
        *vars(found).values(), chunks.row, chunks.size, dv, dbeta, v_stride, beta_stride,
        **x.sizes(), WIDTH=WIDTH, RAW=x.A_log is not None, PRECISION=x.precision(),
        **CONFIGS["value_gradients"].launch(),
    )  # fmt: skip
    return dv, dbeta, found


def channel_gradients(
    x: Inputs, tiles: Tiles, factor: Tensor, found: FromValues, dbeta: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, g, A_log and dt_bias (None where there is no such input); fills the other parts of dbeta."""
    dg = torch.empty(x.g.shape, dtype=x.g.dtype, device=x.g.device)
    dq, dk = (torch.empty(x.g.shape, dtype=t.dtype, device=t.device) for t in (x.q, x.k))
    width = channels_of_program()
    dA_log = None if x.A_log is None else x.tiles(x.key // width, dtype=torch.float32)
    ddt_bias = None if x.dt_bias is None else x.tiles(x.key, dtype=torch.float32)
    chunks, (q_stride, k_stride, _, g_stride, beta_stride) = x.options.chunks, x.strides()
    launch(
        gradients_kernel, (x.heads * (x.key // width), chunks.count),
        x.q, x.k, x.g, x.beta, x.A_log, x.dt_bias, factor, *vars(found).values(), tiles.factors, tiles.decay,
        chunks.row, chunks.size, spans(x.q.device), dq, dk, dg, dbeta, dA_log, ddt_bias,
        q_stride, k_stride, g_stride, beta_stride, x.options.scale, x.options.bound, x.beta[..., 0].numel(),
        H=x.heads, SHARED=x.shared, K=x.key, C=CHUNK, BK=width, WIDTH=WIDTH, **x.switches(), PRECISION=x.precision(),
        **CONFIGS["gradients"].launch(),
    )  # fmt: skip
    if x.shared > 1:
        dq, dk = (t.unflatten(2, (-1, x.shared)).sum(3) for t in (dq, dk))
    if dA_log is not None:
        dA_log = dA_log.sum((0, 2)).view_as(x.A_log).to(x.A_log.dtype)
    if ddt_bias is not None:
        ddt_bias = ddt_bias.sum(0).view_as(x.dt_bias).to(x.dt_bias.dtype)
    return dq, dk, dg, dA_log, ddt_bias


def channels_of_program() -> int:
    """How many channels a program of `gradients_kernel` works on."""
    return min(CONFIGS["gradients"].block, WIDTH)
