"""The RL steps of a job, ours and those of TRL's own trainer, for `deltarl bench trl`."""

import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from deltarl.rewards.adapters import as_trl_reward
from deltarl.rl.curriculum import InTurn
from deltarl.rl.jobs import Job
from deltarl.rl.metrics import read_metrics
from deltarl.rl.parts import load_data, open_host
from deltarl.rl.problems import user_messages
from deltarl.rl.train import train


def our_steps(job: Job) -> list[dict[str, float]]:
    """One row a step: the whole step's seconds, the tokens generated, the seconds of its phases."""
    with tempfile.TemporaryDirectory() as runs:
        settings = job.model_copy(update={"runs_dir": runs})
        settings.data.heldout_size = 1
        settings.rl.checkpoint_every = job.rl.steps
        path = train(settings)
        steps = [row for row in read_metrics(path / "metrics.jsonl") if row["kind"] == "rl"]
    return [{"seconds": sum(row["time"].values()), "tokens": row["tokens_generated"], **row["time"]} for row in steps]


def trl_steps(job: Job, micro_batch: int, engine: str | None) -> list[dict[str, float]]:
    """One row a step of TRL's trainer: its seconds, generation and weight sync included, and the tokens generated."""
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
                print(f"step {len(rows)}: {rows[-1]['seconds']:.2f} s", file=sys.stderr, flush=True)

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


def trl_settings(job: Job, folder: str, micro_batch: int, engine: str | None) -> GRPOConfig:
    """The job with TRL's own defaults where it says nothing. engine: None for vllm on a GPU, else transformers."""
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
        use_vllm=on_gpu if engine is None else engine == "vllm",
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
