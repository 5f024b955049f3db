"""The supervised warm-up: TRL's SFTTrainer on a weighted mix of sources, with our checkpoints and metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from datasets import disable_progress_bars, enable_progress_bars
from tqdm import tqdm
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from deltarl.rl.checkpointing import Checkpointing
from deltarl.rl.interrupt import StopRequest
from deltarl.rl.jobs import Job
from deltarl.rl.problems import Problem
from deltarl.rl.recipes import build_mix
from deltarl.rl.runfolder import RunFolder

CHECKPOINT_EVERY = 200


def sft_config(job: Job, output_dir: str) -> SFTConfig:
    """TRL's settings for a job's SFT stage. Loss on the assistant's tokens only."""
    sft = job.sft
    on_gpu = torch.cuda.is_available()
    micro = sft.micro_batch_size or sft.batch_size
    return SFTConfig(
        output_dir=output_dir,
        seed=job.seed,
        max_steps=sft.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=sft.batch_size // micro,
        learning_rate=sft.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=sft.warmup_steps,
        weight_decay=sft.weight_decay,
        max_length=sft.max_length,
        completion_only_loss=True,
        bf16=job.model.dtype == "bfloat16" and on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
    )


class WarmUp(Checkpointing, SFTTrainer):
    """SFT that writes `sft` rows to the run's metrics and stops, resumably, when asked."""

    def __init__(
        self, *, model: torch.nn.Module, tokenizer: Any, job: Job, dataset: Any, run: RunFolder, stop: StopRequest
    ) -> None:
        self.job, self.run, self.stop = job, run, stop
        self.settings = job.sft
        self.bar: tqdm | None = None
        super().__init__(
            model=model,
            args=sft_config(job, str(run.path)),
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        self.remove_callback(PrinterCallback)
        self._began = time.perf_counter()
        self._tokens = 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write the step's row; checkpoint on the way; stop here if asked."""
        if "train_runtime" in logs:
            return
        super().log(logs, start_time)
        step, now = self.state.global_step, time.perf_counter()
        row = {key: logs[key] for key in ("loss", "learning_rate", "grad_norm", "entropy") if key in logs}
        if "mean_token_accuracy" in logs:
            row["token_accuracy"] = logs["mean_token_accuracy"]
        if "num_tokens" in logs:
            row["tokens"], self._tokens = int(logs["num_tokens"] - self._tokens), logs["num_tokens"]
        self.run.metrics.append({"kind": "sft", "step": step, **row, "seconds": now - self._began})
        self._began = now
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(f"loss {logs.get('loss', float('nan')):.3f}")
        if self.stop.requested or step % CHECKPOINT_EVERY == 0:
            self.write_checkpoint(self.run.checkpoint(step, "sft"))
            self.run.prune("sft")
        self.stop.check()


def warm_up(
    model: torch.nn.Module,
    tokenizer: Any,
    job: Job,
    problems: Sequence[Problem],
    run: RunFolder,
    stop: StopRequest,
    resume_step: int | None,
) -> None:
    """Train `model` in place on the job's SFT mix.

    Raises:
        Interrupted: a stop was requested; sft/checkpoints holds where to go on from.
        UserError: an SFT source is unknown, missing or empty.
    """
    disable_progress_bars()
    dataset = build_mix(
        job.sft.sources, problems, instruction=job.data.instruction, seed=job.seed, n=job.sft.steps * job.sft.batch_size
    )
    trainer = WarmUp(model=model, tokenizer=tokenizer, job=job, dataset=dataset, run=run, stop=stop)
    enable_progress_bars()
    checkpoint = None if resume_step is None else run.checkpoint(resume_step, "sft")
    with tqdm(total=job.sft.steps, initial=resume_step or 0, desc="SFT", unit="step") as trainer.bar:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
