"""fla-core's kernels (0.6.0) under the signatures of deltarl.kernels; imported only where fla-core is installed."""

from importlib.metadata import version

from fla.modules.causal_conv1d import causal_conv1d as fla_conv
from fla.modules.norm.fused_norm_gate import rms_norm_gated
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule
from fla.ops.kda import chunk_kda, fused_recurrent_kda
from torch import Tensor

VERSION = version("fla-core")
RAW = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


def kda_chunk(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, A_log: Tensor, dt_bias: Tensor,
    gate_lower_bound: float | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return chunk_kda(
        q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, lower_bound=gate_lower_bound,
        safe_gate=gate_lower_bound is not None, cu_seqlens=cu_seqlens, **RAW,
    )  # fmt: skip


def gdn_chunk(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, A_log: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor | None]:
    return chunk_gated_delta_rule(q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, **RAW)


def kda_decode_(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, slots: Tensor, *, A_log: Tensor,
    dt_bias: Tensor,
) -> Tensor:  # fmt: skip
    """Reads the states in their order and writes new ones: as many bytes as in place, without the look-up of slots."""
    o, _ = fused_recurrent_kda(
        *(x.unsqueeze(1) for x in (q, k, v, g, beta)), A_log=A_log, dt_bias=dt_bias, initial_state=state,
        output_final_state=True, **RAW,
    )  # fmt: skip
    return o.squeeze(1)


def dplr_chunk(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, lower_bound: float
) -> tuple[Tensor, Tensor | None]:
    """S_t = Diag(exp g) S + b (a^T S) + k v^T, with no g below `lower_bound`: that licenses its fastest scheme."""
    return chunk_dplr_delta_rule(q, k, v, a, b, g, lower_bound=lower_bound)


def causal_conv1d(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    return fla_conv(x, weight, activation="silu")


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    return rms_norm_gated(x, gate, weight, None, activation="sigmoid", eps=eps)


OPERATORS = {
    "kda_chunk": kda_chunk,
    "kda_decode_": kda_decode_,
    "gdn_chunk": gdn_chunk,
    "dplr_chunk": dplr_chunk,
    "causal_conv1d": causal_conv1d,
    "gated_rms_norm": gated_rms_norm,
}
