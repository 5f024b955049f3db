"""The last stage: sums, integrals, limits and derivatives in closed form, and identities proved by sympy.

Sympy expressions are built node by node from our own trees, never from text, and sympy is imported by the first tree
that needs it (about half a second, once in a process). What it is asked is bounded beforehand in nodes, digits,
exponents and ranges, and while it works every call inside of it is paid for from the answer's budget.
"""

from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from typing import Any

from deltarl.rewards.math.budget import paid_by_the_call, spend
from deltarl.rewards.math.evaluate import FIRST_PRECISION, Evaluator, NotANumber, Undefined
from deltarl.rewards.math.lexer import LimitError, ParseError
from deltarl.rewards.math.nodes import Node, names, parts, substituted, uses
from deltarl.rewards.math.polynomials import quotient
from deltarl.rewards.math.sympy_trees import Assumption, Expression, SympyBuilder, to_node

MAX_PARTS = 250
MAX_SIMPLIFIED = 120
MAX_OPERAND_PARTS = 60
MAX_OPERATORS = 4
PART_PRICE = 6

OPERATORS = ("sum", "prod", "int", "prim", "lim", "diff")


class NoClosedForm(ParseError):
    """A sum, integral, limit or derivative that this stage does not work out."""


def holds_operator(node: Node) -> bool:
    return node[0] in OPERATORS or any(holds_operator(part) for part in node if isinstance(part, tuple) and part)


def evaluated(node: Node) -> Node:
    """The tree with every sum, product, integral, limit and derivative replaced by its value.

    A range between integers is written out, without sympy. Raises NoClosedForm and LimitError.
    """
    if _operators(node) > MAX_OPERATORS:
        raise LimitError(f"more than {MAX_OPERATORS} sums, integrals or the like")
    return _Evaluation().value(node)


class _Evaluation:
    def value(self, node: Node) -> Node:
        if not holds_operator(node):
            return node
        written_out = self.written_out(node) if node[0] in ("sum", "prod") else None
        if written_out is not None:
            return written_out
        inside = tuple(self.part(part) for part in node)
        return _closed_form(inside) if node[0] in OPERATORS else inside

    def part(self, part: object) -> object:
        if not isinstance(part, tuple) or not part:
            return part
        return self.value(part) if isinstance(part[0], str) else tuple(self.part(p) for p in part)

    def written_out(self, node: Node) -> Node | None:
        """None where an end is not a number."""
        kind, body, name, *ends = node
        if any(names(end) or holds_operator(end) or uses(end, "oo") for end in ends):
            return None
        first, last = (Evaluator({}, FIRST_PRECISION, real=False).value(end) for end in ends)
        if not all(isinstance(end, Fraction) and end.denominator == 1 for end in (first, last)):
            raise NoClosedForm("a range between ends that are not integers")
        count = int(last - first) + 1
        if count < 1:
            return ("num", Fraction(kind == "prod"), 0)
        spend(PART_PRICE * count * parts(body))
        terms = [substituted(body, {name: ("num", first + k, 0)}) for k in range(count)]
        return ("add" if kind == "sum" else "mul", tuple(self.value(term) for term in terms))


def _closed_form(node: Node) -> Node:
    _check_size(node, MAX_OPERAND_PARTS)
    _check_values_at_ends(node)
    builder = SympyBuilder("real")
    with paid_by_the_call():
        operator = builder.build(node)
        try:
            value = operator.doit(manual=True)
        except _refusals(builder.sympy) as error:
            raise NoClosedForm(f"no closed form: {error}") from error
        return to_node(_generic_branches(builder.sympy, value))


def _refusals(sympy: Any) -> tuple[type[Exception], ...]:
    """What sympy raises for a question that it does not answer: no algorithm for it, arguments outside of the one that
    there is, a polynomial in what is none, a pole."""
    return NotImplementedError, ValueError, sympy.PolynomialError, sympy.PoleError


def _check_values_at_ends(node: Node) -> None:
    """Raises LimitError where an end put in for the bound name makes too large a number, as 40 does in 2^{2^x}."""
    _, body, name, *rest = node
    for end in rest:
        if isinstance(end, tuple) and not (names(end) or uses(end, "oo")):
            value = Evaluator({}, FIRST_PRECISION, real=False).value(end)
            point = Fraction(int(value.real) if not isinstance(value, Fraction) else value)
            environment = dict.fromkeys(names(body) - {name[1]}, Fraction(1)) | {name[1]: point}
            with suppress(Undefined, NotANumber):
                Evaluator(environment, FIRST_PRECISION, real=False).value(body)


def _generic_branches(sympy: Any, value: Expression) -> Expression:
    """Case distinctions replaced by the case beside single points: a geometric sum has one for a ratio of 1."""
    for piece in value.atoms(sympy.Piecewise):
        for branch, condition in piece.args:
            if not isinstance(condition, sympy.Eq) and not branch.has(sympy.Sum, sympy.Product, sympy.Integral):
                value = value.subs(piece, branch)
                break
    return value


def proves_equal(left: Node, right: Node, *assumptions: Assumption) -> bool:
    """Whether sympy shows left - right to be 0 under one of the assumptions about the names, tried in turn.

    A proof for "positive" or "integer" names says nothing of others: a caller must have seen the two agree there.
    Logarithms are split and joined as where both sides are defined. Raises LimitError for trees past the bounds.
    """
    for node in (left, right):
        _check_size(node, MAX_PARTS)
    for assumption in assumptions:
        builder = SympyBuilder(assumption)
        with paid_by_the_call():
            difference = builder.build(left) - builder.build(right)
            if any(form == 0 for form in _forms(builder.sympy, difference)):
                return True
        if difference.has(*_kinked(builder.sympy)):
            return False
    return False


def _kinked(sympy: Any) -> tuple[type, ...]:
    return sympy.Abs, sympy.Max, sympy.Min, sympy.floor, sympy.ceiling, sympy.sign


def _periodic(sympy: Any) -> tuple[type, ...]:
    """The functions that are quotients of exponentials, in which form a difference of theirs is decided."""
    elementary = sympy.functions.elementary
    return elementary.trigonometric.TrigonometricFunction, elementary.hyperbolic.HyperbolicFunction


def _forms(sympy: Any, difference: Expression) -> Iterator[Expression]:
    """The difference in one form after another, the cheap ones first, the others only for what is small."""
    yield difference
    yield sympy.expand(difference)
    if sum(1 for _ in sympy.preorder_traversal(difference)) > MAX_SIMPLIFIED:
        raise LimitError(f"an identity of more than {MAX_SIMPLIFIED} parts")
    try:
        yield from _rewritten(sympy, difference)
    except _refusals(sympy):
        return


def _rewritten(sympy: Any, difference: Expression) -> Iterator[Expression]:
    if difference.has(*_kinked(sympy)):
        yield sympy.expand(difference.rewrite((sympy.Max, sympy.Min), sympy.Abs).rewrite(sympy.floor))
    if difference.has(sympy.log):
        yield sympy.expand(sympy.expand_log(difference, force=True))
        yield sympy.expand(_without_logs_of_sizes(sympy, difference))
    if difference.has(sympy.factorial, sympy.binomial):
        yield sympy.gammasimp(difference)
    if difference.has(*_periodic(sympy)):
        yield sympy.expand(sympy.fraction(sympy.together(difference.rewrite(sympy.exp)))[0])
        yield sympy.trigsimp(difference)
    if any(power.exp.is_Rational and not power.exp.is_Integer for power in difference.atoms(sympy.Pow)):
        yield sympy.radsimp(sympy.sqrtdenest(difference))
        yield sympy.expand(sympy.expand_power_base(difference, force=True))
        yield sympy.expand(_with_radicands_factored(sympy, _without_first_root(sympy, difference)))
    yield sympy.simplify(difference)


def _without_logs_of_sizes(sympy: Any, value: Expression) -> Expression:
    """ln u as ln(u^2) / 2 where u holds absolute values and is not negative: ln |x| is ln(x^2) / 2."""
    return value.replace(
        lambda part: isinstance(part, sympy.log) and part.args[0].has(sympy.Abs) and part.args[0].is_nonnegative,
        lambda part: sympy.log(part.args[0] ** 2) / 2,
    )


def _without_first_root(sympy: Any, value: Expression) -> Expression:
    """x replaced by (t^2 - b) / a for t >= 0, where the value holds a square root of ax + b: its domain stays whole."""
    for power in sorted(value.atoms(sympy.Pow), key=sympy.default_sort_key):
        if power.exp.is_Rational and power.exp.q == 2:
            for name in power.base.free_symbols:
                slope = power.base.diff(name)
                if slope.is_number and slope.is_positive and len(power.base.free_symbols) == 1:
                    root = sympy.Dummy(nonnegative=True)
                    return value.subs(name, (root**2 - power.base.subs(name, 0)) / slope)
    return value


def _with_radicands_factored(sympy: Any, value: Expression) -> Expression:
    return value.replace(
        lambda part: part.is_Pow and part.exp.is_Rational and not part.exp.is_Integer and part.base.is_Add,
        lambda part: sympy.factor(part.base) ** part.exp,
    )


def same_zeros(left: Node, right: Node) -> bool:
    """Whether two quotients have the same zeros: one numerator up to a constant, and denominators that take none away.

    xy - 1 and y - 1/x have, x and x/y have not. Raises LimitError for trees past the bounds.
    """
    for node in (left, right):
        _check_size(node, MAX_PARTS)
        quotient(node)
    builder = SympyBuilder("real")
    sympy = builder.sympy
    with paid_by_the_call():
        built = [builder.build(node) for node in (left, right)]
        try:
            (top, bottom), (other, below) = (sympy.fraction(sympy.cancel(sympy.together(value))) for value in built)
            if other == 0 or top == 0 or not sympy.cancel(top / other).is_number:
                return False
            return sympy.cancel(bottom / below).is_number or all(_apart(sympy, top, b) for b in (bottom, below))
        except _refusals(sympy):
            return False


def _apart(sympy: Any, numerator: Expression, denominator: Expression) -> bool:
    """Whether the two never vanish together, shown by a remainder that is a constant."""
    if denominator.is_number:
        return True
    remainder = sympy.reduced(numerator, [denominator])[1]
    return bool(remainder.is_number and remainder != 0)


def _check_size(node: Node, limit: int) -> None:
    if parts(node) > limit:
        raise LimitError(f"a symbolic expression of {parts(node)} parts, limit {limit}")


def _operators(node: Node) -> int:
    own = bool(node) and node[0] in OPERATORS
    return own + sum(_operators(part) for part in node if isinstance(part, tuple))
