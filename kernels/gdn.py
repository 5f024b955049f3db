"""Gated DeltaNet (arXiv 2412.06464, eq. 10): KDA with one decay per head and token instead of one per channel.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = S_t^T q_t * scale

The operators are KDA's with a decay of width 1, for which no pair of tokens needs a decay per channel. Arguments,
shapes and errors are those of the KDA operators, but g is [B, T, H] and dt_bias [H].
"""

from typing import Any

from torch import Tensor

from deltarl.kernels import chunk, recurrent


def gdn_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Attention over whole sequences; see `kda_chunk`."""
    return chunk.kda_chunk(q, k, v, g.unsqueeze(-1), beta, **options)


def gdn_recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """One token or a few for many sequences; see `kda_recurrent`."""
    return recurrent.kda_recurrent(q, k, v, g.unsqueeze(-1), beta, **options)


def gdn_decode_(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, slots: Tensor, **options: Any
) -> Tensor:
    """One token for each of N sequences with states in a pool, g [N, H]; see `kda_decode_`."""
    return recurrent.kda_decode_(q, k, v, g.unsqueeze(-1), beta, state, slots, **options)
