"""What stands between operators: numbers, names, functions, brackets, LaTeX commands."""

from abc import abstractmethod
from fractions import Fraction

from deltarl.rewards.math.lexer import LimitError, ParseError, Token
from deltarl.rewards.math.nodes import Node, apply, as_list, flat_name, literal_node, product
from deltarl.rewards.math.operators import UNEVALUATED, Operators
from deltarl.rewards.math.wording import meaning

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
SAME_ACCENTS = {"bar": "overline", "widehat": "hat", "overrightarrow": "vec"}
CALL_NAMES = frozenset("fghFGHWPQTNC")
CLOSING_CORNERS = {"lfloor": "rfloor", "lceil": "rceil", "llcorner": "lrcorner", "ulcorner": "urcorner"}
CLOSERS = {"langle": ("rangle",), "(": (")", "]"), "[": ("]", ")"), "{": ("}",), "\\{": ("\\}",)}


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

    @abstractmethod
    def whole(self) -> Node: ...

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
        elif value == "^":
            node = self.choices_before()
        else:
            raise ParseError(f"unexpected {value!r}")
        self.depth -= 1
        return node

    def number(self, literal: str) -> Node:
        if self.op("_"):
            self.at += 1
            base = self.argument()
            if base[0] == "text" and (value := meaning(base[1])):
                base = value
            if base[0] == "num" and base[1].denominator == 1 and 2 <= base[1] <= 36 and literal.isdigit():
                return ("based", literal, int(base[1]))
            raise ParseError(f"no number in base {base[1]}")
        node = literal_node(literal)
        if literal.isdigit():
            return self.mixed(node)
        return node

    def mixed(self, whole: Node) -> Node:
        """2\\frac{1}{2} and `2 1/2` are mixed numbers when the fraction is proper and made of integers."""
        mark, tokens = self.at, self.tokens[self.at : self.at + 6]
        if self.kind() == "cmd" and self.value() in ("frac", "dfrac", "tfrac", "cfrac"):
            self.at += 1
            top = self.number_argument()
            bottom = top and self.number_argument()
        elif self.kind() == "num" and self.tokens[self.at][2] and self.tokens[self.at + 1 : self.at + 2]:
            top = literal_node(self.value())
            self.at += 1
            if not self.accept("/") or self.kind() != "num":
                raise ParseError("two numbers side by side")
            bottom = literal_node(self.value())
            self.at += 1
        else:
            return whole
        if top and bottom and top[2] == bottom[2] == 0 and 0 < top[1] < bottom[1]:
            return ("num", whole[1] + top[1] / bottom[1], 0)
        if tokens[0][0] == "num":
            raise ParseError("a mixed number with an improper fraction")
        self.at, self.tokens[mark : mark + 6] = mark, tokens
        return whole

    def number_argument(self) -> Node | None:
        """An argument that is a bare number; None, and nothing read, before any other: each argument is read once."""
        braced = [t[0] if t[0] == "num" else t[1] for t in self.tokens[self.at : self.at + 3]] == ["{", "num", "}"]
        return self.argument() if braced or self.kind() == "num" else None

    def symbol(self, name: str) -> Node:
        while self.accept("'"):
            name += "'"
        if self.accept("_"):
            lower = self.argument()
            if name == "C" and lower[0] == "num" and (upper := self.natural_exponent()) and upper[1] <= lower[1]:
                return ("fn", "binom", (lower, upper))
            name += "_" + flat_name(lower)
        if name in ("f", "g", "h") and [t[1] for t in self.tokens[self.at : self.at + 5]] == ["^", "{", "-", "1", "}"]:
            self.at += 5
            name += "^-1"
        if self.tokens[self.at - 1][1] not in ("e", "i") and self.op("(") and not self.tokens[self.at][2]:
            return self.maybe_call(name)
        return ("sym", name)

    def natural_exponent(self) -> Node | None:
        """The k of C_n^k, read when it is a number."""
        ahead = [token[:2] for token in self.tokens[self.at : self.at + 4]]
        braced = ahead[:2] == [("op", "^"), ("op", "{")] and ahead[3:] == [("op", "}")]
        number = ahead[2:3] if braced else ahead[1:2]
        if ahead[:1] != [("op", "^")] or not number or number[0][0] != "num":
            return None
        self.at += 4 if braced else 2
        return literal_node(number[0][1])

    def maybe_call(self, name: str) -> Node:
        if name[0] not in CALL_NAMES:
            return ("sym", name)
        ahead = (value for kind, value, _ in self.tokens[self.at + 1 :] if kind == "op" and value in ("(", ")"))
        if name[0] not in "fghFGH" and next(ahead, ")") == "(":
            return ("sym", name)
        mark = self.at
        self.at += 1
        inside = self.bracket("(")
        arguments = inside[1] if inside[0] == "tuple" else (inside,)
        if name == "C" and len(arguments) == 2 and all(a[0] == "num" for a in arguments):
            return ("fn", "binom", arguments)
        if name[0] in "fghFGH" or all(a[0] in ("sym", "num") or (a[0] == "rel" and name == "P") for a in arguments):
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
        if opener == "langle":
            return ("tuple", items, "(", ")")
        if opener == "{" or (len(items) == 1 and inside[0] != "list"):
            if closer != CLOSERS[opener][0]:
                raise ParseError(f"one value between {opener} and {closer}")
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
        if name in CLOSING_CORNERS:
            inside = self.sum()
            if not (self.kind() == "cmd" and self.value() == CLOSING_CORNERS[name]):
                raise ParseError(f"\\{name} is not closed")
            self.at += 1
            return ("fn", "floor" if name in ("lfloor", "llcorner") else "ceil", (inside,))
        if name in ("boxed", "fbox"):
            return self.argument()
        if name in ("emptyset", "varnothing"):
            return ("set", ())
        if name in ("angle", "triangle", "measuredangle"):
            return self.power()
        if name in ACCENTS:
            return self.symbol(f"{SAME_ACCENTS.get(name, name)}({flat_name(self.argument())})")
        if name == "begin":
            return self.environment()
        if name in UNEVALUATED:
            return self.operator(name)
        raise ParseError(f"unknown command \\{name}")

    def choices_before(self) -> Node:
        """^{10}C_3"""
        n = self.argument()
        if not (self.kind() == "sym" and self.value() == "C"):
            raise ParseError("an exponent of nothing")
        self.at += 1
        self.expect("_")
        return ("fn", "binom", (n, self.argument()))

    def cases(self) -> Node:
        """Rows of a value and its condition; rows of one equation each are a list."""
        rows = [[without_marks(cell) for cell in split(row, "&")] for row in self.rows()]
        rows = [[self.part(cell) for cell in row if cell] for row in rows if any(row)]
        if rows and all(len(row) == 2 for row in rows):
            return ("cases", tuple((value, condition) for value, condition in rows))
        if rows and all(len(row) == 1 for row in rows):
            return as_list([row[0] for row in rows], ",")
        raise ParseError("cases without their conditions")

    def rows(self) -> list[list[Token]]:
        """The tokens up to \\end{cases}, split into rows."""
        start, depth = self.at, 1
        while depth and self.kind() != "end":
            depth += (self.kind() == "cmd") * ((self.value() == "begin") - (self.value() == "end"))
            self.at += 1
        rows = split(self.tokens[start : self.at - 1], "\\\\")
        self.braced_word()
        return rows

    def part(self, tokens: list[Token]) -> Node:
        part = type(self)(tokens)
        part.depth = self.depth
        return part.whole()

    def environment(self) -> Node:
        name = self.braced_word()
        if name in ("cases", "dcases"):
            return self.cases()
        if not (name.rstrip("*").endswith("matrix") or name == "array"):
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


def split(tokens: list[Token], mark: str) -> list[list[Token]]:
    """The tokens between the marks that stand outside of braces and environments."""
    pieces: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        depth += (token[1] in ("{", "begin")) - (token[1] in ("}", "end"))
        if token[:2] == ("op", mark) and depth == 0:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return pieces


def without_marks(tokens: list[Token]) -> list[Token]:
    """A cell of a case distinction without its commas and the word before its condition."""
    while tokens and (tokens[-1][1] in (",", ";", ".") or tokens[-1][1] == "if"):
        tokens = tokens[:-1]
    while tokens and (tokens[0][1] in (",", ";") or tokens[0][1].lower() in ("if", "for", "when", "where")):
        tokens = tokens[1:]
    return tokens
