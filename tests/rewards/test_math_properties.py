"""Properties of the comparison over random expressions."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltarl.rewards.math import MathVerifier

verifier = MathVerifier()
CHARACTERS = "0123456789xye+-*/^_=<>()[]{}|,;:!%&$ .'\\"
COMMANDS = [
    "\\frac",
    "\\sqrt",
    "\\boxed{",
    "\\text{",
    "\\pi",
    "\\cup",
    "\\infty",
    "\\begin{pmatrix}",
    "\\end{pmatrix}",
    "\\le",
    "\\pm",
    "\\{",
    "\\}",
    "\\log",
    "and",
    "####",
]
VERDICTS = ("correct", "incorrect", "no_answer", "limit", "gold_error")
BOUNDED = settings(max_examples=80, deadline=None)


def status(answer: str, gold: str) -> str:
    return verifier.verify(f"\\boxed{{{answer}}}", gold, meta={}).status


leaves = st.one_of(st.integers(1, 30).map(str), st.sampled_from("xyab"), st.just("\\pi"))


def grow(children):
    pair = st.tuples(children, children)
    return st.one_of(
        pair.map(lambda p: ("+", *p)),
        pair.map(lambda p: ("*", *p)),
        children.map(lambda c: ("sqrt", c)),
        st.tuples(children, st.integers(2, 3)).map(lambda p: ("^", *p)),
    )


trees = st.recursive(leaves, grow, max_leaves=6)


def latex(tree, swap=False, plain=False):
    """The tree written out: as it is or with operands swapped, in LaTeX or in plain notation."""
    if isinstance(tree, str):
        return tree.replace("\\pi", "pi") if plain else tree
    op, *parts = tree
    if op == "^":
        base = latex(parts[0], swap, plain)
        return f"({base})**{parts[1]}" if plain else f"\\left({base}\\right)^{{{parts[1]}}}"
    if op == "sqrt":
        inside = latex(parts[0], swap, plain)
        return f"sqrt({inside})" if plain else f"\\sqrt{{{inside}}}"
    left, right = (latex(p, swap, plain) for p in (reversed(parts) if swap else parts))
    return f"({left}) {op} ({right})" if plain else f"({left}) {op.replace('*', chr(92) + 'cdot')} ({right})"


@BOUNDED
@given(trees)
def test_reflexive_in_another_order_and_notation(tree):
    gold = latex(tree)
    assert status(gold, gold) == "correct"
    assert status(latex(tree, swap=True), gold) == "correct"
    assert status(latex(tree, plain=True), gold) == "correct"


@BOUNDED
@given(trees, trees)
def test_symmetric(left, right):
    assert status(latex(left), latex(right)) == status(latex(right), latex(left))


@BOUNDED
@given(trees, st.integers(1, 10**6))
def test_an_answer_that_is_off_is_wrong(tree, parts):
    gold = latex(tree)
    assert status(f"{gold} + \\frac{{1}}{{{parts}}}", gold) == "incorrect"
    assert status(f"2({gold})", gold) == "incorrect"


@BOUNDED
@given(trees, trees, trees)
def test_expanding_keeps_the_meaning(a, b, c):
    a, b, c = latex(a), latex(b), latex(c)
    assert status(f"({a})({b}) + ({a})({c})", f"({a})({b} + {c})") == "correct"


@BOUNDED
@given(st.fractions(max_denominator=10**6))
def test_fractions_exactly(value):
    gold = f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    assert status(f"{value.numerator * 3}/{value.denominator * 3}", gold) == "correct"
    near = value + Fraction(1, 10**30)
    assert status(f"{near.numerator}/{near.denominator}", gold) == "incorrect"


@BOUNDED
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=6, unique=True), st.randoms())
def test_sets_in_any_order_and_tuples_in_theirs(items, random):
    shuffled = random.sample(items, len(items))
    gold = ", ".join(map(str, items))
    assert status(", ".join(map(str, shuffled)), gold) == "correct"
    assert status(", ".join(map(str, items[:-1])), gold) == "incorrect"
    answer = "(" + ", ".join(map(str, shuffled)) + ")"
    assert status(answer, f"({gold})") == ("correct" if shuffled == items else "incorrect")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from([*CHARACTERS, *COMMANDS]),
        max_size=40,
    ).map("".join)
)
def test_any_text_gets_a_verdict(text):
    for response, gold in ((text, "7"), (f"\\boxed{{{text}}}", "x+1"), ("\\boxed{7}", text)):
        assert verifier.verify(response, gold, meta={}).status in (
            "correct",
            "incorrect",
            "no_answer",
            "limit",
            "gold_error",
        )


@pytest.mark.parametrize("digits", [5, 50, 500])
def test_close_roots_are_told_apart(digits):
    assert status(f"\\sqrt{{10^{{{2 * digits}}}+1}}", f"10^{{{digits}}}") == "incorrect"
    assert status(f"\\sqrt{{10^{{{2 * digits}}}}}", f"10^{{{digits}}}") == "correct"
