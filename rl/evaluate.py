"""Accuracy on held-out problems, sampled by the rollout engine and scored by the job's verifier."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from deltarl.rewards import VerifierHost
from deltarl.rl.grading import part_means, verifier_items
from deltarl.rl.jobs import Job
from deltarl.rl.problems import Problem, user_messages
from deltarl.rl.prompts import render_prompts
from deltarl.rollout import RolloutWorker, Sampling


def evaluate(
    worker: RolloutWorker,
    tokenizer: Any,
    problems: Sequence[Problem],
    host: VerifierHost,
    job: Job,
    *,
    step: int,
    stage: str,
    stop: Any = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Held-out accuracy of the weights in the engine: (metrics row of kind "eval", one trace row per sample).

    Each problem is sampled `eval.samples_per_problem` times at `eval.temperature`; `accuracy` is the mean over
    problems of the share of correct samples, `stderr` the standard error of that mean over problems. A problem whose
    gold the verifier cannot use is left out of the accuracy and counted in `verdicts`.
    """
    repeated = [problem for problem in problems for _ in range(job.eval.samples_per_problem)]
    prompts = render_prompts(tokenizer, [user_messages(problem, job.data.instruction) for problem in repeated])
    sampling = Sampling(
        temperature=job.eval.temperature,
        max_tokens=job.rl.max_completion_length,
        stop_token_ids=tuple(stop_token_ids(tokenizer)),
    )
    seeds = np.random.SeedSequence([job.seed, 2**31]).generate_state(len(repeated)).tolist()
    with tqdm(total=len(repeated), desc=f"evaluating ({stage})", unit="trace", leave=False) as bar:

        def progress(done: int, total: int, tokens: int) -> None:
            bar.update(done - bar.n)
            if stop is not None:
                stop.check()

        traces = worker.generate(prompts, sampling, seeds=seeds, progress=progress)
    responses = tokenizer.batch_decode([trace.completion_ids for trace in traces], skip_special_tokens=True)
    verdicts = host.verify(verifier_items(repeated, responses, traces, job.eval.samples_per_problem))

    per_problem: dict[str, list[float]] = defaultdict(list)
    for problem, verdict in zip(repeated, verdicts, strict=True):
        if verdict.status != "gold_error":
            per_problem[problem.id].append(float(verdict.status == "correct"))
    task_of = {problem.id: str(problem.meta.get("task", "all")) for problem in problems}
    by_task: dict[str, list[float]] = defaultdict(list)
    for identity, scores in per_problem.items():
        by_task[task_of[identity]].append(sum(scores) / len(scores))
    accuracies = [accuracy for scores in by_task.values() for accuracy in scores]
    row = {
        "kind": "eval",
        "step": step,
        "stage": stage,
        "n": len(accuracies),
        "accuracy": float(np.mean(accuracies)) if accuracies else math.nan,
        "stderr": float(np.std(accuracies) / math.sqrt(len(accuracies))) if accuracies else math.nan,
        "samples_per_problem": job.eval.samples_per_problem,
        "temperature": job.eval.temperature,
        "length_mean": float(np.mean([len(trace.completion_ids) for trace in traces])),
        "by_task": {task: {"n": len(s), "accuracy": float(np.mean(s))} for task, s in sorted(by_task.items())},
        "verdicts": dict(Counter(verdict.status for verdict in verdicts)),
    }
    parts = part_means(verdicts)
    if parts:
        row["parts"] = parts
    rows = [
        {
            "step": step,
            "index": index,
            "problem_id": problem.id,
            "task": problem.meta.get("task"),
            "prompt": problem.question,
            "response": response,
            "gold": problem.gold,
            "status": verdict.status,
            "reward": verdict.score,
            "extracted": verdict.extracted,
            "weight_version": trace.versions[-1] if trace.versions else None,
            "finish_reason": trace.finish_reason,
            "n_tokens": len(trace.completion_ids),
        }
        for index, (problem, response, verdict, trace) in enumerate(
            zip(repeated, responses, verdicts, traces, strict=True)
        )
    ]
    return row, rows


def stop_token_ids(tokenizer: Any) -> list[int]:
    """The tokens that end a response."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
