"""From problems to the graded batch of one RL step: generation and verification side by side, in step with the learner
or ahead of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch

from deltarl.rewards import VerifierHost
from deltarl.rl.ahead import Ahead
from deltarl.rl.batch import Batch
from deltarl.rl.curriculum import ProblemSource
from deltarl.rl.evaluate import stop_token_ids
from deltarl.rl.groups import Group
from deltarl.rl.interrupt import StopRequest
from deltarl.rl.jobs import Job
from deltarl.rl.line import Line
from deltarl.rl.recording import record
from deltarl.rl.runfolder import RunFolder
from deltarl.rl.stream import Stream
from deltarl.rollout import RolloutWorker, Sampling

LOOK_SECONDS = 0.2


class Collector:
    """Gives the learner its batches, drawn by the engine and graded by the verifiers; the mode is the job's (`Line`).

    source: which problems come next. run: the folder that takes down every batch, where the job asks for it.

    seconds: what was spent in the phases "generate" (the engine was drawing) and "verify" (it was not, verdicts were
    awaited), or "wait" (asynchronous mode); the caller clears it. say: told what is going on.
    """

    def __init__(
        self,
        *,
        job: Job,
        source: ProblemSource,
        tokenizer: Any,
        worker: RolloutWorker,
        host: VerifierHost,
        stop: StopRequest,
        run: RunFolder | None = None,
    ) -> None:
        self.job, self.worker, self.host, self.stop, self.run = job, worker, host, stop, run
        self.seconds: Counter[str] = Counter()
        self.say: Callable[[str], None] = lambda text: None
        self.stream = Stream(
            worker=worker,
            host=host,
            tokenizer=tokenizer,
            sampling=Sampling(
                temperature=job.rl.temperature,
                top_p=job.rl.top_p,
                max_tokens=job.rl.max_completion_length,
                stop_token_ids=tuple(stop_token_ids(tokenizer)),
                stop_repetition=job.rollout.stop_repetition,
            ),
            seed=job.seed,
            instruction=job.data.instruction,
            step_tokens=job.rollout.partial_tokens,
        )
        self.line = Line(job, source, self.stream)
        self._paused = False
        self._meter = Meter(self.stream)
        self.ahead = Ahead(self._tick, worker.nudge) if job.rollout.max_staleness else None

    def collect(self, step: int) -> Batch:
        """The batch of the RL step that follows `step` completed ones. Raises Interrupted: it can be asked again."""
        began = time.perf_counter()
        if self.ahead is None:
            self._draw()
            groups, metrics = self._take(step)
        else:
            self._wait(self.ahead.until(self.line.ready))
            groups, metrics = self._wait(self.ahead.ask(lambda: self._take(step)))
            self.seconds["wait"] += time.perf_counter() - began
        batch = Batch([sample for group in groups for sample in group.samples()], self.job.rl.num_generations, metrics)
        if self.job.rollout.record:
            record(self.run, step, groups, metrics)
        return batch

    def _draw(self) -> None:
        """Draw and grade in this thread until the batch is there; leaves everything as it was when stopped."""
        before = self.line.state_dict()
        try:
            while not self.line.ready():
                self.stop.check()
                began, busy = time.perf_counter(), self.stream.busy
                self.line.tick()
                drawing = self.stream.busy > busy
                self.seconds["generate" if drawing else "verify"] += time.perf_counter() - began
                self.say(f"generating {self.line.done()}" if drawing else "verifying")
        except BaseException:
            self.line.load_state_dict(before)
            raise

    def _wait(self, answer: Future) -> Any:
        """The result of what the rollout thread was asked for, looking out for a stop meanwhile."""
        while True:
            try:
                return answer.result(timeout=LOOK_SECONDS)
            except TimeoutError:
                self.stop.check()
                self.say(f"waiting for the engine, {self.line.done()}")

    def _tick(self) -> bool:
        """What the rollout thread does over and over."""
        if self._paused:
            return False
        self.line.tick()
        return self.worker.unfinished > 0 or self.stream.awaiting

    def _take(self, step: int) -> tuple[list[Group], dict[str, Any]]:
        groups, dropped = self.line.take()
        metrics = self._meter.read(self.job, step, groups, dropped, carried=len(self.line.groups))
        return groups, metrics | self.line.source.measure()

    def sync(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Give the engine new weights; in asynchronous mode while it draws."""
        self._do(lambda: self.worker.sync_weights(named_tensors, version))

    def sleep(self) -> None:
        """Have the engine, which has nothing to draw, give its memory to the learner until the next sync."""
        self.worker.sleep()

    @contextmanager
    def idle(self) -> Iterator[RolloutWorker]:
        """The engine with nothing to do, for other work; what was taken out of it goes on afterwards."""
        self._do(self._pause)
        try:
            yield self.worker
        finally:
            self._do(self._resume)

    def _pause(self) -> None:
        self._paused = True
        self.stream.pause()

    def _resume(self) -> None:
        self._paused = False
        self.stream.resume()

    def _do(self, work: Callable[[], Any]) -> Any:
        return work() if self.ahead is None else self.ahead.ask(work).result()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on where this one stands."""
        return self._do(self.line.state_dict)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the collector that gave `state` stood."""
        self._do(lambda: self.line.load_state_dict(state))

    def close(self) -> None:
        """End the rollout thread, if there is one; the worker stays."""
        if self.ahead is not None:
            self.ahead.close()


class Meter:
    """What collecting measures, from one batch to the next."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self._last = self._now()

    def _now(self) -> tuple[float, int, float, float]:
        return time.perf_counter(), self.stream.drawn, self.stream.busy, self.stream.hidden

    def read(
        self, job: Job, step: int, groups: Sequence[Group], dropped: Sequence[Group], carried: int
    ) -> dict[str, Any]:
        """The metrics of a batch taken after `step` steps, by the names of metrics.jsonl."""
        now = self._now()
        wall, drawn, busy, hidden = (new - old for new, old in zip(now, self._last, strict=True))
        self._last = now
        metrics: dict[str, Any] = {
            "tokens_drawn": drawn,
            "tokens_per_second": drawn / busy if busy else 0.0,
            "overlap": {"engine_idle": max(0.0, 1 - busy / wall), "verify_hidden": hidden},
        }
        traces = [trace for group in groups for trace in group.traces]
        if job.rollout.dynamic_sampling:
            graded = [*groups, *dropped]
            metrics["groups_dropped"] = len(dropped)
            metrics["accuracy_drawn"] = sum(g.successes for g in graded) / max(1, sum(g.graded for g in graded))
        if job.rollout.partial_tokens or job.rollout.max_staleness:
            ages = [step - version for trace in traces for version in trace.versions]
            metrics["staleness_mean"], metrics["staleness_max"] = sum(ages) / len(ages), max(ages)
            metrics["groups_carried"] = carried
        if job.rollout.stop_repetition:
            metrics["repeated"] = sum(trace.finish_reason == "repetition" for trace in traces) / len(traces)
        return metrics
