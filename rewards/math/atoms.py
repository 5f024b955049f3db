"""What stands between operators: numbers, names, functions, brackets, LaTeX commands."""

from abc import abstractmethod
from fractions import Fraction

from deltarl.rewards.math.lexer import LimitError, ParseError, Token
from deltarl.rewards.math.nodes import Node, apply, flat_name, literal_node, product
from deltarl.rewards.math.operators import UNEVALUATED, Operators

MAX_DEPTH = 40
ACCENTS = frozenset(
    [
        "overline",
        "bar",
        "vec",
        "hat",
        "tilde",
        "widehat",
        "overrightarrow",
        "mathcal",
        "mathfrak",
        "mathscr",
        "mathbb",
        "dot",
        "underline",
    ]
)
CALL_NAMES = frozenset("fghFGHWPQTN")
CLOSERS = {"(": (")", "]"), "[": ("]", ")"), "{": ("}",), "\\{": ("\\}",)}


class Atoms(Operators):
    """The lower half of the grammar; the upper half is the parser's. `depth` counts open brackets, `bars` open |."""

    def __init__(self, tokens: list[Token]) -> None:
        super().__init__(tokens)
        self.depth = 0
        self.bars = 0

    @abstractmethod
    def items(self) -> Node: ...

    @abstractmethod
    def power(self) -> Node: ...

    def argument(self) -> Node:
        """A braced group, or the one token that TeX would take."""
        if self.accept("{"):
            node = self.items()
            self.expect("}")
            return node
        if self.kind() == "num" and len(self.value()) > 1 and self.value().isdigit():
            first, rest = self.value()[0], self.value()[1:]
            self.tokens[self.at] = ("num", rest, False)
            return ("num", Fraction(first), 0)
        return self.atom()

    def atom(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise LimitError(f"nested deeper than {MAX_DEPTH}")
        kind, value = self.kind(), self.value()
        if kind == "end":
            raise ParseError("ends too early")
        self.at += 1
        if kind == "num":
            node = self.number(value)
        elif kind == "sym":
            node = self.symbol(value)
        elif kind == "func":
            node = self.function(value)
        elif kind == "cmd":
            node = self.command(value)
        elif kind == "text":
            node = ("text", value)
        elif value in CLOSERS:
            node = self.bracket(value)
        elif value == "|":
            node = self.absolute()
        else:
            raise ParseError(f"unexpected {value!r}")
        self.depth -= 1
        return node

    def number(self, literal: str) -> Node:
        if self.op("_"):
            self.at += 1
            base = self.argument()
            if base[0] == "num" and base[1].denominator == 1 and 2 <= base[1] <= 36 and literal.isdigit():
                return ("based", literal, int(base[1]))
            raise ParseError(f"no number in base {base[1]}")
        node = literal_node(literal)
        if literal.isdigit():
            return self.mixed(node)
        return node

    def mixed(self, whole: Node) -> Node:
        """2\\frac{1}{2} and `2 1/2` are mixed numbers when the fraction is proper and made of integers."""
        mark = self.at
        if self.kind() == "cmd" and self.value() in ("frac", "dfrac", "tfrac", "cfrac"):
            self.at += 1
            top, bottom = self.argument(), self.argument()
        elif self.kind() == "num" and self.tokens[self.at][2] and self.tokens[self.at + 1 : self.at + 2]:
            top = literal_node(self.value())
            self.at += 1
            if not self.accept("/") or self.kind() != "num":
                raise ParseError("two numbers side by side")
            bottom = literal_node(self.value())
            self.at += 1
        else:
            return whole
        if all(n[0] == "num" and n[2] == 0 for n in (top, bottom)) and 0 < top[1] < bottom[1]:
            return ("num", whole[1] + top[1] / bottom[1], 0)
        if self.tokens[mark][0] == "num":
            raise ParseError("a mixed number with an improper fraction")
        self.at = mark
        return whole

    def symbol(self, name: str) -> Node:
        while self.accept("'"):
            name += "'"
        if self.accept("_"):
            name += "_" + flat_name(self.argument())
        if self.tokens[self.at - 1][1] not in ("e", "i") and self.op("(") and not self.tokens[self.at][2]:
            return self.maybe_call(name)
        return ("sym", name)

    def maybe_call(self, name: str) -> Node:
        if name[0] not in CALL_NAMES:
            return ("sym", name)
        mark = self.at
        self.at += 1
        inside = self.bracket("(")
        arguments = inside[1] if inside[0] == "tuple" else (inside,)
        if name[0] in "fghFGH" or all(a[0] in ("sym", "num") for a in arguments):
            return ("call", name, arguments)
        self.at = mark
        return ("sym", name)

    def function(self, name: str) -> Node:
        base, power = None, None
        if name == "sqrt":
            degree = self.optional_degree()
            if self.op("(", "{"):
                return ("root", self.group(), degree)
            inside = self.atom()
            return ("root", inside, degree)
        for _ in range(2):
            if self.accept("_"):
                base = self.argument()
            if self.accept("^"):
                power = self.exponent()
        inside = self.group() if self.op("(", "{", "[") else self.implicit_argument()
        several = inside[0] in ("tuple", "list") and name in ("max", "min", "gcd", "lcm", "log")
        arguments = inside[1] if several else (inside,)
        return apply(name, arguments, base, power)

    def optional_degree(self) -> Node:
        if not self.accept("["):
            return ("num", Fraction(2), 0)
        degree = self.sum()
        self.expect("]")
        return degree

    def group(self) -> Node:
        opener = self.value()
        self.at += 1
        return self.bracket(opener)

    def implicit_argument(self) -> Node:
        """What a function without brackets applies to: the factors up to an operator or the next function."""
        node = ("neg", self.power()) if self.accept("-") else self.power()
        while (self.starts_factor() and self.kind() in ("num", "sym")) or (
            self.kind() == "cmd" and self.value() == "frac"
        ):
            node = product(node, self.power())
        return node

    def bracket(self, opener: str) -> Node:
        bars, self.bars = self.bars, 0
        if self.op(*CLOSERS[opener]):
            closer = self.expect(*CLOSERS[opener])
            self.bars = bars
            if opener == "\\{":
                return ("set", ())
            raise ParseError(f"nothing between {opener!r} and {closer!r}")
        inside = self.items()
        if opener == "\\{" and self.op("|", ":"):
            self.at += 1
            inside = self.items()
        closer = self.expect(*CLOSERS[opener])
        self.bars = bars
        items = inside[1] if inside[0] == "list" else (inside,)
        if opener == "\\{":
            return inside if inside[0] == "rel" and inside[2][0] != "=" else ("set", items)
        if opener == "{" or (len(items) == 1 and inside[0] != "list"):
            return inside
        return ("tuple", items, opener, closer)

    def absolute(self) -> Node:
        self.bars += 1
        inside = self.sum()
        self.bars -= 1
        self.expect("|")
        return ("fn", "abs", (inside,))

    def command(self, name: str) -> Node:
        if name in ("frac", "dfrac", "tfrac", "cfrac"):
            return self.derivative(("div", self.argument(), self.argument()))
        if name in ("binom", "dbinom", "tbinom"):
            return ("fn", "binom", (self.argument(), self.argument()))
        if name in ("lfloor", "lceil"):
            inside = self.sum()
            if not (self.kind() == "cmd" and self.value() == "r" + name[1:]):
                raise ParseError(f"\\{name} is not closed")
            self.at += 1
            return ("fn", name[1:], (inside,))
        if name in ("boxed", "fbox"):
            return self.argument()
        if name in ("emptyset", "varnothing"):
            return ("set", ())
        if name in ("angle", "triangle", "measuredangle"):
            return self.power()
        if name in ACCENTS:
            return self.symbol(f"{name}({flat_name(self.argument())})")
        if name == "begin":
            return self.environment()
        if name in UNEVALUATED:
            return self.operator(name)
        raise ParseError(f"unknown command \\{name}")

    def environment(self) -> Node:
        name = self.braced_word()
        if not (name.rstrip("*").endswith("matrix") or name in ("array", "cases")):
            raise ParseError(f"unknown environment {name!r}")
        if name == "array":
            self.braced_word()
        rows: list[list[Node]] = [[]]
        bars, self.bars = self.bars, 1
        while not (self.kind() == "cmd" and self.value() == "end"):
            if self.accept("\\\\"):
                rows.append([])
            elif not self.accept("&"):
                rows[-1].append(self.items())
        self.bars = bars
        self.at += 1
        self.braced_word()
        rows = [row for row in rows if row]
        if not rows or any(len(row) != len(rows[0]) for row in rows):
            raise ParseError("a matrix with rows of different lengths")
        matrix = ("matrix", tuple(map(tuple, rows)))
        return ("fn", "det", (matrix,)) if name == "vmatrix" else matrix
