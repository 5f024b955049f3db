"""transformers' torch code for KDA under the signatures of deltarl.kernels."""

from collections.abc import Callable
from inspect import unwrap

import torch.nn.functional as F
from torch import Tensor
from transformers.models.kimi_linear import modeling_kimi_linear as kimi


def kda_chunk(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, A_log: Tensor, dt_bias: Tensor,
    initial_state: Tensor | None = None, gate_lower_bound: float | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return attend(kimi.chunk_kimi_delta_attention, q, k, v, g, beta, A_log, dt_bias, initial_state, gate_lower_bound)


def kda_recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, A_log: Tensor, dt_bias: Tensor,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return attend(kimi.recurrent_kimi_delta_attention, q, k, v, g, beta, A_log, dt_bias, initial_state)


def attend(
    operator: Callable, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor, dt_bias: Tensor,
    initial_state: Tensor | None, bound: float | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """transformers' operator itself, not what it may put in its place, which takes gate and sigmoid as applied."""
    raw, rate = g.float() + dt_bias.view(g.shape[-2:]), A_log.exp().view(-1, 1)
    decay = -rate * F.softplus(raw) if bound is None else bound * (rate * raw).sigmoid()
    return unwrap(operator)(
        q,
        k,
        v,
        decay,
        beta.float().sigmoid(),
        initial_state=initial_state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )


OPERATORS = {"kda_chunk": kda_chunk}
