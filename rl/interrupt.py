"""Ctrl-C and SIGTERM: the first asks the run to stop where it can go on from, the second ends it at once."""

from __future__ import annotations

import os
import signal
from types import FrameType

STDERR = 2


class Interrupted(Exception):
    """The run was asked to stop; its state has been, or can be, saved."""


class StopRequest:
    """While entered, SIGINT and SIGTERM set `requested`; a second SIGINT raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raise Interrupted if a stop was asked for."""
        if self.requested:
            raise Interrupted

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        os.write(STDERR, b"\nstopping: writing a checkpoint first (again to stop at once)\n")  # print is not reentrant
