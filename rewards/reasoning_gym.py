"""The `reasoning_gym` verifier: answers to reasoning-gym's data sets, right or wrong, by rules of our own.

reasoning-gym's own scorers give part marks for an answer that merely contains the gold, or comes near it. Here each
data set has one rule: numbers by value, expressions by meaning, texts, lists and grids by item, puzzles by their rules.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from deltarl.rewards.math import MathVerifier, extract
from deltarl.rewards.math.verifier import read, read_gold
from deltarl.rewards.puzzles import PUZZLES, Metadata, rows_of
from deltarl.rewards.simple import decimals_in, value_of
from deltarl.rewards.types import Verdict

Rule = Callable[[str, Metadata, str], bool]

MAX_ANSWER_CHARS = 100_000
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
FENCE = re.compile(r"```[a-z]*\n(.*?)\n?```", re.DOTALL)
TEXT = re.compile(r"\\(?:text|texttt|mathrm|mathtt)\s*\{([^{}]*)\}")
FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(-?\d+)(?:\s*/\s*(\d+))?")
COMPLEX = re.compile(r"(?P<real>[-+]?[\d.]++(?![ij]))?(?P<imaginary>[-+]?[\d.]*+[ij])?")
HEXADECIMAL = re.compile(r"-?0x[0-9a-f]+")
ROLE = re.compile(r"\b(\w++)\s+is\s+an?\s+(\w+)")
CELL = re.compile(r"[-+]?\d{1,50}(?:\.\d{1,50})?")
SIGNIFICANT = 3


class ReasoningGymVerifier:
    """Grades rows of reasoning-gym data sets by the rule of `meta["metadata"]["source_dataset"]`.

    A row is what reasoning-gym's data sets yield: question, answer, metadata. The answer graded is the last
    <answer>…</answer>, else the last \\boxed{}, else what follows the last "the answer is" on its line, else the whole
    response; text in <think> blocks does not count, and a response whose meta says `truncated: true` has no answer.

    A data set whose gold cannot decide (`UNDECIDED`) or that has no rule gives gold_error with its name, as do a row
    without metadata and a gold that its own rule does not accept.
    """

    name = "reasoning_gym"
    version = "1"

    def warm_up(self) -> None:
        MathVerifier().warm_up()

    def check_gold(self, gold: str | Sequence[str]) -> str | None:
        """Which rule applies is in a row's metadata, which is not known here."""
        return None if _gold_text(gold).strip() else "the gold is empty"

    def verify(self, response: str, gold: str | Sequence[str], *, meta: Mapping[str, Any]) -> Verdict:
        gold, metadata = _gold_text(gold), meta.get("metadata")
        problem = self.check_gold(gold) or _problem_of(metadata)
        if problem is not None:
            return Verdict(None, "gold_error", info={"reason": problem})
        dataset = metadata["source_dataset"]
        rule = RULES[dataset]
        try:
            if not _passes(rule, gold, metadata, gold):
                reason = f"{dataset}: its own rule does not accept the gold {gold[:80]!r}"
                return Verdict(None, "gold_error", info={"reason": reason})
        except KeyError as error:
            return Verdict(None, "gold_error", info={"reason": f"{dataset}: no {error} in the row's metadata"})
        if meta.get("truncated"):
            return Verdict(0.0, "no_answer", info={"reason": "the response was cut off"})
        answer = answer_text(response)
        if not answer:
            return Verdict(0.0, "no_answer", info={"reason": "no answer found"})
        if len(answer) > MAX_ANSWER_CHARS:
            reason = f"an answer of {len(answer)} characters, limit {MAX_ANSWER_CHARS}"
            return Verdict(0.0, "limit", answer[:200], {"reason": reason})
        if _passes(rule, answer, metadata, gold):
            return Verdict(1.0, "correct", answer, {"reason": f"right by the rule of {dataset}"})
        return Verdict(0.0, "incorrect", answer, {"reason": f"wrong by the rule of {dataset}"})


def answer_text(response: str) -> str:
    """The answer that a response states, without what merely sets it in type; empty without one."""
    text = extract.without_thoughts(response)
    opening = text.rfind("<answer>")
    tagged = TAGGED.match(text, opening) if opening >= 0 else None
    stated = tagged[1] if tagged else text
    if extract.BOX.search(stated):
        stated = extract.boxed(stated) or ""
    elif not tagged:
        stated = extract.after_phrase(stated) or stated
    fenced = FENCE.search(stated)
    stated = TEXT.sub(r"\1", fenced[1] if fenced else stated)
    return stated.strip(" \t\n$`*")


def _gold_text(gold: str | Sequence[str] | None) -> str:
    return gold if isinstance(gold, str) else "".join(map(str, gold or ()))


def _problem_of(metadata: Any) -> str | None:
    if not isinstance(metadata, Mapping) or "source_dataset" not in metadata:
        return "no metadata.source_dataset in the row: keep reasoning-gym's `metadata`"
    dataset = metadata["source_dataset"]
    if dataset in UNDECIDED:
        return f"{dataset}: {UNDECIDED[dataset]}"
    return None if dataset in RULES else f"no rule for data set {dataset!r}"


def _passes(rule: Rule, answer: str, metadata: Metadata, gold: str) -> bool:
    """False for an answer of a form that the rule cannot read."""
    try:
        return rule(answer, metadata, gold)
    except (ValueError, IndexError, TypeError, AttributeError, ZeroDivisionError, RecursionError):
        return False


# --- numbers


def sole_number(text: str) -> Fraction:
    """The one decimal of a text such as `k = 13` or `34 days`; ValueError for none, several, or a sum left undone."""
    numbers = decimals_in(text)
    if len(numbers) != 1:
        raise ValueError("not one number")
    return numbers[0]


def number(answer: str, metadata: Metadata, gold: str) -> bool:
    return sole_number(answer) == sole_number(gold)


def coordinates(answer: str, metadata: Metadata, gold: str) -> bool:
    """The gold's numbers in their order: right when they round to its three decimals."""
    return _near(decimals_in(answer), decimals_in(gold), Fraction("0.0005"))


def roots(answer: str, metadata: Metadata, gold: str) -> bool:
    """Every root, in any order, to four decimals, rounded either way."""
    return _near(sorted(decimals_in(answer)), sorted(decimals_in(gold)), Fraction("0.0001"))


def largest_or_smallest(answer: str, metadata: Metadata, gold: str) -> bool:
    """The gold is a float printed in full: 947865419.1689999 for the question's 947865419.169000."""
    exact = sole_number(gold)
    return abs(sole_number(answer) - exact) <= abs(exact) / 10**12


def _near(answers: Sequence[Fraction], golds: Sequence[Fraction], tolerance: Fraction) -> bool:
    pairs = list(zip(answers, golds, strict=True))
    return bool(pairs) and all(abs(answer - gold) <= tolerance for answer, gold in pairs)


def probability(answer: str, metadata: Metadata, gold: str) -> bool:
    """A decimal right to four digits, or a quotient; a name and `=` may stand before it."""
    value, exact = value_of(answer.rpartition("=")[2]), value_of(gold)
    return abs(value - exact) <= exact / 10_000


def significant(answer: str, metadata: Metadata, gold: str) -> bool:
    """Right when the gold, rounded to three significant digits, may give it."""
    value, exact = sole_number(answer), sole_number(gold)
    return abs(value - exact) <= _unit(exact) / 2


def _unit(value: Fraction) -> Fraction:
    """One in the last of SIGNIFICANT digits of a value."""
    digits = len(str(abs(value.numerator))) - len(str(value.denominator))
    exponent = digits if abs(value) >= Fraction(10) ** digits else digits - 1
    return Fraction(10) ** (exponent - SIGNIFICANT + 1)


def lowest_terms(answer: str, metadata: Metadata, gold: str) -> bool:
    """The gold's own numerator and denominator: an equal fraction that can be reduced is wrong."""
    return _fraction(answer) == _fraction(gold)


def _fraction(text: str) -> tuple[int, int]:
    found = FRACTION.fullmatch(text.strip(" $"))
    if found is None:
        raise ValueError("not a fraction")
    return int(found[1] or found[3]), int(found[2] or found[4] or 1)


def complex_number(answer: str, metadata: Metadata, gold: str) -> bool:
    return _complex(answer) == _complex(gold)


def _complex(text: str) -> tuple[Fraction, Fraction]:
    text = text.replace("\u2212", "-").replace(" ", "").strip("()$")
    found = COMPLEX.fullmatch(text)
    if found is None or not text:
        raise ValueError("not a + bi")
    imaginary = (found["imaginary"] or "0i")[:-1]
    return Fraction(found["real"] or 0), Fraction(imaginary + "1" if imaginary in ("", "+", "-") else imaginary)


def hexadecimal(answer: str, metadata: Metadata, gold: str) -> bool:
    values = [HEXADECIMAL.fullmatch(text.strip().casefold()) for text in (answer, gold)]
    return all(values) and int(values[0][0], 16) == int(values[1][0], 16)


def factors(answer: str, metadata: Metadata, gold: str) -> bool:
    """The gold's factors in any order."""
    found = [sorted(map(int, re.split(r"\\times|\\cdot|[×x*·]", text))) for text in (answer, gold)]
    return found[0] == found[1]


# --- expressions, by the math verifier


def expanded(answer: str, metadata: Metadata, gold: str) -> bool:
    """The same polynomial, multiplied out: without brackets."""
    return "(" not in answer and _same(gold, answer)


def antiderivative(answer: str, metadata: Metadata, gold: str) -> bool:
    """Its derivative is the integrand, whatever the constant; an integral left standing is none."""
    answer, integrand = _ln(answer), _ln(metadata["integrand"])
    reading = read(answer)
    if not reading.trees or reading.unevaluated:
        return False
    return _same(integrand, f"\\frac{{d}}{{d{metadata['variable']}}}\\left({answer}\\right)")


def _same(gold: str, answer: str) -> bool:
    verdict = MathVerifier(require_evaluated=False).grade([read_gold(gold)], read(answer))
    return verdict.status == "correct"


def _ln(expression: str) -> str:
    """sympy's log is the natural one, and its E the number."""
    return re.sub(r"\bE\b", "e", re.sub(r"(?<![\\\w])log\b", "ln", expression))


# --- texts, lists, grids


def words(answer: str, metadata: Metadata, gold: str) -> bool:
    """The same text, whatever its case, blanks, quotes and last full stop."""
    return _text(answer).casefold() == _text(gold).casefold()


def characters(answer: str, metadata: Metadata, gold: str) -> bool:
    """The same text in the same case."""
    return _text(answer) == _text(gold)


def _text(text: str) -> str:
    return " ".join(text.split()).strip("\"'`").rstrip(".").strip()


def sequence(answer: str, metadata: Metadata, gold: str) -> bool:
    """The same items in order, between blanks or commas, with or without brackets; numbers by value."""
    items, expected = [[cell for row in rows_of(text) for cell in row] for text in (answer, gold)]
    return _same_cells(items, expected) if expected else re.fullmatch(r"\[\s*\]", answer) is not None


def grid(answer: str, metadata: Metadata, gold: str) -> bool:
    """The same rows of the same cells."""
    rows, expected = rows_of(answer), rows_of(gold)
    return len(rows) == len(expected) and all(map(_same_cells, rows, expected))


def _same_cells(cells: Sequence[str], expected: Sequence[str]) -> bool:
    return len(cells) == len(expected) and all(
        a == b or _same_number(a, b) for a, b in zip(cells, expected, strict=True)
    )


def _same_number(left: str, right: str) -> bool:
    return all(map(CELL.fullmatch, (left, right))) and Fraction(left) == Fraction(right)


def digits(answer: str, metadata: Metadata, gold: str) -> bool:
    """The same digits in order, whatever stands between them."""
    return re.findall(r"\d", answer) == re.findall(r"\d", gold)


def lists_of_lists(answer: str, metadata: Metadata, gold: str) -> bool:
    """The same lists in any order, their items as they stand."""
    return sorted(json.loads(answer)) == sorted(json.loads(gold))


def groups(answer: str, metadata: Metadata, gold: str) -> bool:
    """The same groups in any order, their members in any order."""
    return sorted(map(sorted, json.loads(answer))) == sorted(map(sorted, json.loads(gold)))


def roles(answer: str, metadata: Metadata, gold: str) -> bool:
    """Who is what, each person once."""
    said, true = ROLE.findall(answer.casefold()), ROLE.findall(gold.casefold())
    return bool(true) and sorted(said) == sorted(true)


def predicted_output(answer: str, metadata: Metadata, gold: str) -> bool:
    """The same JSON value, or the same text."""
    try:
        return _typed(json.loads(answer)) == _typed(json.loads(gold))
    except ValueError:
        return characters(answer, metadata, gold)


def _typed(value: Any) -> Any:
    """True is not 1."""
    return json.dumps(value, sort_keys=True)


BY_RULE: list[tuple[Rule, str]] = [
    (
        number,
        "aiw basic_arithmetic binary_alternation chain_sum circuit_logic count_bits count_primes decimal_arithmetic "
        "decimal_chain_sum gcd gsm_symbolic largest_island lcm leg_counting letter_counting maze number_sequence "
        "products rectangle_count rotten_oranges self_reference simple_equations simple_geometry",
    ),
    (
        words,
        "acre base_conversion caesar_cipher calendar_arithmetic color_cube_rotation course_schedule figlet_font "
        "family_relationships game_of_life_halting isomorphic_strings mahjong_puzzle needle_haystack ransom_note "
        "spell_backward syllogism time_intervals tsumego zebra_puzzles",
    ),
    (characters, "bf emoji_mystery letter_jumble sentence_reordering string_insertion string_manipulation"),
    (
        sequence,
        "ab arc_1d list_functions number_filtering number_sorting path_star spiral_matrix string_splitting "
        "string_synthesis word_sequence_reversal word_sorting",
    ),
    (grid, "arc_agi binary_matrix game_of_life manipulate_matrix modulo_grid pool_matrix rearc rotate_matrix"),
    (antiderivative, "intermediate_integration simple_integration"),
    (complex_number, "complex_arithmetic"),
    (coordinates, "advanced_geometry"),
    (digits, "futoshiki"),
    (expanded, "polynomial_multiplication"),
    (factors, "prime_factorization"),
    (groups, "group_anagrams"),
    (hexadecimal, "bitwise_arithmetic"),
    (largest_or_smallest, "number_format"),
    (lists_of_lists, "palindrome_partitioning"),
    (lowest_terms, "dice fraction_simplification"),
    (predicted_output, "codeio"),
    (probability, "coin_flip"),
    (roles, "knights_knaves"),
    (roots, "polynomial_equations"),
    (significant, "power_function"),
]
RULES: dict[str, Rule] = {name: rule for rule, names in BY_RULE for name in names.split()} | PUZZLES
UNDECIDED = {
    "boxnet": "many plans are right and a row holds none",
    "knight_swap": "many move lists are right and one gold cannot decide",
    "propositional_logic": "many conclusions are right and a row holds none",
    "rubiks_cube": "many move lists are right and a row holds none",
    "rush_hour": "many move lists are right and a row holds none",
    "sokoban": "many move lists are right and one gold cannot decide",
    "word_ladder": "many ladders are right, and which words exist is not in a row",
}
