"""The learner: the optimizer steps of an RL step over packs of traces, on TRL's GRPOTrainer.

transformers' Trainer and accelerate keep the loop: optimizer, schedule, devices, mixed precision, logging. Replaced is
what a step does: a collector gives the traces, rl/forward.py their logprobs, rl/objective.py the loss.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PrinterCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

from deltarl.rl.adapters import policy_tensors
from deltarl.rl.alarm import Alarm
from deltarl.rl.algorithms import Algorithm, Scores
from deltarl.rl.batch import Batch
from deltarl.rl.buffered import from_plain, to_plain
from deltarl.rl.checkpointing import Checkpointing, Stateful
from deltarl.rl.collect import Collector
from deltarl.rl.critic import Critic
from deltarl.rl.errors import Diverged
from deltarl.rl.follower import FollowedCollector
from deltarl.rl.forward import checkpoint_activations, enable_scoring, packed_logprobs, pads, unwrapped
from deltarl.rl.guard import Guard
from deltarl.rl.jobs import Job
from deltarl.rl.objective import MicroBatch, Tally
from deltarl.rl.packing import Pack, make_packs
from deltarl.rl.packsteps import PackSteps
from deltarl.rl.ptx import PTXStream
from deltarl.rl.recording import Recorded
from deltarl.rl.replay import keep_for_replay
from deltarl.rl.runfolder import RunFolder
from deltarl.rl.sharding import from_main, gathered, is_main, shares
from deltarl.rl.targets import Targets

TRL_GROUP = 2  # the least that GRPOConfig takes; the collector makes the groups
METRIC_NAMES = ("grad_norm", "learning_rate")


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
        per_device_train_batch_size=TRL_GROUP,
        gradient_accumulation_steps=1,
        num_generations=TRL_GROUP,
        learning_rate=rl.learning_rate,
        lr_scheduler_type=rl.lr_scheduler,
        warmup_steps=rl.warmup_steps,
        weight_decay=rl.weight_decay,
        max_grad_norm=rl.max_grad_norm,
        beta=0.0,
        bf16=job.model.dtype == "bfloat16" and on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=False,
        logging_steps=updates_per_step(job),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


@dataclass(frozen=True)
class Learning:
    """The batch that is learned from, what was computed about it before its first update, and in how many parts."""

    batch: Batch
    scores: Scores
    targets: Targets
    minibatches: int


RECORDS = (Learning, Scores, Targets)
"""What a `Learning` is made of besides its batch."""


class RLTrainer(PackSteps, Checkpointing, GRPOTrainer):
    """Policy optimization on batches of graded traces.

    One RL step is: sync weights, collect a batch, and `updates_per_step(job)` optimizer steps. `after_step(step)`, to
    be set, is called when a step's row has been written and may return True to stop.

    `reference` anchors the KL, and is given where `rl.beta` is more than 0; `algorithm` is GRPO where none is given;
    `ptx` is the supervised stream of `rl.ptx`.

    Raises out of `train()`: Interrupted when a stop is requested while the engine generates or between two optimizer
    steps, a checkpoint can be written then; Diverged when `rl.max_skipped` steps in a row were not finite.
    """

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        tokenizer: Any,
        job: Job,
        collector: Collector | Recorded | FollowedCollector,
        run: RunFolder,
        reference: torch.nn.Module | None = None,
        algorithm: Algorithm | None = None,
        ptx: PTXStream | None = None,
    ) -> None:
        self.job, self.collector, self.run = job, collector, run
        self.settings = job.rl
        self.algorithm = Algorithm(job.rl) if algorithm is None else algorithm
        self.ptx = ptx
        self.after_step: Callable[[int], bool] = lambda step: False
        self.bar: tqdm | None = None
        self.learning: Learning | None = None
        self._seconds: Counter[str] = Counter()
        self._step_began = time.perf_counter()
        self._synced_at = -1
        self._tally = Tally()
        self.alarm = Alarm(job.rollout.alarm, run)
        self.guard = Guard(job.rl.max_skipped)
        collector.say = self.show
        super().__init__(
            model=model,
            reward_funcs=[_graded_by_the_collector],
            args=grpo_config(job, str(run.path)),
            train_dataset=Dataset.from_dict({"prompt": [""]}),
            processing_class=tokenizer,
        )
        self.remove_callback(PrinterCallback)
        self.algorithm.to(self.accelerator.device)
        enable_scoring(unwrapped(self.model))
        checkpoint_activations(unwrapped(self.model), job.rl.gradient_checkpointing)
        if reference is not None:
            reference.requires_grad_(False)
            enable_scoring(reference)
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    @property
    def rl_step(self) -> int:
        """RL steps completed."""
        return self.state.global_step // updates_per_step(self.job)

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Gradients of one minibatch of the current batch of traces; the first of an RL step collects it."""
        model.train()
        update = self.state.global_step % updates_per_step(self.job)
        if update == 0:
            self.learning = self._begin_step(model)
        else:
            from_main(lambda: self.collector.stop.check())
        before, losses = self._tally.copy(), self.losses(model, update)
        loss = self.backward(model, losses)
        learners = [model, *([] if self.algorithm.critic is None else [self.algorithm.critic])]
        if losses and self.guard.passes(learners, loss):
            self._tally.mean("loss", loss.view(1, 1), torch.ones_like(loss).view(1, 1))
            self.algorithm.after_update()
        elif losses:
            self._tally = before
            self._skip()
        return loss

    def _skip(self) -> None:
        """Say that an optimizer step is left out, as nothing finite came of it. Raises Diverged if that were enough."""
        guard, step = self.guard, self.rl_step + 1
        kept = keep_for_replay(self)
        what = f"loss or gradient not finite, {guard.in_a_row} in a row; see why: deltarl replay {kept}"
        self.run.event("skipped_update", step, f"optimizer step {self.state.global_step + 1}: {what}")
        if guard.exhausted:
            raise Diverged(f"stopped in RL step {step}: {what}")

    def losses(self, model: torch.nn.Module, update: int) -> list[Callable[[], Tensor]]:
        """What adds up to the loss of an update of the RL step, pack by pack; nothing in one that is left out.

        A batch in fewer minibatches than `rl.minibatches` leaves out the first updates: a step has as many as ever.
        """
        device, unused = self.accelerator.device, self.job.rl.minibatches - self.learning.minibatches
        update -= unused * self.job.rl.num_iterations
        if update < 0:
            return []
        minibatch = self.minibatch(update)
        packs = self._packs(minibatch)
        tokens = sum(sum(pack.completions) for pack in packs)
        losses = [lambda pack=pack: self.pack_loss(model, pack.to(device), len(minibatch), tokens) for pack in packs]
        if self.ptx is not None and self.algorithm.learns_policy(self.rl_step):
            losses += self.ptx.losses(model, self.state.global_step, self.accelerator, self._tally)
        return losses

    def _begin_step(self, model: torch.nn.Module) -> Learning:
        """Collect a batch of traces from the current weights, and what its updates are measured against."""
        self._step_began = time.perf_counter()
        self._seconds.clear()
        self.collector.seconds.clear()
        # A step's randomness depends on seed and step alone: a resumed run draws what the run before would have drawn.
        set_seed(int(np.random.SeedSequence([self.job.seed, self.rl_step, 1]).generate_state(1)[0]))
        self.sync_engine()
        batch = from_main(lambda: self.collector.collect(self.rl_step))
        if self.job.rollout.sleep:
            from_main(lambda: self.collector.sleep())
            self._synced_at = -1
        self.show("learning")
        began = time.perf_counter()
        lengths = torch.tensor([len(sample.trace.completion_ids) for sample in batch.samples]).unsqueeze(1)
        needs_old = self.algorithm.needs_old
        old, values = self._score(model, batch, self.algorithm.critic) if needs_old else (None, None)
        scores = Scores(
            mask=(torch.arange(int(lengths.max())) < lengths).long(),
            sampler=pad_sequence([torch.tensor(sample.trace.logprobs) for sample in batch.samples], batch_first=True),
            old=old,
            reference=None if self.ref_model is None else self._score(self.ref_model, batch)[0],
            values=values,
        )
        targets = self.algorithm.begin(batch, scores, self.rl_step)
        learning = Learning(batch, scores, targets, self.algorithm.minibatches(scores))
        self._seconds["logprobs"] = time.perf_counter() - began
        of_traces = (targets.advantages * scores.mask).sum(1) / lengths.squeeze(1).clamp(min=1)
        self.run.write_traces("traces", self.rl_step + 1, batch.trace_rows(self.rl_step + 1, of_traces.tolist()))
        return learning

    def sync_engine(self) -> None:
        """Bring the engine to the learner's weights, in place; the version is the RL step."""
        if self._synced_at == self.state.global_step:
            return
        began = time.perf_counter()
        tensors, version = self.weights()
        from_main(lambda: self.collector.sync(tensors, version))
        self._synced_at = self.state.global_step
        self._seconds["sync"] += time.perf_counter() - began

    def weights(self) -> tuple[Iterable[tuple[str, Tensor]], int]:
        """The tensors that the engine should have now, and their version."""
        return policy_tensors(self.accelerator.unwrap_model(self.model)), self.rl_step

    def minibatch(self, update: int) -> list[int]:
        """The traces of an update of the RL step: every iteration over the batch has an order of its own."""
        iteration, part = divmod(update, self.learning.minibatches)
        rng = np.random.default_rng([self.job.seed, self.rl_step, 2, iteration])
        order = rng.permutation(len(self.learning.batch.samples))
        return np.array_split(order, self.learning.minibatches)[part].tolist()

    def _packs(self, rows: list[int]) -> list[Pack]:
        traces = [sample.trace for sample in self.learning.batch.samples]
        return make_packs(traces, rows, self.job.rl.token_budget, padded=pads(self.model))

    @torch.no_grad()
    def _score(self, model: torch.nn.Module, batch: Batch, critic: Critic | None = None) -> list[Tensor | None]:
        """Logprobs of the completions under a model, and their values if there is a critic: [N, T] each, on the CPU."""
        traces = [sample.trace for sample in batch.samples]
        scored_rows: dict[int, tuple[Tensor, Tensor | None]] = {}
        for pack, _ in shares(make_packs(traces, range(len(traces)), self.job.rl.token_budget, padded=pads(model))):
            pack = pack.to(self.accelerator.device)
            if model is self.ref_model:  # the reference is a policy of its own, with its own choice of experts
                pack = replace(pack, routing=None)
            with self.accelerator.autocast():
                scored = packed_logprobs(model, pack, temperature=self.job.rl.temperature, hidden=critic is not None)
                found = None if critic is None else critic(pack, scored.hidden).cpu()
            by_row = pack.split(scored.logprobs.cpu()), [None] * len(pack.rows) if found is None else pack.split(found)
            scored_rows |= {row: both for row, *both in zip(pack.rows, *by_row, strict=True)}
        for of_process in gathered(scored_rows):
            scored_rows |= of_process
        logprobs, values = zip(*(scored_rows[row] for row in range(len(traces))), strict=True)
        return [None if rows[0] is None else pad_sequence(rows, batch_first=True) for rows in (logprobs, values)]

    def pack_loss(self, model: torch.nn.Module, pack: Pack, sequences: int, tokens: int) -> Tensor:
        """A pack's share of the loss of a minibatch of that many sequences and completion tokens."""
        scores, targets, critic = self.learning.scores, self.learning.targets, self.algorithm.critic
        learns = self.algorithm.learns_policy(self.rl_step)
        with self.accelerator.autocast():
            with torch.set_grad_enabled(learns):
                scored = packed_logprobs(
                    model, pack, temperature=self.job.rl.temperature, entropy=True, hidden=critic is not None
                )
            values = None if critic is None else pack.to_rows(critic(pack, scored.hidden))
        logprobs = pack.to_rows(scored.logprobs)

        def recorded(known: Tensor | None) -> Tensor | None:
            return None if known is None else known[pack.rows, : logprobs.shape[1]].to(logprobs.device)

        micro = MicroBatch(
            logprobs=logprobs,
            entropies=pack.to_rows(scored.entropies),
            mask=pack.mask(),
            advantages=recorded(targets.advantages),
            old=logprobs.detach() if scores.old is None else recorded(scores.old),
            sampler=recorded(scores.sampler),
            reference=recorded(scores.reference),
            sequences=float(sequences),
            tokens=float(tokens),
            values=values,
            old_values=recorded(scores.values),
            returns=recorded(targets.returns),
        )
        return self.algorithm.loss(micro, self.rl_step, self._tally)

    def parts(self) -> dict[str, Stateful]:
        """The collector, the algorithm, and inside an RL step its batch and what was measured of it."""
        return {
            "collector": self.collector,
            "algorithm": self.algorithm,
            "guard": self.guard,
            "tally": self._tally,
            "batch": self,
        }

    def state_dict(self) -> dict[str, Any]:
        """The batch that is being learned from; none between two RL steps."""
        return {"learning": to_plain(self.learning)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the middle of that batch."""
        self.learning = from_plain(state["learning"], *RECORDS)

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
        tallied = self._tally.of_all_processes().take()
        row = {
            "kind": "rl",
            "step": self.rl_step,
            **measured,
            **{name: logs[name] for name in METRIC_NAMES if name in logs},
            "loss": None,
            **tallied,
            "skipped": self.guard.take(),
            **self.algorithm.after_step(tallied),
            "weight_version": self.rl_step - 1,
            "time": phases,
        }
        if is_main():
            self.run.metrics.append(row)
            self.alarm.check(self.rl_step, tallied)
        self.learning = None
        if self.bar is not None:
            self.bar.update(1)
        self.show(f"accuracy {measured['accuracy'] or 0:.0%}")
        if self.after_step(self.rl_step):
            self.control.should_training_stop = True


def _graded_by_the_collector(**columns: Any) -> list[float]:
    """TRL's trainer wants a reward function; none is called where TRL does not generate."""
    raise AssertionError("a batch comes with its verdicts")
