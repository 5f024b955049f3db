"""`deltarl bench trl`: the RL steps of a job through deltarl, and through TRL's own GRPOTrainer with vLLM colocated.

Both take the same model folder, problems in the same order, verifier, batch, learning rate and lengths. TRL cannot
train a Kimi Linear model with vLLM, so the job's `model.path` is some other causal LM.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch

from deltarl.rl.errors import UserError
from deltarl.rl.jobs import Job, load_job

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
        default="vllm" if torch.cuda.is_available() else "transformers",
        help="what TRL generates with (default: vllm on a GPU)",
    )
    bench.add_argument("--limit", type=int, default=300, metavar="S", help="seconds for a side (default: 300)")
    bench.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    bench.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """1 when a side failed or was late. Raises UserError for a job or options that cannot be used."""
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
        rows = trl_steps(job, args.micro_batch, args.trl_engine) if args.side == "trl" else our_steps(job)
        print(json.dumps(rows))
        return 0
    found = {side: in_a_process(side, args) for side in SIDES}
    print(json.dumps(found) if args.json else as_text(found))
    return int(any("failed" in side for side in found.values()))


def in_a_process(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a side measured, in a process of its own, or why it did not."""
    command = [sys.executable, "-P", "-m", "deltarl", "bench", "trl", args.job, "--side", side]
    command += ["--steps", str(args.steps), "--micro-batch", str(args.micro_batch), "--trl-engine", args.trl_engine]
    for override in args.set:
        command += ["--set", override]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {args.limit} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]}
    return summary(json.loads(done.stdout.splitlines()[-1]))


def summary(rows: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Medians over the steps after the first: seconds a step, tokens generated, and these by those."""
    counted = rows[1:]
    seconds = statistics.median(row["seconds"] for row in counted)
    tokens = statistics.median(row["tokens"] for row in counted)
    speed = statistics.median(row["tokens"] / row["seconds"] for row in counted)
    return {"seconds": seconds, "tokens": tokens, "tokens_per_second": speed, "steps": list(rows)}


def our_steps(job: Job) -> list[dict[str, float]]:
    """One row a step: the whole step's seconds, the tokens generated, the seconds of its phases."""
    from deltarl.rl.metrics import read_metrics
    from deltarl.rl.train import train

    with tempfile.TemporaryDirectory() as runs:
        settings = job.model_copy(update={"runs_dir": runs})
        settings.data.heldout_size = 1
        settings.rl.checkpoint_every = job.rl.steps
        path = train(settings)
        steps = [row for row in read_metrics(path / "metrics.jsonl") if row["kind"] == "rl"]
    return [{"seconds": sum(row["time"].values()), "tokens": row["tokens_generated"], **row["time"]} for row in steps]


def trl_steps(job: Job, micro_batch: int, engine: str) -> list[dict[str, float]]:
    """One row a step of TRL's trainer: its seconds, generation and weight sync included, and the tokens generated."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    from deltarl.rewards.adapters import as_trl_reward
    from deltarl.rl.curriculum import InTurn
    from deltarl.rl.parts import load_data, open_host
    from deltarl.rl.problems import user_messages

    rows: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            rows.append({"seconds": time.perf_counter() - self.began})

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "completions/mean_length" in logs:
                rows[-1]["tokens"] = logs["completions/mean_length"] * job.rl.prompts_per_step * job.rl.num_generations

    with tempfile.TemporaryDirectory() as folder, open_host(job) as host:
        problems = InTurn(load_data(job, host).train, seed=job.seed).next_problems(
            job.rl.steps * job.rl.prompts_per_step
        )
        data = Dataset.from_dict(
            {
                "prompt": [user_messages(problem, job.data.instruction) for problem in problems],
                "gold": [problem.gold for problem in problems],
            }
        )
        trainer = GRPOTrainer(
            model=job.model.path,
            reward_funcs=as_trl_reward(host),
            args=trl_settings(job, folder, micro_batch, engine),
            train_dataset=data,
            callbacks=[Clock()],
        )
        trainer.train()
    return rows


def trl_settings(job: Job, folder: str, micro_batch: int, engine: str) -> Any:
    """The job as TRL's GRPOConfig, with TRL's own defaults where the job says nothing."""
    from trl import GRPOConfig

    rl, on_gpu = job.rl, torch.cuda.is_available()
    return GRPOConfig(
        output_dir=folder,
        seed=job.seed,
        max_steps=rl.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=rl.prompts_per_step * rl.num_generations // micro_batch,
        num_generations=rl.num_generations,
        max_completion_length=rl.max_completion_length,
        temperature=rl.temperature,
        top_p=rl.top_p,
        learning_rate=rl.learning_rate,
        lr_scheduler_type=rl.lr_scheduler,
        warmup_steps=rl.warmup_steps,
        weight_decay=rl.weight_decay,
        max_grad_norm=rl.max_grad_norm,
        beta=rl.beta,
        loss_type=rl.loss_type,
        epsilon=rl.epsilon,
        shuffle_dataset=False,
        use_vllm=engine == "vllm",
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=job.rollout.gpu_memory_utilization,
        vllm_max_model_length=job.rollout.max_model_len,
        bf16=job.model.dtype == "bfloat16" and on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=rl.gradient_checkpointing == "all",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


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
