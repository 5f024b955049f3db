"""`kda_chunk` for NVIDIA GPUs: three kernels forward (two of which backward runs again) and two backward.

Forward keeps nothing but its inputs; backward makes the states of the chunks anew. bf16 and fp16 are computed with bf16
products summed in fp32; the states between the chunks are fp32.
"""

import torch
from torch import Tensor

from deltarl.kernels.fused.call import Inputs, Options, Tiles
from deltarl.kernels.fused.chunks import CHUNK, chunks_of, spans
from deltarl.kernels.fused.configs import CONFIGS
from deltarl.kernels.fused.gradients import gradients_kernel, value_gradients_kernel
from deltarl.kernels.fused.prepare import prepare_kernel
from deltarl.kernels.fused.scan import scan, scan_backward
from deltarl.kernels.inputs import check_arguments, sequence_lengths


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
    """Same arguments, shapes and errors as `deltarl.kernels.chunk.kda_chunk`; K and V are 32, 64 or 128, T > 0."""
    check_arguments(q, k, v, g, beta, A_log, dt_bias, gate_lower_bound)
    q, k, g, dt_bias = one_per_value_head(q, k, v, g, dt_bias)
    batch, tokens = q.shape[:2]
    lengths = [tokens] * batch if cu_seqlens is None else sequence_lengths(cu_seqlens, batch, tokens)
    expected = (len(lengths), *q.shape[2:], v.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state must be {expected}, got {tuple(initial_state.shape)}")
    options = Options(
        chunks_of(tuple(lengths), q.device),
        q.shape[-1] ** -0.5 if scale is None else scale,
        gate_lower_bound,
        use_qk_l2norm,
        output_final_state,
    )
    return ChunkAttention.apply(q, k, v, g, beta, A_log, dt_bias, initial_state, options)


def one_per_value_head(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, dt_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q and k repeated for the value heads that share a key head, a decay per head spread over its channels."""
    if v.shape[2] > q.shape[2]:
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    if g.shape[3] < q.shape[3]:
        g = g.expand(q.shape)
        dt_bias = None if dt_bias is None else dt_bias.repeat_interleave(q.shape[3])
    return q, k, g, dt_bias


class ChunkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, A_log, dt_bias, initial, options: Options) -> tuple[Tensor, Tensor | None]:
        q, k, v, g, beta = (packed_rows(x) for x in (q, k, v, g, beta))
        initial = None if initial is None else initial.contiguous()
        ctx.save_for_backward(q, k, v, g, beta, A_log, dt_bias, initial)
        ctx.options = options
        inputs = Inputs(q, k, v, g, beta, A_log, dt_bias, options, product_dtype(q, torch.float16))
        tiles = prepare(inputs, keep_inverse=False)
        o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        final = None
        if options.keep_final:
            final = torch.empty(inputs.state_shape(), dtype=torch.float32, device=v.device)
        ctx.passage = scan(inputs, tiles, initial, final=final, o=o)
        return o, final

    @staticmethod
    def backward(ctx, do: Tensor, dfinal: Tensor | None):
        *tensors, initial = ctx.saved_tensors
        inputs = Inputs(*tensors, ctx.options, product_dtype(tensors[0], torch.bfloat16))
        tiles = prepare(inputs, keep_inverse=True)
        states = inputs.tiles(inputs.key, inputs.value)
        passage = scan(inputs, tiles, initial, states=states, passage=ctx.passage)
        dinitial = None if initial is None else torch.empty_like(initial, dtype=torch.float32)
        dfinal = dfinal.contiguous() if ctx.options.keep_final else None
        do = do.contiguous()
        dstates, dnew = scan_backward(inputs, tiles, do, dfinal, dinitial, passage)
        gradients = all_gradients(inputs, tiles, do, states, dstates, dnew)
        return *gradients, None if initial is None else dinitial.to(initial.dtype), None


def product_dtype(q: Tensor, low_precision: torch.dtype) -> torch.dtype:
    return torch.float32 if q.dtype == torch.float32 else low_precision


def packed_rows(x: Tensor) -> Tensor:
    """x [B, T, H, ...] itself if its rows (b, t) lie at one distance and each row is contiguous, else a copy."""
    wanted = 1
    for size, stride in zip(x.shape[:1:-1], x.stride()[:1:-1], strict=True):
        if size > 1 and stride != wanted:
            return x.contiguous()
        wanted *= size
    return x if x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()


def prepare(x: Inputs, keep_inverse: bool) -> Tiles:
    tiles = Tiles(
        w=x.tiles(CHUNK, x.key),
        u=x.tiles(CHUNK, x.value),
        reader=x.tiles(CHUNK, x.key),
        writer=x.tiles(CHUNK, x.key),
        attend=x.tiles(CHUNK, CHUNK),
        decay=x.tiles(x.key, dtype=torch.float32),
        inverse=x.tiles(CHUNK, CHUNK) if keep_inverse else None,
    )
    chunks, config = x.options.chunks, CONFIGS["prepare"]
    prepare_kernel[(x.heads, chunks.count)](
        x.q, x.k, x.v, x.g, x.beta, x.A_log, x.dt_bias, chunks.row, chunks.size, spans(x.q.device),
        tiles.w, tiles.u, tiles.reader, tiles.writer, tiles.attend, tiles.inverse, tiles.decay,
        *x.strides(), x.options.scale, x.options.bound,
        **x.sizes(), BK=min(config.block, x.key), **x.switches(), KEEP_INVERSE=keep_inverse, PRECISION=x.precision(),
        **config.launch(),
    )  # fmt: skip
    return tiles


def all_gradients(x: Inputs, tiles: Tiles, do: Tensor, states: Tensor, dstates: Tensor, dnew: Tensor):
    """Gradients of q, k, v, g, beta, A_log and dt_bias (None where there is no such input)."""
    dq, dk, dv, dg, dbeta = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x.q, x.k, x.v, x.g, x.beta))
    dA_log = None if x.A_log is None else x.tiles(dtype=torch.float32)
    ddt_bias = None if x.dt_bias is None else x.tiles(x.key, dtype=torch.float32)
    dattend, derase = x.tiles(CHUNK, CHUNK), x.tiles(CHUNK, CHUNK)
    dbeta_by_v = x.tiles(CHUNK, dtype=torch.float32)
    chunks, width = x.options.chunks, min(64, x.value)
    sizes, switches = x.sizes(), x.switches()
    q_stride, k_stride, v_stride, g_stride, beta_stride = x.strides()
    config = CONFIGS["value_gradients"]
    value_gradients_kernel[(x.heads, chunks.count)](
        x.v, x.beta, do, tiles.inverse, tiles.u, dnew, dattend, derase, chunks.row, chunks.size, dv, dbeta_by_v,
        v_stride, beta_stride, H=x.heads, V=x.value, C=CHUNK, BV=min(config.block, x.value), RAW=switches["RAW"],
        PRECISION=x.precision(), **config.launch(),
    )  # fmt: skip
    config = CONFIGS["gradients"]
    gradients_kernel[(x.heads, chunks.count)](
        x.q, x.k, x.g, x.beta, x.A_log, x.dt_bias, do, states, dstates, tiles.u, dnew, dattend, derase, dbeta_by_v,
        chunks.row, chunks.size, spans(x.q.device), dq, dk, dg, dbeta, dA_log, ddt_bias,
        q_stride, k_stride, g_stride, beta_stride, x.options.scale, x.options.bound,
        **sizes, BK=min(config.block, x.key), BV=width, **switches, PRECISION=x.precision(), **config.launch(),
    )  # fmt: skip
    if dA_log is not None:
        dA_log = dA_log.sum(0).view_as(x.A_log).to(x.A_log.dtype)
    if ddt_bias is not None:
        ddt_bias = ddt_bias.sum(0).view_as(x.dt_bias).to(x.dt_bias.dtype)
    return dq, dk, dv, dg, dbeta, dA_log, ddt_bias
