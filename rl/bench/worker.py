"""`deltarl bench worker`: what the rollout worker adds to a bare `LLM.generate`, on the same engine and prompts."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from deltarl.rl.bench.rollout import DTYPES, MODELS, write_model
from deltarl.rl.errors import UserError


def add_options(bench: argparse.ArgumentParser) -> None:
    bench.add_argument(
        "--model", default="full", choices=MODELS, help="16 layers of width 1024, or a tiny one for CPUs"
    )
    bench.add_argument("--arm", default="kda", help="default: kda")
    bench.add_argument("--sequences", type=int, default=256, metavar="N", help="default: 256")
    bench.add_argument("--prompt", type=int, default=128, metavar="N", help="tokens of a prompt (default: 128)")
    bench.add_argument("--tokens", type=int, default=512, metavar="N", help="tokens to draw for each (default: 512)")
    bench.add_argument("--repeats", type=int, default=5, metavar="N", help="timings of each (default: 5)")
    bench.add_argument("--json", action="store_true", help="print one JSON object instead of a line")


def run(args: argparse.Namespace) -> None:
    """Both in turn, after one warm-up of each. Raises UserError for numbers that cannot be used."""
    if min(args.sequences, args.tokens, args.repeats) < 1 or args.prompt < 2:
        raise UserError("sequences, tokens and repeats must be 1 or more, prompt 2 or more")
    with tempfile.TemporaryDirectory() as work:
        row = measure(args, Path(work))
    if args.json:
        print(json.dumps(row))
    else:
        print(
            f"{args.sequences} x ({args.prompt} + {args.tokens}) tokens: bare {row['bare_seconds']:.3f} s, "
            f"worker {row['worker_seconds']:.3f} s, {row['overhead']:+.1%} (medians of {args.repeats})"
        )


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Medians of both, and the worker's overhead as a share of the bare engine's time."""
    import torch

    from deltarl.rollout import Sampling
    from deltarl.rollout.worker import VllmWorker

    folder = write_model(args.arm, args.model, work / "model", args.prompt + args.tokens)
    worker = VllmWorker(
        folder,
        dtype=DTYPES[args.model],
        max_model_len=args.prompt + args.tokens,
        max_num_seqs=args.sequences,
        gpu_memory_utilization=0.6 if torch.cuda.is_available() else 0.1,
        seed=0,
        load_format="dummy",
    )
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 300, (args.sequences, args.prompt), generator=generator).tolist()
    seeds = list(range(args.sequences))
    sampling = Sampling(max_tokens=args.tokens, ignore_eos=True)
    try:
        ways = {
            "bare": lambda: bare(worker, prompts, sampling, seeds),
            "worker": lambda: worker.generate(prompts, sampling, seeds=seeds, progress=lambda *state: None),
        }
        for way in ways.values():
            way()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - began)
    finally:
        worker.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "bare_seconds": medians["bare"],
        "worker_seconds": medians["worker"],
        "overhead": medians["worker"] / medians["bare"] - 1,
        "all_seconds": seconds,
    }


def bare(worker: Any, prompts: list[list[int]], sampling: Any, seeds: list[int]) -> None:
    """vLLM's own generate, asked for the same tokens and logprobs."""
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            ignore_eos=True,
            seed=seed,
            logprobs=0,
            detokenize=False,
        )
        for seed in seeds
    ]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    worker.llm.generate(inputs, parameters, use_tqdm=False)
