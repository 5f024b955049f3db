"""The engine's logprobs and the learner's of the same long traces, for `deltarl bench mismatch`."""

import argparse
import gc
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltarl.model import load_model
from deltarl.rl.bench.mismatch import BUCKETS
from deltarl.rl.errors import UserError
from deltarl.rl.forward import enable_scoring, packed_logprobs
from deltarl.rl.losses import effective_sample_size, kl_estimate
from deltarl.rl.packing import make_pack
from deltarl.rollout import Sampling, Trace
from deltarl.rollout.worker import VllmWorker

PROMPT_TOKENS = 32


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """What `compare` finds, and where it was found. Raises UserError for a folder that holds no model."""
    try:
        traces = sample(args)
        model, _ = load_model(args.model, torch.float32)
    except ValueError as error:
        raise UserError(str(error)) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    enable_scoring(model)
    engine = torch.tensor([trace.logprobs for trace in traces]).double()
    exact = scored(model, traces, None)
    trained = scored(model, traces, torch.bfloat16) if args.dtype == "bfloat16" else exact
    return compare(engine, trained, exact) | {
        "model": args.model,
        "dtype": args.dtype,
        "state_dtype": args.state_dtype,
        "traces": args.traces,
        "tokens": args.tokens,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def sample(args: argparse.Namespace) -> list[Trace]:
    """Traces of `args.tokens` tokens after random prompts, at temperature 1."""
    vocabulary = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    generator = torch.Generator().manual_seed(args.seed)
    prompts = torch.randint(vocabulary, (args.traces, PROMPT_TOKENS), generator=generator).tolist()
    worker = VllmWorker(
        args.model,
        dtype=args.dtype,
        max_model_len=PROMPT_TOKENS + args.tokens,
        max_num_seqs=args.traces,
        gpu_memory_utilization=args.memory,
        seed=args.seed,
        mamba_ssm_cache_dtype=args.state_dtype,
    )
    try:
        sampling = Sampling(max_tokens=args.tokens, ignore_eos=True)
        return worker.generate(prompts, sampling, seeds=list(range(args.traces)))
    finally:
        worker.close()
        gc.collect()


@torch.no_grad()
def scored(model: torch.nn.Module, traces: list[Trace], autocast: torch.dtype | None) -> Tensor:
    """The learner's logprobs [traces, tokens] of the traces, fp64; one trace at a time."""
    device, rows = next(model.parameters()).device, []
    for index in range(len(traces)):
        with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
            rows.append(packed_logprobs(model, make_pack(traces, [index]).to(device)).logprobs.double().cpu())
    return torch.stack(rows)


def compare(engine: Tensor, trained: Tensor, exact: Tensor) -> dict[str, Any]:
    """What parts the logprobs [traces, tokens] of the engine, of the learner as it trains, and of the learner in fp32.

    floor: mean |trained - exact|. gap, gap_exact: mean |engine - trained|, |engine - exact|. ratio: gap_exact / floor.
    kl: of the engine's policy to the learner's, estimator k3. ess: of the weights exp(trained - engine) per token.
    gap_by_position, floor_by_position: gap_exact and floor in eighths of the traces, first to last.
    """
    gap, floor = (engine - exact).abs(), (trained - exact).abs()
    difference = (engine - trained).abs()
    return {
        "gap": difference.mean().item(),
        "gap_max": difference.max().item(),
        "gap_exact": gap.mean().item(),
        "floor": floor.mean().item(),
        "ratio": (gap.mean() / floor.mean()).item() if floor.any() else None,
        "kl": kl_estimate(engine, trained).mean().item(),
        "ess": effective_sample_size((trained - engine).exp()).item(),
        "gap_by_position": [part.mean().item() for part in gap.tensor_split(BUCKETS, 1)],
        "floor_by_position": [part.mean().item() for part in floor.tensor_split(BUCKETS, 1)],
    }
