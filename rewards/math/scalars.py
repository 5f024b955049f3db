"""Whether two expressions have the same value.

Constants are compared exactly or to a precision past every size met. Expressions with names must agree at every probe
point, and then be proved equal: as quotients of polynomials, else by sympy.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from deltarl.rewards.math.evaluate import (
    FIRST_PRECISION,
    MAX_PRECISION,
    Environment,
    Evaluator,
    LimitError,
    NotANumber,
    Number,
    Undefined,
)
from deltarl.rewards.math.integers import hash_number
from deltarl.rewards.math.nodes import Node, names, substituted, uses
from deltarl.rewards.math.polynomials import same_quotient
from deltarl.rewards.math.symbolic import proves_equal
from deltarl.rewards.math.sympy_trees import Assumption

PROBES = 8
PROBES_NEEDED = 3
LONE_DECIMAL_DIGITS = 2
PAIR_DECIMAL_DIGITS = 5


@dataclass(frozen=True, slots=True)
class Rules:
    """precision: significant digits from which a decimal answer may stand for an exact gold that has no finite decimal.
    percent_either: `28%` may be answered as 28 and the other way round (0.28 is always right for 28%).
    degrees_either: 30 degrees may be answered as 30 and the other way round (pi/6 is always right for 30 degrees).
    require_evaluated: an answer that holds a sum, integral, limit or derivative equals only a gold of the same form.
    """

    precision: int = 6
    percent_either: bool = True
    degrees_either: bool = True
    require_evaluated: bool = True


def same_value(left: Node, right: Node) -> bool:
    """Equal as expressions. Raises NotANumber, Undefined (constants only) and LimitError."""
    variables = sorted(names(left) | names(right))
    if not variables:
        return agree(left, right, {}, real=False)
    real = not (uses(left, "i") or uses(right, "i"))
    for points, assumptions in (
        (probe_points(variables), ("real", "positive")),
        (integer_points(variables), ("integer",)),
    ):
        hits = 0
        for environment in points:
            try:
                if not agree(left, right, environment, real):
                    return False
            except Undefined:
                continue
            hits += 1
        if hits >= PROBES_NEEDED:
            return proved(left, right, *assumptions)
    return proved(left, right, "real")


def proved(left: Node, right: Node, *assumptions: Assumption) -> bool:
    """Equal by proof, for expressions that no probe point tells apart. Raises LimitError past the bounds of sympy."""
    exact = same_quotient(left, right)
    return proves_equal(left, right, *assumptions) if exact is None else exact


def agree(left: Node, right: Node, environment: Environment, real: bool) -> bool:
    """Equal values at one point: exactly when both are rational, else as near as `difference` can tell."""
    return difference(left, right, environment, real) == 0


def order(left: Node, right: Node) -> int:
    """-1, 0 or 1 as the left constant is less than, equal to or greater than the right one.

    Raises NotANumber, also for complex ones, Undefined and LimitError.
    """
    value = difference(left, right, {}, real=False)
    if not isinstance(value, Fraction) and value.imag != 0:
        raise NotANumber("an order of complex numbers")
    sign = value if isinstance(value, Fraction) else value.real
    return int(sign > 0) - int(sign < 0)


def difference(left: Node, right: Node, environment: Environment, real: bool) -> Number:
    """left - right at one point: exact when both are rational, else 0 below half the bits of a precision that is four
    times the largest magnitude met, so that a difference that the numbers' sizes allow cannot hide."""
    precision = FIRST_PRECISION
    while True:
        evaluator = Evaluator(environment, precision, real)
        a, b = evaluator.value(left), evaluator.value(right)
        if evaluator.exact:
            return a - b
        needed = 4 * evaluator.magnitude + FIRST_PRECISION
        if needed <= precision:
            a, b = evaluator.inexact(a), evaluator.inexact(b)
            noise = max(1, abs(a), abs(b)) * evaluator.mp.ldexp(1, -precision // 2)
            return a - b if abs(a - b) > noise else Fraction(0)
        if needed > MAX_PRECISION:
            raise LimitError(f"a comparison at {needed} bits, limit {MAX_PRECISION}")
        precision = needed


def number(node: Node) -> Number:
    """The value of a constant. Raises NotANumber, Undefined and LimitError."""
    return Evaluator({}, FIRST_PRECISION, real=False).value(node)


def probe_points(variables: list[str]) -> Iterator[Environment]:
    """Rational points, the same for the same names: positive, negative, small, and of mixed signs."""
    for index in range(PROBES):
        point = {}
        for position, name in enumerate(variables):
            seed = hash_number(f"{name}/{index}")
            size = Fraction(seed % 89 + 11, seed // 89 % 7 + 2) if index % 3 != 2 else Fraction(seed % 13 + 1, 17)
            negative = index in (1, 6) or (index in (3, 4) and (position + index) % 2 == 0)
            point[name] = -size if negative else size
        yield point


def integer_points(variables: list[str]) -> Iterator[Environment]:
    for index in range(PROBES):
        yield {name: Fraction(hash_number(f"{name}:{index}") % 9 + 2 + index) for name in variables}


def same_up_to_factor(left: Node, right: Node, positive: bool) -> bool:
    """left = c * right for one c that is not 0 (above 0 if `positive`): at every probe point, and then by proof."""
    variables = sorted(names(left) | names(right))
    real = not (uses(left, "i") or uses(right, "i"))
    first, there, hits = None, {}, 0
    for environment in probe_points(variables) if variables else iter([{}]):
        try:
            evaluator = Evaluator(environment, FIRST_PRECISION, real)
            ratio = evaluator.quotient(evaluator.value(left), evaluator.value(right))
            if ratio == 0 or (positive and not ratio > 0):
                return False
        except Undefined:
            continue
        hits += 1
        first, there = (ratio, environment) if first is None else (first, there)
        if not _near(evaluator, first, ratio):
            return False
    if hits < (PROBES_NEEDED if variables else 1):
        return False
    if isinstance(first, Fraction):
        return proved(left, ("mul", (("num", first, 0), right)), "real", "positive")
    point = {("sym", name): ("num", value, 0) for name, value in there.items()}
    crosswise = ("mul", (left, substituted(right, point))), ("mul", (right, substituted(left, point)))
    return same_value(*crosswise)


def _near(evaluator: Evaluator, a: Number, b: Number) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = evaluator.inexact(a), evaluator.inexact(b)
    return bool(abs(a - b) <= abs(a) * evaluator.mp.ldexp(1, -FIRST_PRECISION // 2))


def matches(gold: Node, answer: Node, rules: Rules) -> bool:
    """The answer has the gold's value, percent signs and decimals read by the rules."""
    if gold[0] == "pct" and answer[0] == "pct":
        return matches(gold[1], answer[1], rules)
    if gold[0] == "pct" and rules.percent_either and matches(gold[1], answer, rules):
        return True
    if answer[0] == "pct" and rules.percent_either and matches(gold, answer[1], rules):
        return True
    if same_value(gold, answer):
        return True
    bare = without_degrees(gold), without_degrees(answer)
    if rules.degrees_either and bare != (gold, answer):
        return matches(*bare, rules)
    return _rounds(gold, answer, rules)


def without_degrees(node: Node) -> Node:
    """The tree without degree signs outside of functions, whose arguments they are part of."""
    if node[0] == "deg":
        return without_degrees(node[1])
    if node[0] in ("add", "mul"):
        return (node[0], tuple(map(without_degrees, node[1])))
    if node[0] in ("neg", "div"):
        return (node[0], *map(without_degrees, node[1:]))
    return node


def _rounds(gold: Node, answer: Node, rules: Rules) -> bool:
    gold_decimal, answer_decimal = decimal(gold), decimal(answer)
    if (gold_decimal is None and answer_decimal is None) or names(gold) or names(answer):
        return False
    if gold_decimal and answer_decimal:
        coarse = min(gold_decimal, answer_decimal, key=lambda d: d[1])
        return coarse[2] >= PAIR_DECIMAL_DIGITS and _within(gold, answer, coarse[1], Fraction(1, 2))
    if gold_decimal:
        return (
            gold_decimal[2] >= LONE_DECIMAL_DIGITS
            and not has_finite_decimal(answer)
            and _within(gold, answer, gold_decimal[1], Fraction(1, 2))
        )
    return (
        answer_decimal[2] >= rules.precision
        and not has_finite_decimal(gold)
        and _within(gold, answer, answer_decimal[1], Fraction(1))
    )


def decimal(node: Node) -> tuple[Fraction, int, int] | None:
    """(value, places, significant digits) of a decimal literal, with or without a sign; None for anything else."""
    if node[0] == "neg":
        inner = decimal(node[1])
        return inner and (-inner[0], inner[1], inner[2])
    if node[0] != "num" or node[2] == 0:
        return None
    return node[1], node[2], len(str(abs(node[1].numerator * 10 ** node[2] // node[1].denominator)))


def has_finite_decimal(node: Node) -> bool:
    value = number(node)
    if not isinstance(value, Fraction):
        return False
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _within(left: Node, right: Node, places: int, ulps: Fraction) -> bool:
    evaluator = Evaluator({}, FIRST_PRECISION + 8 * places, real=False)
    a, b = evaluator.value(left), evaluator.value(right)
    limit = ulps / 10**places
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return abs(a - b) <= limit
    return bool(abs(evaluator.inexact(a) - evaluator.inexact(b)) <= evaluator.inexact(limit))
