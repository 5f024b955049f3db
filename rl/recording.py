"""A recorded rollout stream: every batch as the learner was given it, and the same run again without an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deltarl.rl.batch import Batch
from deltarl.rl.errors import UserError
from deltarl.rl.groups import Group
from deltarl.rl.interrupt import StopRequest
from deltarl.rl.jobs import Job
from deltarl.rl.metrics import read_jsonl
from deltarl.rl.problems import Problem
from deltarl.rl.runfolder import RunFolder

FOLDER = "rollouts"


def record(run: RunFolder, step: int, groups: Sequence[Group], metrics: Mapping[str, Any]) -> None:
    """Write the batch of the RL step after `step` completed ones to rollouts/: its metrics, then a group a line, with
    tokens, logprobs, versions, texts and verdicts."""
    run.write_traces(FOLDER, step + 1, [{"metrics": metrics}, *(group.state_dict(drawn=True) for group in groups)])


class Recorded:
    """In place of a `Collector`: the batches that another run recorded, in their order; there is no engine.

    Raises UserError where the folder holds no record of a step that the job asks for.
    """

    def __init__(self, *, job: Job, problems: Sequence[Problem], stop: StopRequest) -> None:
        self.job, self.stop = job, stop
        self.problems = {problem.id: problem for problem in problems}
        self.folder = Path(job.rollout.replay) / FOLDER
        self.seconds: Counter[str] = Counter()
        self.say: Callable[[str], None] = lambda text: None
        missing = [step for step in range(1, job.rl.steps + 1) if not self._path(step).is_file()]
        if missing:
            raise UserError(
                f"rollout.replay: {self.folder} holds no record of step {missing[0]}: record a run with "
                "rollout.record=true, or set rl.steps to the steps that it has"
            )

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:05d}.jsonl"

    def collect(self, step: int) -> Batch:
        """The recorded batch of the RL step that follows `step` completed ones."""
        self.stop.check()
        path = self._path(step + 1)
        head, *rows = read_jsonl(path)
        unknown = [row["problem"] for row in rows if row["problem"] not in self.problems]
        if unknown:
            raise UserError(
                f"rollout.replay: {path} needs {unknown[0]}, which the job's data lacks: keep data as it was"
            )
        size = len(rows[0]["traces"])
        groups = [Group.from_state(row, self.problems, size) for row in rows]
        return Batch([sample for group in groups for sample in group.samples()], size, head["metrics"])

    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """There is no engine to be synced."""

    def sleep(self) -> None:
        """There is no engine that has memory."""

    @contextmanager
    def idle(self) -> Iterator[None]:
        """There is no engine to measure with."""
        yield None

    def state_dict(self) -> dict[str, Any]:
        """The step says what comes next."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to put back."""

    def close(self) -> None:
        """Nothing to end."""
