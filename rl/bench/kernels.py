"""`deltarl bench kernels`: the KDA operators beside their public peers, in one run.

On a CPU the peer is transformers' torch code. A row gives the seconds of one call (median), the peer's seconds, and how
many times longer the peer takes (`ratio`).
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import KimiLinearConfig, KimiLinearForCausalLM
from transformers.models.kimi_linear import modeling_kimi_linear as kimi

from deltarl.kernels import kda_chunk, kda_recurrent
from deltarl.model import build_model
from deltarl.rl.errors import UserError

REPEATS = 5
PEER_REPEATS = 1
HEADS, WIDTH = 4, 32
TOLERANCE = 1e-4  # fp32 sums of 1024 tokens in another order
CPU_MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 192,
    "linear_num_heads": 2,
    "linear_head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}


@dataclass(frozen=True)
class Row:
    """One case. seconds, peer_seconds: median of one call; ratio: peer_seconds / seconds; what: what a call does."""

    case: str
    what: str
    seconds: float
    peer_seconds: float
    ratio: float


Work = Callable[[], Any]


def bench(device: str, *, as_json: bool) -> None:
    """Print the table, or one JSON object with `rows`. Raises UserError for another device."""
    if device != "cpu":
        raise UserError(f"--device {device} is not known: use cpu")
    rows = []
    for case, what, ours, peer in cpu_cases():
        seconds, peer_seconds = median_seconds(ours, REPEATS), median_seconds(peer, PEER_REPEATS)
        rows.append(Row(case, what, seconds, peer_seconds, peer_seconds / seconds))
        if not as_json:
            print(table_line(rows[-1]), flush=True)
    if as_json:
        print(json.dumps({**about(), "rows": [asdict(row) for row in rows]}))
    else:
        print("  ".join(f"{key} {value}" for key, value in about().items()))


def about() -> dict[str, Any]:
    """Where the numbers were taken."""
    return {"device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__,
            "transformers": transformers.__version__}  # fmt: skip


def table_line(row: Row) -> str:
    ours, peer = f"{row.seconds * 1e3:.1f} ms", f"{row.peer_seconds * 1e3:.1f} ms"
    return f"{row.case:26} {row.what:28} ours {ours:>10}   transformers {peer:>12}   {row.ratio:6.1f} x"


def median_seconds(work: Work, repeats: int) -> float:
    """The median of `repeats` calls, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def cpu_cases() -> Iterator[tuple[str, str, Work, Work]]:
    """(case, what a call does, ours, transformers'), after a check that both compute the same."""
    torch.manual_seed(0)
    yield "cpu-4L-d64-8x1024", "hybrid, forward + backward", *model_pair()

    inputs = raw_inputs(batch=8, tokens=1024)
    ours, peer = partial(kda_chunk, **inputs), partial(peer_attend, kimi.chunk_kimi_delta_attention, **inputs)
    same(ours()[0], peer()[0])
    yield "cpu-chunk-8x1024-h4-k32", "kda_chunk, forward", ours, peer

    inputs = raw_inputs(batch=64, tokens=1) | {"initial_state": torch.randn(64, HEADS, WIDTH, WIDTH)}
    ours, peer = partial(kda_recurrent, **inputs), partial(peer_attend, kimi.recurrent_kimi_delta_attention, **inputs)
    same(ours()[0], peer()[0])
    yield "cpu-decode-64-h4-k32", "kda_recurrent, one token", ours, peer


def model_pair() -> tuple[Work, Work]:
    """Forward and backward of the loss on 8 rows of 1024 tokens: our hybrid, and transformers' of the same weights."""
    model = build_model("kda", "2m", vocab_size=512, **CPU_MODEL)
    settings = {
        key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "architectures")
    }
    peer = KimiLinearForCausalLM(KimiLinearConfig(**settings))
    peer.load_state_dict(model.state_dict())
    ids = torch.randint(0, 512, (8, 1024))
    same(model(input_ids=ids[:1, :70]).logits, peer(input_ids=ids[:1, :70]).logits)
    return partial(train_once, model, ids), partial(train_once, peer, ids)


def train_once(model: torch.nn.Module, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()


def raw_inputs(batch: int, tokens: int) -> dict[str, Tensor]:
    """Raw projections as a layer makes them, with gates as a fresh layer has them."""
    q, k, v, g = (torch.randn(batch, tokens, HEADS, WIDTH) for _ in range(4))
    gate = {"A_log": torch.rand(HEADS).mul(15).add(1).log(), "dt_bias": torch.full((HEADS * WIDTH,), -4.0)}
    return {"q": q, "k": k, "v": v, "g": g, "beta": torch.randn(batch, tokens, HEADS), **gate}


def peer_attend(
    operator: Callable, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor, dt_bias: Tensor,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """transformers' operator, which takes the gate and the sigmoid as already applied."""
    decay = -A_log.exp().view(-1, 1) * F.softplus(g + dt_bias.view(g.shape[-2:]))
    return operator(
        q,
        k,
        v,
        decay,
        beta.sigmoid(),
        initial_state=initial_state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )


def same(ours: Tensor, peer: Tensor) -> None:
    """Raises RuntimeError when the two differ by more than fp32 rounding: then the times compare nothing."""
    error = (ours - peer).norm() / peer.norm()
    if not error < TOLERANCE:
        raise RuntimeError(f"the two implementations differ by {error:.1e}: their times cannot be compared")
