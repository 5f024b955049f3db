"""A thread that keeps the engine at work while the learner updates."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

IDLE_SECONDS = 0.05


class Ahead:
    """Calls `tick` over and over in a thread of its own, and between two calls what others ask for.

    tick: advances the work, and returns whether there was any. An exception out of it ends the thread and is raised in
    whoever asks next, or waits. nudge: called by those who ask, so that a tick that waits ends soon.
    """

    def __init__(self, tick: Callable[[], bool], nudge: Callable[[], None]) -> None:
        self._tick, self._nudge = tick, nudge
        self._asked: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._awaited: list[tuple[Callable[[], bool], Future[None]]] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="rollout", daemon=True)
        self._thread.start()

    def ask(self, work: Callable[[], Any]) -> Future[Any]:
        """Have `work` done between two ticks; its result or exception."""
        answer: Future[Any] = Future()
        self._asked.put((work, answer))
        self._nudge()
        if self._failure is not None:
            self._refuse()
        return answer

    def until(self, condition: Callable[[], bool]) -> Future[None]:
        """Done when `condition`, looked at after each tick, is true."""
        answer: Future[None] = Future()
        asked = self.ask(lambda: self._awaited.append((condition, answer)))
        asked.add_done_callback(lambda asked: asked.exception() and answer.set_exception(asked.exception()))
        return answer

    def close(self) -> None:
        """Stop after the tick that is going on. What is asked for later is refused."""
        self._asked.put(None)
        self._thread.join()

    def _run(self) -> None:
        busy = True
        try:
            while self._answer(0.0 if busy else IDLE_SECONDS):
                busy = self._tick()
                for condition, answer in [*self._awaited]:
                    if condition():
                        self._awaited.remove((condition, answer))
                        answer.set_result(None)
        except BaseException as failure:  # noqa: BLE001 - raised again in whoever asks
            self._failure = failure
        else:
            self._failure = RuntimeError("the rollout thread is closed")
        for _, answer in self._awaited:
            answer.set_exception(self._failure)
        self._refuse()

    def _answer(self, seconds: float) -> bool:
        """Do what was asked for, waiting so long for the first; False when asked to end."""
        while True:
            try:
                asked = self._asked.get(block=seconds > 0, timeout=seconds)
            except Empty:
                return True
            if asked is None:
                return False
            work, answer = asked
            seconds = 0.0
            try:
                answer.set_result(work())
            except BaseException as error:  # noqa: BLE001 - the asker's
                answer.set_exception(error)

    def _refuse(self) -> None:
        """Answer everything that is asked for with the failure."""
        while True:
            try:
                asked = self._asked.get_nowait()
            except Empty:
                return
            if asked is not None:
                asked[1].set_exception(self._failure)
