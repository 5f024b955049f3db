"""Our trees as sympy expressions and back. Sympy is imported when the first one is built."""

from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

from deltarl.rewards.math.evaluate import NotANumber, Undefined
from deltarl.rewards.math.lexer import LimitError
from deltarl.rewards.math.nodes import Node

MAX_NUMBER = 10**15
MAX_EXPONENT = 64
MAX_FACTORIAL = 100
MAX_BITS = 4096

TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc")
FUNCTIONS = {
    **{name: name for name in (*TRIGONOMETRIC, "sinh", "cosh", "tanh", "coth", "sech", "csch")},
    **{f"{arc}{name}": f"a{name}" for arc in ("arc", "a") for name in TRIGONOMETRIC},
    **{f"{arc}{name}": f"a{name}" for arc in ("arc", "ar", "a") for name in ("sinh", "cosh", "tanh")},
    "ln": "log", "abs": "Abs", "floor": "floor", "ceil": "ceiling", "max": "Max", "min": "Min", "binom": "binomial",
}  # fmt: skip
BACK = {sympy_name: name for name, sympy_name in FUNCTIONS.items()}

Assumption = Literal["real", "positive", "integer"]
Expression = Any  # a sympy.Expr


@lru_cache(maxsize=1)
def load_sympy() -> Any:
    """Sympy with what it imports and sets up at first use: about a second, once in a process, paid for by no answer."""
    import sympy
    import sympy.integrals.heurisch
    import sympy.integrals.manualintegrate
    import sympy.integrals.risch
    import sympy.physics.units.systems.si

    x = sympy.Symbol("x", real=True)
    sympy.simplify(sympy.sin(x) ** 2 + 2**x - sympy.sqrt(x + 1) / (sympy.Abs(x) + 1) + sympy.Max(x, 1))
    sympy.Integral(x * sympy.exp(-x), (x, 0, sympy.oo)).doit(manual=True)
    sympy.Sum(2**-x, (x, 0, sympy.oo)).doit()
    return sympy


class SympyBuilder:
    """Builds sympy expressions whose free names are real, positive or integer.

    Raises NotANumber for what is no scalar, LimitError past MAX_NUMBER, MAX_EXPONENT, MAX_FACTORIAL or MAX_BITS,
    Undefined for a value that does not exist.
    """

    def __init__(self, names: Assumption) -> None:
        self.sympy = load_sympy()
        self.names = names
        self.bound: dict[str, Expression] = {}

    def build(self, node: Node) -> Expression:
        handler = HANDLERS.get(node[0])
        if handler is None:
            raise NotANumber(f"a {node[0]} is not a number")
        value = handler(self, node)
        if value is self.sympy.zoo or value is self.sympy.nan:
            raise Undefined("division by zero")
        factor = value.as_coeff_Mul()[0]
        if factor.is_Rational and max(factor.p.bit_length(), factor.q.bit_length()) > MAX_BITS:
            raise LimitError(f"a factor of more than {MAX_BITS} bits in a symbolic expression")
        return value

    def operator(self, node: Node) -> Expression:
        """A sum, product, integral, limit or derivative, not yet worked out."""
        kind, body, name, *rest = node
        if kind == "diff":
            return self.sympy.Derivative(self.build(body), self.build(name))
        ends = [self.build(end) for end in rest if isinstance(end, tuple)]
        whole = kind in ("sum", "prod")
        symbol = self.sympy.Dummy(**({"integer": True} if whole else {"real": True}))
        self.bound[name[1]] = symbol
        body = self.build(body)
        del self.bound[name[1]]
        if kind == "lim":
            return self.sympy.Limit(body, symbol, ends[0], rest[1] or "+-" if ends[0].is_finite else "-")
        make = {"sum": self.sympy.Sum, "prod": self.sympy.Product, "int": self.sympy.Integral}[kind]
        return make(body, (symbol, *ends))


def _num(self: SympyBuilder, node: Node) -> Expression:
    value = node[1]
    if max(abs(value.numerator), value.denominator) > MAX_NUMBER:
        raise LimitError("a number of more than 15 digits in a symbolic expression")
    return self.sympy.Rational(value.numerator, value.denominator)


def _sym(self: SympyBuilder, node: Node) -> Expression:
    name = node[1]
    known = {"pi": self.sympy.pi, "e": self.sympy.E, "i": self.sympy.I, "oo": self.sympy.oo}
    return known.get(name) or self.bound.get(name) or self.sympy.Symbol(name, **{self.names: True})


def _pow(self: SympyBuilder, node: Node) -> Expression:
    base, exponent = self.build(node[1]), self.build(node[2])
    if exponent.is_Rational and abs(exponent) > MAX_EXPONENT:
        raise LimitError(f"an exponent past {MAX_EXPONENT} in a symbolic expression")
    if exponent.is_number and base.is_number and abs(exponent.evalf(8)) > MAX_EXPONENT:
        raise LimitError(f"an exponent past {MAX_EXPONENT} in a symbolic expression")
    if exponent.is_Rational and exponent.q != 1 and exponent.q % 2:
        return _odd_root(self, base, exponent.q) ** exponent.p
    return base**exponent


def _root(self: SympyBuilder, node: Node) -> Expression:
    base, degree = self.build(node[1]), self.build(node[2])
    if degree.is_Integer and 0 < degree <= MAX_EXPONENT and degree % 2:
        return _odd_root(self, base, degree)
    if not degree.is_Symbol and not (degree.is_Integer and 0 < degree <= MAX_EXPONENT):
        raise LimitError("a root of that degree in a symbolic expression")
    return base ** (1 / degree)


def _odd_root(self: SympyBuilder, base: Expression, degree: int) -> Expression:
    """The real root of a negative number, where sympy's is complex."""
    negative = base.is_negative or base.could_extract_minus_sign()
    return -((-base) ** self.sympy.Rational(1, degree)) if negative else base ** self.sympy.Rational(1, degree)


def _factorial(self: SympyBuilder, node: Node) -> Expression:
    value = self.build(node[1])
    if value.is_number and not (value.is_Integer and 0 <= value <= MAX_FACTORIAL):
        raise LimitError(f"a factorial past {MAX_FACTORIAL} in a symbolic expression")
    return self.sympy.factorial(value)


def _function(self: SympyBuilder, node: Node) -> Expression:
    name, arguments = node[1], [self.build(argument) for argument in node[2]]
    if name == "log":
        return self.sympy.log(arguments[0]) / self.sympy.log(arguments[1])
    if name not in FUNCTIONS:
        raise NotANumber(f"no symbolic {name}")
    if name in ("max", "min") and any(a.is_extended_real is False for a in arguments):
        raise Undefined("an order of complex numbers")
    if name == "binom" and any(a.is_number and not abs(a) <= MAX_FACTORIAL for a in arguments):
        raise LimitError(f"a binomial coefficient past {MAX_FACTORIAL} in a symbolic expression")
    return getattr(self.sympy, FUNCTIONS[name])(*arguments)


def _call(self: SympyBuilder, node: Node) -> Expression:
    return self.sympy.Function(node[1], real=True)(*(self.build(argument) for argument in node[2]))


def _joined(make: str) -> Callable[[SympyBuilder, Node], Expression]:
    return lambda self, node: getattr(self.sympy, make)(*(self.build(part) for part in node[1]))


HANDLERS: dict[str, Callable[[SympyBuilder, Node], Expression]] = {
    "num": _num,
    "sym": _sym,
    "add": _joined("Add"),
    "mul": _joined("Mul"),
    "neg": lambda self, node: -self.build(node[1]),
    "div": lambda self, node: self.build(node[1]) / self.build(node[2]),
    "pow": _pow,
    "root": _root,
    "fact": _factorial,
    "pct": lambda self, node: self.build(node[1]) / 100,
    "deg": lambda self, node: self.build(node[1]) * self.sympy.pi / 180,
    "fn": _function,
    "call": _call,
    **dict.fromkeys(("sum", "prod", "int", "lim", "diff"), SympyBuilder.operator),
}


def to_node(value: Expression) -> Node:
    """The tree of a sympy expression in closed form. Raises NotANumber for a function that our trees do not have."""
    if value.is_Rational:
        return ("num", Fraction(int(value.p), int(value.q)), 0)
    if value.is_Symbol:
        return ("sym", value.name)
    name = type(value).__name__
    constants = {"Pi": "pi", "Exp1": "e", "ImaginaryUnit": "i", "Infinity": "oo"}
    if name in constants:
        return ("sym", constants[name])
    if name == "NegativeInfinity":
        return ("neg", ("sym", "oo"))
    parts = tuple(to_node(part) for part in value.args)
    if value.is_Add or value.is_Mul:
        return ("add" if value.is_Add else "mul", parts)
    if value.is_Pow:
        return ("pow", *parts)
    if name == "exp":
        return ("pow", ("sym", "e"), parts[0])
    if name == "factorial":
        return ("fact", parts[0])
    if name in BACK:
        return ("fn", BACK[name], parts)
    raise NotANumber(f"no closed form: {name}")
