"""The allowance of an answer stops code that swallows what stops it, and leaves nothing behind."""

import sys

import pytest

from deltarl.rewards.math.budget import allowance, paid_by_the_call
from deltarl.rewards.math.lexer import LimitError

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def call() -> None:
    pass


def finalised_with_calls():
    try:
        yield
    finally:
        for _ in range(10_000):
            call()


def test_an_exception_lost_in_a_finaliser_is_raised_again():
    """Three units a call: 1000 calls are paid for, and the finaliser's exception goes nowhere."""
    reached = 0
    with pytest.raises(LimitError, match="more work"), allowance(3000), paid_by_the_call():
        for _ in range(20):
            generator = finalised_with_calls()
            next(generator)
            del generator
            for _ in range(100):
                call()
            reached += 1
    assert reached == 0


def test_hooks_are_put_back():
    seen = []

    def hook(*event):
        seen.append(event)

    sys.setprofile(hook)
    try:
        with pytest.raises(LimitError), allowance(30), paid_by_the_call():
            for _ in range(100):
                call()
        assert sys.getprofile() is hook
    finally:
        sys.setprofile(None)
    assert sys.gettrace() is None or sys.gettrace().__name__ != "_stop"
    for _ in range(100):
        call()


def test_nesting_without_end_is_a_limit():
    def deeper():
        deeper()

    with pytest.raises(LimitError, match="nested too deep"), allowance(10**9), paid_by_the_call():
        deeper()


def test_what_is_paid_for_passes():
    with allowance(3000), paid_by_the_call():
        for _ in range(500):
            call()
