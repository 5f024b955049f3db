"""Random expressions that can be written in many ways, and valued in floating point independently of the verifier."""

import math
from fractions import Fraction
from random import Random

from hypothesis import strategies as st

Tree = str | tuple
POINTS = ({"x": 1.37, "y": 0.61, "a": 2.23, "b": 3.11}, {"x": 0.29, "y": 2.71, "a": 1.13, "b": 0.47})
FUNCTIONS = {"sin": math.sin, "cos": math.cos, "ln": math.log, "exp": math.exp}

integers = st.integers(1, 30).map(str)
names = st.sampled_from("xyab")


def grown(leaves: st.SearchStrategy, functions: bool, max_leaves: int = 5) -> st.SearchStrategy:
    """Sums, products, quotients, roots, powers and, if asked, a sine or the like of the leaves."""

    def grow(children: st.SearchStrategy) -> st.SearchStrategy:
        kinds = [
            st.tuples(st.sampled_from(("+", "*", "/")), children, children),
            st.tuples(st.just("sqrt"), children),
            st.tuples(st.just("^"), children, st.integers(2, 3).map(str)),
        ]
        if functions:
            kinds.append(st.tuples(st.sampled_from(("sin", "cos", "exp")), st.one_of(leaves, children)))
        return st.one_of(kinds)

    return st.recursive(leaves, grow, max_leaves=max_leaves)


constants = grown(st.one_of(integers, st.just("pi")), functions=False)
expressions = grown(st.one_of(integers, names, st.just("pi")), functions=False)
elementary = grown(st.one_of(st.integers(1, 5).map(str), names), functions=True, max_leaves=2)
polynomials = st.lists(st.integers(-9, 9), min_size=2, max_size=4).filter(lambda roots: any(roots))


def value(tree: Tree, point: dict[str, float]) -> float:
    if isinstance(tree, str):
        return math.pi if tree == "pi" else point[tree] if tree in point else float(tree)
    op, *parts = tree
    left, *rest = (value(part, point) for part in parts)
    if op in FUNCTIONS:
        return FUNCTIONS[op](left)
    if op == "sqrt":
        return math.sqrt(left)
    right = rest[0]
    return {"+": left.__add__, "*": left.__mul__, "/": left.__truediv__, "^": left.__pow__}[op](right)


def differ(left: Tree, right: Tree) -> bool:
    """Clearly different at one of two points; False also where floating point cannot tell."""
    try:
        pairs = [(value(left, point), value(right, point)) for point in POINTS]
    except OverflowError:
        return False
    return any(abs(a - b) > 1e-6 * max(abs(a), abs(b), 1e-3) for a, b in pairs)


def written(tree: Tree, random: Random) -> str:
    """One of the ways to write a tree: operands of sums and products in any order, LaTeX or plain notation."""
    if isinstance(tree, str):
        return random.choice(("\\pi", "\\pi ", "{\\pi}")) if tree == "pi" else tree
    op, *parts = tree
    texts = [written(part, random) for part in parts]
    if op in "+*":
        random.shuffle(texts)
    space = random.choice(("", " ", "\\,"))
    group = random.choice(("({})", "\\left({}\\right)", "\\bigl({}\\bigr)", "{{({})}}")).format
    if op == "+":
        return group(f"{texts[0]}{space}+{space}{texts[1]}")
    if op == "*":
        sign = random.choice(("\\cdot ", " \\times ", "*", ""))
        return f"{group(texts[0])}{space}{sign}{group(texts[1])}"
    if op == "/":
        return random.choice((f"\\frac{{{texts[0]}}}{{{texts[1]}}}", f"\\dfrac{{{texts[0]}}}{{{texts[1]}}}",
                              f"({group(texts[0])}/{group(texts[1])})"))  # fmt: skip
    if op == "sqrt":
        return random.choice((f"\\sqrt{{{texts[0]}}}", f"\\sqrt[2]{{{texts[0]}}}", f"{group(texts[0])}^{{1/2}}",
                              f"{group(texts[0])}^{{\\frac12}}", f"sqrt({texts[0]})"))  # fmt: skip
    if op == "^":
        return random.choice((f"{group(texts[0])}^{{{texts[1]}}}", f"{group(texts[0])}**{texts[1]}"))
    if op == "exp":
        return random.choice((f"e^{{{texts[0]}}}", f"\\exp{group(texts[0])}", f"exp({texts[0]})"))
    return random.choice((f"\\{op}{group(texts[0])}", f"{op}({texts[0]})", f"\\{op}\\left({texts[0]}\\right)"))


def perturbed(tree: Tree, random: Random) -> Tree:
    """The tree with another leaf, exponent or operation somewhere."""
    if isinstance(tree, str):
        return str(int(tree) + random.choice((1, 2, 10))) if tree.isdigit() else ("+", tree, "1")
    op, *parts = tree
    if op in "+*" and random.random() < 0.3:
        return ({"+": "*", "*": "+"}[op], *parts)
    at = random.randrange(len(parts))
    return (op, *parts[:at], perturbed(parts[at], random), *parts[at + 1 :])


def expanded(roots: list[int]) -> list[int]:
    """The coefficients of (x - r1)(x - r2)..., from the highest power down."""
    coefficients = [1]
    for root in roots:
        shifted = [*coefficients, 0]
        coefficients = [a - root * b for a, b in zip(shifted, [0, *coefficients], strict=True)]
    return coefficients


def polynomial(coefficients: list[int], name: str = "x") -> str:
    powers = [f"({c}){name}^{{{k}}}" for k, c in zip(range(len(coefficients) - 1, 0, -1), coefficients, strict=False)]
    return " + ".join([*powers, f"({coefficients[-1]})"])


def factored(roots: list[int], name: str = "x") -> str:
    return "".join(f"({name}{-root:+d})" for root in roots)


def fraction(number: Fraction) -> str:
    return f"{number.numerator}/{number.denominator}"
