"""The CPU's cases: transformers' torch code is the peer."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import KimiLinearConfig, KimiLinearForCausalLM

from deltarl.kernels import kda_chunk, kda_recurrent
from deltarl.model import build_model
from deltarl.rl.bench.kernels import hf
from deltarl.rl.bench.kernels.rows import Row

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


Work = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """build: ours and transformers' work, after a check that both compute the same."""

    name: str
    what: str
    build: Callable[[], tuple[Work, Work]]


def measure(case: Case) -> Row:
    torch.manual_seed(0)
    ours, peer = case.build()
    row = Row(case.name, case.what, seconds=median_seconds(ours, REPEATS))
    row.peers["transformers"] = {"seconds": median_seconds(peer, PEER_REPEATS)}
    return row


def about() -> dict[str, Any]:
    """Where the numbers were taken."""
    return {"device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__,
            "transformers": transformers.__version__}  # fmt: skip


def median_seconds(work: Work, repeats: int) -> float:
    """The median of `repeats` calls, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def chunk_pair() -> tuple[Work, Work]:
    inputs = raw_inputs(batch=8, tokens=1024)
    ours, peer = partial(kda_chunk, **inputs), partial(hf.kda_chunk, **inputs)
    same(ours()[0], peer()[0])
    return ours, peer


def decode_pair() -> tuple[Work, Work]:
    inputs = raw_inputs(batch=64, tokens=1) | {"initial_state": torch.randn(64, HEADS, WIDTH, WIDTH)}
    ours, peer = partial(kda_recurrent, **inputs), partial(hf.kda_recurrent, **inputs)
    same(ours()[0], peer()[0])
    return ours, peer


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


def same(ours: Tensor, peer: Tensor) -> None:
    """Raises RuntimeError when the two differ by more than fp32 rounding: then the times compare nothing."""
    error = (ours - peer).norm() / peer.norm()
    if not error < TOLERANCE:
        raise RuntimeError(f"the two implementations differ by {error:.1e}: their times cannot be compared")


CASES = (
    Case("cpu-4L-d64-8x1024", "hybrid, forward + backward", model_pair),
    Case("cpu-chunk-8x1024-h4-k32", "kda_chunk, forward", chunk_pair),
    Case("cpu-decode-64-h4-k32", "kda_recurrent, one token", decode_pair),
)
