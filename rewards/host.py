"""A warm pool of processes that run a verifier, each task under a deadline.

The processes are started with a plain `exec` of the interpreter, never forked and never re-importing the parent's main
module: the parent may hold torch, vLLM and a GPU. Each is owned by one thread of the parent (slot.py), which takes
tasks from a queue (tasks.py), waits for each answer as long as the deadline allows, and replaces a process that hangs
or dies.
"""

import asyncio
import atexit
import os
import pickle
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, NoReturn

from deltarl.rewards.registry import VerifierLoadError, absolute_spec
from deltarl.rewards.slot import Slot, failed
from deltarl.rewards.tasks import HostClosed, Reply, Task, TaskQueue
from deltarl.rewards.types import STATUSES, Status, Verdict, VerifierSpec
from deltarl.rewards.worker import plain

Item = tuple[str, str | Sequence[str], Mapping[str, Any] | None]


class VerifierHost:
    """Runs a verifier in `workers` processes; usable from any number of threads and event loops of one process.

    spec: what to run (VerifierSpec, or its name). timeout: seconds for one task, counted from when its worker is given
    it, or from the worker's last answer where it was given several; a worker's start does not count. memory_mb: private
    memory of a worker. max_pending: tasks that wait at most: `submit` blocks beyond. max_response_chars,
    max_gold_chars: longer ones get status "limit" without being sent.

    Status "timeout", "limit" and "error" score 0.0. A worker that dies is replaced and its task tried again, up to
    three times in all, so that a process killed from outside changes no verdict; where all workers die one after the
    other without an answer, each task is tried once and starts are spaced out, up to 3.2 s. A task that ran out of
    memory in a worker that had served others is tried again in a fresh one.

    grouped: whether the verifier needs `meta["group_lengths"]` (`Verifier.grouped`).

    The host belongs to the process that made it. A worker dies with that process, however it ends; what a verifier
    starts dies with its worker unless it leaves the worker's process group.

    Raises VerifierLoadError when the verifier does not load, ValueError for a number that makes no sense.
    """

    def __init__(
        self,
        spec: VerifierSpec | str,
        workers: int = 1,
        timeout: float = 5.0,
        memory_mb: int = 2048,
        *,
        max_pending: int = 1024,
        max_response_chars: int = 1_000_000,
        max_gold_chars: int = 100_000,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}: a verifier host needs at least 1")
        if timeout <= 0:
            raise ValueError(f"timeout is {timeout}: give the seconds one verification may take")
        if max_pending < 1:
            raise ValueError(f"max_pending is {max_pending}: at least 1 task must be able to wait")
        self.spec = absolute_spec(VerifierSpec(spec) if isinstance(spec, str) else spec)
        self.timeout = timeout
        self.memory_mb = memory_mb
        self.max_pending = max_pending
        self.max_response_chars = max_response_chars
        self.max_gold_chars = max_gold_chars
        self._process = os.getpid()
        setup = _pickled_setup(self.spec, memory_mb)
        self._queue = TaskQueue(max_pending, workers)
        self._slots: list[Slot] = []
        atexit.register(self.close)
        try:
            for _ in range(workers):
                self._slots.append(Slot(self._queue, self.spec.name, setup, timeout))
            for slot in self._slots:
                self.grouped = slot.ready.result()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "VerifierHost":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> NoReturn:
        raise TypeError("a verifier host stays in its process: send its spec, and open a host there")

    def submit(self, item: Item) -> "Future[Verdict]":
        """Queues one (response, gold, meta) and returns the future of its verdict; blocks while more than `max_pending`
        tasks wait. Raises HostClosed, here or from the future."""
        future: Future[Verdict] = Future()
        self._put("verify", item, future)
        try:
            self._queue.wait_for_room()
        except BaseException:
            future.cancel()
            raise
        return future

    def verify(self, items: Sequence[Item], progress: Callable[[int, int], None] | None = None) -> list[Verdict]:
        """The verdicts of all items, in their order; `progress(done, total)` is called as they come in."""
        return self._in_order("verify", items, progress)

    def as_completed(self, items: Iterable[Item]) -> Iterator[tuple[int, Verdict]]:
        """(index, verdict) as they come in. At most `max_pending` items are taken ahead of the verdicts handed out, so
        that `items` may be endless. Closing the iterator cancels what still waits."""
        return self._as_completed("verify", items)

    async def averify(self, item: Item) -> Verdict:
        """The verdict of one item. Never blocks the event loop: each coroutine that waits is its own place in line."""
        future: Future[Verdict] = Future()
        self._put("verify", item, future)
        return await asyncio.wrap_future(future)

    async def as_completed_async(
        self, items: Iterable[Item] | AsyncIterable[Item]
    ) -> AsyncIterator[tuple[int, Verdict]]:
        """As `as_completed`, for `async for`; never blocks the event loop, except in what `items` itself does."""
        done: asyncio.Queue[tuple[int, asyncio.Future[Verdict]]] = asyncio.Queue()
        ahead = asyncio.Semaphore(self.max_pending)
        waiting: set[asyncio.Future[Verdict]] = set()

        async def feed() -> None:
            index = 0
            async for item in _asynchronously(items):
                await ahead.acquire()
                answer: Future[Verdict] = Future()
                self._put("verify", item, answer)
                future = asyncio.wrap_future(answer)
                waiting.add(future)
                future.add_done_callback(lambda future, index=index: done.put_nowait((index, future)))
                index += 1

        feeder = asyncio.create_task(feed())
        feeder.add_done_callback(lambda feeder: done.put_nowait((-1, feeder)))
        feeding = True
        try:
            while feeding or waiting:
                index, future = await done.get()
                if future is feeder:
                    feeder.result()
                    feeding = False
                    continue
                waiting.discard(future)
                ahead.release()
                yield index, future.result()
        finally:
            feeder.cancel()
            for future in waiting:
                future.cancel()

    def check_golds(self, golds: Sequence[str | Sequence[str]]) -> list[Verdict]:
        """For each gold a verdict whose status is gold_error, with the reason, when it cannot be graded against."""
        return self._in_order("check", [("", gold, None) for gold in golds], None)

    def counts(self) -> dict[Status, int]:
        """Verdicts given so far, by status."""
        with self._queue.lock:
            return {status: self._queue.counts[status] for status in STATUSES}

    def latency(self) -> dict[str, float]:
        """Milliseconds inside the verifier: p50_ms, p99_ms (both within 5 %) and max_ms of all tasks so far; a task
        that was cut off counts with its deadline. Empty without any."""
        with self._queue.lock:
            seen = self._queue.latencies
            if not seen.total:
                return {}
            p50, p99 = seen.percentile(0.5), seen.percentile(0.99)
            return {"p50_ms": p50 * 1e3, "p99_ms": p99 * 1e3, "max_ms": seen.longest * 1e3}

    def latency_histogram(self) -> list[tuple[float, float, int]]:
        """(from seconds, to seconds, tasks) of each bucket that is not empty; edges are a factor 1.047 apart."""
        with self._queue.lock:
            return self._queue.latencies.rows()

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [worker.process.pid for slot in self._slots if (worker := slot.worker) is not None]

    def close(self) -> None:
        """Fails what is unanswered with HostClosed and ends every worker: one that is busy or starting at once, an idle
        one may leave by itself for up to 2 s. Waits for them. Does nothing when called again, or in a fork."""
        if os.getpid() != self._process:
            return
        idle = self._queue.close()
        for slot in self._slots:
            if slot not in idle:
                slot.kill()
        for slot in self._slots:
            if slot.thread is not threading.current_thread():
                slot.thread.join()
        atexit.unregister(self.close)

    def _put(self, kind: str, item: Item, future: "Future[Verdict] | Reply") -> None:
        if os.getpid() != self._process:
            raise HostClosed(f"this verifier host belongs to process {self._process}: open one in this process")
        response, gold, meta = item
        if not isinstance(response, str):
            raise TypeError(f"response is a {type(response).__name__}: give the text")
        golds = [gold] if isinstance(gold, str) else [str(g) for g in gold or ()]
        message = (kind, str(response), str(gold) if isinstance(gold, str) else golds, plain(meta) if meta else {})
        gold_chars = sum(map(len, golds))
        task = Task(message, len(response) + gold_chars, counted=kind == "verify", future=future)
        if len(response) > self.max_response_chars:
            reason = f"response of {len(response)} characters, limit {self.max_response_chars}"
            self._queue.settle(task, failed("limit", reason))
        elif gold_chars > self.max_gold_chars:
            reason = f"gold of {gold_chars} characters, limit {self.max_gold_chars}"
            self._queue.settle(task, failed("limit", reason))
        else:
            self._queue.put(task)

    def _as_completed(self, kind: str, items: Iterable[Item]) -> Iterator[tuple[int, Verdict]]:
        done: SimpleQueue[tuple[int, Reply]] = SimpleQueue()
        waiting: dict[int, Reply] = {}
        source = enumerate(items)
        try:
            while True:
                while len(waiting) < self.max_pending and done.empty() and (entry := next(source, None)):
                    index, item = entry
                    waiting[index] = reply = Reply(index, done)
                    self._put(kind, item, reply)
                    self._queue.wait_for_room()
                if not waiting:
                    return
                index, reply = done.get()
                del waiting[index]
                yield index, reply.result()
        finally:
            for reply in waiting.values():
                reply.cancel()

    def _in_order(self, kind: str, items: Sequence[Item], progress: Callable[[int, int], None] | None) -> list[Verdict]:
        verdicts: dict[int, Verdict] = {}
        for index, verdict in self._as_completed(kind, items):
            verdicts[index] = verdict
            if progress is not None:
                progress(len(verdicts), len(items))
        return [verdicts[index] for index in range(len(items))]


async def _asynchronously(items: Iterable[Item] | AsyncIterable[Item]) -> AsyncIterator[Item]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


def _pickled_setup(spec: VerifierSpec, memory_mb: int) -> bytes:
    try:
        return pickle.dumps({"spec": spec, "memory_mb": memory_mb})
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise VerifierLoadError(f"verifier {spec.name!r}: options must be plain values ({error})") from error
