"""Functions given by cases, compared piece by piece over the real line."""

from collections.abc import Callable
from itertools import product

from deltarl.rewards.math.evaluate import NotANumber
from deltarl.rewards.math.intervals import Piece, complement, intersection, real_set, same_set, union
from deltarl.rewards.math.nodes import Node, names, substituted

OTHERWISE = frozenset(("otherwise", "else", "elsewhere"))
Pieces = list[tuple[Node, tuple[Piece, ...]]]


def same_cases(gold: Node, answer: Node, same: Callable[[Node, Node], bool]) -> bool:
    """Equal domains, and equal values wherever a piece of one meets a piece of the other.

    Raises NotANumber where a condition is no set of values of one name with known ends.
    """
    gold_name, answer_name = _variable(gold), _variable(answer)
    ours, theirs = _pieces(gold), _pieces(substituted(answer, {answer_name: gold_name}))
    if not same_set(_domain(ours), _domain(theirs), same):
        return False
    for (value, here), (other, there) in product(ours, theirs):
        for piece in intersection(here, there):
            single = piece.low_closed and piece.high_closed and same(piece.low, piece.high)
            point = {gold_name: piece.low} if single else {}
            if not same(substituted(value, point), substituted(other, point)):
                return False
    return True


def _variable(node: Node) -> Node:
    found = frozenset().union(*(names(condition) for _, condition in node[1]))
    if len(found) != 1:
        raise NotANumber("cases that depend on more than one name")
    return ("sym", *found)


def _pieces(node: Node) -> Pieces:
    stated = [(value, real_set(condition)) for value, condition in node[1] if not _is_otherwise(condition)]
    rest = complement(_domain(stated))
    return stated + [(value, rest) for value, condition in node[1] if _is_otherwise(condition)]


def _is_otherwise(condition: Node) -> bool:
    return condition[0] == "text" and condition[1].casefold() in OTHERWISE


def _domain(pieces: Pieces) -> tuple[Piece, ...]:
    return union([piece for _, domain in pieces for piece in domain])
