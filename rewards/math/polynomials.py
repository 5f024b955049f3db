"""Quotients of polynomials in normal form: an exact decision for the expressions that are rational in their names."""

from collections.abc import Callable
from fractions import Fraction

from deltarl.rewards.math.budget import fraction_price, spend
from deltarl.rewards.math.evaluate import FIRST_PRECISION, Evaluator, NotANumber, Undefined
from deltarl.rewards.math.lexer import LimitError
from deltarl.rewards.math.nodes import CONSTANT_NAMES, Node, names

MAX_TERMS = 300
MAX_POWER = 64
MAX_BITS = 20_000

Monomial = frozenset[tuple[Node, int]]
Polynomial = dict[Monomial, Fraction]
Quotient = tuple[Polynomial, Polynomial]

UNIT: Monomial = frozenset()
ONE: Polynomial = {UNIT: Fraction(1)}


def same_quotient(left: Node, right: Node) -> bool | None:
    """Whether two expressions are the same quotient of polynomials; None where that is not the question.

    Any other subexpression (a root, a sine) counts as one more name, so that True is a proof for every expression and
    False is returned only where both are rational in plain names. None also past MAX_TERMS terms.
    """
    try:
        (a, b), (c, d) = quotient(left), quotient(right)
        equal = _product(a, d) == _product(c, b)
    except LimitError:
        return None
    if equal:
        return True
    atoms = {atom for polynomial in (a, b, c, d) for monomial in polynomial for atom, _ in monomial}
    return False if all(atom[0] == "sym" and atom[1] not in CONSTANT_NAMES for atom in atoms) else None


def quotient(node: Node) -> Quotient:
    """(numerator, denominator), nothing cancelled. Raises Undefined for a denominator of 0, and LimitError."""
    kind = node[0]
    if kind == "num":
        return ({UNIT: node[1]} if node[1] else {}), ONE
    if kind == "neg":
        top, bottom = quotient(node[1])
        return {monomial: -factor for monomial, factor in top.items()}, bottom
    if kind == "add":
        return _folded(node[1], _added)
    if kind == "mul":
        return _folded(node[1], _multiplied)
    if kind == "div":
        return _multiplied(quotient(node[1]), _inverse(quotient(node[2])))
    if kind == "pow":
        exponent = _small_integer(node[2])
        if exponent is not None:
            base = quotient(node[1])
            return _power(base if exponent > 0 else _inverse(base), abs(exponent))
    value = None if names(node) else _rational(node)
    if value is not None:
        return ({UNIT: value} if value else {}), ONE
    return {frozenset(((node, 1),)): Fraction(1)}, ONE


def _rational(node: Node) -> Fraction | None:
    """The value of a constant that is worked out without rounding, as 5! is and log_2 8 is not."""
    evaluator = Evaluator({}, FIRST_PRECISION, real=False)
    try:
        value = evaluator.value(node)
    except NotANumber:
        return None
    return value if evaluator.exact and isinstance(value, Fraction) else None


def _folded(nodes: tuple[Node, ...], combine: Callable[[Quotient, Quotient], Quotient]) -> Quotient:
    result = quotient(nodes[0])
    for node in nodes[1:]:
        result = combine(result, quotient(node))
    return result


def _small_integer(node: Node) -> int | None:
    if node[0] == "neg":
        inner = _small_integer(node[1])
        return None if inner is None else -inner
    if node[0] != "num" or node[1].denominator != 1 or not 0 < abs(node[1]) <= MAX_POWER:
        return None
    return int(node[1])


def _inverse(value: Quotient) -> Quotient:
    if not value[0]:
        raise Undefined("division by zero")
    return value[1], value[0]


def _power(value: Quotient, exponent: int) -> Quotient:
    result = value
    for _ in range(exponent - 1):
        result = _multiplied(result, value)
    return result


def _multiplied(left: Quotient, right: Quotient) -> Quotient:
    return _product(left[0], right[0]), _product(left[1], right[1])


def _added(left: Quotient, right: Quotient) -> Quotient:
    if left[1] == right[1]:
        return _sum(left[0], right[0]), left[1]
    return _sum(_product(left[0], right[1]), _product(right[0], left[1])), _product(left[1], right[1])


def _sum(left: Polynomial, right: Polynomial) -> Polynomial:
    spend(len(right) * fraction_price(max(_bits(left), _bits(right))))
    result = dict(left)
    for monomial, factor in right.items():
        result[monomial] = result.get(monomial, 0) + factor
    return _bounded(result)


def _product(left: Polynomial, right: Polynomial) -> Polynomial:
    if len(left) * len(right) > MAX_TERMS**2:
        raise LimitError(f"a product of {len(left)} by {len(right)} terms")
    spend(len(left) * len(right) * 2 * fraction_price(max(_bits(left), _bits(right))))
    result: Polynomial = {}
    for a, x in left.items():
        for b, y in right.items():
            monomial = _joined(a, b)
            result[monomial] = result.get(monomial, 0) + x * y
    return _bounded(result)


def _joined(left: Monomial, right: Monomial) -> Monomial:
    if not left or not right:
        return left or right
    exponents = dict(left)
    for atom, exponent in right:
        exponents[atom] = exponents.get(atom, 0) + exponent
    return frozenset(exponents.items())


def _bounded(polynomial: Polynomial) -> Polynomial:
    kept = {monomial: factor for monomial, factor in polynomial.items() if factor}
    if len(kept) > MAX_TERMS:
        raise LimitError(f"a polynomial of {len(kept)} terms, limit {MAX_TERMS}")
    if _bits(kept) > MAX_BITS:
        raise LimitError(f"a coefficient of more than {MAX_BITS} bits")
    return kept


def _bits(polynomial: Polynomial) -> int:
    return max((max(f.numerator.bit_length(), f.denominator.bit_length()) for f in polynomial.values()), default=0)
