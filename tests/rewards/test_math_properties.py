"""Properties of the comparison over random answers of every kind: rewriting keeps one right, a change does not."""

import os
from fractions import Fraction

import pytest
from answer_trees import (
    constants,
    differ,
    elementary,
    expanded,
    expressions,
    factored,
    fraction,
    perturbed,
    polynomial,
    polynomials,
    written,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from deltarl.rewards.math import MathVerifier

verifier = MathVerifier()
verifier.warm_up()
ASKED = os.environ.get("FUZZ_EXAMPLES")
BOUNDED = settings(max_examples=int(ASKED or 10), derandomize=ASKED is None, database=None, deadline=None)
randoms = st.randoms(use_true_random=False)
distinct_values = st.lists(st.integers(-50, 50), min_size=2, max_size=6, unique=True)


def status(answer: str, gold: str) -> str:
    return verifier.verify(f"\\boxed{{{answer}}}", gold, meta={}).status


@pytest.mark.parametrize("trees", [constants, expressions, elementary], ids=["constants", "expressions", "elementary"])
def test_an_expression_written_in_another_way_is_right_and_a_changed_one_wrong(trees):
    @BOUNDED
    @given(trees, randoms)
    def check(tree, random):
        gold = written(tree, random)
        assert status(gold, gold) == "correct"
        assert status(written(tree, random), gold) == "correct"
        other = perturbed(tree, random)
        if differ(tree, other):
            assert status(written(other, random), gold) in ("incorrect", "limit")

    check()


@pytest.mark.parametrize("trees", [constants, expressions, elementary], ids=["constants", "expressions", "elementary"])
def test_symmetric(trees):
    @BOUNDED
    @given(trees, trees, randoms)
    def check(left, right, random):
        left, right = written(left, random), written(right, random)
        assert (status(left, right) == "correct") == (status(right, left) == "correct")

    check()


@BOUNDED
@given(expressions, st.integers(1, 10**6), randoms)
def test_an_answer_that_is_off_by_a_little_or_a_factor_is_wrong(tree, parts, random):
    gold = written(tree, random)
    assert status(f"{gold} + \\frac{{1}}{{{parts}}}", gold) == "incorrect"
    assert status(f"2({gold})", gold) == "incorrect"
    assert status(f"-({gold})", gold) == "incorrect"


@BOUNDED
@given(expressions, expressions, expressions, randoms)
def test_expanding_keeps_the_meaning(a, b, c, random):
    a, b, c = (written(tree, random) for tree in (a, b, c))
    assert status(f"({a})({b}) + ({a})({c})", f"({a})({b} + {c})") == "correct"


@BOUNDED
@given(polynomials, st.integers(0, 10), st.integers(1, 9))
def test_factored_and_expanded_polynomials(roots, place, change):
    coefficients = expanded(roots)
    assert status(polynomial(coefficients), factored(roots)) == "correct"
    assert status(factored(roots[::-1]), polynomial(coefficients)) == "correct"
    coefficients[place % len(coefficients)] += change
    assert status(polynomial(coefficients), factored(roots)) == "incorrect"


@BOUNDED
@given(st.fractions(max_denominator=10**6))
def test_fractions_exactly(number):
    gold = f"\\frac{{{number.numerator}}}{{{number.denominator}}}"
    assert status(f"{number.numerator * 3}/{number.denominator * 3}", gold) == "correct"
    assert status(fraction(number + Fraction(1, 10**30)), gold) == "incorrect"


@BOUNDED
@given(st.integers(-(10**9), 10**9), st.integers(1, 9))
def test_decimals_exactly(digits, places):
    gold = f"{digits / 10**places:.{places}f}"
    assert status(f"\\frac{{{digits}}}{{{10**places}}}", gold) == "correct"
    assert status(gold + "000", gold) == "correct"
    assert status(f"{digits}\\cdot 10^{{-{places}}}", gold) == "correct"
    assert status(fraction(Fraction(digits, 10**places) + Fraction(1, 10 ** (places + 12))), gold) == "incorrect"


@BOUNDED
@given(distinct_values, randoms)
def test_sets_in_any_order_and_tuples_in_theirs(items, random):
    shuffled = random.sample(items, len(items))
    gold, answer = ", ".join(map(str, items)), ", ".join(map(str, shuffled))
    assert status(answer, gold) == "correct"
    assert status(f"\\left\\{{ {answer} \\right\\}}", f"\\{{{gold}\\}}") == "correct"
    assert status(", ".join(map(str, items[:-1])), gold) == "incorrect"
    assert status(f"\\{{{answer}, 51\\}}", f"\\{{{gold}\\}}") == "incorrect"
    assert status(f"({answer})", f"({gold})") == ("correct" if shuffled == items else "incorrect")


@BOUNDED
@given(st.lists(constants, min_size=2, max_size=3), randoms)
def test_items_written_in_another_way(trees, random):
    texts = [written(tree, random) for tree in trees]
    again = [written(tree, random) for tree in trees]
    assert status(f"\\left({', '.join(again)}\\right)", f"({','.join(texts)})") == "correct"
    other = perturbed(trees[0], random)
    if differ(other, trees[0]):
        again[0] = written(other, random)
        assert status(f"({','.join(again)})", f"({','.join(texts)})") in ("incorrect", "limit")


@BOUNDED
@given(st.integers(1, 3), st.integers(1, 3), st.data(), randoms)
def test_matrices(rows, columns, data, random):
    cells = [[data.draw(st.integers(-9, 9)) for _ in range(columns)] for _ in range(rows)]

    def latex(kind, write):
        body = " \\\\ ".join(" & ".join(map(write, row)) for row in cells)
        return f"\\begin{{{kind}}} {body} \\end{{{kind}}}"

    gold = latex("pmatrix", str)
    assert status(latex("bmatrix", lambda cell: f"\\frac{{{3 * cell}}}{{3}}"), gold) == "correct"
    cells[random.randrange(rows)][random.randrange(columns)] += 1
    assert status(latex("pmatrix", str), gold) == "incorrect"


@BOUNDED
@given(distinct_values, st.booleans(), randoms)
def test_intervals_in_any_order_and_with_their_own_ends(ends, unbounded, random):
    ends = sorted(ends)[: len(ends) // 2 * 2]
    pieces = [
        [random.choice("(["), low, high, random.choice(")]")] for low, high in zip(ends[::2], ends[1::2], strict=True)
    ]
    if unbounded:
        pieces.append(["(" if random.random() < 0.5 else "[", ends[-1] + 1, "\\infty", ")"])

    def joined(pieces, sign):
        return sign.join(f"{opener}{low},{high}{closer}" for opener, low, high, closer in pieces)

    gold = joined(pieces, " \\cup ")
    assert status(joined(random.sample(pieces, len(pieces)), "\u222a"), gold) == "correct"
    assert status(f"x \\in {gold}", gold) == "correct"
    chosen, at = random.randrange(len(pieces)), random.choice((0, 1))
    changed = [list(piece) for piece in pieces]
    changed[chosen][at] = {"(": "[", "[": "("}.get(changed[chosen][at], changed[chosen][1] - Fraction(1, 2))
    assert status(joined(changed, "\\cup"), gold) == "incorrect"


@BOUNDED
@given(polynomials, polynomials, st.integers(1, 9))
def test_quotients_of_polynomials(top, bottom, change):
    gold = f"\\frac{{{factored(top)}}}{{{factored(bottom)}}}"
    again = f"({polynomial(expanded(top))})/({polynomial(expanded(bottom))})"
    assert status(again, gold) == "correct"
    assert status(f"({factored(top)}) \\cdot ({factored(bottom)})^{{-1}}", gold) == "correct"
    assert status(f"\\frac{{{factored(top)} + {change}}}{{{factored(bottom)}}}", gold) == "incorrect"
    assert status(f"{gold} + {change}", gold) == "incorrect"


@BOUNDED
@given(polynomials, st.integers(2, 9), st.integers(1, 9))
def test_equations_up_to_rearrangement_and_scaling(roots, factor, change):
    gold = f"y = {factored(roots)}"
    assert status(f"{factored(roots)} = y", gold) == "correct"
    assert status(f"{factor}y - {factor}({polynomial(expanded(roots))}) = 0", gold) == "correct"
    assert status(f"-{factor} y = -{factor} {factored(roots)}", gold) == "correct"
    assert status(f"y = {factored(roots)} + {change}", gold) == "incorrect"
    assert status(f"{factor}y = {factored(roots)}", gold) == "incorrect"
    assert status(f"z = {factored(roots)}", gold) == "incorrect"


@BOUNDED
@given(polynomials, st.integers(1, 9))
def test_names_that_are_bound_may_be_renamed(roots, change):
    body, renamed = (polynomial(expanded(roots), name) for name in "kj")
    gold = f"\\sum_{{k=1}}^{{n}} ({body})"
    assert status(f"\\sum_{{j=1}}^{{n}} ({renamed})", gold) == "correct"
    assert status(f"\\sum_{{j=1}}^{{n}} ({renamed} + {change})", gold) == "incorrect"
    assert status(f"\\sum_{{j={1 + change}}}^{{n}} ({renamed})", gold) == "incorrect"
    assert status(f"f(t) = {factored(roots, 't')}", f"f(x) = {factored(roots)}") == "correct"
    assert status(f"f(t) = {factored(roots, 't')} + {change}", f"f(x) = {factored(roots)}") == "incorrect"


IDENTITIES = [
    ("\\sin(2({t}))", "2\\sin({t})\\cos({t})"),
    ("\\cos^2({t})", "1-\\sin^2({t})"),
    ("\\tan({t})", "\\frac{{\\sin({t})}}{{\\cos({t})}}"),
    ("\\ln(({t})^2)", "2\\ln(\\sqrt{{({t})^2}})"),
    ("e^{{2({t})}}", "(e^{{{t}}})^2"),
    ("2^{{{t}+1}}", "2\\cdot 2^{{{t}}}"),
    ("\\log_2(8^{{{t}}})", "3({t})"),
]


@pytest.mark.parametrize(("left", "right"), IDENTITIES)
def test_identities_of_functions_at_any_argument(left, right):
    @BOUNDED
    @given(st.sampled_from("xyab"), st.integers(1, 9), st.integers(0, 9), st.integers(1, 9))
    def check(name, slope, offset, change):
        argument = f"{slope}{name}+{offset}"
        gold, answer = left.format(t=argument), right.format(t=argument)
        assert status(answer, gold) == status(gold, answer) == "correct"
        assert status(f"{answer}+{change}", gold) == "incorrect"
        assert status(right.format(t=f"{slope}{name}+{offset + change}"), gold) == "incorrect"

    check()


@pytest.mark.parametrize("digits", [5, 50, 500])
def test_close_roots_are_told_apart(digits):
    assert status(f"\\sqrt{{10^{{{2 * digits}}}+1}}", f"10^{{{digits}}}") == "incorrect"
    assert status(f"\\sqrt{{10^{{{2 * digits}}}}}", f"10^{{{digits}}}") == "correct"
