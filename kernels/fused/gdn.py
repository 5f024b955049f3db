"""`gdn_chunk` for NVIDIA GPUs: the chunks of `deltarl.kernels.fused.chunk` with one decay per head and token.

The scans over the chunks are KDA's. Forward keeps nothing but its inputs; backward makes the states of the chunks anew.
Products are fp16 (fp32 for fp32 inputs) summed in fp32, gradients brought into fp16's range before; the state that
goes from chunk to chunk is fp32.
"""

from functools import partial

import torch
from torch import Tensor

from deltarl.kernels.fused.call import Inputs, Options
from deltarl.kernels.fused.chunk import packed_rows, product_dtype, widened
from deltarl.kernels.fused.chunks import chunks_of
from deltarl.kernels.fused.gdn_gradients import gdn_gradients
from deltarl.kernels.fused.gdn_prepare import gdn_prepare
from deltarl.kernels.fused.launch import compiled_together
from deltarl.kernels.fused.passage import Passage
from deltarl.kernels.fused.ranges import into_range
from deltarl.kernels.fused.scan import scan, scan_backward
from deltarl.kernels.inputs import check_arguments, sequence_lengths


def gdn_chunk(
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
    """Same arguments, shapes and errors as `deltarl.kernels.gdn.gdn_chunk`; K and V are at most 128, T > 0, and q and k
    have one dtype."""
    check_arguments(q, k, v, g.unsqueeze(-1), beta, A_log, dt_bias, gate_lower_bound)
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
    q, k, v = (widened(x, 0) for x in (q, k, v))
    if initial_state is not None:
        initial_state = widened(widened(initial_state, 0), 1)
    o, state = GatedDelta.apply(q, k, v, g, beta, A_log, dt_bias, initial_state, options)
    return o[..., :value], None if state is None else state[..., :key, :value]


class GatedDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, A_log, dt_bias, initial, options: Options) -> tuple[Tensor, Tensor | None]:
        q, k, v, g, beta = (packed_rows(x) for x in (q, k, v, g, beta))
        initial = None if initial is None else initial.contiguous()
        ctx.save_for_backward(q, k, v, g, beta, A_log, dt_bias, initial)
        ctx.options = options
        inputs = Inputs(q, k, v, g, beta, A_log, dt_bias, options, product_dtype(q))
        training = any(ctx.needs_input_grad)

        def work() -> tuple[Tensor, Tensor | None, Passage | None]:
            o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
            final = None
            if options.keep_final:
                final = torch.empty(inputs.state_shape(), dtype=torch.float32, device=v.device)
            return o, final, scan(inputs, gdn_prepare(inputs, for_backward=training), initial, final=final, o=o)

        key = ("gdn_chunk", training, inputs.kind(), initial is None)
        o, final, ctx.passage = compiled_together(key, v.device, work)
        return o, final

    @staticmethod
    def backward(ctx, do: Tensor, dfinal: Tensor | None):
        *tensors, initial = ctx.saved_tensors
        inputs = Inputs(*tensors, ctx.options, product_dtype(tensors[0]))
        dfinal = dfinal.contiguous() if ctx.options.keep_final else None
        work = partial(all_gradients, inputs, initial, do.contiguous(), dfinal, ctx.passage)
        return compiled_together(("gdn_chunk backward", inputs.kind(), initial is None), do.device, work)


def all_gradients(
    x: Inputs, initial: Tensor | None, do: Tensor, dfinal: Tensor | None, passage: Passage | None
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, g, beta, A_log, dt_bias and the initial state (None where there is no such input), None."""
    tiles = gdn_prepare(x, for_backward=True)
    states = x.tiles(x.key, x.value)
    passage = scan(x, tiles, initial, states=states, passage=passage)
    out = into_range(x, do, dfinal)
    dinitial = None if initial is None else torch.empty_like(initial, dtype=torch.float32)
    dstates, dnew = scan_backward(x, tiles, out, dinitial, passage)
    kept = tiles.tokens, tiles.attend, tiles.erase, tiles.inverse, tiles.u
    del tiles  # the gradients need none of the others' memory
    gradients = gdn_gradients(x, out, *kept, dnew, states, dstates)
    if initial is not None:
        dinitial = (dinitial * out.by_sequence[..., None, None]).to(initial.dtype)
    return *gradients, dinitial, None
