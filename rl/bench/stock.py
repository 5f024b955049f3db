"""`deltarl bench trl`: the RL steps of a job through deltarl, and through TRL's own GRPOTrainer with vLLM colocated.

Both take the same model folder, problems in the same order, verifier, batch, learning rate and lengths. TRL cannot
train a Kimi Linear model with vLLM, so the job's `model.path` is some other causal LM.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from deltarl.rl.errors import UserError

SIDES = ("trl", "deltarl")


def add_options(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("job", help="a job file whose model.path is a causal LM that TRL can train")
    bench.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the job")
    bench.add_argument("--steps", type=int, default=6, metavar="N", help="RL steps; the first is not counted")
    bench.add_argument(
        "--micro-batch", type=int, default=16, metavar="N", help="sequences in a pass of TRL's; deltarl: token_budget"
    )
    bench.add_argument(
        "--trl-engine",
        choices=("vllm", "transformers"),
        help="what TRL generates with (default: vllm on a GPU)",
    )
    bench.add_argument("--limit", type=int, default=300, metavar="S", help="seconds for a side (default: 300)")
    bench.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    bench.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """1 when a side failed or was late. Raises UserError for a job or options that cannot be used."""
    from deltarl.rl.jobs import load_job

    if args.steps < 2:
        raise UserError(f"--steps {args.steps}: give 2 or more, the first is not counted")
    job = load_job(args.job, [*args.set, f"rl.steps={args.steps}", "sft.steps=0", "eval.every=0"])
    if job.model.path is None:
        raise UserError(
            f"{args.job} has no model.path: TRL cannot train an arm; name a folder with --set model.path=DIR"
        )
    if job.rl.algorithm != "grpo" or job.rl.minibatches * job.rl.num_iterations != 1:
        raise UserError(f"{args.job}: this bench compares algorithm grpo with one optimizer step per batch")
    if job.rl.prompts_per_step * job.rl.num_generations % args.micro_batch:
        raise UserError(f"--micro-batch {args.micro_batch} does not divide rl.prompts_per_step x rl.num_generations")
    if args.side:
        from deltarl.rl.bench.stock_steps import our_steps, trl_steps

        rows = trl_steps(job, args.micro_batch, args.trl_engine) if args.side == "trl" else our_steps(job)
        print(json.dumps(rows))
        return 0
    found = {side: in_a_process(side, args) for side in SIDES}
    print(json.dumps(found) if args.json else as_text(found))
    return int(any("failed" in side for side in found.values()))


def in_a_process(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a side measured, in a process of its own, or why it did not."""
    command = [sys.executable, "-P", "-m", "deltarl", "bench", "trl", args.job, "--side", side]
    command += ["--steps", str(args.steps), "--micro-batch", str(args.micro_batch)]
    if args.trl_engine:
        command += ["--trl-engine", args.trl_engine]
    for override in args.set:
        command += ["--set", override]
    try:
        environment = os.environ | {"PYTHONSAFEPATH": "1"}  # as TRL's vLLM starts processes that see the working folder
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit, env=environment)
    except subprocess.TimeoutExpired as error:
        said = last_line((error.stderr or b"").decode(errors="replace"))
        return {"failed": f"not done after {args.limit} s" + (f"; said last: {said}" if said else "")}
    if done.returncode:
        return {"failed": last_line(done.stderr) or f"exit code {done.returncode}"}
    return summary(json.loads(done.stdout.splitlines()[-1]))


def last_line(text: str) -> str:
    """The last line that is not empty; of a line that was written over itself, its last state."""
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def summary(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Medians over the steps after the first: seconds a step, tokens generated, and these by those."""
    counted = rows[1:]
    seconds = statistics.median(row["seconds"] for row in counted)
    tokens = statistics.median(row["tokens"] for row in counted)
    speed = statistics.median(row["tokens"] / row["seconds"] for row in counted)
    return {"seconds": seconds, "tokens": tokens, "tokens_per_second": speed, "steps": list(rows)}


def as_text(found: dict[str, dict[str, Any]]) -> str:
    lines = []
    for side, measured in found.items():
        if "failed" in measured:
            lines.append(f"{side:8s} {measured['failed']}")
        else:
            each = " ".join(f"{row['seconds']:.2f}" for row in measured["steps"])
            lines.append(
                f"{side:8s} {measured['seconds']:6.2f} s a step, {measured['tokens']:,.0f} tokens generated, "
                f"{measured['tokens_per_second']:,.0f} a second of the step   (steps: {each})"
            )
    if not any("failed" in measured for measured in found.values()):
        ratio = found["deltarl"]["seconds"] / found["trl"]["seconds"]
        lines.append(f"deltarl / trl: {ratio:.2f} of the time a step")
    return "\n".join(lines)
