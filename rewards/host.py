"""A warm pool of processes that run a verifier, each task under a deadline.

The processes are started with a plain `exec` of the interpreter, never forked and never re-importing the parent's main
module: the parent may hold torch, vLLM and a GPU. Each is owned by one thread of the parent (a slot), which sends it
tasks, waits for each answer as long as the deadline allows, and replaces it when it hangs or dies.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from typing import Any

from deltarl.rewards.registry import VerifierLoadError, absolute_spec
from deltarl.rewards.types import STATUSES, Status, Verdict, VerifierSpec
from deltarl.rewards.worker import plain

Item = tuple[str, str | Sequence[str], Mapping[str, Any] | None]

START_SECONDS = 120.0
CRASH_ATTEMPTS = 3
BATCH_TASKS = 32
BATCH_CHARS = 1 << 20
LATENCIES_KEPT = 100_000
UNUSABLE = ("gold_error", "timeout", "limit", "error")
BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from deltarl.rewards.worker import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)


class HostClosed(RuntimeError):
    """The host was closed before it answered."""


@dataclass(slots=True)
class _Task:
    message: tuple
    size: int
    counted: bool
    future: Future = field(default_factory=Future)
    crashes: int = 0


class VerifierHost:
    """Runs a verifier in `workers` processes; usable from any number of threads.

    spec: what to run (VerifierSpec, or its name). timeout: seconds for one task, counted from when its worker is given
    it. memory_mb: private memory of a worker. max_response_chars, max_gold_chars: longer ones get status "limit"
    without being sent.

    Status "timeout", "limit" and "error" score 0.0. A worker that dies is replaced and its task tried again, up to
    three times in all, so that a process killed from outside changes no verdict. Raises VerifierLoadError when the
    verifier does not load.
    """

    def __init__(
        self,
        spec: VerifierSpec | str,
        workers: int = 1,
        timeout: float = 5.0,
        memory_mb: int = 2048,
        *,
        max_response_chars: int = 1_000_000,
        max_gold_chars: int = 100_000,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}: a verifier host needs at least 1")
        if timeout <= 0:
            raise ValueError(f"timeout is {timeout}: give the seconds one verification may take")
        self.spec = absolute_spec(VerifierSpec(spec) if isinstance(spec, str) else spec)
        self.timeout = timeout
        self.memory_mb = memory_mb
        self.max_response_chars = max_response_chars
        self.max_gold_chars = max_gold_chars
        self._queue: deque[_Task] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._counts: Counter[str] = Counter()
        self._latencies: deque[float] = deque(maxlen=LATENCIES_KEPT)
        self._slots = [_Slot(self, index) for index in range(workers)]
        atexit.register(self.close)
        problems = [slot.started.result() for slot in self._slots]
        if any(problems):
            self.close()
            raise VerifierLoadError(next(p for p in problems if p))

    def __enter__(self) -> "VerifierHost":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, item: Item) -> "Future[Verdict]":
        """Queues one (response, gold, meta) and returns the future of its verdict. Raises HostClosed."""
        return self._submit("verify", item)

    def verify(self, items: Sequence[Item], progress: Callable[[int, int], None] | None = None) -> list[Verdict]:
        """The verdicts of all items, in their order; `progress(done, total)` is called as they come in."""
        return self._gather([self.submit(item) for item in items], progress)

    def check_golds(self, golds: Sequence[str | Sequence[str]]) -> list[Verdict]:
        """For each gold a verdict whose status is gold_error, with the reason, when it cannot be graded against."""
        return self._gather([self._submit("check", ("", gold, None)) for gold in golds], None)

    def counts(self) -> dict[Status, int]:
        """Verdicts given so far, by status."""
        return {status: self._counts[status] for status in STATUSES}

    def latency(self) -> dict[str, float]:
        """Milliseconds inside the verifier: p50_ms, p99_ms, max_ms over the last 100 000 tasks; empty without any."""
        with self._changed:
            values = sorted(self._latencies)
        if not values:
            return {}
        at = [values[min(len(values) - 1, int(len(values) * share))] for share in (0.5, 0.99)]
        return {"p50_ms": at[0] * 1e3, "p99_ms": at[1] * 1e3, "max_ms": values[-1] * 1e3}

    def worker_pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [slot.process.pid for slot in self._slots if slot.process is not None]

    def close(self) -> None:
        """Cancels what waits, ends every worker and waits for it; calling it again does nothing."""
        with self._changed:
            if not self._closed:
                self._closed = True
                for task in self._queue:
                    task.future.cancel()
                self._queue.clear()
                self._changed.notify_all()
        atexit.unregister(self.close)
        for slot in self._slots:
            slot.stop()
        for slot in self._slots:
            slot.thread.join()

    def _submit(self, kind: str, item: Item) -> "Future[Verdict]":
        response, gold, meta = item
        golds = [gold] if isinstance(gold, str) else [str(g) for g in gold or ()]
        task = _Task((kind, response, gold if isinstance(gold, str) else golds, plain(meta or {})), 0, kind == "verify")
        gold_chars = sum(map(len, golds))
        task.size = len(response) + gold_chars
        if len(response) > self.max_response_chars:
            reason = f"response of {len(response)} characters, limit {self.max_response_chars}"
            return self._settle(task, _failed("limit", reason))
        if gold_chars > self.max_gold_chars:
            return self._settle(task, _failed("limit", f"gold of {gold_chars} characters, limit {self.max_gold_chars}"))
        with self._changed:
            if self._closed:
                raise HostClosed("the verifier host is closed: make a new one")
            self._queue.append(task)
            self._changed.notify()
        return task.future

    def _gather(self, futures: list[Future], progress: Callable[[int, int], None] | None) -> list[Verdict]:
        try:
            if progress is not None:
                for done, _ in enumerate(as_completed(futures), start=1):
                    progress(done, len(futures))
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def _take(self) -> list[_Task]:
        """Waits for work; a few tasks at once where many wait, so that a message costs little. Empty when closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return []
                share = min(BATCH_TASKS, 1 + len(self._queue) // (4 * len(self._slots)))
                batch, chars = [], 0
                while self._queue and len(batch) < share and chars < BATCH_CHARS:
                    task = self._queue.popleft()
                    if task.future.running() or task.future.set_running_or_notify_cancel():
                        batch.append(task)
                        chars += task.size
                    if task.crashes:
                        break
                if batch:
                    return batch

    def _give_back(self, tasks: Sequence[_Task]) -> None:
        with self._changed:
            if not self._closed:
                self._queue.extendleft(reversed(tasks))
                self._changed.notify(len(tasks))
                return
        for task in tasks:
            task.future.set_exception(HostClosed("the verifier host was closed before it answered"))

    def _settle(self, task: _Task, verdict: Verdict, seconds: float | None = None) -> Future:
        if task.counted:
            with self._changed:
                self._counts[verdict.status] += 1
                if seconds is not None:
                    self._latencies.append(seconds)
        task.future.set_result(verdict)
        return task.future


class _Slot:
    """One place in the pool: a thread, and the process it owns at the moment."""

    def __init__(self, host: VerifierHost, index: int) -> None:
        self.host = host
        self.process: subprocess.Popen | None = None
        self.connection: Connection | None = None
        self.started: Future[str | None] = Future()
        self.thread = threading.Thread(target=self._run, name=f"verifier-{index}", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Called by another thread once the host is closed: a worker that still runs must not be waited for."""
        process = self.process
        if process is not None:
            _kill_group(process)

    def _run(self) -> None:
        problem = self._start()
        self.started.set_result(problem)
        while problem is None and (tasks := self.host._take()):
            self._serve(deque(tasks))
        self._end()

    def _start(self) -> str | None:
        """Starts a process and waits until its verifier is loaded; the line that says why not, None when it is."""
        self.connection, theirs = Pipe()
        arguments = [json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", BOOT, *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,
            )
        if self.host._closed:
            return "the host was closed"
        try:
            self.connection.send({"spec": self.host.spec, "memory_mb": self.host.memory_mb})
            if self.connection.poll(START_SECONDS):
                return self.connection.recv()
            return f"verifier {self.host.spec.name!r} was not ready after {START_SECONDS:.0f} s: see its warm_up()"
        except (EOFError, OSError):
            code = self._end()
            return f"the worker of verifier {self.host.spec.name!r} died at its start ({_exit(code)}): see its stderr"

    def _serve(self, tasks: deque[_Task]) -> None:
        """Answers the tasks in order; those behind one that hangs or dies go back to the queue."""
        problem = self._start() if self.process is None else None
        if problem is not None:
            self._end()
            while tasks:
                self.host._settle(tasks.popleft(), _failed("error", problem))
            return
        try:
            self.connection.send([task.message for task in tasks])
            while tasks:
                if not self.connection.poll(self.host.timeout):
                    self._end()
                    self.host._settle(tasks.popleft(), _failed("timeout", f"no verdict after {self.host.timeout:g} s"))
                    break
                score, status, extracted, info, seconds = self.connection.recv()
                self.host._settle(tasks.popleft(), Verdict(score, status, extracted, info), seconds)
        except (EOFError, OSError):
            code = self._end()
            tasks[0].crashes += 1
            if tasks[0].crashes == CRASH_ATTEMPTS and not self.host._closed:
                self.host._settle(
                    tasks.popleft(), _failed("error", f"the worker died {CRASH_ATTEMPTS} times ({_exit(code)})")
                )
        self.host._give_back(tasks)

    def _end(self) -> int | None:
        """Ends the process, waits for it, and gives its exit code."""
        if self.process is None:
            return None
        self.connection.close()
        _kill_group(self.process)
        code = self.process.wait()
        self.process = self.connection = None
        return code


def check_golds(
    spec_or_host: VerifierSpec | str | VerifierHost, golds: Sequence[str | Sequence[str]]
) -> list[tuple[int, str | Sequence[str], str]]:
    """(index, gold, reason) of each gold that cannot be graded against. Raises VerifierLoadError."""
    if isinstance(spec_or_host, VerifierHost):
        verdicts = spec_or_host.check_golds(golds)
        return [(i, golds[i], v.info.get("reason", v.status)) for i, v in enumerate(verdicts) if v.status in UNUSABLE]
    with VerifierHost(spec_or_host) as host:
        return check_golds(host, golds)


def _failed(status: Status, reason: str) -> Verdict:
    return Verdict(0.0, status, info={"reason": reason})


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _exit(code: int | None) -> str:
    return f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
