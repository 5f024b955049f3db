"""The supervised warm-up: packs of conversations from a weighted mix of sources, in one stage or several."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from torch import Tensor
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainingArguments

from deltarl.rl.checkpointing import Checkpointing, Stateful
from deltarl.rl.errors import Diverged, UserError
from deltarl.rl.forward import checkpoint_activations, enable_scoring, packed_logprobs, pads, unwrapped
from deltarl.rl.guard import Guard
from deltarl.rl.interrupt import StopRequest
from deltarl.rl.jobs import Job
from deltarl.rl.jobsections import SFTStage
from deltarl.rl.objective import Tally
from deltarl.rl.packing import Pack, make_packs
from deltarl.rl.packsteps import PackSteps
from deltarl.rl.problems import Problem
from deltarl.rl.recipes import build_mix
from deltarl.rl.runfolder import RunFolder
from deltarl.rl.supervised import encode

CHECKPOINT_EVERY = 200


def training_arguments(job: Job, output_dir: str) -> TrainingArguments:
    """transformers' settings for a job's SFT. Checkpoints, logging and progress are ours."""
    sft = job.sft
    on_gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=output_dir,
        seed=job.seed,
        max_steps=sum(stage.steps for stage in sft.schedule),
        learning_rate=sft.learning_rate,
        weight_decay=sft.weight_decay,
        bf16=job.model.dtype == "bfloat16" and on_gpu,
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def rate_at(stages: Sequence[SFTStage], step: int) -> float:
    """The learning rate of an optimizer step (from 0): in every stage a linear warm-up, then a cosine to 0."""
    for stage in stages:
        if step < stage.steps:
            break
        step -= stage.steps
    else:
        return 0.0
    if step < stage.warmup_steps:
        return stage.learning_rate * step / stage.warmup_steps
    through = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    return stage.learning_rate * 0.5 * (1 + math.cos(math.pi * through))


class WarmUp(PackSteps, Checkpointing, Trainer):
    """SFT that writes `sft` rows to the run's metrics and stops, resumably, when asked.

    mixes: the rows of each stage, `batch_size` for each of its steps.
    """

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        tokenizer: Any,
        job: Job,
        mixes: Sequence[Dataset],
        run: RunFolder,
        stop: StopRequest,
    ) -> None:
        self.job, self.mixes, self.run, self.stop = job, mixes, run, stop
        self.settings = job.sft
        self.guard = Guard(job.rl.max_skipped)
        self.bar: tqdm | None = None
        super().__init__(model=model, args=training_arguments(job, str(run.path)), processing_class=tokenizer)
        self.remove_callback(PrinterCallback)
        enable_scoring(unwrapped(self.model))
        checkpoint_activations(unwrapped(self.model), job.sft.gradient_checkpointing)
        self._tally = Tally()
        self._tokens = 0
        self._began = time.perf_counter()

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rates of the stages, as shares of the section's, which the optimizer was made with."""
        if self.lr_scheduler is None:
            stages, base = self.settings.schedule, self.settings.learning_rate
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: rate_at(stages, step) / base
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Gradients of the mean loss per learned token over the next rows of the mix."""
        model.train()
        sequences = encode(self.processing_class, self._rows(self.state.global_step), self.settings.max_length)
        if not sequences:
            raise UserError(
                f"sft.max_length = {self.settings.max_length} cuts off the answers of all {self.settings.batch_size} "
                f"rows of step {self.state.global_step + 1}; raise it"
            )
        self._tokens = sum(len(sequence.ids) for sequence in sequences)
        targets = float(sum(len(sequence.places) for sequence in sequences))
        budget = self.settings.token_budget
        packs = make_packs(sequences, range(len(sequences)), budget, padded=pads(model))
        losses: list[Callable[[], Tensor]] = [
            lambda pack=pack: self._loss(model, pack.to(self.accelerator.device), targets) for pack in packs
        ]
        loss = self.backward(model, losses)
        if not self.guard.passes([model], loss):
            self._skip()
        return loss

    def _skip(self) -> None:
        """Say that a step is left out, as nothing finite came of it. Raises Diverged if that were enough."""
        step, what = self.state.global_step + 1, f"loss or gradient not finite, {self.guard.in_a_row} in a row"
        self.run.event("skipped_update", step, f"SFT: {what}")
        if self.guard.exhausted:
            raise Diverged(f"stopped in SFT step {step}: {what}")

    def parts(self) -> dict[str, Stateful]:
        """What counts the steps that were left out."""
        return {"guard": self.guard}

    def _rows(self, step: int) -> Any:
        """The rows of an optimizer step, from 0."""
        for stage, mix in zip(self.settings.schedule, self.mixes, strict=True):
            if step < stage.steps:
                return mix.select(range(step * self.settings.batch_size, (step + 1) * self.settings.batch_size))
            step -= stage.steps
        raise IndexError(f"no stage has step {step}")

    def _loss(self, model: torch.nn.Module, pack: Pack, targets: float) -> Tensor:
        """A pack's share of the mean loss over that many learned tokens."""
        with self.accelerator.autocast():
            scored = packed_logprobs(model, pack, entropy=True)
        self._tally.mean("entropy", scored.entropies, torch.ones_like(scored.entropies))
        return -scored.logprobs.sum() / targets

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write the step's row; checkpoint on the way; stop here if asked."""
        if "train_runtime" in logs:
            return
        super().log(logs, start_time)
        step, now = self.state.global_step, time.perf_counter()
        row = {key: logs[key] for key in ("loss", "learning_rate", "grad_norm") if key in logs}
        row |= self._tally.take() | {"skipped": self.guard.take(), "tokens": self._tokens, "seconds": now - self._began}
        self.run.metrics.append({"kind": "sft", "step": step, **row})
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
    """Train `model` in place on the job's SFT stages.

    Raises:
        Interrupted: a stop was requested; sft/checkpoints holds where to go on from.
        UserError: an SFT source is unknown, missing or empty, or the chat template hides what is to be learned.
    """
    disable_progress_bars()
    mixes = [
        build_mix(
            stage.sources,
            problems,
            instruction=job.data.instruction,
            seed=job.seed + number,
            n=stage.steps * job.sft.batch_size,
            turns=job.sft.turns,
        )
        for number, stage in enumerate(job.sft.schedule)
    ]
    enable_progress_bars()
    trainer = WarmUp(model=model, tokenizer=tokenizer, job=job, mixes=mixes, run=run, stop=stop)
    checkpoint = None if resume_step is None else run.checkpoint(resume_step, "sft")
    with tqdm(total=trainer.args.max_steps, initial=resume_step or 0, desc="SFT", unit="step") as trainer.bar:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
