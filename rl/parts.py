"""What a run is made of, opened from its job: problems, verifiers, policy, engine. Bad input becomes a UserError."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from deltarl.model import build_model, load_model
from deltarl.rewards import VerifierHost, VerifierLoadError, VerifierSpec
from deltarl.rl.algorithms import Algorithm
from deltarl.rl.critic import Critic
from deltarl.rl.curriculum import Curriculum, InTurn, ProblemSource
from deltarl.rl.difficulty import in_band, read_pass_rates
from deltarl.rl.errors import UserError
from deltarl.rl.forward import checkpoint_activations, enable_scoring
from deltarl.rl.jobs import Job
from deltarl.rl.problems import Problem, drop_bad_golds, first_gold, load_problems
from deltarl.rl.recipes import build_mix
from deltarl.rl.tokenizer import build_tokenizer
from deltarl.rollout import RolloutWorker, check_vllm_version, make_worker

TOKENIZER_ROWS = 4000


class Problems(NamedTuple):
    """The problems of a run, whose golds its verifier can all parse; pass rates by id, where they are known."""

    train: list[Problem]
    heldout: list[Problem]
    pass_rates: dict[str, float]


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
    """Training and held-out problems whose golds the verifier can grade against, and of the training ones those in
    `data.pass_band`; what was dropped is printed."""
    say("building problems")
    loaded = load_problems(job.data, job.seed)
    kept = []
    for name, problems in (("training", loaded.train), ("held-out", loaded.heldout)):
        good, bad = drop_bad_golds(problems, host.check_golds, job.data.max_bad_gold)
        for problem, reason in bad:
            say(f"  left out {problem.id}: gold {first_gold(problem)!r}: {reason}")
        say(f"  {len(good)} {name} problems" + (f", {len(bad)} left out: their golds do not parse" if bad else ""))
        kept.append(good)
    train, heldout = kept
    rates = {} if job.data.pass_rates is None else read_pass_rates(Path(job.data.pass_rates))
    if job.data.pass_band is not None:
        train = in_band(train, rates, job.data.pass_band)
        say(f"  {len(train)} of {len(kept[0])} training problems have a pass rate in {job.data.pass_band}")
    return Problems(train, heldout, rates)


def open_source(job: Job, problems: Problems) -> ProblemSource:
    """What gives the training problems, in the order that the job asks for."""
    settings = job.rl.curriculum
    if settings is None:
        return InTurn(problems.train, seed=job.seed)
    return Curriculum(
        problems.train,
        settings,
        seed=job.seed,
        prompts_per_step=job.rl.prompts_per_step,
        pass_rates=problems.pass_rates,
    )


def open_algorithm(job: Job, model: Any, start: str) -> Algorithm:
    """The job's algorithm for a policy that RL starts at `start`, with the critic if it has one."""
    settings = job.rl.critic
    if settings is None:
        return Algorithm(job.rl)
    trunk = None
    if settings.kind == "model":
        trunk, _ = open_model(settings.path or start)
        vocabulary, read = (m.get_input_embeddings().num_embeddings for m in (model, trunk))
        if vocabulary != read:
            raise UserError(f"rl.critic.path has {read} tokens and the policy {vocabulary}: both need one vocabulary")
        enable_scoring(trunk)
        checkpoint_activations(trunk, job.rl.gradient_checkpointing)
    width = (trunk or model).get_output_embeddings().weight.shape[1]
    return Algorithm(job.rl, Critic(settings, width, trunk))


def new_policy(job: Job, problems: list[Problem]) -> tuple[Any, Any]:
    """A model of the job's arm and size with fresh weights, and a tokenizer trained on the SFT mix."""
    sources = [source for stage in job.sft.schedule for source in stage.sources] or job.sft.sources
    rows = build_mix(sources, problems, instruction=job.data.instruction, seed=job.seed, n=TOKENIZER_ROWS)
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


def check_engine(job: Job) -> None:
    """Raise UserError where the job's engine is not installed, or in a version outside the supported range."""
    if job.rollout.engine == "vllm":
        try:
            check_vllm_version()
        except ValueError as error:
            raise UserError(str(error)) from error


def open_engine(job: Job, path: str) -> RolloutWorker:
    """The rollout engine serving the policy at `path`."""
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
            placement=rollout.placement,
            gpu=rollout.gpu,
            hang_seconds=rollout.hang_seconds,
            max_restarts=rollout.max_restarts,
            sleep=rollout.sleep,
            tensor_parallel=rollout.tensor_parallel,
            record_routing=rollout.replay_routing,
        )
    except ValueError as error:
        raise UserError(f"rollout: {error}") from error


def say(text: str) -> None:
    """A line of progress, above any progress bar."""
    tqdm.write(text, file=sys.stderr)
