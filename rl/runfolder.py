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
from deltarl.rl.metrics import MetricsLog

STATE_FILE = "trainer_state.json"
COLLECTOR_FILE = "collector.json"


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
        (path / "job.yaml").write_text(dump_job(job))
        return cls(path, job)

    def checkpoint(self, step: int, stage: str = "rl") -> Path:
        """Where the checkpoint of a step lies: checkpoints/<step>, or sft/checkpoints/<step>."""
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

    def prune(self, keep: int, stage: str = "rl") -> None:
        """Remove old checkpoints: the first and the last `keep` stay."""
        steps = [step for step in self.steps(stage) if step > 0]
        for step in steps[:-keep]:
            shutil.rmtree(self.checkpoint(step, stage))
