"""One place in the pool: a thread, and the worker process it owns at the moment."""

import contextlib
import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future

from deltarl.channel import Channel
from deltarl.rewards.registry import VerifierLoadError
from deltarl.rewards.tasks import ATTEMPTS, Task, TaskQueue
from deltarl.rewards.types import Status, Verdict
from deltarl.rewards.worker import ANSWER_BYTES, decode

START_SECONDS = 120.0
GRACE_SECONDS = 2.0
PATIENCE_SECONDS = 0.05
STALE_SECONDS = 0.25
GATHER_SECONDS = 0.01
BOOT = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from deltarl.rewards.worker import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)
SINGLE_THREADED = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Worker:
    """A worker process and the channel to it.

    The interpreter is started afresh, never forked, and the process holds no file of ours but its end of the channel.
    It leads a process group, which ends with it. Started, used and ended by one thread, with which the kernel would
    kill it; only `kill` is for others. The constructor raises OSError where no process can be had.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        arguments = [json.dumps([str(path) for path in sys.path]), str(theirs.fileno()), str(os.getpid())]
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", BOOT, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[theirs.fileno()],
                env=os.environ | SINGLE_THREADED,
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self.answered = 0
        self._channel = Channel(ours, ANSWER_BYTES)
        self._lock = threading.Lock()
        self._ended = False

    def load(self, setup: bytes) -> bool:
        """Has the process load its verifier, and returns whether that is `grouped`. Raises VerifierLoadError,
        TimeoutError, or EOFError and OSError."""
        self._channel.post(setup)
        answer = decode(self._channel.receive(START_SECONDS)[0])
        if isinstance(answer, str):
            raise VerifierLoadError(answer)
        return answer

    def give(self, tasks: Iterable[Task]) -> None:
        """Never blocks; the process answers them after those that it has already."""
        self._channel.post(pickle.dumps([task.message for task in tasks]))

    def answers(self, seconds: float) -> list[bytes]:
        """The answers that are in, one at least: a message for each task, in the tasks' order.

        Raises TimeoutError, or EOFError and OSError when the process is gone or sends something else.
        """
        return self._channel.receive(seconds)

    def read(self, message: bytes) -> tuple[Verdict, float, bool]:
        """The verdict of an answer, the seconds it took, and whether it ran out of memory. Raises ConnectionError."""
        try:
            score, status, extracted, info, took, exhausted = decode(message)
            verdict = Verdict(score, status, extracted, info)
            if not 0 <= took < math.inf:
                raise ValueError(f"took {took} s")
        except (ValueError, TypeError, RecursionError) as error:
            raise ConnectionError("the worker sent something that is no verdict") from error
        self.answered += 1
        return verdict, took, exhausted

    def exited(self) -> bool:
        """Whether the process has ended by itself; it stays a zombie, so that its id is not given to another one."""
        try:
            found = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # the program ignores SIGCHLD
            return True
        return found is not None

    def kill(self) -> None:
        """Kills the process with all its group; safe from any thread, and after its end."""
        with self._lock:
            if not self._ended:
                self._kill_group()

    def end(self, grace: float = 0.0) -> int:
        """Ends the process, after `grace` seconds in which it may leave by itself; its exit code, or minus a signal."""
        self._channel.close()
        latest = time.monotonic() + grace
        while not self.exited() and time.monotonic() < latest:
            time.sleep(0.002)
        with self._lock:
            self._kill_group()
            self._ended = True
            return self.process.wait()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Slot:
    """Takes tasks from the queue, gives them to its worker, waits for each answer as long as the deadline allows, and
    replaces the worker when it hangs or dies.

    setup: pickled {"spec", "memory_mb"}. timeout: seconds for each task. `ready` is done when the first worker can
    take tasks, and is whether its verifier is `grouped`; its exception says why it cannot (VerifierLoadError).
    """

    def __init__(self, queue: TaskQueue, name: str, setup: bytes, timeout: float) -> None:
        self.queue = queue
        self.name = name
        self.setup = setup
        self.timeout = timeout
        self.worker: Worker | None = None
        self.stale = 0
        self.ready: Future[bool] = Future()
        self.thread = threading.Thread(target=self._run, name=f"verifier {name}", daemon=True)
        self.thread.start()

    def kill(self) -> None:
        """Called by another thread once the queue is closed, so that nobody waits for a worker that is busy."""
        if (worker := self.worker) is not None:
            worker.kill()

    def _run(self) -> None:
        try:
            grouped = self._start()
        except BaseException as error:  # noqa: BLE001 - raised again by whoever waits for `ready`
            self._end()
            self.ready.set_exception(error)
            return
        self.ready.set_result(grouped)
        while True:
            problem = self._restore()
            tasks = deque(self.queue.take(self))
            if not tasks:
                break
            try:
                if problem is None:
                    self._serve(tasks)
                elif self.queue.broken():
                    self._refuse(tasks, problem)
            finally:
                self.queue.give_back(tasks)
        self._end(GRACE_SECONDS)

    def _start(self) -> bool:
        """Whether the verifier is `grouped`. Raises VerifierLoadError: the line says why there is no worker now."""
        try:
            self.worker = Worker()
        except OSError as error:
            raise VerifierLoadError(f"no process could be started for verifier {self.name!r}: {error}") from error
        if self.queue.closed.is_set():
            self.worker.kill()
        try:
            grouped = self.worker.load(self.setup)
        except TimeoutError as error:
            line = f"verifier {self.name!r} was not ready after {START_SECONDS:.0f} s: see its warm_up()"
            raise VerifierLoadError(line) from error
        except (EOFError, OSError) as error:
            line = f"the worker of verifier {self.name!r} died at its start ({self._end()}): see its stderr"
            raise VerifierLoadError(line) from error
        self.queue.set_ready(self, True)
        return grouped

    def _restore(self) -> str | None:
        """Sees to it that there is a worker; None, or the line that says why neither this slot nor another has one."""
        problem, failures = None, 0
        while self.worker is None and (problem is None or not self.queue.broken()):
            if self.queue.closed.wait(self.queue.pause(failures)):
                return "the host is closed"
            try:
                self._start()
            except VerifierLoadError as error:
                self._end()
                self.queue.worker_died()
                problem, failures = str(error), failures + 1
        return None if self.worker is not None else problem

    def _refuse(self, tasks: deque[Task], problem: str) -> None:
        while tasks and not self.queue.closed.is_set():
            self.queue.settle(tasks.popleft(), failed("error", problem))

    def _serve(self, tasks: deque[Task]) -> None:
        """Has the worker answer in order, taking each task off that is settled; stops when the worker is lost, or has
        answered all. It is given more before it runs out.

        The worker sends each answer at once, and several are read at a time, for to wake up costs more than to read. So
        what a worker answered is known whatever becomes of it, and the first task left is the one that it had.
        """
        worker = self.worker
        if worker.exited():  # while it had nothing to do: no task's fault
            self._end()
            return
        try:
            worker.give(tasks)
            given = len(tasks)
            while tasks and self.worker is not None:
                self._settle(tasks, self._answers(tasks))
                if 2 * len(tasks) <= given and not self.stale and self.worker is not None:
                    given = self._give_more(tasks) or given
                if len(tasks) > 1:
                    time.sleep(min(GATHER_SECONDS, self.queue.seconds * len(tasks) / 2))
        except TimeoutError:
            if worker.exited():  # a process that it left behind holds its end of the channel
                self._died(tasks)
            else:
                self._hung(tasks)
        except (EOFError, OSError):
            self._died(tasks)
        self._pass_over_stale()

    def _give_more(self, tasks: deque[Task]) -> int:
        """Gives the worker more of what waits, behind the tasks that it has; how many."""
        more = self.queue.take_more()
        if more:
            tasks.extend(more)
            self.worker.give(more)
        return len(more)

    def _answers(self, tasks: deque[Task]) -> list[bytes]:
        """Answers to the first tasks. While the first takes long, the tasks behind it go to a slot that has nothing to
        do: this worker has them too, and its answers to them will be stale."""
        end = time.monotonic() + self.timeout
        while len(tasks) > 1:
            try:
                return self.worker.answers(min(PATIENCE_SECONDS, end - time.monotonic()))
            except TimeoutError:
                if time.monotonic() >= end:
                    raise
                if self.queue.someone_is_idle():
                    first = tasks.popleft()
                    self.stale = len(tasks)
                    self.queue.give_back(tasks)
                    tasks.clear()
                    tasks.append(first)
        return self.worker.answers(end - time.monotonic())

    def _settle(self, tasks: deque[Task], answers: list[bytes]) -> None:
        """Takes the tasks off that are answered; answers beyond them are stale ones."""
        for answer in answers:
            if not tasks:
                self.stale -= 1
                continue
            verdict, seconds, exhausted = self.worker.read(answer)
            if exhausted:
                self._exhausted(tasks, verdict, seconds)
                return
            self.queue.settle(tasks.popleft(), verdict, seconds)

    def _pass_over_stale(self) -> None:
        """Reads the answers that nobody waits for; a worker that does not have them soon is replaced."""
        end = time.monotonic() + STALE_SECONDS
        try:
            while self.stale > 0 and self.worker is not None:
                self.stale -= len(self.worker.answers(end - time.monotonic()))
        except (EOFError, OSError):
            self._end()
        self.stale = 0

    def _died(self, tasks: deque[Task]) -> None:
        how = self._end()
        self.queue.worker_died()
        tasks[0].attempts += 1
        if tasks[0].attempts >= self.queue.attempts_allowed() and not self.queue.closed.is_set():
            line = f"the worker died {tasks[0].attempts} times ({how})"
            self.queue.settle(tasks.popleft(), failed("error", line))

    def _hung(self, tasks: deque[Task]) -> None:
        self._end()
        if not self.queue.closed.is_set():
            line = f"no verdict after {self.timeout:g} s"
            self.queue.settle(tasks.popleft(), failed("timeout", line), self.timeout)

    def _exhausted(self, tasks: deque[Task], verdict: Verdict, seconds: float) -> None:
        """The memory may have gone to earlier tasks: the worker is replaced, and a task that was not its first is tried
        again in a fresh one."""
        fresh = self.worker.answered == 1
        self._end()
        tasks[0].attempts += 1
        if fresh or tasks[0].attempts == ATTEMPTS:
            self.queue.settle(tasks.popleft(), verdict, seconds)

    def _end(self, grace: float = 0.0) -> str:
        """Ends the worker, if there is one, and says how it ended."""
        self.queue.set_ready(self, False)
        if self.worker is None:
            return "not started"
        code = self.worker.end(grace)
        self.worker = None
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def failed(status: Status, reason: str) -> Verdict:
    """A verdict that no verifier gave; scores 0.0."""
    return Verdict(0.0, status, info={"reason": reason})
