"""The tree of an answer: plain tuples, so that equal trees are equal and may be dictionary keys.

Nodes, by their first entry:
    num value places          a literal: Fraction, decimals after its point (0 for an integer)
    sym name                  e, i, pi and oo among them
    add [..] · mul [..] · div a b · pow a b · neg a · root a n · fact a · pct a · deg a · pm a (+a or -a) · mp a
    fn name args              a known function; log has (x, base)
    call name args            an unknown function, f(x)
    based digits base         204_5
    list items kind · tuple items open close · set items · union a b · minus a b · meet a b · ratio items
    rel terms ops             a = b < c
    matrix rows · cases (value, condition).. · modulo a m · text words
    sum prod int lim diff: operators.py

"""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from deltarl.rewards.math.lexer import LimitError, ParseError

Node = tuple[Any, ...]

MAX_EXPONENT_10 = 2000
MAX_TREE_DEPTH = 150
CONSTANT_NAMES = frozenset(("e", "i", "pi", "oo"))


def names(node: Node) -> frozenset[str]:
    """The free names of a tree."""
    if node[0] == "sym":
        return frozenset() if node[1] in CONSTANT_NAMES else frozenset((node[1],))
    found: frozenset[str] = frozenset()
    for part in node:
        if isinstance(part, tuple) and part:
            found |= names(part)
    return found


def parts(node: Node) -> int:
    """How many tuples a tree is made of, those that stand in it more than once counted each time."""
    return 1 + sum(parts(part) for part in node if isinstance(part, tuple))


def check_depth(node: Node) -> None:
    """Raises LimitError for a tree that walks by recursion would not get to the bottom of."""
    level, depth = [node], 0
    while level:
        depth += 1
        if depth > MAX_TREE_DEPTH:
            raise LimitError(f"a tree deeper than {MAX_TREE_DEPTH}")
        level = [part for parent in level for part in parent if isinstance(part, tuple)]


def uses(node: Node, name: str) -> bool:
    if node == ("sym", name):
        return True
    return any(isinstance(part, tuple) and uses(part, name) for part in node)


def substituted(node: Node, mapping: Mapping[Node, Node]) -> Node:
    if node in mapping:
        return mapping[node]
    return tuple(substituted(part, mapping) if isinstance(part, tuple) else part for part in node)


def literal_node(literal: str) -> Node:
    """A number's node. Raises LimitError for an exponent past the bound."""
    mantissa, _, exponent = literal.lower().partition("e")
    if exponent and abs(int(exponent)) > MAX_EXPONENT_10:
        raise LimitError(f"an exponent of ten past {MAX_EXPONENT_10}")
    places = max(0, len(mantissa.partition(".")[2]) - int(exponent or 0))
    return ("num", Fraction(literal), places if "." in mantissa else 0)


def flat_name(node: Node) -> str:
    """A subscript or accent's content as part of a name."""
    if node[0] == "num":
        return str(node[1])
    if node[0] in ("sym", "text"):
        return node[1]
    return (
        "("
        + " ".join(flat_name(p) if isinstance(p, tuple) and p and isinstance(p[0], str) else str(p) for p in node)
        + ")"
    )


def as_list(items: list[Node], kind: str) -> Node:
    return items[0] if len(items) == 1 else ("list", tuple(items), kind)


def product(left: Node, right: Node) -> Node:
    if left[0] == "text" or right[0] == "text":
        raise ParseError("words in a product")
    return ("mul", (*(left[1] if left[0] == "mul" else (left,)), right))


def is_name(node: Node) -> bool:
    return node[0] in ("sym", "call", "text")


def apply(name: str, arguments: tuple[Node, ...], base: Node | None, power: Node | None) -> Node:
    ten, minus_one = ("num", Fraction(10), 0), ("neg", ("num", Fraction(1), 0))
    if name in ("log", "lg"):
        node = ("fn", "log", arguments if len(arguments) == 2 else (arguments[0], base or ten))
    elif name == "exp":
        node = ("pow", ("sym", "e"), arguments[0])
    elif name == "cbrt":
        node = ("root", arguments[0], ("num", Fraction(3), 0))
    elif power == minus_one and not name.startswith(("arc", "a")):
        return ("fn", f"arc{name}", arguments)
    else:
        node = ("fn", name, arguments)
    return node if power is None else ("pow", node, power)
