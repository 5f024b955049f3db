"""The learner: TRL's GRPOTrainer over our rollout engine, verifier pool, run folder and checkpoints.

TRL keeps the loop: prompts in order, generation windows, the model's logprobs, accumulation, the optimizer. What is
replaced: where completions come from, how they are scored, advantages and loss (rl/objective.py), what is recorded.
The private parts of TRL used here are pinned by tests/contract/test_trl_contract.py.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import PrinterCallback, set_seed
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from deltarl.model import checkpoint_tensors
from deltarl.rewards import Verdict, VerifierHost
from deltarl.rl.checkpointing import Checkpointing
from deltarl.rl.grading import part_means, verifier_items
from deltarl.rl.interrupt import StopRequest
from deltarl.rl.jobs import Job
from deltarl.rl.losses import group_advantages
from deltarl.rl.objective import MicroBatch, Tally, grpo_loss
from deltarl.rl.problems import Problem, user_messages
from deltarl.rl.runfolder import RunFolder
from deltarl.rollout import RolloutWorker, Sampling, Trace

METRIC_NAMES = {
    "reward": "reward_mean",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "frac_zero_std",
    "completions/mean_length": "length_mean",
    "completions/max_length": "length_max",
    "completions/clipped_ratio": "truncated",
    "grad_norm": "grad_norm",
    "loss": "loss",
    "learning_rate": "learning_rate",
}


def updates_per_step(job: Job) -> int:
    """Optimizer steps per RL step: every minibatch of the batch of traces, `num_iterations` times."""
    return job.rl.minibatches * job.rl.num_iterations


def training_order(problems: Sequence[Problem], job: Job) -> Dataset:
    """One row per prompt of the whole run, in order: the problems reshuffled each pass, by seed.

    The order depends on seed and problems only, so two arms see the same data and a resumed run its own place.
    """
    needed = max(1, job.rl.steps) * job.rl.prompts_per_step
    order: list[int] = []
    epoch = 0
    while len(order) < needed:
        order += np.random.default_rng([job.seed, epoch]).permutation(len(problems)).tolist()
        epoch += 1
    rows = [problems[index] for index in order[:needed]]
    return Dataset.from_dict(
        {
            "prompt": [user_messages(problem, job.data.instruction) for problem in rows],
            "problem": order[:needed],
        }
    )


def grpo_config(job: Job, output_dir: str) -> GRPOConfig:
    """TRL's settings for a job. Checkpoints, logging and progress are ours, so TRL's are off."""
    rl = job.rl
    batch = rl.prompts_per_step * rl.num_generations
    on_gpu = torch.cuda.is_available()
    return GRPOConfig(
        output_dir=output_dir,
        seed=job.seed,
        max_steps=rl.steps * updates_per_step(job),
        per_device_train_batch_size=rl.micro_batch_size,
        gradient_accumulation_steps=batch // (rl.minibatches * rl.micro_batch_size),
        steps_per_generation=batch // rl.micro_batch_size,
        num_generations=rl.num_generations,
        num_iterations=rl.num_iterations,
        max_completion_length=rl.max_completion_length,
        temperature=rl.temperature,
        top_p=rl.top_p,
        learning_rate=rl.learning_rate,
        lr_scheduler_type=rl.lr_scheduler,
        warmup_steps=rl.warmup_steps,
        weight_decay=rl.weight_decay,
        max_grad_norm=rl.max_grad_norm,
        beta=0.0,
        scale_rewards="none",
        vllm_importance_sampling_correction=False,
        shuffle_dataset=False,
        bf16=job.model.dtype == "bfloat16" and on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=rl.gradient_checkpointing,
        logging_steps=updates_per_step(job),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
    )


class EngineBridge:
    """What GRPOTrainer asks of its `vllm_generation`, answered by a RolloutWorker."""

    def __init__(self, trainer: RLTrainer) -> None:
        self.trainer = trainer

    def sync_weights(self) -> None:
        """Put the learner's weights into the running engine."""
        self.trainer.sync_engine()

    def generate(
        self, prompts: list[list[int]], images: object, num_generations: int, profiler: object = None
    ) -> tuple[None, list[list[int]], list[list[list[float]]], None]:
        """Sample one completion per prompt (prompts come repeated); logprobs as [sequence][token][1]."""
        traces = self.trainer.sample(prompts)
        return None, [t.completion_ids for t in traces], [[[lp] for lp in t.logprobs] for t in traces], None


class RLTrainer(Checkpointing, GRPOTrainer):
    """GRPO on a rollout engine.

    One RL step is: sync weights, sample `prompts_per_step × num_generations` traces, verify, and
    `updates_per_step(job)` optimizer steps. `after_step(step)`, to be set, is called when a step's row has been written
    and may return True to stop; checkpoints are only meaningful there, between batches of traces.

    `reference` anchors the KL, and is given where `rl.beta` is more than 0.

    Raises `Interrupted` out of `train()` when a stop is requested while the engine generates.
    """

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        tokenizer: Any,
        job: Job,
        problems: Sequence[Problem],
        worker: RolloutWorker,
        host: VerifierHost,
        run: RunFolder,
        stop: StopRequest,
        reference: torch.nn.Module | None = None,
    ) -> None:
        self.job, self.problems, self.worker, self.host, self.run, self.stop = job, problems, worker, host, run, stop
        self.after_step: Callable[[int], bool] = lambda step: False
        self.bar: tqdm | None = None
        self._seconds: Counter[str] = Counter()
        self._step_began = time.perf_counter()
        self._traces: list[Trace] = []
        self._verdicts: list[Verdict] = []
        self._graded: list[tuple[Problem, str]] = []
        self._window: dict[str, Any] = {}
        self._tally = Tally()
        super().__init__(
            model=model,
            reward_funcs=[self._verify],
            args=grpo_config(job, str(run.path)),
            train_dataset=training_order(problems, job),
            processing_class=tokenizer,
        )
        self.remove_callback(PrinterCallback)
        self.use_vllm = True
        self.vllm_generation = EngineBridge(self)
        self._last_loaded_step = -1
        if reference is not None:
            self._set_reference(reference)

    def _set_reference(self, reference: torch.nn.Module) -> None:
        """Anchor the KL to `reference`, frozen; TRL would load one by the model's hub name instead."""
        self.beta = self.job.rl.beta
        reference.requires_grad_(False)
        add_fused_lm_head(reference, temperature=self.temperature)
        self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    @property
    def rl_step(self) -> int:
        """RL steps completed."""
        return self.state.global_step // updates_per_step(self.job)

    def sync_engine(self) -> None:
        """Bring the engine to the learner's weights, in place; the version is the RL step."""
        began = time.perf_counter()
        self.worker.sync_weights(checkpoint_tensors(self.accelerator.unwrap_model(self.model)), version=self.rl_step)
        self._last_loaded_step = self.state.global_step
        self._seconds["sync"] += time.perf_counter() - began

    def sample(self, prompts: list[list[int]]) -> list[Trace]:
        """One trace per prompt from the engine, seeded by (job seed, step, index)."""
        began = time.perf_counter()
        rl = self.job.rl
        sampling = Sampling(
            temperature=rl.temperature,
            top_p=rl.top_p,
            max_tokens=rl.max_completion_length,
            stop_token_ids=tuple(self.eos_token_ids),
        )
        seeds = np.random.SeedSequence([self.job.seed, self.rl_step]).generate_state(len(prompts)).tolist()

        def progress(done: int, total: int, tokens: int) -> None:
            self.stop.check()
            if self.bar is not None:
                self.bar.set_postfix_str(f"generating {done}/{total}", refresh=False)
                self.bar.update(0)

        self._traces = self.worker.generate(prompts, sampling, seeds=seeds, progress=progress)
        self._seconds["generate"] += time.perf_counter() - began
        return self._traces

    def _verify(
        self, prompts: list[Any], completions: list[Any], problem: list[int], **columns: Any
    ) -> list[float | None]:
        """TRL reward function: the job's verifier in its worker pool; None where the gold is unusable."""
        began = time.perf_counter()
        if self.bar is not None:
            self.bar.set_postfix_str(f"verifying {len(completions)}", refresh=True)
        self._graded = [
            (self.problems[index], completion[0]["content"] if isinstance(completion, list) else completion)
            for index, completion in zip(problem, completions, strict=True)
        ]
        rows, texts = zip(*self._graded, strict=True)
        self._verdicts = self.host.verify(verifier_items(rows, texts, self._traces, self.job.rl.num_generations))
        self._seconds["verify"] += time.perf_counter() - began
        if self.bar is not None:
            self.bar.set_postfix_str("learning", refresh=True)
        return [verdict.score for verdict in self._verdicts]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._step_began = time.perf_counter()
        self._seconds.clear()
        # A step's randomness depends on seed and step alone: a resumed run draws what the run before would have drawn.
        set_seed(int(np.random.SeedSequence([self.job.seed, self.rl_step, 1]).generate_state(1)[0]))
        output = super()._generate_and_score_completions(inputs)
        self._seconds["logprobs"] = time.perf_counter() - self._step_began - self._seconds.total()
        tokens = sum(len(trace.completion_ids) for trace in self._traces)
        statuses = Counter(verdict.status for verdict in self._verdicts)
        graded = len(self._verdicts) - statuses["gold_error"]
        self._window = {
            "accuracy": statuses["correct"] / graded if graded else None,
            "verdicts": dict(statuses),
            "tokens_generated": tokens,
            "tokens_per_second": tokens / self._seconds["generate"],
            "weight_version": self.rl_step,
        }
        parts = part_means(self._verdicts)
        if parts:
            self._window["parts"] = parts
        rewards = [math.nan if verdict.score is None else verdict.score for verdict in self._verdicts]
        advantages = group_advantages(
            torch.tensor(rewards), self.num_generations, baseline=self.job.rl.baseline, scale=self.job.rl.scale_rewards
        )
        output["advantages"] = advantages.to(output["advantages"])
        self._write_traces(advantages.tolist())
        return output

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        length = inputs["completion_ids"].shape[1]
        logprobs, entropies, _ = self._get_per_token_logps_and_entropies(
            model, ids, attention_mask, length, compute_entropy=True
        )
        steps = self.current_gradient_accumulation_steps
        batch = MicroBatch(
            logprobs=logprobs,
            entropies=entropies,
            mask=inputs["completion_mask"],
            advantages=inputs["advantages"].unsqueeze(1),
            old=inputs.get("old_per_token_logps", logprobs.detach()),
            sampler=inputs["sampling_per_token_logps"],
            reference=inputs.get("ref_per_token_logps"),
            sequences=float(steps * len(ids)),
            tokens=float(inputs["num_items_in_batch"]) / self.accelerator.num_processes / self.job.rl.minibatches,
        )
        return grpo_loss(self.job.rl, batch, self._tally)

    def _write_traces(self, advantages: list[float]) -> None:
        group = self.job.rl.num_generations
        self.run.write_traces(
            "traces",
            self.rl_step + 1,
            (
                {
                    "step": self.rl_step + 1,
                    "index": index,
                    "problem_id": problem.id,
                    "task": problem.meta.get("task"),
                    "group": index // group,
                    "prompt": problem.question,
                    "response": text,
                    "gold": problem.gold,
                    "status": verdict.status,
                    "reward": verdict.score,
                    "extracted": verdict.extracted,
                    "info": dict(verdict.info),
                    "advantage": advantage,
                    "weight_version": trace.versions[-1] if trace.versions else None,
                    "finish_reason": trace.finish_reason,
                    "n_tokens": len(trace.completion_ids),
                }
                for index, ((problem, text), verdict, trace, advantage) in enumerate(
                    zip(self._graded, self._verdicts, self._traces, advantages, strict=True)
                )
            ),
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write the step's row; TRL fills `logs` with its metrics on the way."""
        if "train_runtime" in logs:
            return
        super().log(logs, start_time)
        named = {METRIC_NAMES[key]: value for key, value in logs.items() if key in METRIC_NAMES}
        elapsed = time.perf_counter() - self._step_began
        phases = {name: self._seconds[name] for name in ("generate", "sync", "verify", "logprobs")}
        phases["update"] = elapsed - sum(phases.values())
        self.run.metrics.append(
            {"kind": "rl", "step": self.rl_step, **named, **self._tally.take(), **self._window, "time": phases}
        )
        if self.bar is not None:
            self.bar.update(1)
            self.bar.set_postfix_str(f"accuracy {self._window['accuracy'] or 0:.0%}", refresh=True)
        if self.after_step(self.rl_step):
            self.control.should_training_stop = True
