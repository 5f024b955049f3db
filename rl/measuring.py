"""A policy measured outside of a run: its held-out accuracy, and how hard the training problems are for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from deltarl.rewards import VerifierHost
from deltarl.rl.difficulty import describe, pass_rates, write_pass_rates
from deltarl.rl.errors import UserError
from deltarl.rl.evaluate import evaluate
from deltarl.rl.interrupt import Interrupted, StopRequest
from deltarl.rl.jobs import EvalConfig, Job, load_job
from deltarl.rl.parts import Problems, check_engine, load_data, open_engine, open_host, open_model
from deltarl.rl.problems import Problem
from deltarl.rl.prompts import check_prompt_lengths
from deltarl.rl.runfolder import RunFolder
from deltarl.rollout import RolloutWorker


class Target(NamedTuple):
    """What is measured: a run folder's checkpoint of an RL step, or (`run` None, step 0) a job file's `model.path`."""

    job: Job
    run: RunFolder | None
    step: int
    path: str


def find_target(target: str, checkpoint: int | None, overrides: list[str]) -> Target:
    """The policy that is named by a run folder (its last checkpoint, unless one is given) or a job file.

    Raises UserError: neither a run folder with that checkpoint nor a job with a model.
    """
    if not Path(target).is_dir():
        job = load_job(target, overrides)
        if job.model.path is None:
            raise UserError(f"{target} has no model.path: give one with --set model.path=DIR, or name a run folder")
        return Target(job, None, 0, job.model.path)
    job = load_job(Path(target) / "job.yaml", overrides)
    run = RunFolder(Path(target), job)
    step = run.latest() if checkpoint is None else checkpoint
    if step not in run.steps():
        raise UserError(f"{target} has no checkpoint {step}; it has: {', '.join(map(str, run.steps())) or 'none'}")
    return Target(job, run, step, str(run.checkpoint(step)))


class Opened(NamedTuple):
    """What measuring takes."""

    data: Problems
    host: VerifierHost
    tokenizer: Any
    worker: RolloutWorker
    stop: StopRequest


@contextmanager
def opened(job: Job, path: str, part: str) -> Iterator[Opened]:
    """The job's data (its `part`, "train" or "heldout", will be asked), verifiers, and an engine with the policy."""
    check_engine(job)
    with StopRequest() as stop, open_host(job) as host:
        data = load_data(job, host)
        _, tokenizer = open_model(path)
        check_prompt_lengths(tokenizer, getattr(data, part), job)
        worker = open_engine(job, path)
        try:
            yield Opened(data, host, tokenizer, worker, stop)
        finally:
            worker.close()


def evaluate_target(target: str, checkpoint: int | None, overrides: list[str]) -> dict[str, Any]:
    """Held-out accuracy of a run folder's checkpoint (default: the last) or of a job file's `model.path`.

    Prints the row as JSON; for a run folder the traces go to its `eval/again_step_*.jsonl`. Nothing else is changed.

    Raises:
        UserError: neither a run folder with that checkpoint nor a job with a model.
    """
    job, run, step, path = find_target(target, checkpoint, overrides)
    with opened(job, path, "heldout") as parts:
        row, traces = _sampled(job, parts, parts.data.heldout, step)
    if run is not None:
        run.write_traces("eval", step, traces, prefix="again_")
    print(json.dumps(row))
    return row


def measure_difficulty(
    target: str,
    checkpoint: int | None,
    overrides: list[str],
    *,
    samples: int,
    temperature: float,
    band: tuple[float, float],
    output: Path,
) -> list[dict[str, Any]]:
    """Pass rate of each training problem for a policy, over `samples` answers at a temperature: written to `output`.

    Prints the histogram, and how many problems lie in the band. `data.pass_band` of the job is not applied.

    Raises:
        UserError: neither a run folder with that checkpoint nor a job with a model.
    """
    job, _, step, path = find_target(target, checkpoint, overrides)
    whole = job.data.model_copy(update={"pass_rates": None, "pass_band": None})
    asked = EvalConfig(temperature=temperature, samples_per_problem=samples)
    job = job.model_copy(update={"data": whole, "eval": asked})
    with opened(job, path, "train") as parts:
        _, traces = _sampled(job, parts, parts.data.train, step)
    rows = pass_rates(traces)
    write_pass_rates(output, rows)
    print(describe(rows, band))
    print(f"train on the band with: --set data.pass_rates={output} --set 'data.pass_band=[{band[0]:g}, {band[1]:g}]'")
    return rows


def _sampled(
    job: Job, parts: Opened, problems: list[Problem], step: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    _, host, tokenizer, worker, stop = parts
    try:
        return evaluate(worker, tokenizer, problems, host, job, step=step, stage="again", stop=stop)
    except Interrupted:
        raise Interrupted("stopped while evaluating; nothing was written") from None
