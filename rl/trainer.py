"""The learner: the optimizer steps of an RL step over packs of traces, on TRL's GRPOTrainer.

transformers' Trainer and accelerate keep the loop: optimizer, schedule, devices, mixed precision, logging. Replaced is
what a step does: a collector gives the traces, rl/forward.py their logprobs, rl/objective.py the loss.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PrinterCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from deltarl.model import checkpoint_tensors
from deltarl.rl.batch import Batch
from deltarl.rl.checkpointing import Checkpointing
from deltarl.rl.collect import Collector
from deltarl.rl.forward import enable_scoring, packed_logprobs, unwrapped
from deltarl.rl.jobs import Job
from deltarl.rl.losses import group_advantages
from deltarl.rl.objective import MicroBatch, Tally, grpo_loss
from deltarl.rl.packing import Pack, make_packs
from deltarl.rl.runfolder import COLLECTOR_FILE, RunFolder

METRIC_NAMES = ("grad_norm", "loss", "learning_rate")


def updates_per_step(job: Job) -> int:
    """Optimizer steps per RL step: every minibatch of the batch of traces, `num_iterations` times."""
    return job.rl.minibatches * job.rl.num_iterations


def grpo_config(job: Job, output_dir: str) -> GRPOConfig:
    """TRL's settings for a job. Checkpoints, logging and progress are ours, so TRL's are off."""
    rl = job.rl
    on_gpu = torch.cuda.is_available()
    return GRPOConfig(
        output_dir=output_dir,
        seed=job.seed,
        max_steps=rl.steps * updates_per_step(job),
        per_device_train_batch_size=rl.num_generations,
        gradient_accumulation_steps=1,
        num_generations=rl.num_generations,
        learning_rate=rl.learning_rate,
        lr_scheduler_type=rl.lr_scheduler,
        warmup_steps=rl.warmup_steps,
        weight_decay=rl.weight_decay,
        max_grad_norm=rl.max_grad_norm,
        beta=0.0,
        bf16=job.model.dtype == "bfloat16" and on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=rl.gradient_checkpointing,
        logging_steps=updates_per_step(job),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


@dataclass(frozen=True)
class Learning:
    """The batch that is being learned from, and what was computed about it before its first update.

    advantages [N]; old, reference: per trace, the logprobs of its completion under the policy before the first update
    and under the reference; None where the loss has no use for them.
    """

    batch: Batch
    advantages: Tensor
    old: list[Tensor] | None
    reference: list[Tensor] | None


class RLTrainer(Checkpointing, GRPOTrainer):
    """Policy optimization on batches of graded traces.

    One RL step is: sync weights, collect a batch, and `updates_per_step(job)` optimizer steps. `after_step(step)`, to
    be set, is called when a step's row has been written and may return True to stop; checkpoints are only meaningful
    there, between batches of traces.

    `reference` anchors the KL, and is given where `rl.beta` is more than 0.

    Raises `Interrupted` out of `train()` when a stop is requested while the engine generates.
    """

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        tokenizer: Any,
        job: Job,
        collector: Collector,
        run: RunFolder,
        reference: torch.nn.Module | None = None,
    ) -> None:
        self.job, self.collector, self.run = job, collector, run
        self.after_step: Callable[[int], bool] = lambda step: False
        self.bar: tqdm | None = None
        self.learning: Learning | None = None
        self._seconds: Counter[str] = Counter()
        self._step_began = time.perf_counter()
        self._synced_at = -1
        self._tally = Tally()
        collector.say = self.show
        super().__init__(
            model=model,
            reward_funcs=[_graded_by_the_collector],
            args=grpo_config(job, str(run.path)),
            train_dataset=Dataset.from_dict({"prompt": [""]}),
            processing_class=tokenizer,
        )
        self.remove_callback(PrinterCallback)
        enable_scoring(unwrapped(self.model))
        if reference is not None:
            reference.requires_grad_(False)
            enable_scoring(reference)
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    @property
    def rl_step(self) -> int:
        """RL steps completed."""
        return self.state.global_step // updates_per_step(self.job)

    def get_train_dataloader(self) -> DataLoader:
        """One item for each optimizer step of the run; the traces come from the collector."""
        return DataLoader(range(self.args.max_steps), batch_size=1, collate_fn=list)

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Gradients of one minibatch of the current batch of traces; the first of an RL step collects it."""
        model.train()
        update = self.state.global_step % updates_per_step(self.job)
        if update == 0:
            self.learning = self._begin_step(model)
        loss = torch.zeros((), device=self.accelerator.device)
        minibatch = self._minibatch(update)
        packs = self._packs(minibatch)
        tokens = sum(sum(pack.completions) for pack in packs)
        for index, pack in enumerate(packs):
            last = index == len(packs) - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                part = self._loss(model, pack.to(self.accelerator.device), len(minibatch), tokens)
                self.accelerator.backward(part)
            loss += part.detach()
        return loss

    def _begin_step(self, model: torch.nn.Module) -> Learning:
        """Collect a batch of traces from the current weights, and what its updates are measured against."""
        self._step_began = time.perf_counter()
        self._seconds.clear()
        self.collector.seconds.clear()
        # A step's randomness depends on seed and step alone: a resumed run draws what the run before would have drawn.
        set_seed(int(np.random.SeedSequence([self.job.seed, self.rl_step, 1]).generate_state(1)[0]))
        self.sync_engine()
        batch = self.collector.collect(self.rl_step)
        self.show("learning")
        began = time.perf_counter()
        rl = self.job.rl
        advantages = group_advantages(batch.rewards, batch.group, baseline=rl.baseline, scale=rl.scale_rewards)
        learning = Learning(
            batch,
            advantages,
            old=self._logprobs(model, batch) if updates_per_step(self.job) > 1 else None,
            reference=None if self.ref_model is None else self._logprobs(self.ref_model, batch),
        )
        self._seconds["logprobs"] = time.perf_counter() - began
        self.run.write_traces("traces", self.rl_step + 1, batch.trace_rows(self.rl_step + 1, advantages.tolist()))
        return learning

    def sync_engine(self) -> None:
        """Bring the engine to the learner's weights, in place; the version is the RL step."""
        if self._synced_at == self.state.global_step:
            return
        began = time.perf_counter()
        tensors = checkpoint_tensors(self.accelerator.unwrap_model(self.model))
        self.collector.worker.sync_weights(tensors, version=self.rl_step)
        self._synced_at = self.state.global_step
        self._seconds["sync"] += time.perf_counter() - began

    def _minibatch(self, update: int) -> list[int]:
        """The traces of an update of the RL step: every iteration over the batch has an order of its own."""
        iteration, part = divmod(update, self.job.rl.minibatches)
        rng = np.random.default_rng([self.job.seed, self.rl_step, 2, iteration])
        order = rng.permutation(len(self.learning.batch.samples))
        return np.array_split(order, self.job.rl.minibatches)[part].tolist()

    def _packs(self, rows: list[int]) -> list[Pack]:
        return make_packs([sample.trace for sample in self.learning.batch.samples], rows, self.job.rl.token_budget)

    @torch.no_grad()
    def _logprobs(self, model: torch.nn.Module, batch: Batch) -> list[Tensor]:
        """Logprobs of every trace's completion under a model."""
        found: list[Tensor] = [torch.empty(0)] * len(batch.samples)
        traces = [sample.trace for sample in batch.samples]
        for pack in make_packs(traces, range(len(traces)), self.job.rl.token_budget):
            with self.accelerator.autocast():
                scored = packed_logprobs(model, pack.to(self.accelerator.device), temperature=self.job.rl.temperature)
            for row, values in zip(pack.rows, pack.split(scored.logprobs), strict=True):
                found[row] = values
        return found

    def _loss(self, model: torch.nn.Module, pack: Pack, sequences: int, tokens: int) -> Tensor:
        """A pack's share of the loss of a minibatch of that many sequences and completion tokens."""
        learning, device = self.learning, self.accelerator.device
        with self.accelerator.autocast():
            scored = packed_logprobs(model, pack, temperature=self.job.rl.temperature, entropy=True)
        logprobs = pack.to_rows(scored.logprobs)
        samplers = [torch.tensor(learning.batch.samples[row].trace.logprobs, device=device) for row in pack.rows]

        def recorded(values: list[Tensor] | None) -> Tensor | None:
            return None if values is None else pad_sequence([values[row] for row in pack.rows], batch_first=True)

        old = recorded(learning.old)
        micro = MicroBatch(
            logprobs=logprobs,
            entropies=pack.to_rows(scored.entropies),
            mask=pack.mask(),
            advantages=learning.advantages[pack.rows].unsqueeze(1).to(device),
            old=logprobs.detach() if old is None else old,
            sampler=pad_sequence(samplers, batch_first=True),
            reference=recorded(learning.reference),
            sequences=float(sequences),
            tokens=float(tokens),
        )
        return grpo_loss(self.job.rl, micro, self._tally)

    def write_more(self, folder: Path) -> None:
        """The collector's state."""
        (folder / COLLECTOR_FILE).write_text(json.dumps(self.collector.state_dict()))

    def show(self, doing: str) -> None:
        """Say what is being done at the progress bar, if there is one."""
        if self.bar is not None:
            self.bar.set_postfix_str(doing, refresh=not doing.startswith("generating"))
            self.bar.update(0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write the step's row, then do what comes between steps."""
        if "train_runtime" in logs:
            return
        super().log(logs, start_time)
        elapsed = time.perf_counter() - self._step_began
        measured = self.learning.batch.measure()
        phases = {"generate": 0.0, "sync": 0.0, "verify": 0.0, **self._seconds, **self.collector.seconds}
        phases["update"] = elapsed - sum(phases.values())
        self.run.metrics.append(
            {
                "kind": "rl",
                "step": self.rl_step,
                **measured,
                **{name: logs[name] for name in METRIC_NAMES if name in logs},
                **self._tally.take(),
                "tokens_per_second": measured["tokens_generated"] / phases["generate"],
                "weight_version": self.rl_step - 1,
                "time": phases,
            }
        )
        self.learning = None
        if self.bar is not None:
            self.bar.update(1)
        self.show(f"accuracy {measured['accuracy'] or 0:.0%}")
        if self.after_step(self.rl_step):
            self.control.should_training_stop = True


def _graded_by_the_collector(**columns: Any) -> list[float]:
    """TRL's trainer wants a reward function; none is called where TRL does not generate."""
    raise AssertionError("a batch comes with its verdicts")
