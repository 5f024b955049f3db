"""Two small verifiers: `exact` compares strings, `numeric` compares the last number."""

import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from deltarl.rewards.math.extract import without_thoughts
from deltarl.rewards.types import Verdict

DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
TEN_TO = r"(?:\s*(?:\\times|\\cdot|[×·*x])\s*10\s*(?:\^|\*\*)\s*\{?|[eE])(?P<power>[-+]?\d+)\}?"
NUMBER = re.compile(
    rf"(?<![\w.^])(?<!\^\{{)(?:(?P<sign>(?<![\w)\]}}])[-+])\\?[$€£¥]?)?(?P<value>(?>{DECIMAL}))"
    rf"(?:{TEN_TO}|\s*/\s*(?P<below>\d+)(?!\s*/\s*\d))?(?!\s*(?:\^|\*\*))"
)
AROUND = " \t\n$€£¥%°\\"
MAX_DIGITS = 1000
MAX_POWER = 1000
MAX_NUMBERS = 100
TAIL_CHARS = 20_000


class ExactVerifier:
    """Correct when the whole response equals the gold, runs of white space counted as one blank.

    Text in <think> blocks does not count; a response whose meta says `truncated: true` has no answer.
    case_sensitive: False compares casefolded text. last_line: True grades only the last line that is not blank.
    """

    name = "exact"
    version = "2"

    def __init__(self, case_sensitive: bool = True, last_line: bool = False) -> None:
        self.case_sensitive = case_sensitive
        self.last_line = last_line

    def check_gold(self, gold: str | Sequence[str]) -> str | None:
        return None if any(map(self._normal, _texts(gold))) else "the gold is empty"

    def verify(self, response: str, gold: str | Sequence[str], *, meta: Mapping[str, Any]) -> Verdict:
        problem = self.check_gold(gold)
        if problem is not None:
            return Verdict(None, "gold_error", info={"reason": problem})
        if meta.get("truncated"):
            return Verdict(0.0, "no_answer", info={"reason": "the response was cut off"})
        text = without_thoughts(response)
        lines = [line for line in text.splitlines() if line.strip()]
        answer = self._normal(lines[-1] if self.last_line and lines else text)
        if not answer:
            return Verdict(0.0, "no_answer", info={"reason": "the response is empty"})
        if answer in map(self._normal, _texts(gold)):
            return Verdict(1.0, "correct", answer, {"reason": "equal to the gold"})
        return Verdict(0.0, "incorrect", answer, {"reason": "another text than the gold"})

    def _normal(self, text: str) -> str:
        text = " ".join(text.split())
        return text if self.case_sensitive else text.casefold()


class NumericVerifier:
    """Correct when the last number of the response is the gold within a tolerance.

    A number is a decimal (12, -3.5, .5), with or without commas between thousands (1,234.5), a quotient (3/4), or in
    scientific notation (1.5e3, 1.5 × 10^3). Currency, percent and degree signs and units beside it are passed over:
    50% is 50, not 0.5. Digits inside a name (m2), an exponent (m^2) and the base of a power (2^10) are no numbers; for
    expressions take `math`. A comma is never a decimal point.

    abs_tol, rel_tol: the answer a passes for gold g when |a - g| <= max(abs_tol, rel_tol * |g|), computed exactly, the
    tolerances as the decimals they are written as. The gold is one number, or several of which any will do.

    Text in <think> blocks does not count; a response whose meta says `truncated: true` has no answer, for its last
    number may be cut. Raises ValueError for a tolerance that is negative or not finite.
    """

    name = "numeric"
    version = "2"

    def __init__(self, abs_tol: float = 0.0, rel_tol: float = 0.0) -> None:
        if not all(math.isfinite(tolerance) and tolerance >= 0 for tolerance in (abs_tol, rel_tol)):
            raise ValueError(f"abs_tol {abs_tol} and rel_tol {rel_tol} must be finite and not negative")
        self.abs_tol = Fraction(str(abs_tol))
        self.rel_tol = Fraction(str(rel_tol))

    def check_gold(self, gold: str | Sequence[str]) -> str | None:
        golds = _texts(gold)
        if golds and all(value_of(text) is not None for text in golds):
            return None
        return f"not a number: {str(gold)[:80]!r}"

    def verify(self, response: str, gold: str | Sequence[str], *, meta: Mapping[str, Any]) -> Verdict:
        problem = self.check_gold(gold)
        if problem is not None:
            return Verdict(None, "gold_error", info={"reason": problem})
        if meta.get("truncated"):
            return Verdict(0.0, "no_answer", info={"reason": "the response was cut off"})
        found = _last_number(_plain(without_thoughts(response)))
        if found is None:
            return Verdict(0.0, "no_answer", info={"reason": "no number found"})
        if _too_big(found):
            reason = f"a number of more than {MAX_DIGITS} digits or a power of ten past {MAX_POWER}"
            return Verdict(0.0, "limit", found[0][:MAX_DIGITS], {"reason": reason})
        answer = _value(found)
        if answer is None:
            return Verdict(0.0, "incorrect", found[0], {"reason": "a quotient with 0 below"})
        if any(self._near(answer, value_of(text)) for text in _texts(gold)):
            return Verdict(1.0, "correct", found[0], {"reason": "the gold's number"})
        return Verdict(0.0, "incorrect", found[0], {"reason": "another number than the gold"})

    def _near(self, answer: Fraction, gold: Fraction) -> bool:
        return abs(answer - gold) <= max(self.abs_tol, self.rel_tol * abs(gold))


def decimals_in(text: str) -> list[Fraction]:
    """Every number of a text that `numeric` would read, a quotient as its two numbers; ValueError past the limits."""
    values: list[Fraction] = []
    for found in NUMBER.finditer(_plain(text)):
        if _too_big(found) or len(values) >= MAX_NUMBERS:
            raise ValueError(f"more than {MAX_NUMBERS} numbers, or one of more than {MAX_DIGITS} digits")
        values += [_decimal(found), *([Fraction(found["below"])] if found["below"] else [])]
    return values


def _texts(gold: str | Sequence[str] | None) -> list[str]:
    return [gold] if isinstance(gold, str) else [str(text) for text in gold or ()]


def _plain(text: str) -> str:
    """The text with minus signs and LaTeX's commas between thousands in ASCII."""
    return text.replace("\u2212", "-").replace("{,}", ",")


def _last_number(text: str) -> re.Match[str] | None:
    """The last number; the text's end is searched first, for a long text may hold very many."""
    tail = deque(NUMBER.finditer(text[-TAIL_CHARS:]), maxlen=1)
    if tail and (tail[0].start() > 0 or len(text) <= TAIL_CHARS):
        return tail[0]
    return next(iter(deque(NUMBER.finditer(text), maxlen=1)), None)


def value_of(text: str) -> Fraction | None:
    """The value of a text that is one number as `numeric` reads it, with its signs and blanks; None for another."""
    text = _plain(text).strip(AROUND)
    sign = "-" if text.startswith("-") else ""
    found = NUMBER.fullmatch(sign + text.removeprefix("-").strip(AROUND))
    return None if found is None or _too_big(found) else _value(found)


def _too_big(found: re.Match[str]) -> bool:
    power = found["power"]
    return len(found[0]) > MAX_DIGITS or (power is not None and abs(int(power)) > MAX_POWER)


def _value(found: re.Match[str]) -> Fraction | None:
    """The number's value; None for a quotient with 0 below."""
    below = int(found["below"] or 1)
    return _decimal(found) / below if below else None


def _decimal(found: re.Match[str]) -> Fraction:
    value = Fraction(found["value"].replace(",", "")) * Fraction(10) ** int(found["power"] or 0)
    return -value if found["sign"] == "-" else value
