"""The run folder: job.yaml, metrics.jsonl, traces/, eval/, checkpoints/<step>/; everything a run leaves behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deltarl.rl.errors import UserError
from deltarl.rl.jobs import Job, dump_job, load_job
from deltarl.rl.manifest import Damaged, check
from deltarl.rl.metrics import MetricsLog, read_metrics


class RunFolder:
    """One run's folder and its open metrics log."""

    def __init__(self, path: Path, job: Job) -> None:
        self.path = path
        self.job = job
        self.metrics = MetricsLog(path / "metrics.jsonl")

    @classmethod
    def create(cls, job: Job) -> RunFolder:
        """A new folder `<runs_dir>/<name>`, or `<name>-2`, `-3`, … where that is taken."""
        base = Path(job.runs_dir)
        base.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = base / (job.name if number == 1 else f"{job.name}-{number}")
            try:
                path.mkdir()
                break
            except FileExistsError:
                number += 1
        (path / "job.yaml").write_text(dump_job(job))
        return cls(path, job)

    @classmethod
    def open(cls, path: str | Path, overrides: list[str] | None = None) -> RunFolder:
        """The folder of an earlier run, its job changed by `overrides`. Raises UserError when it is none."""
        path = Path(path)
        if not (path / "job.yaml").is_file():
            raise UserError(f"{path} is not a run folder: it has no job.yaml; runs are listed by: ls runs/")
        job = load_job(path / "job.yaml", overrides)
        changed = path / "job.yaml.tmp"  # other processes of the learner may be reading it
        changed.write_text(dump_job(job))
        os.replace(changed, path / "job.yaml")
        return cls(path, job)

    def checkpoint(self, step: int, stage: str = "rl") -> Path:
        """Where the checkpoint of a step lies: checkpoints/<step>, or <stage>/checkpoints/<step>.

        Stage "sft" is the warm-up; stage "window" has those inside an RL step, by the number of optimizer steps.
        """
        return (self.path if stage == "rl" else self.path / stage) / "checkpoints" / str(step)

    def steps(self, stage: str = "rl") -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        folder = self.checkpoint(0, stage).parent
        if not folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())

    def latest(self, stage: str = "rl") -> int | None:
        """The last step with a complete checkpoint."""
        return max(self.steps(stage), default=None)

    def event(self, what: str, step: int, detail: str = "") -> None:
        """Record something that happened, in metrics.jsonl."""
        self.metrics.append({"kind": "event", "step": step, "what": what, "detail": detail})

    def write_traces(self, kind: str, step: int, rows: Iterable[Mapping[str, Any]], prefix: str = "") -> Path:
        """Write `traces/step_00012.jsonl` or `eval/step_00012.jsonl` at once: a kill leaves the whole file or none."""
        path = self.path / kind / f"{prefix}step_{step:05d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        os.replace(temporary, path)
        return path

    def set_aside_damaged(self, stage: str = "rl") -> list[str]:
        """Rename the latest checkpoints to `<step>.damaged` until one is as it was written; a line for each.

        Raises UserError when the one that RL starts from is damaged: no earlier one is left.
        """
        lines = []
        for step in reversed(self.steps(stage)):
            folder = self.checkpoint(step, stage)
            try:
                check(folder)
                break
            except Damaged as damage:
                if step == 0:
                    raise UserError(f"{damage}; RL starts from it: run the job anew, in a new run folder") from damage
                aside = folder.with_name(f"{step}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(folder, aside)
                before = self.latest(stage)
                start = "the start of the RL step" if stage == "window" else "the start"
                goes_on = f"from {start}" if before is None else f"with checkpoint {before}"
                lines.append(f"checkpoint {step} is damaged ({damage}): going on {goes_on}")
                self.event("damaged_checkpoint", step, lines[-1])
        return lines

    def accuracies(self) -> dict[int, float]:
        """Held-out accuracy by RL step, where it was measured during RL."""
        rows = read_metrics(self.metrics.path)
        return {row["step"]: row["accuracy"] for row in rows if row["kind"] == "eval" and row["stage"] == "during"}

    def prune(self, stage: str = "rl") -> None:
        """Remove the checkpoints that the job's settings do not keep, and those inside RL steps that are complete."""
        rl = self.job.rl
        if stage == "sft":
            kept = kept_steps(self.steps(stage), last=2)
        else:
            shutil.rmtree(self.path / "window", ignore_errors=True)
            kept = kept_steps(
                self.steps(), last=rl.keep_checkpoints, best=rl.keep_best, every=rl.keep_every, scores=self.accuracies()
            )
        for step in set(self.steps(stage)) - kept:
            shutil.rmtree(self.checkpoint(step, stage))


def kept_steps(
    steps: list[int], *, last: int, best: int = 0, every: int | None = None, scores: Mapping[int, float] | None = None
) -> set[int]:
    """Those of `steps` to keep: 0, the `last` ones, the `best` by score (the later of equals), every `every`-th."""
    scored = sorted((score, step) for step, score in (scores or {}).items() if step in steps)
    kept = {0, *sorted(steps)[-last:], *(step for _, step in scored[len(scored) - best :])}
    return {step for step in steps if step in kept or (every is not None and step % every == 0)}
