"""What waits for a worker of the pool, and what has been answered."""

import threading
from collections import Counter, deque
from collections.abc import Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue

from deltarl.rewards.stats import LatencyHistogram
from deltarl.rewards.types import Status, Verdict

ATTEMPTS = 3
BATCH_TASKS = 128
BATCH_CHARS = 1 << 20
BATCH_SECONDS = 0.02
RECENT = 1 / 16
FIRST_PAUSE = 0.05
DOUBLINGS = 6


class HostClosed(RuntimeError):
    """The host was closed before it answered."""


class Reply:
    """The verdict of one task of a stream, which only the stream waits for: the part of a Future that it needs, at an
    eighth of the cost. Once answered, (index, reply) is put into `done`."""

    __slots__ = ("_cancelled", "_done", "_error", "_index", "_verdict")

    def __init__(self, index: int, done: "SimpleQueue[tuple[int, Reply]]") -> None:
        self._index = index
        self._done = done
        self._cancelled = False
        self._error: Exception | None = None

    def cancel(self) -> None:
        self._cancelled = True

    def running(self) -> bool:
        return False

    def set_running_or_notify_cancel(self) -> bool:
        return not self._cancelled

    def set_result(self, verdict: Verdict) -> None:
        self._verdict = verdict
        self._done.put((self._index, self))

    def set_exception(self, error: Exception) -> None:
        self._error = error
        self._done.put((self._index, self))

    def result(self) -> Verdict:
        """For after it was answered. Raises what `set_exception` was given."""
        if self._error is not None:
            raise self._error
        return self._verdict


@dataclass(slots=True, eq=False)
class Task:
    """message: (kind, response, gold, meta) as the worker gets it. size: its characters. counted: whether its verdict
    goes into the statistics. attempts: workers that were lost to it."""

    message: tuple
    size: int
    counted: bool
    future: "Future[Verdict] | Reply" = field(default_factory=Future)
    attempts: int = 0


class TaskQueue:
    """First in, first out between the threads that ask and the `takers` that answer; counts what is answered.

    max_pending: tasks that may wait before `wait_for_room` blocks.
    """

    def __init__(self, max_pending: int, takers: int) -> None:
        self.counts: Counter[Status] = Counter()
        self.latencies = LatencyHistogram()
        self.lock = threading.RLock()
        self.closed = threading.Event()
        self.seconds = 2 * BATCH_SECONDS  # what a task takes of late; the first come alone, for nobody knows yet
        self._max_pending = max_pending
        self._takers = takers
        self._waiting: deque[Task] = deque()
        self._idle: set[Hashable] = set()
        self._ready: set[Hashable] = set()
        self._deaths = 0
        self._work = threading.Condition(self.lock)
        self._room = threading.Condition(self.lock)

    def put(self, task: Task) -> None:
        """Never blocks. Raises HostClosed."""
        with self.lock:
            if self.closed.is_set():
                raise HostClosed("the verifier host is closed: make a new one")
            self._waiting.append(task)
            self._work.notify()

    def wait_for_room(self) -> None:
        """Returns once no more than `max_pending` tasks wait, or the queue is closed."""
        if len(self._waiting) <= self._max_pending:
            return
        with self.lock:
            self._room.wait_for(lambda: len(self._waiting) <= self._max_pending or self.closed.is_set())

    def take(self, taker: Hashable) -> list[Task]:
        """Waits for work: a few tasks at once where many wait and none takes long, so that a message costs little; one
        that cost a worker already comes alone. Empty when closed. The taker is idle until this returns a task."""
        with self.lock:
            self._idle.add(taker)
            while True:
                self._work.wait_for(lambda: self._waiting or self.closed.is_set())
                if self.closed.is_set():
                    return []
                batch = self._batch()
                if batch:
                    self._idle.discard(taker)
                    return batch

    def take_more(self) -> list[Task]:
        """What `take` would give, for a taker that has some still; empty where none waits, or one that comes alone."""
        with self.lock:
            if not self._waiting or self._waiting[0].attempts:
                return []
            return self._batch()

    def someone_is_idle(self) -> bool:
        return bool(self._idle)

    def give_back(self, tasks: Iterable[Task]) -> None:
        """Puts unanswered tasks in front of those that wait; once closed they fail with HostClosed."""
        tasks = list(tasks)
        with self.lock:
            if not self.closed.is_set():
                self._waiting.extendleft(reversed(tasks))
                self._work.notify(len(tasks))
                return
        _fail(tasks)

    def settle(self, task: Task, verdict: Verdict, seconds: float | None = None) -> None:
        """Answers a task. seconds: how long the verifier had it, None where it never did."""
        with self.lock:
            if seconds is not None:
                self._deaths = 0
                self.seconds += RECENT * (seconds - self.seconds)
            if task.counted:
                self.counts[verdict.status] += 1
                if seconds is not None:
                    self.latencies.add(seconds)
        task.future.set_result(verdict)

    def close(self) -> set[Hashable]:
        """Fails all that waits with HostClosed, wakes everyone, and says which takers are idle, for good."""
        with self.lock:
            self.closed.set()
            waiting, self._waiting = self._waiting, deque()
            self._work.notify_all()
            self._room.notify_all()
            idle = set(self._idle)
        _fail(task for task in waiting if task.future.running() or task.future.set_running_or_notify_cancel())
        return idle

    def set_ready(self, taker: Hashable, ready: bool) -> None:
        """Whether the taker has a worker that loaded its verifier."""
        with self.lock:
            if ready:
                self._ready.add(taker)
            else:
                self._ready.discard(taker)

    def worker_died(self) -> None:
        with self.lock:
            self._deaths += 1

    def broken(self) -> bool:
        """Whether worker after worker died without an answer, and none is left."""
        return self._storm() >= 0 and not self._ready

    def attempts_allowed(self) -> int:
        """Workers that a task may cost: three; one while workers die one after the other without a single answer."""
        return 1 if self._storm() >= 0 else ATTEMPTS

    def pause(self, failures: int) -> float:
        """Seconds to wait before a process is started again, given the starts that failed before: none at first, 0.05 s
        doubling to 3.2 s while all workers die or this one's starts fail, so that a verifier that cannot run does not
        keep the machine busy with starting it."""
        storm = max(self._storm(), failures - ATTEMPTS)
        return FIRST_PAUSE * 2 ** min(storm, DOUBLINGS) if storm >= 0 else 0.0

    def _storm(self) -> int:
        """Deaths in a row beyond those that one round of bad luck explains: each worker lost three times, and one task
        tried three times more."""
        return self._deaths - ATTEMPTS * (self._takers + 1)

    def _batch(self) -> list[Task]:
        quick = int(BATCH_SECONDS / max(self.seconds, 1e-6))
        share = min(BATCH_TASKS, 1 + len(self._waiting) // (4 * self._takers), 1 + quick)
        batch, chars = [], 0
        while self._waiting and len(batch) < share and chars < BATCH_CHARS:
            if batch and self._waiting[0].attempts:
                break
            task = self._waiting.popleft()
            if task.future.running() or task.future.set_running_or_notify_cancel():
                batch.append(task)
                chars += task.size
            if task.attempts:
                break
        if len(self._waiting) <= self._max_pending:
            self._room.notify_all()
        return batch


def _fail(tasks: Iterable[Task]) -> None:
    for task in tasks:
        task.future.set_exception(HostClosed("the verifier host was closed before it answered"))
