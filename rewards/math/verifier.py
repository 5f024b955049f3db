"""The `math` verifier: finds the answer that a response states and decides whether it equals the gold."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

from deltarl.rewards.math import extract
from deltarl.rewards.math.budget import allowance
from deltarl.rewards.math.choices import chosen_in, letter_of, letters, settled_on
from deltarl.rewards.math.compare import Conflict, equivalent, split_label
from deltarl.rewards.math.lexer import LimitError, ParseError, clean, has_thousands
from deltarl.rewards.math.nodes import Node
from deltarl.rewards.math.operators import Unevaluated
from deltarl.rewards.math.parser import parse
from deltarl.rewards.math.scalars import Rules
from deltarl.rewards.math.symbolic import holds_operator
from deltarl.rewards.math.sympy_trees import load_sympy
from deltarl.rewards.math.wording import meaning, units_in, without_letter_unit
from deltarl.rewards.types import Verdict

Extraction = Literal["strict", "anchored", "lenient"]
MAX_ANSWER_CHARS = 4000
DECIMAL_COMMA = re.compile(r"-?\d+,(?:\d{1,2}|\d{4,})|-?0,\d+")
TWO_NUMBERS = re.compile(r"-?[1-9]\d*,\d")
TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|textit|mbox|textnormal|textrm)\s*\{([^{}]*)\}")
SPACING = re.compile(r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|q?quad|displaystyle)(?![a-zA-Z])|\\[,;:! ]|~")
BLANKS = re.compile(r"(?<![\d,]) | (?!\d)")
WORDS = re.compile(r"\(?[A-Za-z'\-]+\)?")
INTEGER = re.compile(r"-?(?:0|[1-9]\d{0,14})")


@dataclass(frozen=True, slots=True)
class Reading:
    """One text read as an answer.

    flat: its characters without spacing. trees: what it says, twice where commas may stand between thousands or
    between items. words: it is made of words. unevaluated: it holds a sum, integral or the like. choice: the letter
    of a multiple choice that a gold stands for. units: those it states.
    """

    text: str
    flat: str
    trees: tuple[Node, ...]
    problem: str | None = None
    limit: bool = False
    words: bool = False
    unevaluated: bool = False
    choice: str | None = None
    units: frozenset[str] = frozenset()


class MathVerifier:
    """Grades mathematical answers by meaning.

    Numbers, sets, tuples and quotients of polynomials are compared exactly and other constants to a precision past
    every size in them. Other expressions with names must agree at probe points and then be proved equal by sympy, which
    warm_up() loads, and without it the first answer that needs it. The work that one answer costs is counted and
    bounded (budget.py): more is status "limit", on a slow machine as on a fast one.

    extraction: "strict" takes the last \\boxed{} alone; "anchored" then "the final answer is", then `####`, then a
    response that is nothing but an answer; "lenient" then the last math span and the last number.
    precision: significant digits from which a decimal may stand for an exact gold without a finite decimal (1/3, π).
    percent: "either" lets 28 and 28% stand for each other; "strict" reads 28% as 0.28 only.
    degrees: "either" lets 30 and 30 degrees stand for each other; "strict" reads 30 degrees as pi/6 only.
    units: with "agree" an answer may leave out the gold's unit or currency but not state another (3 hours is not 3
    minutes; nothing is converted), "required" wants it stated, "ignore" reads past all of them.
    require_evaluated: an answer that leaves a sum, product, integral, limit or derivative to be worked out is wrong,
    unless the gold is of the same form; False works it out. A gold's is always worked out.

    thoughts: with "count" an answer may stand in a <think> block, which with "ignore" is as if it were not there.

    A response whose last box is not closed, or whose meta says
    `truncated: true`, has no answer. Raises ValueError for an unknown option value.
    """

    name = "math"
    version = "3"

    def __init__(
        self,
        extraction: Extraction = "anchored",
        precision: int = 6,
        percent: Literal["either", "strict"] = "either",
        degrees: Literal["either", "strict"] = "either",
        units: Literal["agree", "required", "ignore"] = "agree",
        require_evaluated: bool = True,
        thoughts: Literal["ignore", "count"] = "ignore",
    ) -> None:
        if extraction not in ("strict", "anchored", "lenient"):
            raise ValueError(f"extraction {extraction!r}: use strict, anchored or lenient")
        if percent not in ("either", "strict"):
            raise ValueError(f"percent {percent!r}: use either or strict")
        if precision < 1:
            raise ValueError(f"precision {precision}: give the significant digits, at least 1")
        if degrees not in ("either", "strict"):
            raise ValueError(f"degrees {degrees!r}: use either or strict")
        if units not in ("agree", "required", "ignore"):
            raise ValueError(f"units {units!r}: use agree, required or ignore")
        if thoughts not in ("ignore", "count"):
            raise ValueError(f"thoughts {thoughts!r}: use ignore or count")
        self.extraction = extraction
        self.units = units
        self.thoughts = thoughts
        self.rules = Rules(precision, percent == "either", degrees == "either", require_evaluated)

    def warm_up(self) -> None:
        """Loads sympy, which takes longer than a deadline may be."""
        load_sympy()
        self.verify("\\boxed{\\sqrt{2}}", "2^{1/2}", meta={})

    def check_gold(self, gold: str | Sequence[str]) -> str | None:
        problems = [read_gold(text).problem for text in _texts(gold)]
        if not problems:
            return "there is no gold"
        return problems[0] if all(problems) else None

    def verify(self, response: str, gold: str | Sequence[str], *, meta: Mapping[str, Any]) -> Verdict:
        golds = [reading for text in _texts(gold) if not (reading := read_gold(text)).problem]
        if not golds:
            return Verdict(None, "gold_error", info={"reason": self.check_gold(gold)})
        if meta.get("truncated"):
            return Verdict(0.0, "no_answer", info={"reason": "the response was cut off"})
        texts = self.answer_texts(response)
        if any(gold.choice for gold in golds):
            letter = self.chosen(response, texts)
            if letter in [gold.choice for gold in golds]:
                return Verdict(1.0, "correct", letter)
        if not texts:
            return Verdict(0.0, "no_answer", info={"reason": "no answer found"})
        answer = next((r for r in map(read, texts) if r.trees or r.limit), None) or read(texts[0])
        return self.grade(golds, answer)

    def grade(self, golds: Sequence[Reading], answer: Reading) -> Verdict:
        if answer.limit:
            return Verdict(0.0, "limit", answer.text[:MAX_ANSWER_CHARS], {"reason": answer.problem})
        try:
            with allowance():
                if any(self.same(gold, answer) for gold in golds):
                    return Verdict(1.0, "correct", answer.text)
        except (LimitError, RecursionError) as error:
            return Verdict(0.0, "limit", answer.text, {"reason": str(error)})
        except Conflict as error:
            return Verdict(0.0, "incorrect", answer.text, {"reason": str(error)})
        return Verdict(0.0, "incorrect", answer.text, {"reason": answer.problem} if answer.problem else {})

    def same(self, gold: Reading, answer: Reading) -> bool:
        """Raises LimitError and Conflict."""
        if gold.flat == answer.flat or _same_words(gold.flat, answer.flat):
            return True
        if not self.units_agree(gold.units, answer.units):
            return False
        if INTEGER.fullmatch(gold.flat) and INTEGER.fullmatch(answer.flat):
            return int(gold.flat) == int(answer.flat)
        if _decimal_comma(answer.flat, gold.flat) or (
            _decimal_comma(gold.flat, answer.flat) and not TWO_NUMBERS.fullmatch(gold.flat)
        ):
            return True
        if not gold.trees or not answer.trees:
            return False
        count = max(len(gold.trees), len(answer.trees))
        pairs = [
            (gold.trees[min(i, len(gold.trees) - 1)], answer.trees[min(i, len(answer.trees) - 1)]) for i in range(count)
        ]
        return any(equivalent(g, a, self.rules) for g, a in pairs)

    def units_agree(self, gold: frozenset[str], answer: frozenset[str]) -> bool:
        if self.units == "ignore" or not gold:
            return True
        return bool(gold & answer) or (self.units == "agree" and not answer)

    def answer_texts(self, response: str) -> list[str]:
        """The answer that the response states, as one text or, where words surround it, as the texts to try reading
        in turn; the first that is mathematics is graded, and no other. Empty without an answer."""
        text = self.shown(response)
        if extract.BOX.search(text):
            box = extract.boxed(text)
            return [] if box is None or not box.strip() else [box]
        if self.extraction == "strict":
            return []
        stated = extract.stated(text)
        if stated:
            guess = self.extraction == "lenient" and not extract.NO_NUMBER.search(stated)
            return extract.readings_of(stated) + (extract.lenient(stated) if guess else [])
        if extract.is_bare(text):
            return [text.strip()]
        return extract.lenient(text) if self.extraction == "lenient" else []

    def shown(self, response: str) -> str:
        return (
            extract.THOUGHT_MARK.sub("\n\n", response)
            if self.thoughts == "count"
            else extract.without_thoughts(response)
        )

    def chosen(self, response: str, texts: Sequence[str]) -> str | None:
        """The letter of a multiple choice that the response settles on."""
        text = self.shown(response)
        if extract.BOX.search(text) or self.extraction == "strict":
            return letter_of(plain(clean(texts[0]))) if texts else None
        stated = extract.stated(text)
        if stated:
            return settled_on(stated)
        if extract.is_bare(text) and (letter := letter_of(text)):
            return letter
        return chosen_in(text) if self.extraction == "lenient" else None


@lru_cache(maxsize=8192)
def read_gold(text: str) -> Reading:
    """A gold read as an answer; it may be a boxed answer, closed or not, or end in `####` and the answer."""
    stated = extract.boxed(text) if extract.BOX.search(text) else extract.after_hashes(text)
    if stated is None and (box := extract.BOX.match(text.lstrip("$ "))) is not None:
        stated = text.lstrip("$ ")[box.end() :]
    reading = replace(
        read(text if stated is None else stated), choice=_letter_of_gold(stated or extract.stated(text) or text)
    )
    if reading.trees:
        try:
            with allowance():
                for tree in reading.trees:
                    if not holds_operator(tree):
                        split_label(tree)
        except (Conflict, ParseError, LimitError, ArithmeticError) as error:
            return replace(reading, problem=str(error))
        return replace(reading, problem=None)
    if reading.words or reading.unevaluated or reading.choice:
        return replace(reading, problem=None)
    stated = extract.stated(text)
    texts = extract.readings_of(stated) if stated else extract.only_span(text)
    return next((r for r in map(read, texts) if r.trees), reading)


def _letter_of_gold(text: str) -> str | None:
    return letter_of(plain(clean(text))) if len(text) <= MAX_ANSWER_CHARS else None


def read(text: str) -> Reading:
    """A text read as an answer; `problem` says in one line why it has no tree."""
    if INTEGER.fullmatch(text):
        return Reading(text, text, (("num", Fraction(int(text)), 0),))
    if len(text) > MAX_ANSWER_CHARS:
        return Reading(text, "", (), f"an answer of {len(text)} characters, limit {MAX_ANSWER_CHARS}", limit=True)
    cleaned = clean(text)
    flat = flattened(cleaned)
    if not flat:
        return Reading(text, flat, (), "empty")
    if (tree := meaning(flat)) is not None:
        return Reading(text, flat, (tree,), words=True)
    cleaned, unit = without_letter_unit(cleaned)
    units = units_in(text) | ({unit} if unit else frozenset())
    try:
        trees = (parse(cleaned),)
        if has_thousands(cleaned):
            trees += (parse(cleaned, thousands=False),)
        unevaluated = any(map(holds_operator, trees))
        problem = "a sum, integral or the like stands unevaluated" if unevaluated else None
        return Reading(text, flat, trees, problem, unevaluated=unevaluated, units=units)
    except Unevaluated as error:
        return Reading(text, flat, (), str(error), unevaluated=True)
    except ParseError as error:
        return Reading(text, flat, (), str(error), words=WORDS.fullmatch(flat) is not None)
    except (LimitError, RecursionError) as error:
        return Reading(text, flat, (), str(error), limit=True)


def flattened(cleaned: str) -> str:
    """The text in plain words, and without blanks that separate nothing."""
    return BLANKS.sub("", plain(cleaned)).rstrip("*. ").lstrip("* ")


def plain(cleaned: str) -> str:
    """The text without commands that only set words or space."""
    text = SPACING.sub(" ", TEXT_COMMAND.sub(r" \1 ", cleaned)).replace("\\ldots", "...").replace("\\dots", "...")
    return " ".join(text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").split())


def _texts(gold: str | Sequence[str] | None) -> list[str]:
    return [gold] if isinstance(gold, str) else [str(g) for g in gold or ()]


def _same_words(gold: str, answer: str) -> bool:
    """The same words in any case, or the same letters of a multiple choice with several answers: AC and `A, C`."""
    if WORDS.fullmatch(gold) and gold.strip("()").casefold() == answer.strip("()").casefold():
        return len(gold.strip("()")) > 1
    several = letters(gold)
    return len(several) > 1 and several == letters(answer)


def _decimal_comma(comma: str, point: str) -> bool:
    """1,22 beside 1.22: a comma for the point, where it cannot stand between thousands."""
    return "." in point and DECIMAL_COMMA.fullmatch(comma) is not None and comma.replace(",", ".") == point
