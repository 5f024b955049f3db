"""What a learner's processes other than the main one have in place of a run folder and a collector."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deltarl.rl.interrupt import StopRequest
from deltarl.rl.jobs import Job


class FollowedRun:
    """Knows where the main process's run folder lies, and leaves writing to it."""

    def __init__(self, path: Path, job: Job) -> None:
        self.path, self.job = path, job

    def event(self, what: str, step: int, detail: str = "") -> None:
        """Nothing: the main process records it."""

    def write_traces(self, kind: str, step: int, rows: Iterable[Mapping[str, Any]], prefix: str = "") -> None:
        """Nothing: the main process has the same traces."""

    def checkpoint(self, step: int, stage: str = "rl") -> Path:
        """Where the main process writes a checkpoint."""
        return (self.path if stage == "rl" else self.path / stage) / "checkpoints" / str(step)


class FollowedCollector:
    """Has no engine and no verifiers: batches come from the main process."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop
        self.seconds: Counter[str] = Counter()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the main process saves its collector's state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to go on from."""
