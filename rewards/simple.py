"""Two small verifiers: `exact` compares strings, `numeric` compares the last number."""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from deltarl.rewards.types import Verdict

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+")
MAX_DIGITS = 1000


class ExactVerifier:
    """Correct when the whole response equals the gold, runs of white space counted as one blank.

    case_sensitive: False compares casefolded text. last_line: True grades only the last line that is not blank.
    """

    name = "exact"
    version = "1"

    def __init__(self, case_sensitive: bool = True, last_line: bool = False) -> None:
        self.case_sensitive = case_sensitive
        self.last_line = last_line

    def verify(self, response: str, gold: str | Sequence[str], *, meta: Mapping[str, Any]) -> Verdict:
        golds = [self._normal(g) for g in ([gold] if isinstance(gold, str) else gold)]
        if not any(golds):
            return Verdict(None, "gold_error", info={"reason": "the gold is empty"})
        lines = [line for line in response.splitlines() if line.strip()]
        answer = self._normal(lines[-1] if self.last_line and lines else response)
        if not answer:
            return Verdict(0.0, "no_answer")
        return Verdict(1.0, "correct", answer) if answer in golds else Verdict(0.0, "incorrect", answer)

    def _normal(self, text: str) -> str:
        text = " ".join(text.split())
        return text if self.case_sensitive else text.casefold()


class NumericVerifier:
    """Correct when the last number of the response is the gold within a tolerance.

    Numbers are decimals, with or without commas between thousands. abs_tol, rel_tol: the answer a passes for gold g
    when |a - g| <= max(abs_tol, rel_tol * |g|), computed exactly on the decimals.
    """

    name = "numeric"
    version = "1"

    def __init__(self, abs_tol: float = 0.0, rel_tol: float = 0.0) -> None:
        if abs_tol < 0 or rel_tol < 0:
            raise ValueError("abs_tol and rel_tol must not be negative")
        self.abs_tol = Fraction(abs_tol)
        self.rel_tol = Fraction(rel_tol)

    def check_gold(self, gold: str | Sequence[str]) -> str | None:
        golds = [gold] if isinstance(gold, str) else gold
        return (
            None if golds and all(_whole_number(g) is not None for g in golds) else f"not a number: {str(gold)[:80]!r}"
        )

    def verify(self, response: str, gold: str | Sequence[str], *, meta: Mapping[str, Any]) -> Verdict:
        reason = self.check_gold(gold)
        if reason is not None:
            return Verdict(None, "gold_error", info={"reason": reason})
        found = NUMBER.findall(response)
        if not found:
            return Verdict(0.0, "no_answer")
        if len(found[-1]) > MAX_DIGITS:
            return Verdict(0.0, "limit", info={"reason": f"a number of more than {MAX_DIGITS} digits"})
        answer = _value(found[-1])
        right = any(self._near(answer, _whole_number(g)) for g in ([gold] if isinstance(gold, str) else gold))
        return Verdict(1.0, "correct", found[-1]) if right else Verdict(0.0, "incorrect", found[-1])

    def _near(self, answer: Fraction, gold: Fraction) -> bool:
        return abs(answer - gold) <= max(self.abs_tol, self.rel_tol * abs(gold))


def _whole_number(text: str) -> Fraction | None:
    text = text.strip()
    return _value(text) if len(text) <= MAX_DIGITS and NUMBER.fullmatch(text) else None


def _value(number: str) -> Fraction:
    return Fraction(number.replace(",", ""))
