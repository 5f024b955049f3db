"""`deltarl compare`: the same job for several arms or variants and seeds, one process each, and one picture of all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deltarl.rl.errors import UserError
from deltarl.rl.interrupt import Interrupted
from deltarl.rl.jobs import Comparison, Job, dump_job, load_comparison, read_yaml, set_key, validate
from deltarl.rl.metrics import load_run
from deltarl.rl.report import write_comparison

EXIT_INTERRUPTED = 130


def compare(path: str, overrides: list[str], *, dry_run: bool = False) -> Path | None:
    """Run every arm or variant and seed of a comparison file, then write its report; runs already complete are kept.

    The runs differ in `model.arm`, or in what the variants set, and `seed` alone; a seed fixes problems, their order,
    the SFT mix and sampling seeds for all of them. Returns the report, None with `dry_run`.

    Raises:
        UserError: the file or a run's job cannot be used, or a run failed.
        Interrupted: Ctrl-C; the same command goes on where it stopped.
    """
    comparison = load_comparison(path, overrides)
    check_arms(comparison, path)
    folder = Path(comparison.runs_dir) / comparison.name
    jobs = {
        (name, seed): job_of(comparison, Path(path), name, seed)
        for name in comparison.entries
        for seed in comparison.seeds
    }
    if dry_run:
        print("---\n".join(dump_job(job) for job in jobs.values()), end="")
        return None
    for number, ((name, seed), job) in enumerate(jobs.items(), start=1):
        tqdm.write(f"== run {number} of {len(jobs)}: {name}, seed {seed}", file=sys.stderr)
        train_one(job, folder / job.name, f"deltarl compare {path}")
    runs = {name: [folder / jobs[name, seed].name for seed in comparison.seeds] for name in comparison.entries}
    varied = {key for keys in comparison.entries.values() for key, _ in flat(keys)}
    report = write_comparison(folder, runs, varied)
    tqdm.write(f"report: {report}", file=sys.stderr)
    return report


def check_arms(comparison: Comparison, path: str) -> None:
    """Raise UserError for an arm that does not exist, before hours go into the ones that do."""
    from deltarl.model import ARMS  # torch takes seconds to import

    unknown = [arm for arm in comparison.arms if arm not in ARMS]
    if unknown:
        raise UserError(f"{path}: arms: unknown arm {unknown[0]!r}: known arms are {', '.join(sorted(ARMS))}")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"rl": {"steps": 3}}` and `{"rl.steps": 3}` alike as `("rl.steps", 3)`."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def job_of(comparison: Comparison, path: Path, name: str, seed: int) -> Job:
    """The job of one arm or variant and seed: the base job with the overrides, in the comparison's folder."""
    base = path.parent / comparison.base
    values = read_yaml(base)
    for key, value in flat(comparison.set | comparison.entries[name]):
        set_key(values, key, value)
    values |= {"seed": seed, "name": f"{name}-s{seed}", "runs_dir": str(Path(comparison.runs_dir) / comparison.name)}
    job = validate(Job, values, f"{path} over {base}")
    if job.model.path is not None and comparison.arms:
        raise UserError(f"{base}: model.path fixes the architecture; leave it out to compare arms")
    return job


def train_one(job: Job, folder: Path, command: str) -> None:
    """Train one run in a process of its own, going on from `folder` where it was begun."""
    if folder.is_dir():
        record = load_run(folder)
        if record.job != job.model_dump():
            raise UserError(f"{folder} was run with another job; remove it, or give the comparison another name")
        if record.eval_at("after") is not None:
            return
        arguments = ["--resume", str(folder)]
    else:
        job_file = folder.parent / f"{job.name}.yaml"
        job_file.parent.mkdir(parents=True, exist_ok=True)
        job_file.write_text(dump_job(job))
        arguments = [str(job_file)]
    process = subprocess.Popen([sys.executable, "-m", "deltarl", "train", *arguments])
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the run got the Ctrl-C too, and writes its checkpoint
        code = process.wait()
    if code == EXIT_INTERRUPTED:
        raise Interrupted(f"stopped; go on with: {command}")
    if code != 0:
        raise UserError(f"the run {folder} ended with exit code {code}; see its messages above, then repeat: {command}")
