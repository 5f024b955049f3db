"""The grammar of sums, products, integrals, limits and derivatives.

Their nodes are (kind, body, name, ...): sum and prod with (low, high), int with (low, high), lim with (target, side),
diff and prim, an integral without bounds, with nothing more. The bound name is rewritten to #0, #1, ... from the inside
out, so that the choice of a letter does not matter to equality.
"""

from abc import ABC, abstractmethod
from fractions import Fraction

from deltarl.rewards.math.cursor import Cursor
from deltarl.rewards.math.lexer import ParseError, Token
from deltarl.rewards.math.nodes import Node, names, substituted

KINDS = {"sum": "sum", "prod": "prod", "int": "int", "lim": "lim"}
UNEVALUATED = frozenset(
    ("iint iiint oint limsup liminf bigcup bigcap partial nabla dots ldots cdots " + " ".join(KINDS)).split()
)


class Unevaluated(ParseError):
    """A sum, integral, limit or the like, of a form outside of this grammar."""


class Operators(Cursor, ABC):
    """What comes behind \\sum, \\prod, \\int and \\lim. Raises Unevaluated for a form that it does not know."""

    @abstractmethod
    def argument(self) -> Node: ...

    @abstractmethod
    def sum(self) -> Node: ...

    @abstractmethod
    def term(self) -> Node: ...

    @abstractmethod
    def exponent(self) -> Node: ...

    @abstractmethod
    def starts_factor(self) -> bool: ...

    def operator(self, command: str) -> Node:
        if command not in KINDS:
            raise Unevaluated(f"\\{command} stands unevaluated")
        if command == "lim":
            return self.limit()
        marks: dict[str, Node] = {}
        while self.op("_", "^"):
            mark = self.value()
            self.at += 1
            if self.kind() in ("num", "sym") and [t[1] for t in self.tokens[self.at + 1 : self.at + 2]] == ["_"]:
                marks[mark] = self.inner(self.tokens[self.at : self.at + 1])
                self.at += 1
            else:
                marks[mark] = self.argument() if mark == "_" else self.exponent()
        if command == "int" and not marks:
            return self.integral()
        if set(marks) != {"_", "^"}:
            raise Unevaluated(f"\\{command} without both of its bounds")
        if command == "int":
            return self.integral(marks["_"], marks["^"])
        low = marks["_"]
        if low[0] != "rel" or low[2] != ("=",) or low[1][0][0] != "sym":
            raise Unevaluated(f"\\{command} over something other than a range")
        return bound(KINDS[command], self.term(), low[1][0], (low[1][1], marks["^"]))

    def integral(self, *ends: Node) -> Node:
        depth, inner = 0, 0
        for at in range(self.at, len(self.tokens) - 1):
            kind, value, _ = self.tokens[at]
            depth += (kind == "op" and value in ("(", "[", "{")) - (kind == "op" and value in (")", "]", "}"))
            if depth < 0:
                break
            inner += (kind, value) == ("cmd", "int")
            if depth or (kind, value) != ("sym", "d") or self.tokens[at + 1][0] != "sym":
                continue
            if inner:
                inner -= 1
            else:
                name, inside = ("sym", self.tokens[at + 1][1]), self.tokens[self.at : at]
                body = self.inner(inside) if inside else ("num", Fraction(1), 0)
                self.at = at + 2
                return bound("int", body, name, ends) if ends else ("prim", body, name)
        raise Unevaluated("\\int without its differential")

    def limit(self) -> Node:
        self.expect("_")
        self.expect("{")
        if self.kind() != "sym":
            raise Unevaluated("\\lim of no single name")
        name = ("sym", self.value())
        self.at += 1
        self.expect("->")
        start, depth = self.at, 1
        while depth and self.kind() != "end":
            depth += self.op("{") - self.op("}")
            self.at += 1
        target, side = self.tokens[start : self.at - 1], ""
        values = [value for _, value, _ in target]
        if values[-2:-1] == ["^"] and values[-1] in ("+", "-"):
            side, target = values[-1], target[:-2]
        elif values[-4:-2] == ["^", "{"] and values[-2] in ("+", "-"):
            side, target = values[-2], target[:-4]
        return bound("lim", self.term(), name, (self.inner(target), side))

    def derivative(self, fraction: Node) -> Node:
        """`\\frac{d}{dx}` before a factor, else the fraction as it is."""
        top, bottom = fraction[1], fraction[2]
        d = ("sym", "d")
        if top != d or bottom[0] != "mul" or len(bottom[1]) != 2 or bottom[1][0] != d or bottom[1][1][0] != "sym":
            return fraction
        if not self.starts_factor():
            return fraction
        return ("diff", self.term(), bottom[1][1])

    def inner(self, tokens: list[Token]) -> Node:
        """The tree of a part of the tokens."""
        part = type(self)(tokens)
        part.depth = self.depth
        node = part.sum()
        if part.at < len(tokens):
            raise ParseError(f"unexpected {part.value()!r}")
        return node


def bound(kind: str, body: Node, name: Node, rest: tuple) -> Node:
    """Raises Unevaluated where the name is also part of a subscript, whose meaning is not known."""
    free = names(body)
    if any(name[1] in other.partition("_")[2] for other in free):
        raise Unevaluated("an index in a subscript")
    level = sum(other.startswith("#") for other in free)
    inner = ("sym", f"#{level}")
    return (kind, substituted(body, {name: inner}), inner, *rest)
