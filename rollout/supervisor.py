"""Keeps one engine process running: starts it, hears what it says, notices when it dies or hangs, starts another."""

import contextlib
import itertools
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

from deltarl.channel import Channel
from deltarl.rollout.engine import EngineError
from deltarl.rollout.types import Request, Trace

START_SECONDS = 900.0
"""A process may take so long to load and compile, and again for the first of its steps."""

LOOK_SECONDS = 1.0
"""The end of a process is seen at once by its channel, or within this time where a child of it keeps that open."""

GRACE_SECONDS = 5.0
BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from deltarl.rollout.engine_process import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)


class EngineLost(Exception):
    """The process that was asked is gone; another one is on its way."""


class EngineProcess:
    """An interpreter started afresh, never forked, that dies with the thread that started it; it leads a process group,
    which ends with it. environment: variables that it has beyond this process's."""

    def __init__(self, environment: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        arguments = [json.dumps([str(path) for path in sys.path]), str(theirs.fileno()), str(os.getpid())]
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", BOOT, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=os.environ | environment,
            )
        finally:
            theirs.close()
        self.channel = Channel(ours)

    def end(self, grace: float = 0.0) -> str:
        """Ends the process, after `grace` seconds in which it may leave by itself; says how it ended."""
        self.channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class Supervisor:
    """One engine process at a time, and the requests that it has; a thread of its own starts, hears and replaces it.

    arguments: VllmWorker's, by name. environment: variables of the process. hang_seconds: a process that owes an
    answer or has requests, and says nothing for so long, is killed (seen at most LOOK_SECONDS late). max_restarts:
    processes that are started after the first; when they are used up, every call raises EngineError.

    Calls come from one thread. `requests` are those that were submitted and not yet taken, `ended` what those of them
    that ended came to. Processes are numbered by `generation`. One that replaces another has no requests: it is `fresh`
    until `resubmit`. While `paused` is set, a lost process is not replaced.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        environment: dict[str, str],
        hang_seconds: float,
        max_restarts: int,
    ) -> None:
        self.hang_seconds, self.max_restarts = hang_seconds, max_restarts
        self.setup, self.environment = pickle.dumps(arguments), environment
        self.changed = threading.Condition()
        self.requests: dict[str, Request] = {}
        self.ended: dict[str, Trace] = {}
        self.tokens = 0
        self.ready: tuple[Any, ...] | None = None
        self.losses: list[str] = []
        self.problem: EngineError | None = None
        self.generation = 0
        self.fresh = False
        self.paused = False
        self._process: EngineProcess | None = None
        self._closed = False
        self._heard = time.monotonic()
        self._stepped = False
        self._numbers = itertools.count()
        self._owed: set[int] = set()
        self._answers: dict[int, tuple[str, Any]] = {}
        self._thread = threading.Thread(target=self._keep, name="engine supervisor", daemon=True)
        self._thread.start()

    def wait_up(self, seconds: float | None = None) -> bool:
        """Waits for a process that is ready; whether there is one. Raises EngineError when there will be none."""
        with self.changed:
            self.changed.wait_for(lambda: self.ready is not None or self.problem is not None, seconds)
            self._check()
            return self.ready is not None

    def submit(self, requests: list[Request]) -> None:
        """Hands requests to the process, or keeps them for the next one."""
        with self.changed:
            if not self._unfinished():
                self._heard = time.monotonic()
            self.requests.update((request.id, request) for request in requests)
            if self.fresh:
                return
        with contextlib.suppress(EngineLost):
            self._send(next(self._numbers), "add", (requests,))

    def resubmit(self, generation: int) -> None:
        """Hands all that runs to the process of that number. Raises EngineLost when it is another one by now."""
        with self.changed:
            if generation != self.generation:
                raise EngineLost
            self.fresh, self._heard = False, time.monotonic()
            requests = self._unfinished()
        self._send(next(self._numbers), "add", (requests,))

    def drop(self, names: Iterable[str]) -> None:
        """Forgets requests, and what came of them."""
        with self.changed:
            for name in names:
                self.requests.pop(name, None)
                self.ended.pop(name, None)

    def pause(self, paused: bool) -> None:
        with self.changed:
            self.paused = paused
            self.changed.notify_all()

    def ask(self, command: str, *arguments: Any) -> Any:
        """The process's answer. Raises EngineLost, or the ValueError with which the engine refuses."""
        return self.answer(self.post(command, *arguments))

    def post(self, command: str, *arguments: Any) -> int:
        """Sends a command, and returns the number under which `answer` waits for what comes back. Raises EngineLost."""
        number = next(self._numbers)
        with self.changed:
            if not self._owed:
                self._heard = time.monotonic()
            self._owed.add(number)
        self._send(number, command, arguments)
        return number

    def answer(self, number: int) -> Any:
        with self.changed:
            self.changed.wait_for(lambda: number not in self._owed)
            self._check()
            if number not in self._answers:
                raise EngineLost
            kind, value = self._answers.pop(number)
        if kind == "refused":
            raise value
        return value

    def take(self, seconds: float) -> list[tuple[str, Trace]]:
        """What has ended, after waiting at most `seconds` for the process to say something."""
        with self.changed:
            if not self.ended:
                self.changed.wait(seconds)
            self._check()
            taken, self.ended = self.ended, {}
            for name in taken:
                del self.requests[name]
            return list(taken.items())

    def close(self) -> None:
        """Ends the process; it may leave by itself for GRACE_SECONDS."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()
            process = self._process
        if process is not None:
            process.channel.close()
        self._thread.join()

    @property
    def pid(self) -> int | None:
        """The process that runs now."""
        process = self._process
        return None if process is None else process.process.pid

    def _unfinished(self) -> list[Request]:
        return [request for name, request in self.requests.items() if name not in self.ended]

    def _check(self) -> None:
        if self.problem is not None:
            raise self.problem

    def _send(self, number: int, command: str, arguments: tuple) -> None:
        with self.changed:
            process = self._process if self.ready is not None else None
        try:
            if process is not None:
                process.channel.send(pickle.dumps((number, command, arguments)))
                return
        except OSError:  # the thread sees it too
            pass
        with self.changed:
            self._owed.discard(number)
        raise EngineLost

    def _keep(self) -> None:
        while not self._closed:
            try:
                self._start()
                problem = self._listen()
                if not self._closed:
                    how = self._end()
                    self._lose(problem or f"it ended ({how})")
            except EngineError as error:
                self._end()
                if not self.losses:
                    self._give_up(error)
                elif not self._closed:
                    self._lose(str(error))
            if self.problem is not None:
                return
        self._end(GRACE_SECONDS)

    def _start(self) -> None:
        """Raises EngineError when the process does not become ready."""
        self._process = EngineProcess(self.environment)
        if self._closed:
            raise EngineError("the worker was closed while its engine started")
        try:
            self._process.channel.send(self.setup)
            (message,) = self._process.channel.receive(START_SECONDS)
        except TimeoutError as error:
            raise EngineError(f"the engine was not ready after {START_SECONDS:.0f} s: see what it printed") from error
        except (EOFError, OSError) as error:
            raise EngineError(f"the engine's process died at its start ({self._end()}): see what it printed") from error
        kind, *found = pickle.loads(message)
        if kind == "unfit":
            raise found[0]
        with self.changed:
            self.ready, self.fresh = tuple(found), bool(self.losses)
            self.generation += 1
            self._stepped, self._heard = False, time.monotonic()
            self.changed.notify_all()

    def _listen(self) -> str | None:
        """Hears the process until it is lost or to be closed; says why it is lost, None where it just ended."""
        failed = None
        while not self._closed:
            try:
                for message in self._process.channel.receive(LOOK_SECONDS):
                    kind, *parts = pickle.loads(message)
                    if kind == "failed":
                        failed = parts[0]
                    else:
                        self._hear(kind, parts)
            except TimeoutError:
                if self._process.process.poll() is not None:
                    return failed
                if self._silent():
                    return f"it said nothing for {self.hang_seconds:g} s"
            except (EOFError, OSError):
                return failed
        return None

    def _hear(self, kind: str, parts: list[Any]) -> None:
        with self.changed:
            self._heard = time.monotonic()
            if kind == "ended":
                traces, self.tokens = parts
                self._stepped = True
                for name, trace in traces:
                    if name in self.requests:
                        self.ended[name] = trace
            else:
                number, value = parts
                self._owed.discard(number)
                self._answers[number] = (kind, value)
            self.changed.notify_all()

    def _silent(self) -> bool:
        with self.changed:
            owes = bool(self._owed) or (not self.fresh and bool(self._unfinished()))
            patience = self.hang_seconds if self._stepped else max(START_SECONDS, self.hang_seconds)
            return owes and time.monotonic() - self._heard > patience

    def _lose(self, reason: str) -> None:
        """Tells those who wait, and waits itself while no process is wanted."""
        with self.changed:
            self.losses.append(reason)
            self.ready = None
            self.tokens = 0
            self._owed.clear()
            self._answers.clear()
            self.changed.notify_all()
        if len(self.losses) > self.max_restarts:
            times = f"{len(self.losses)} times" if len(self.losses) > 1 else "once"
            self._give_up(EngineError(f"the engine was lost {times}, more than max_restarts; the last time: {reason}"))
        with self.changed:
            self.changed.wait_for(lambda: self._closed or not self.paused)

    def _give_up(self, problem: EngineError) -> None:
        with self.changed:
            self.problem = problem
            self.changed.notify_all()

    def _end(self, grace: float = 0.0) -> str:
        process, self._process = self._process, None
        return "not started" if process is None else process.end(grace)
