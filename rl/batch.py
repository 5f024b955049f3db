"""The traces of one RL step with their verdicts: what a collector gives and the learner learns from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deltarl.rewards import Verdict
from deltarl.rl.grading import part_means
from deltarl.rl.problems import Problem
from deltarl.rollout import Trace


@dataclass(frozen=True)
class Sample:
    """One graded trace. `text`: the completion decoded without special tokens, which is what the verdict is about."""

    problem: Problem
    trace: Trace
    text: str
    verdict: Verdict


@dataclass(frozen=True)
class Batch:
    """The samples of one RL step, group after group: `group` samples of one problem stand side by side.

    metrics: what collecting measured, for the step's row in metrics.jsonl.
    """

    samples: list[Sample]
    group: int
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def rewards(self) -> torch.Tensor:
        """Scores [N], fp32; NaN where the gold was unusable."""
        scores = (sample.verdict.score for sample in self.samples)
        return torch.tensor([math.nan if score is None else score for score in scores])

    def measure(self) -> dict[str, Any]:
        """Rewards, accuracy and lengths of the batch, by the names of metrics.jsonl."""
        verdicts = [sample.verdict for sample in self.samples]
        lengths = [len(sample.trace.completion_ids) for sample in self.samples]
        statuses = Counter(verdict.status for verdict in verdicts)
        graded = len(verdicts) - statuses["gold_error"]
        rewards = self.rewards
        groups = [row[~row.isnan()] for row in rewards.view(-1, self.group)]
        known = rewards[~rewards.isnan()]
        measured: dict[str, Any] = {
            "reward_mean": known.mean().item(),
            "reward_std": known.std().item(),
            "frac_zero_std": sum(len(row) < 2 or bool(row.std() < 1e-6) for row in groups) / len(groups),
            "accuracy": statuses["correct"] / graded if graded else None,
            "length_mean": sum(lengths) / len(lengths),
            "length_max": max(lengths),
            "truncated": sum(s.trace.finish_reason == "length" for s in self.samples) / len(self.samples),
            "tokens_generated": sum(lengths),
            "verdicts": dict(statuses),
        }
        parts = part_means(verdicts)
        return measured | ({"parts": parts} if parts else {}) | self.metrics

    def trace_rows(self, step: int, advantages: Sequence[float]) -> Iterator[dict[str, Any]]:
        """One row per sample for traces/step_*.jsonl."""
        for index, (sample, advantage) in enumerate(zip(self.samples, advantages, strict=True)):
            problem, trace, verdict = sample.problem, sample.trace, sample.verdict
            yield {
                "step": step,
                "index": index,
                "problem_id": problem.id,
                "task": problem.meta.get("task"),
                "group": index // self.group,
                "prompt": problem.question,
                "response": sample.text,
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
