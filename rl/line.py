"""Which groups are drawn next, which are dropped, and when a batch of them is there: the rules of every mode.

Groups stand in line in the order in which their problems were chosen, and batches are taken off its head, so that what
the learner sees does not depend on which completion happened to end first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from deltarl.rl.curriculum import ProblemSource
from deltarl.rl.errors import UserError
from deltarl.rl.groups import Group
from deltarl.rl.jobs import Job
from deltarl.rl.stream import Stream


class Line:
    """The groups between the choice of their problem and the learner.

    Synchronous: a batch is the first `prompts_per_step` groups that are not dropped, drawn by one version of the
    weights; what was drawn beyond them (`oversample`) is forgotten and drawn anew. With `partial_tokens` a batch is
    every group that is complete when each completion has ended or drawn so many tokens; the others go on
    in the next step. With `max_staleness` groups are drawn for that many further batches meanwhile.

    With `dynamic_sampling` a group whose rewards are all equal is dropped, one whose gold is unusable as soon as that
    shows, and another takes its place, up to `max_oversampling` groups for each that is needed.
    """

    def __init__(self, job: Job, source: ProblemSource, stream: Stream) -> None:
        self.rollout, self.source, self.stream = job.rollout, source, stream
        self.size, self.needed, self.batches = job.rl.num_generations, job.rl.prompts_per_step, job.rl.steps
        self.groups: list[Group] = []
        self.waiting: list[Group] = []
        self.taken = 0
        self.next = 0
        self.first = 0
        self.carried = 0

    def tick(self) -> None:
        """Open groups where there is room, advance those that are open, and drop those that are decided."""
        if self.rollout.partial_tokens and self._settled() and not self._head():
            self.waiting = self._undropped()
        while self.waiting or self._room():
            group = self.waiting.pop(0) if self.waiting else self._another()
            self.stream.open(group)
        for group in self.stream.advance():
            if self.rollout.dynamic_sampling and group.ungradable:
                group.dropped = "gold_error"
                self.stream.close(group)
            elif self.rollout.dynamic_sampling and group.complete and group.equal:
                group.dropped = "equal"

    def _another(self) -> Group:
        (problem,) = self.source.next_problems(1)
        group = Group(self.next, problem, self.size)
        self.groups.append(group)
        self.next += 1
        return group

    def _room(self) -> bool:
        """Whether another group is to be drawn now."""
        ahead = self._ahead()
        most = math.ceil(self.rollout.max_oversampling * self.needed) * ahead
        return len(self._undropped()) < self._wanted(ahead) and self.next - self.first < most

    def _ahead(self) -> int:
        """For how many batches groups are drawn now."""
        return min(self.stream.worker.version + self.rollout.max_staleness + 1, self.batches) - self.taken

    def _wanted(self, ahead: int) -> int:
        if self.rollout.partial_tokens:
            return self.carried + self.needed
        return math.ceil(self.rollout.oversample * self.needed) * ahead

    def _undropped(self) -> list[Group]:
        return [group for group in self.groups if group.dropped is None]

    def ready(self) -> bool:
        """Whether the next batch is there. Raises UserError where sampling cannot find a group that varies."""
        if not self._undropped() and not self.waiting and not self._room():
            self._give_up()
        if self.rollout.partial_tokens:
            return self._settled() and bool(self._head())
        head = self._undropped()[: self.needed]
        return all(group.complete for group in head) and (len(head) == self.needed or not self._room())

    def done(self) -> str:
        """How far the groups in line are, for a line of progress."""
        return f"{sum(group.complete for group in self._undropped())}/{len(self._undropped())} groups"

    def _settled(self) -> bool:
        """Whether no open group can advance before it is opened again."""
        if self.waiting or self._room():
            return False
        return all(group.complete or self.stream.resting(group) for group in self._undropped())

    def _give_up(self) -> NoReturn:
        right = sum(group.successes == group.size for group in self.groups)
        wrong = sum(group.successes == 0 for group in self.groups)
        raise UserError(
            f"rollout.dynamic_sampling: none of {len(self.groups)} groups of {self.size} samples had differing rewards "
            f"({right} all correct, {wrong} none correct); change data.difficulty, raise rl.num_generations or "
            "rollout.max_oversampling, or set rollout.dynamic_sampling=false"
        )

    def take(self) -> tuple[list[Group], list[Group]]:
        """The batch that is ready, and the groups dropped on the way to it; both leave the line."""
        batch = self._head()
        last = batch[-1].number
        gone = [g for g in self.groups if g.dropped and (g.number < last or self.rollout.partial_tokens)]
        for group in [*batch, *gone]:
            self.stream.close(group)
            self.groups.remove(group)
            if group.graded:
                self.source.report(group.problem.id, group.successes, group.graded)
        self.taken += 1
        if self.rollout.max_staleness == 0:
            self._rest()
        self._begin()
        return batch, gone

    def _begin(self) -> None:
        """Count from here what the next batch takes."""
        self.first = self.groups[0].number if self.groups and not self.rollout.partial_tokens else self.next
        self.carried = len(self.groups)

    def _head(self) -> list[Group]:
        complete = [group for group in self._undropped() if group.complete]
        return complete if self.rollout.partial_tokens else complete[: self.needed]

    def _rest(self) -> None:
        """Empty the engine: what is left is drawn anew for the next batch, or gone on with where that is asked for."""
        for group in self.groups:
            self.stream.close(group)
            if not self.rollout.partial_tokens:
                group.forget()
        self.waiting = list(self.groups)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next batches depend on; in asynchronous mode, what is in flight is drawn anew."""
        drawn = bool(self.rollout.partial_tokens)
        return {
            "taken": self.taken,
            "next": self.next,
            "groups": [group.state_dict(drawn=drawn) for group in self.groups],
            "source": self.source.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the line that gave `state` stood."""
        for group in self.groups:
            self.stream.close(group)
        self.taken, self.next = state["taken"], state["next"]
        problems = {problem.id: problem for problem in self.source.problems}
        self.groups = [Group.from_state(group, problems, self.size) for group in state["groups"]]
        self.waiting = list(self.groups)
        self.source.load_state_dict(state["source"])
        self._begin()
