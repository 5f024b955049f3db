"""Groups in the engine and at the verifiers: each completion is graded as it ends, while the others are drawn."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any

from deltarl.rewards import Verdict, VerifierHost
from deltarl.rl.grading import verifier_item
from deltarl.rl.groups import Group
from deltarl.rl.problems import user_messages
from deltarl.rl.prompts import render_prompts
from deltarl.rollout import Request, RolloutWorker, Sampling, Trace

WAIT_SECONDS = 0.1


@dataclass
class Opened:
    """A group since it was opened last, and the verdicts that are outstanding."""

    group: Group
    awaited: int = 0


class Stream:
    """Groups that are being drawn and graded.

    step_tokens: tokens that a completion gets each time its group is opened; None: all it may have. A group is
    resting when it has an unfinished completion, and nothing of it is drawn or verified.

    drawn: tokens the engine drew, those of dropped groups included. busy: seconds in which it had something to draw.
    hidden: those of them in which a verdict was awaited as well.
    """

    def __init__(
        self,
        *,
        worker: RolloutWorker,
        host: VerifierHost,
        tokenizer: Any,
        sampling: Sampling,
        seed: int,
        instruction: str,
        step_tokens: int | None = None,
    ) -> None:
        self.worker, self.host, self.tokenizer, self.sampling = worker, host, tokenizer, sampling
        self.seed, self.instruction, self.step_tokens = seed, instruction, step_tokens
        self.opened: dict[int, Opened] = {}
        self.drawn = 0
        self.busy = self.hidden = 0.0
        self._verdicts: SimpleQueue[tuple[Opened, int, Future[Verdict]]] = SimpleQueue()

    def open(self, group: Group) -> None:
        """Draw what a group lacks."""
        self.opened[group.number] = Opened(group)
        self._draw(group)

    def _draw(self, group: Group) -> None:
        (prompt,) = render_prompts(self.tokenizer, [user_messages(group.problem, self.instruction)])
        seeds, names = group.seeds(self.seed), _names(group)
        requests = []
        for place, begun in enumerate(group.traces):
            if begun is None or begun.finish_reason == "suspended":
                request = Request(names[place], prompt, self.sampling, seeds[place], begun)
                if self.step_tokens is not None:
                    most = min(self.sampling.max_tokens, request.drawn + self.step_tokens)
                    request = replace(request, sampling=replace(self.sampling, max_tokens=most))
                requests.append(request)
        self.worker.add(requests)

    def advance(self) -> list[Group]:
        """One step of the engine, or, where it has nothing to draw, a wait for a verdict; the groups that got one."""
        began = time.perf_counter()
        working, awaiting = self.worker.unfinished > 0, self.awaiting
        for name, trace in self.worker.step() if working else ():
            number, place = map(int, name.split("."))
            self._take_in(self.opened[number], place, trace)
        graded = self._graded(0.0 if working or not awaiting else WAIT_SECONDS)
        if working:
            elapsed = time.perf_counter() - began
            self.busy += elapsed
            self.hidden += elapsed if awaiting else 0.0
        return graded

    def _take_in(self, opened: Opened, place: int, trace: Trace) -> None:
        """Keep what was drawn of a completion, and have it graded if it has ended."""
        group = opened.group
        before = group.traces[place]
        self.drawn += len(trace.completion_ids) - (0 if before is None else len(before.completion_ids))
        if trace.finish_reason == "length" and len(trace.completion_ids) < self.sampling.max_tokens:
            trace = replace(trace, finish_reason="suspended")
        group.traces[place] = trace
        if trace.finish_reason != "suspended":
            group.texts[place] = self.tokenizer.decode(trace.completion_ids, skip_special_tokens=True)
            if not self.host.grouped:
                self._grade(opened, place)
            elif None not in group.texts:
                for index in range(group.size):
                    self._grade(opened, index)

    def _grade(self, opened: Opened, place: int) -> None:
        group = opened.group
        lengths = [len(trace.completion_ids) for trace in group.traces] if self.host.grouped else None
        item = verifier_item(group.problem, group.texts[place], group.traces[place], lengths)
        opened.awaited += 1
        answer = self.host.submit(item)
        answer.add_done_callback(lambda answer: self._verdicts.put((opened, place, answer)))

    def _graded(self, seconds: float) -> list[Group]:
        """Take in the verdicts that are there; waits up to `seconds` for the first."""
        graded: dict[int, Group] = {}
        while True:
            try:
                opened, place, answer = self._verdicts.get(block=seconds > 0, timeout=seconds)
            except Empty:
                return list(graded.values())
            seconds = 0.0
            group = opened.group
            if self.opened.get(group.number) is opened:
                group.verdicts[place] = answer.result()
                opened.awaited -= 1
                graded[group.number] = group

    @property
    def awaiting(self) -> bool:
        """Whether a verdict is outstanding."""
        return any(opened.awaited for opened in self.opened.values())

    def resting(self, group: Group) -> bool:
        """Whether an open group waits to be opened again."""
        if self.opened[group.number].awaited or any(name in self.worker.running for name in _names(group)):
            return False
        return any(trace.finish_reason == "suspended" for trace in group.traces)

    def close(self, group: Group) -> None:
        """Let go of a group: what is being drawn of it is cut short and kept."""
        if group.number in self.opened:
            self._cut(self.opened[group.number])
            del self.opened[group.number]

    def _cut(self, opened: Opened) -> None:
        for name, trace in self.worker.suspend(_names(opened.group)):
            self._take_in(opened, int(name.split(".")[1]), trace)

    def pause(self) -> None:
        """Take every completion out of the engine, keeping what was drawn; `resume` goes on with them."""
        for opened in self.opened.values():
            self._cut(opened)

    def resume(self) -> None:
        """Go on with what `pause` took out."""
        for opened in self.opened.values():
            self._draw(opened.group)


def _names(group: Group) -> list[str]:
    return [f"{group.number}.{place}" for place in range(group.size)]
