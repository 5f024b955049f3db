"""Sympy's srepr notation as trees of the math verifier, read from Python's syntax tree; nothing is evaluated."""

import ast
import re
from fractions import Fraction

from deltarl.rewards.math.lexer import GREEK, ParseError, clean
from deltarl.rewards.math.nodes import Node
from deltarl.rewards.math.operators import bound
from deltarl.rewards.math.parser import parse

CONSTANTS = {"E": "e", "I": "i", "pi": "pi", "oo": "oo"}
RELATIONS = {
    "Equality": "=", "Unequality": "!=", "StrictLessThan": "<", "LessThan": "<=", "StrictGreaterThan": ">",
    "GreaterThan": ">=",
}  # fmt: skip
FUNCTIONS = {
    "Abs": "abs", "Max": "max", "Min": "min", "ceiling": "ceil", "floor": "floor", "binomial": "binom", "Mod": "mod",
    "asin": "arcsin", "acos": "arccos", "atan": "arctan", "asinh": "arcsinh", "acosh": "arccosh", "atanh": "arctanh",
    **{name: name for name in ("sin", "cos", "tan", "sec", "csc", "cot", "sinh", "cosh", "tanh")},
}  # fmt: skip
GREEK_NAME = re.compile(rf"(?<![\\A-Za-z])(?:{'|'.join(GREEK)})(?![A-Za-z])")
KNOWN_SETS = {"Reals": "R", "Integers": "Z", "Naturals": "N", "Rationals": "Q", "Complexes": "C"}
SETS = {"Union": "union", "Intersection": "meet", "Complement": "minus"}


class UnknownForm(ValueError):
    pass


def srepr_tree(text: str) -> Node:
    """Raises UnknownForm for a form that is not listed here, and for a symbol whose name is no LaTeX."""
    return _tree(ast.parse(text, mode="eval").body)


def number(value: Fraction, places: int = 0) -> Node:
    return ("num", value, places) if value >= 0 else ("neg", ("num", -value, places))


def _tree(part: ast.expr) -> Node:
    if isinstance(part, ast.UnaryOp):
        return ("neg", _tree(part.operand))
    if isinstance(part, ast.Name) and part.id == "EmptySet":
        return ("set", ())
    if isinstance(part, ast.Name) and part.id in KNOWN_SETS:
        return ("sym", f"mathbb{KNOWN_SETS[part.id]}")
    if isinstance(part, ast.Name) and part.id in CONSTANTS:
        return ("sym", CONSTANTS[part.id])
    if not isinstance(part, ast.Call):
        raise UnknownForm(ast.dump(part))
    if isinstance(part.func, ast.Call):
        return ("call", part.func.args[0].value, tuple(_tree(a) for a in part.args))
    head, raw = part.func.id, part.args
    if head in ("Integer", "Rational"):
        return number(Fraction(*(ast.literal_eval(a) for a in raw)))
    if head == "Float":
        return _float(float(raw[0].value))
    if head == "Symbol":
        return _symbol(raw[0].value)
    if head.endswith("Matrix"):
        return ("matrix", tuple(tuple(_tree(cell) for cell in row.elts) for row in raw[0].elts))
    if head in ("Sum", "Product", "Integral", "Limit", "Derivative"):
        return _operator(head, raw)
    if head == "Interval":
        low_open, high_open = [a.id == "true" for a in raw[2:]] or (False, False)
        return ("tuple", (_tree(raw[0]), _tree(raw[1])), "(" if low_open else "[", ")" if high_open else "]")
    parts = tuple(_tree(a) for a in raw)
    if head in ("Add", "MatAdd", "Mul", "MatMul"):
        return ("add" if head.endswith("Add") else "mul", parts)
    if head == "Pow":
        return ("root", parts[0], ("num", Fraction(2), 0)) if parts[1] == number(Fraction(1, 2)) else ("pow", *parts)
    if head == "exp":
        return ("pow", ("sym", "e"), *parts)
    if head == "log":
        return ("fn", "log", parts) if len(parts) == 2 else ("fn", "ln", parts)
    if head == "factorial":
        return ("fact", *parts)
    if head == "UnevaluatedExpr":
        return parts[0]
    if head in RELATIONS:
        return ("rel", parts, (RELATIONS[head],))
    if head == "FiniteSet":
        return ("set", parts)
    if head == "Tuple":
        return ("tuple", parts, "(", ")")
    if head in SETS:
        node = parts[0]
        for other in parts[1:]:
            node = (SETS[head], node, other)
        return node
    if head in FUNCTIONS:
        return ("fn", FUNCTIONS[head], parts)
    raise UnknownForm(f"unknown form {head}")


def _float(value: float) -> Node:
    """A float to the 15 digits that it holds."""
    digits = f"{value:.15g}"
    mantissa, _, exponent = digits.partition("e")
    return number(Fraction(digits), max(0, len(mantissa.partition(".")[2]) - int(exponent or 0)))


def _symbol(name: str) -> Node:
    """A name as LaTeX writes it: theta is \\theta, bar{x} is \\bar{x}."""
    try:
        return parse(clean(GREEK_NAME.sub(r"\\\g<0>", re.sub(r"^(bar|overline)(?=\{)", r"\\overline", name))))
    except ParseError as error:
        raise UnknownForm(f"symbol {name}") from error


def _operator(head: str, raw: list[ast.expr]) -> Node:
    body = _tree(raw[0])
    if head == "Limit":
        side = raw[3].args[0].value if len(raw) > 3 else "+"
        return bound("lim", body, _tree(raw[1]), (_tree(raw[2]), side))
    for over in raw[1:]:
        name, *ends = (_tree(a) for a in over.args)
        if head == "Derivative" or not ends:
            body = ("diff" if head == "Derivative" else "prim", body, name)
        else:
            body = bound({"Sum": "sum", "Product": "prod", "Integral": "int"}[head], body, name, tuple(ends))
    return body
