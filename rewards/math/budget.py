"""What one answer may cost, counted instead of timed: a verdict depends on the texts and not on the machine's load.

A unit is about a microsecond of one core of 2024. Whoever is about to do work that grows with the text pays for it
first, and what the rest of the allowance does not cover is refused. Outside of an allowance nothing is counted.
"""

import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from deltarl.rewards.math.lexer import LimitError

ALLOWANCE = 300_000
CALL_PRICE = 3


class _Meter(threading.local):
    left: float = math.inf


class _CallsSpent(BaseException):
    """Leaves sympy past its own handlers of exceptions."""


_METER = _Meter()


@contextmanager
def allowance(units: float = ALLOWANCE) -> Iterator[None]:
    """What the block may spend in this thread; an allowance around it stays as it was."""
    outer, _METER.left = _METER.left, units
    try:
        yield
    finally:
        _METER.left = outer


def spend(units: float) -> None:
    """Raises LimitError when the allowance is used up."""
    _METER.left -= units
    if _METER.left < 0:
        raise LimitError("more work than one answer may cost")


class paid_by_the_call:
    """For code of others whose work cannot be foreseen: each Python function called in the block is paid for.

    Raises LimitError in the middle of it, also where it nests too deep for the interpreter.

    The interpreter drops a hook that raises, and what is raised while a generator is finalised goes nowhere: so each of
    two hooks, before it raises, sets the other, which raises at the next call.
    """

    def __enter__(self) -> None:
        self.outer = sys.getprofile(), sys.gettrace()
        sys.setprofile(self._pay)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        profile, trace = self.outer
        sys.setprofile(profile)
        sys.settrace(trace)
        if kind is _CallsSpent:
            raise LimitError("more work than one answer may cost") from None
        if kind is RecursionError:
            raise LimitError("nested too deep for the interpreter") from None

    def _pay(self, frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call":
            _METER.left -= CALL_PRICE
            if _METER.left < 0 and frame.f_code is not _EXIT:
                sys.settrace(self._stop)
                raise _CallsSpent

    def _stop(self, frame: FrameType, _event: str, _argument: Any) -> None:
        if frame.f_code is not _EXIT:
            sys.setprofile(self._pay)
            raise _CallsSpent


_EXIT = paid_by_the_call.__exit__.__code__


def fraction_price(bits: int) -> float:
    """An operation on two fractions of that many bits, with its greatest common divisors: 16 ms at 60 000 bits."""
    return 4 + 230 * (bits / 5000) ** 1.7


def function_price(precision: int) -> float:
    """An elementary function at that many bits: 60 ms at 20 000 bits."""
    return 30 * (precision / 256) ** 1.75
