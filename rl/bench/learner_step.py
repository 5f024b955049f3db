"""Measuring an optimizer step of the learner, for `deltarl bench learner`."""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deltarl.model import HybridForCausalLM, build_model
from deltarl.rl.errors import UserError
from deltarl.rl.forward import checkpoint_activations, enable_scoring, packed_logprobs
from deltarl.rl.losses import aggregate, clipped_surrogate
from deltarl.rl.packing import Pack, make_packs
from deltarl.rollout import Trace

SMOLLM2_135M = {  # the dimensions of HuggingFaceTB/SmolLM2-135M
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, as their data sheets have it


def lengths(count: int, longest: int, spread: float) -> list[int]:
    """`count` lengths, their logarithms spread evenly from longest / spread to longest, in one mixed order."""
    shares = torch.linspace(0, 1, count)[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    return (longest * spread ** (shares - 1)).round().int().tolist()


def measure(size: str, recomputed: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a model size, one for each way."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = build(size, args.vocab).to(device).train()
    enable_scoring(model)
    try:
        checkpoint_activations(model, recomputed if recomputed in ("none", "all") else recomputed.split(","))
    except ValueError as error:
        raise UserError(f"--recompute: {error}, and all or none") from error
    generator = torch.Generator().manual_seed(1)
    traces = [
        Trace(draw(args.prompt, model, generator), draw(length, model, generator), [], [], "length")
        for length in lengths(args.sequences, args.longest, args.spread)
    ]
    whole = [args.prompt + len(trace.completion_ids) for trace in traces]
    packs = [pack.to(device) for pack in make_packs(traces, range(len(traces)), args.budget)]
    rows = [part.to(device) for part in padded(traces, args.budget)]
    passes = {
        "packed": [partial(score_packed, model, pack) for pack in packs],
        "padded": [partial(score_padded, model, part) for part in rows],
    }
    computed = {"packed": sum(whole), "padded": sum(part.ids.numel() for part in rows)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    about = {
        "size": size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "recompute": recomputed,
        "sequences": len(traces),
        "longest": max(whole),
        "shortest": min(whole),
        "tokens": sum(whole),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    work, found = flops(model, whole), []
    for way in args.ways:
        step = partial(optimizer_step, optimizer, passes[way], float(sum(whole) - args.prompt * len(whole)))
        seconds, gib = time_steps(step, args.repeats, device)
        rates = {"tokens_per_second": sum(whole) / seconds, "mfu": mfu(work / seconds)} if seconds else {}
        found.append(
            about
            | {"way": way, "computed": computed[way], "passes": len(passes[way]), "seconds": seconds, "peak_gib": gib}
            | rates
        )
    return found


def build(size: str, vocabulary: int) -> Any:
    """A hybrid of a named size, or a Llama of SmolLM2-135M's, with fresh fp32 weights."""
    if size != "smollm2-135m":
        try:
            return build_model("kda", size, vocab_size=vocabulary)
        except ValueError as error:
            raise UserError(f"--sizes: {error}, and smollm2-135m") from error
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M))


def draw(count: int, model: Any, generator: torch.Generator) -> list[int]:
    return torch.randint(3, model.config.vocab_size, (count,), generator=generator).tolist()


@dataclass(frozen=True)
class Rows:
    """Traces as rows of equal length: ids and mask [B, T]; before [S] into the flattened rows; targets [S]."""

    ids: Tensor
    mask: Tensor
    before: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Rows":
        return Rows(*(x.to(device) for x in (self.ids, self.mask, self.before, self.targets)))


def padded(traces: list[Trace], budget: int) -> list[Rows]:
    """All traces padded to the longest, as many rows a pass as the budget holds."""
    longest = max(len(trace.prompt_ids) + len(trace.completion_ids) for trace in traces)
    found = []
    for first in range(0, len(traces), budget // longest):
        chosen = traces[first : first + budget // longest]
        ids, before = torch.zeros(len(chosen), longest, dtype=torch.long), []
        for row, trace in enumerate(chosen):
            tokens = trace.prompt_ids + trace.completion_ids
            ids[row, : len(tokens)] = torch.tensor(tokens)
            before += range(row * longest + len(trace.prompt_ids) - 1, row * longest + len(tokens) - 1)
        places = torch.tensor(before)
        found.append(Rows(ids, (ids > 0).long(), places, ids.flatten()[places + 1]))
    return found


def score_packed(model: Any, pack: Pack) -> Tensor:
    return packed_logprobs(model, pack, entropy=True).logprobs


def score_padded(model: Any, rows: Rows) -> Tensor:
    """The same from rows with padding on the right."""
    how = {} if isinstance(model, HybridForCausalLM) else {"attention_mask": rows.mask}
    return model(input_ids=rows.ids, score=(rows.before, rows.targets, 1.0, True), **how)[0]


def optimizer_step(optimizer: torch.optim.Optimizer, passes: list[Callable[[], Tensor]], tokens: float) -> None:
    """GRPO's loss per token over all passes, its gradients, and one step; bf16 autocast on a GPU."""
    for score in passes:
        with torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()):
            logprobs = score().unsqueeze(0)
        mask = torch.ones_like(logprobs)
        surrogate = clipped_surrogate(logprobs, logprobs.detach(), mask, mask)
        aggregate(surrogate.loss, mask, "token", sequences=1.0, tokens=tokens, max_length=1).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def time_steps(step: Callable[[], None], repeats: int, device: torch.device) -> tuple[float | None, float | None]:
    """(median seconds of a step after a first one, peak GiB of GPU memory); (None, None) where memory ran out."""
    gpu = device.type == "cuda"
    finish: Callable[[], None] = torch.cuda.synchronize if gpu else lambda: None
    seconds = []
    try:
        step()
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(repeats):
            finish()
            began = time.perf_counter()
            step()
            finish()
            seconds.append(time.perf_counter() - began)
    except torch.cuda.OutOfMemoryError:
        return None, None
    return statistics.median(seconds), torch.cuda.max_memory_allocated() / 2**30 if gpu else None


def flops(model: Any, whole: list[int]) -> float:
    """Floating-point operations of forward and backward over sequences of those lengths, nothing computed twice.

    6 a token for every weight of a matrix product, and attention: forward 2 (K + V) a pair of tokens and head for
    softmax attention (half of the pairs, as it is causal), 6 K V a token and head for the recurrence of KDA; backward
    twice as many.
    """
    config, tokens = model.config, sum(whole)
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.get_input_embeddings().weight.numel()
    if config.tie_word_embeddings:
        weights += model.get_input_embeddings().weight.numel()
    pairs = sum(length**2 for length in whole) / 2
    if not isinstance(model, HybridForCausalLM):
        width = config.hidden_size // config.num_attention_heads
        return 6 * weights * tokens + 3 * config.num_hidden_layers * config.num_attention_heads * 4 * width * pairs
    softmax = config.layer_types.count("full_attention")
    width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    attention = softmax * config.num_attention_heads * 2 * width * pairs
    linear = len(config.layer_types) - softmax
    recurrence = linear * config.linear_num_heads * 6 * config.linear_head_dim**2 * tokens
    return 6 * weights * tokens + 3 * (attention + recurrence)


def mfu(rate: float) -> float | None:
    """Share of the GPU's dense bf16 peak that `rate` operations a second are; None for a device that is not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((rate / peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def as_table(rows: list[dict[str, Any]]) -> str:
    """The rows for reading, with the share of the padded step's time that the packed one takes."""
    lines = [f"{rows[0]['device']}, torch {rows[0]['torch']}"]
    lines.append(
        f"{'size':<14}{'params':>8}{'recompute':>16}{'way':>8}{'passes':>8}{'tokens':>9}{'computed':>10}{'s':>9}"
        f"{'tokens/s':>10}{'MFU':>7}{'peak GiB':>10}{'of padded':>11}"
    )
    padded_seconds = {(row["size"], row["recompute"]): row["seconds"] for row in rows if row["way"] == "padded"}
    for row in rows:
        base = padded_seconds.get((row["size"], row["recompute"]))
        share = row["seconds"] / base if row["seconds"] and base and row["way"] == "packed" else None
        lines.append(
            f"{row['size']:<14}{row['parameters'] / 1e6:>7.0f}M{row['recompute']:>16}{row['way']:>8}{row['passes']:>8}"
            f"{row['tokens']:>9}{row['computed']:>10}{shown(row['seconds'], '.3f', 'no memory'):>9}"
            f"{shown(row.get('tokens_per_second'), '.0f'):>10}{shown(row.get('mfu'), '.1%'):>7}"
            f"{shown(row['peak_gib'], '.2f'):>10}{shown(share, '.2f'):>11}"
        )
    return "\n".join(lines)


def shown(value: float | None, how: str, absent: str = "-") -> str:
    return absent if value is None else format(value, how)
