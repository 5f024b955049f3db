"""Sets of real numbers: intervals, unions, finite sets and inequalities in one form.

A real set is a sorted tuple of pieces (low, high, low_closed, high_closed) that neither touch nor overlap; low and
high are nodes, and ("sym", "oo") and its negative stand for the ends of the line.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import cmp_to_key
from typing import NamedTuple

from deltarl.rewards.math.evaluate import Evaluator, NotANumber, Undefined
from deltarl.rewards.math.lexer import LimitError, ParseError
from deltarl.rewards.math.nodes import Node, names
from deltarl.rewards.math.scalars import order, proved

MAX_PIECES = 400
INFINITY: Node = ("sym", "oo")
MINUS_INFINITY: Node = ("neg", INFINITY)
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


class Piece(NamedTuple):
    low: Node
    high: Node
    low_closed: bool
    high_closed: bool


def is_inequality(node: Node) -> bool:
    return node[0] == "rel" and all(op in ("<", ">", "<=", ">=", "!=") for op in node[2])


def names_a_set(node: Node) -> bool:
    """Whether the notation is only read as a set of reals, which makes `(a, b)` beside it an interval."""
    if node[0] in ("union", "meet", "minus") or is_inequality(node) or node == ("sym", "mathbbR"):
        return True
    if node[0] == "tuple" and len(node[1]) == 2 and (node[2], node[3]) != ("(", ")"):
        return True
    if node[0] == "tuple" and len(node[1]) == 2 and any(_infinite(end) for end in node[1]):
        return True
    return node[0] == "list" and all(is_inequality(item) for item in node[1])


def real_set(node: Node) -> tuple[Piece, ...]:
    """Raises ParseError (NotANumber among them) where the node is no set of reals with known ends."""
    if node == ("sym", "mathbbR"):
        return (Piece(MINUS_INFINITY, INFINITY, False, False),)
    if node[0] == "tuple" and len(node[1]) == 2:
        low, high = node[1]
        if _order(low, high) > 0:
            raise NotANumber("an interval with its ends in the wrong order")
        return union([Piece(low, high, node[2] == "[", node[3] == "]")])
    if node[0] == "set" or (node[0] == "list" and node[2] == "," and not any(map(is_inequality, node[1]))):
        return union([Piece(item, item, True, True) for item in node[1]])
    if node[0] == "union":
        operands = []
        while node[0] == "union":
            operands.append(node[2])
            node = node[1]
        return union([piece for operand in (node, *operands) for piece in real_set(operand)])
    if node[0] == "meet":
        return intersection(real_set(node[1]), real_set(node[2]))
    if node[0] == "minus":
        return intersection(real_set(node[1]), complement(real_set(node[2])))
    if node[0] == "rel":
        return _solve(node)
    if node[0] == "list" and all(is_inequality(item) for item in node[1]):
        parts = [real_set(item) for item in node[1]]
        met = parts[0]
        for part in parts[1:]:
            met = intersection(met, part)
        return met if met and node[2] != "or" else union([piece for part in parts for piece in part])
    raise NotANumber(f"a {node[0]} is not a set of reals")


def same_set(left: tuple[Piece, ...], right: tuple[Piece, ...], same_end: Callable[[Node, Node], bool]) -> bool:
    return len(left) == len(right) and all(
        a[2:] == b[2:] and _same_end(a.low, b.low, same_end) and _same_end(a.high, b.high, same_end)
        for a, b in zip(left, right, strict=True)
    )


def _same_end(a: Node, b: Node, same_end: Callable[[Node, Node], bool]) -> bool:
    return a == b if _infinite(a) or _infinite(b) else same_end(a, b)


def _infinite(node: Node) -> bool:
    return node in (INFINITY, MINUS_INFINITY)


def _order(a: Node, b: Node) -> int:
    """-1, 0 or 1, the ends of the line among the numbers. Raises NotANumber, Undefined and LimitError."""
    if _infinite(a) or _infinite(b):
        ranks = [(node == INFINITY) - (node == MINUS_INFINITY) for node in (a, b)]
        return ranks[0] - ranks[1]
    return order(a, b)


def _order_low(a: Piece, b: Piece) -> int:
    """A closed end begins before an open one at the same place."""
    return _order(a.low, b.low) or b.low_closed - a.low_closed


def _order_high(a: Piece, b: Piece) -> int:
    return _order(a.high, b.high) or a.high_closed - b.high_closed


def union(pieces: list[Piece]) -> tuple[Piece, ...]:
    if len(pieces) > MAX_PIECES:
        raise LimitError(f"a set of {len(pieces)} pieces, limit {MAX_PIECES}")
    merged: list[Piece] = []
    for piece in sorted(pieces, key=cmp_to_key(_order_low)):
        length = _order(piece.high, piece.low)
        if length < 0 or (length == 0 and not (piece.low_closed and piece.high_closed)):
            continue
        if merged:
            last = merged[-1]
            gap = _order(piece.low, last.high)
            if gap < 0 or (gap == 0 and (piece.low_closed or last.high_closed)):
                if _order_high(piece, last) > 0:
                    merged[-1] = last._replace(high=piece.high, high_closed=piece.high_closed)
                continue
        merged.append(piece)
    return tuple(merged)


def intersection(left: tuple[Piece, ...], right: tuple[Piece, ...]) -> tuple[Piece, ...]:
    if len(left) * len(right) > MAX_PIECES:
        raise LimitError("an intersection of too many pieces")
    return union([_overlap(a, b) for a in left for b in right])


def _overlap(a: Piece, b: Piece) -> Piece:
    low = max((a, b), key=cmp_to_key(_order_low))
    high = min((a, b), key=cmp_to_key(_order_high))
    return Piece(low.low, high.high, low.low_closed, high.high_closed)


def complement(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    gaps, low, closed = [], MINUS_INFINITY, False
    for piece in pieces:
        gaps.append(Piece(low, piece.low, closed, not piece.low_closed))
        low, closed = piece.high, not piece.high_closed
    return union([*gaps, Piece(low, INFINITY, closed, False)])


def _solve(node: Node) -> tuple[Piece, ...]:
    """The solutions of `a < t <= b` where t is a name, its absolute value, or linear in one name."""
    result: tuple[Piece, ...] = (Piece(MINUS_INFINITY, INFINITY, False, False),)
    for left, op, right in zip(node[1], node[2], node[1][1:], strict=False):
        if op in ("=", "in"):
            raise NotANumber("an equation is not a set of reals")
        result = intersection(result, _solve_one(left, op, right))
    return result


def _solve_one(left: Node, op: str, right: Node) -> tuple[Piece, ...]:
    if not names(left):
        left, right, op = right, left, FLIPPED.get(op, op)
    if not names(right) and left[0] in ("sym", "call"):
        return _ray(op, right)
    if not names(right) and left[0] == "fn" and left[1] == "abs" and left[2][0][0] in ("sym", "call"):
        inside = intersection(_ray(op, right), _ray(FLIPPED.get(op, op), ("neg", right)))
        outside = union([*_ray(op, right), *_ray(FLIPPED.get(op, op), ("neg", right))])
        return inside if op in ("<", "<=") else outside
    slope, offset = _linear(("add", (left, ("neg", right))))
    bound: Node = ("num", -offset / slope, 0)
    return _ray(op if slope > 0 else FLIPPED.get(op, op), bound)


def _linear(node: Node) -> tuple[Fraction, Fraction]:
    """(slope, offset) of an expression that is linear in its one name, found at four exact points."""
    variables = sorted(names(node))
    if len(variables) != 1:
        raise NotANumber("an inequality in more than one name")
    try:
        values = [Evaluator({variables[0]: Fraction(x)}, 64, real=True).value(node) for x in (0, 1, 2, -7)]
    except Undefined as error:
        raise NotANumber("an inequality that is not linear") from error
    offset, slope = values[0], values[1] - values[0]
    straight = all(isinstance(v, Fraction) for v in values) and values[2:] == [offset + 2 * slope, offset - 7 * slope]
    if not straight or slope == 0:
        raise NotANumber("an inequality that is not linear with rational coefficients")
    line = ("add", (("mul", (("num", slope, 0), ("sym", variables[0]))), ("num", offset, 0)))
    if not proved(node, line, "real"):
        raise NotANumber("an inequality that is linear at some points only")
    return slope, offset


def _ray(op: str, end: Node) -> tuple[Piece, ...]:
    if op == "!=":
        return Piece(MINUS_INFINITY, end, False, False), Piece(end, INFINITY, False, False)
    closed = op.endswith("=")
    if op.startswith("<"):
        return (Piece(MINUS_INFINITY, end, False, closed),)
    if op.startswith(">"):
        return (Piece(end, INFINITY, closed, False),)
    raise ParseError(f"no ray for {op!r}")
