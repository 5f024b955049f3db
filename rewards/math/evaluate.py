"""The value of a tree: an exact Fraction as long as it is rational, else an mpmath number of enough bits.

Every size is bounded before the operation that would make it: bits of integers, exponents, factorials, arguments of
periodic functions; and what is done is paid for from the answer's budget. LimitError says what was refused.
"""

import math
import threading
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from mpmath import MPContext

from deltarl.rewards.math.budget import fraction_price, function_price, spend
from deltarl.rewards.math.determinants import determinant
from deltarl.rewards.math.integers import exact_root, hash_number
from deltarl.rewards.math.lexer import LimitError, ParseError
from deltarl.rewards.math.nodes import Node, names

MAX_BITS = 60_000
MAX_FACTORIAL = 4_000
MAX_EXPONENT = 100_000
MAX_ANGLE_BITS = 2_000
MAX_PRECISION = 20_000
FIRST_PRECISION = 256
NOISE_BITS = 48
GAMMA_FUNCTIONS = 200
DIGITS_A_BIT = 0.15

_LOCAL = threading.local()

Number = Any  # Fraction | mpf | mpc
Environment = Mapping[str, Fraction]


class Undefined(ArithmeticError):
    """Division by zero, a logarithm of zero, or a real expression without a real value at a point."""


class NotANumber(ParseError):
    """The tree is no number: a set, a relation, words, infinity."""


class Evaluator:
    """Evaluates trees at one precision.

    magnitude: the largest |log2| of a value met on the way. exact: nothing was rounded on the way.

    real: roots and logarithms of negative numbers are Undefined instead of complex.
    """

    def __init__(self, environment: Environment, precision: int, real: bool) -> None:
        self.environment = environment
        self.real = real
        self.magnitude = 0
        self.exact = True
        self.mp = _context()
        self.mp.prec = precision

    def value(self, node: Node) -> Number:
        handler = HANDLERS.get(node[0])
        if handler is None:
            raise NotANumber(f"a {node[0]} is not a number")
        result = handler(self, node)
        self._measure(result)
        return result

    def inexact(self, value: Number) -> Number:
        self.exact = False
        if isinstance(value, Fraction):
            self._measure(value)
            return self.mp.mpf(value.numerator) / value.denominator
        return value

    def _measure(self, value: Number) -> None:
        if isinstance(value, Fraction):
            bits = max(value.numerator.bit_length(), value.denominator.bit_length())
            if bits > MAX_BITS:
                raise LimitError(f"a number of {bits} bits, limit {MAX_BITS}")
            spend(fraction_price(bits))
        else:
            if not self.mp.isfinite(value):
                raise Undefined("not finite")
            bits = abs(self.mp.mag(value)) if value else 0
            spend(10)
        self.magnitude = max(self.magnitude, bits)

    def sum(self, values: list[Number]) -> Number:
        if all(isinstance(v, Fraction) for v in values):
            total = Fraction(0)
            for value in values:
                total += value
                self._measure(total)
            return total
        terms = [self.inexact(value) for value in values]
        largest = max((self.mp.mag(term) for term in terms if term), default=0)
        return self.settled(self.mp.fsum(terms), largest)

    def settled(self, value: Number, scale: int) -> Number:
        """The value with a part that rounding alone can explain, beside terms of 2**scale, taken as exactly 0."""
        noise = scale - self.mp.prec + NOISE_BITS
        real = value.real if value.real and self.mp.mag(value.real) > noise else 0
        imaginary = value.imag if value.imag and self.mp.mag(value.imag) > noise else 0
        if imaginary:
            return self.mp.mpc(real, imaginary)
        return real or Fraction(0)

    def product(self, left: Number, right: Number) -> Number:
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return left * right
        return self.inexact(left) * self.inexact(right)

    def quotient(self, top: Number, bottom: Number) -> Number:
        if bottom == 0:
            raise Undefined("division by zero")
        if isinstance(top, Fraction) and isinstance(bottom, Fraction):
            return top / bottom
        return self.inexact(top) / self.inexact(bottom)

    def power(self, base: Number, exponent: Number) -> Number:
        if isinstance(exponent, Fraction):
            if isinstance(base, Fraction) and exponent.denominator == 1:
                return self._integer_power(base, int(exponent))
            fractional = exponent.denominator > 1 and abs(exponent.numerator) <= MAX_EXPONENT
            if fractional and (exponent.denominator == 2 or exponent.denominator % 2):
                return self.power(self.root(base, exponent.denominator), Fraction(exponent.numerator))
        if base == 0:
            if isinstance(exponent, Fraction) and exponent > 0:
                return Fraction(0)
            raise Undefined("0 to a power that is not positive")
        base, exponent = self.inexact(base), self.inexact(exponent)
        if self.real and base.real < 0 and exponent != self.mp.floor(exponent.real):
            raise Undefined("a power of a negative number")
        if abs(exponent) * (abs(self.mp.mag(base)) + 1) > MAX_EXPONENT:
            raise LimitError("an exponent past the bound")
        self._pay(2)
        result = base**exponent
        return self.settled(result, self.mp.mag(result)) if result else Fraction(0)

    def _integer_power(self, base: Fraction, exponent: int) -> Fraction:
        if base == 0 and exponent <= 0:
            raise Undefined("0 to a power that is not positive")
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(base) != 1 and base != 0 and bits * abs(exponent) > MAX_BITS:
            raise LimitError(f"a power of more than {MAX_BITS} bits")
        return base ** (exponent if abs(base) != 1 else exponent % 2)

    def root(self, radicand: Number, degree: int) -> Number:
        """The real root where there is one (an odd root of a negative number is negative), else the principal one."""
        if degree < 1 or degree > MAX_EXPONENT:
            raise LimitError("a root of that degree")
        if isinstance(radicand, Fraction):
            if radicand < 0 and degree % 2:
                return -self.root(-radicand, degree)
            if radicand < 0 and self.real:
                raise Undefined("an even root of a negative number")
            exact = exact_root(radicand, degree)
            if exact is not None:
                return exact
        number = self.inexact(radicand)
        self._pay(1)
        if number.imag == 0 and number.real < 0:
            if degree % 2:
                return -self.mp.root(-number.real, degree)
            if self.real:
                raise Undefined("an even root of a negative number")
        return self.mp.root(number, degree) if degree > 2 else self.mp.sqrt(number)

    def _pay(self, functions: float) -> None:
        spend(functions * function_price(self.mp.prec))

    def angle(self, value: Number) -> Number:
        number = self.inexact(value)
        if number != 0 and self.mp.mag(number) > MAX_ANGLE_BITS:
            raise LimitError("an angle past the bound")
        return number


def _context() -> MPContext:
    """The thread's own arithmetic context: making one takes longer than most evaluations."""
    if not hasattr(_LOCAL, "context"):
        _LOCAL.context = MPContext()
    return _LOCAL.context


def _num(_: Evaluator, node: Node) -> Number:
    return node[1]


def _sym(self: Evaluator, node: Node) -> Number:
    name = node[1]
    if name in self.environment:
        return self.environment[name]
    if name in ("pi", "e", "i"):
        self.exact = False
        return self.mp.mpc(0, 1) if name == "i" else +getattr(self.mp, name)
    raise NotANumber("infinity" if name == "oo" else f"{name} has no value")


def _mul(self: Evaluator, node: Node) -> Number:
    result = Fraction(1)
    for factor in node[1]:
        result = self.product(result, self.value(factor))
        self._measure(result)
    return result


def _pow(self: Evaluator, node: Node) -> Number:
    """A name in the exponent stands for any real number, so that a negative base has no value between integers."""
    base, exponent = self.value(node[1]), self.value(node[2])
    whole = isinstance(exponent, Fraction) and exponent.denominator == 1
    if self.real and not whole and names(node[2]) and self.inexact(base).real < 0:
        raise Undefined("a power of a negative number")
    return self.power(base, exponent)


def _root(self: Evaluator, node: Node) -> Number:
    degree = self.value(node[2])
    if not isinstance(degree, Fraction) or degree.denominator != 1:
        return self.power(self.value(node[1]), self.quotient(Fraction(1), degree))
    return self.root(self.value(node[1]), int(degree))


def _factorial(self: Evaluator, node: Node) -> Number:
    value = self.value(node[1])
    if not isinstance(value, Fraction) or value.denominator != 1 or value < 0:
        if isinstance(value, Fraction) and node[1][0] == "num":
            raise Undefined("a factorial of no natural number")
        return _gamma(self, value)
    if value > MAX_FACTORIAL:
        raise LimitError(f"a factorial past {MAX_FACTORIAL}")
    return Fraction(math.factorial(int(value)))


def _gamma(self: Evaluator, value: Number) -> Number:
    number = self.inexact(value)
    if abs(number) > MAX_FACTORIAL:
        raise LimitError("a gamma function past the bound")
    self._pay(GAMMA_FUNCTIONS * self.mp.prec / FIRST_PRECISION)
    try:
        return self.mp.gamma(number + 1)
    except ValueError as error:
        raise Undefined("a factorial of a negative integer") from error


def _based(_: Evaluator, node: Node) -> Number:
    digits, base = node[1], node[2]
    if any(int(d) >= base for d in digits):
        raise Undefined(f"digits that base {base} does not have")
    return Fraction(int(digits, base))


def _call(self: Evaluator, node: Node) -> Number:
    """An unknown function: some fixed number for each name and argument, equal when the arguments are."""
    key = [node[1]]
    for argument in node[2]:
        value = self.value(argument)
        shown = int(self.mp.prec * DIGITS_A_BIT)
        key.append(
            f"{value.numerator:x}/{value.denominator:x}" if isinstance(value, Fraction) else self.mp.nstr(value, shown)
        )
    return Fraction(hash_number(" ".join(key)), 1 << 40)


def _function(self: Evaluator, node: Node) -> Number:
    name, arguments = node[1], node[2]
    if name in ("det",):
        return determinant(self, arguments[0])
    values = [self.value(a) for a in arguments]
    known = FUNCTIONS.get(name)
    if known is None:
        raise NotANumber(f"unknown function {name}")
    return known(self, *values)


def _abs(_: Evaluator, value: Number) -> Number:
    return abs(value)


def _log(self: Evaluator, value: Number, base: Number) -> Number:
    return self.quotient(_ln(self, value), _ln(self, base))


def _ln(self: Evaluator, value: Number) -> Number:
    number = self.inexact(value)
    if number == 0:
        raise Undefined("the logarithm of zero")
    if self.real and number.imag == 0 and number.real < 0:
        raise Undefined("the logarithm of a negative number")
    self._pay(1)
    return Fraction(0) if number == 1 else self.mp.log(number)


def _real(self: Evaluator, value: Number) -> Number:
    if not isinstance(value, Fraction) and value.imag != 0:
        raise Undefined("an order of complex numbers")
    return value


def _floor(self: Evaluator, value: Number) -> Number:
    return (
        Fraction(math.floor(value)) if isinstance(value, Fraction) else Fraction(int(self.mp.floor(_real(self, value))))
    )


def _ceil(self: Evaluator, value: Number) -> Number:
    return -_floor(self, -value)


def _mod(self: Evaluator, value: Number, modulus: Number) -> Number:
    if not isinstance(value, Fraction) or not isinstance(modulus, Fraction) or modulus == 0:
        raise Undefined("a remainder of numbers that are not rational")
    return value % modulus


def _extreme(pick: Callable) -> Callable:
    return lambda self, *values: pick((_real(self, v) for v in values), key=lambda v: self.inexact(v).real)


def _common(pick: Callable) -> Callable:
    def apply(self: Evaluator, *values: Number) -> Number:
        if not all(isinstance(v, Fraction) for v in values):
            raise Undefined("a common divisor of numbers that are not rational")
        result = abs(values[0])
        for value in values[1:]:
            scale = math.lcm(result.denominator, value.denominator)
            result = Fraction(pick(int(result * scale), int(value * scale)), scale)
            self._measure(result)
        return result

    return apply


def _binomial(self: Evaluator, n: Number, k: Number) -> Number:
    if not all(isinstance(v, Fraction) for v in (n, k)) or k.denominator != 1 or abs(n) > MAX_FACTORIAL:
        raise LimitError("a binomial coefficient past the bound")
    if not 0 <= k <= MAX_FACTORIAL:
        return Fraction(0)
    result = Fraction(1)
    for j in range(int(k)):
        result *= (n - j) / (j + 1)
        self._measure(result)
    return result


def _plain(name: str, bounded: bool = False) -> Callable:
    def apply(self: Evaluator, value: Number) -> Number:
        number = self.angle(value) if bounded else self.inexact(value)
        self._pay(2)
        if name in ("asin", "acos", "acosh", "atanh") and self.real and abs(number) > 1 and name != "acosh":
            raise Undefined(f"{name} outside of its domain")
        try:
            result = getattr(self.mp, name)(number)
            return self.settled(result, max(0, self.mp.mag(number))) if bounded and number else result
        except (ZeroDivisionError, ValueError) as error:
            raise Undefined(f"{name} at a pole") from error

    return apply


def _hyperbolic(name: str) -> Callable:
    inner = _plain(name)

    def apply(self: Evaluator, value: Number) -> Number:
        if abs(value) > MAX_EXPONENT:
            raise LimitError("an exponent past the bound")
        self.magnitude = max(self.magnitude, 2 * int(abs(value)))
        return inner(self, value)

    return apply


TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc")
FUNCTIONS: dict[str, Callable] = {
    "abs": _abs, "log": _log, "ln": _ln, "floor": _floor, "ceil": _ceil, "mod": _mod, "binom": _binomial,
    "max": _extreme(max), "min": _extreme(min), "gcd": _common(math.gcd), "lcm": _common(math.lcm),
    **{name: _plain(name, bounded=True) for name in TRIGONOMETRIC},
    **{name: _hyperbolic(name) for name in ("sinh", "cosh", "tanh", "coth", "sech", "csch")},
    **{f"{prefix}{name}": _plain(f"a{name}") for name in TRIGONOMETRIC for prefix in ("arc", "a")},
    **{f"{prefix}{n}": _plain(f"a{n}") for n in ("sinh", "cosh", "tanh") for prefix in ("arc", "ar", "a")},
}  # fmt: skip
HANDLERS: dict[str, Callable[[Evaluator, Node], Number]] = {
    "num": _num,
    "sym": _sym,
    "add": lambda self, node: self.sum([self.value(term) for term in node[1]]),
    "neg": lambda self, node: -self.value(node[1]),
    "mul": _mul,
    "div": lambda self, node: self.quotient(self.value(node[1]), self.value(node[2])),
    "pow": _pow,
    "root": _root,
    "fact": _factorial,
    "pct": lambda self, node: self.value(node[1]) / 100,
    "deg": lambda self, node: self.product(self.value(node[1]), self.value(("sym", "pi"))) / 180,
    "based": _based,
    "call": _call,
    "fn": _function,
}
