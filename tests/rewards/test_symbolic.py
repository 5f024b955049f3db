"""Identities that need a proof, sums and integrals, and what the last stage of the math verifier refuses."""

import subprocess
import sys

import pytest

from deltarl.rewards import VerifierHost, VerifierSpec
from deltarl.rewards.math import MathVerifier

default, working_out = MathVerifier(), MathVerifier(require_evaluated=False)


def status(answer: str, gold: str, verifier: MathVerifier = default) -> str:
    return verifier.verify(f"\\boxed{{{answer}}}", gold, meta={}).status


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1", "\\sin^2 x+\\cos^2 x"),
        ("\\sin 2x", "2\\sin x\\cos x"),
        ("\\cos 3x", "4\\cos^3 x-3\\cos x"),
        ("\\sin(x+y)", "\\sin x\\cos y+\\cos x\\sin y"),
        ("\\tan\\frac{x}{2}", "\\frac{1-\\cos x}{\\sin x}"),
        ("\\sin^6 x+\\cos^6 x", "1-3\\sin^2 x\\cos^2 x"),
        ("\\cos x", "\\sin(\\frac{\\pi}{2}-x)"),
        ("\\sinh x", "\\frac{e^x-e^{-x}}{2}"),
        ("\\ln(xy)", "\\ln x+\\ln y"),
        ("2\\ln x", "\\ln x^2"),
        ("\\log_2 x", "\\frac{\\ln x}{\\ln 2}"),
        ("4^n", "2^{2n}"),
        ("e^{2x}", "(e^x)^2"),
        ("\\sqrt{x-1}+1", "\\sqrt{x+2\\sqrt{x-1}}"),
        ("\\sqrt2+\\sqrt3", "\\sqrt{5+2\\sqrt6}"),
        ("\\frac{1}{\\sqrt{x}+1}", "\\frac{\\sqrt{x}-1}{x-1}"),
        ("\\frac{1}{\\sqrt{1-x^2}}", "(1-x^2)^{-1/2}"),
        ("-\\sqrt[3]{x}", "\\sqrt[3]{-x}"),
        ("\\frac{1}{x(x+1)}", "\\frac1x-\\frac{1}{x+1}"),
        ("(a+b)^5", "a^5+5a^4b+10a^3b^2+10a^2b^3+5ab^4+b^5"),
        ("120x+\\frac14", "5!\\,x+(3\\bmod 2)/4"),
        ("\\binom{n}{2}", "\\frac{n(n-1)}{2}"),
        ("|x-1|", "\\sqrt{x^2-2x+1}"),
        ("\\max(x,y)", "\\frac{x+y+|x-y|}{2}"),
        ("\\lceil x\\rceil", "-\\lfloor -x\\rfloor"),
        ("xy=1", "y=\\frac1x"),
        ("y(x-1)=1", "y=\\frac{1}{x-1}"),
    ],
)
def test_identities(gold, answer):
    assert status(answer, gold) == "correct"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1", "\\sin^2 x-\\cos^2 x"),
        ("\\sin 2x", "2\\sin x\\cos y"),
        ("\\cos 3x", "4\\cos^3 x-3\\cos x+10^{-40}"),
        ("\\ln(x+y)", "\\ln x+\\ln y"),
        ("\\sqrt{x+y}", "\\sqrt{x}+\\sqrt{y}"),
        ("(a+b)^5", "a^5+5a^4b+10a^3b^2+10a^2b^3+5ab^4-b^5"),
        ("xy=1", "y=-\\frac1x"),
        ("x=y", "\\frac{x}{y}=1"),
        ("x", "\\max(x,-1000)"),
        ("x+1000", "\\sqrt{(x+1000)^2}"),
        ("x+1000", "|x+1000|"),
        ("\\lfloor x\\rfloor", "\\lfloor x+10^{-14}\\rfloor"),
    ],
)
def test_near_misses_of_which_some_agree_at_every_probe_point(gold, answer):
    assert status(answer, gold) == "incorrect"


def test_a_polynomial_through_every_probe_point_is_refuted():
    from deltarl.rewards.math.scalars import probe_points

    zeros = "".join(f"(x-({point['x'].numerator}/{point['x'].denominator}))" for point in probe_points(["x"]))
    assert status(f"x+{zeros}", "x") == "incorrect"
    assert status(f"x+{zeros}-{zeros}", "x") == "correct"


SUMS = [
    ("5050", "\\sum_{k=1}^{100} k"),
    ("120", "\\prod_{k=1}^{5} k"),
    ("\\frac{n(n+1)}{2}", "\\sum_{k=1}^n k"),
    ("2", "\\sum_{k=0}^{\\infty} \\frac{1}{2^k}"),
    ("\\frac{\\pi^2}{6}", "\\sum_{k=1}^\\infty \\frac{1}{k^2}"),
    ("18", "\\sum_{i=1}^{2}\\sum_{j=1}^{3} ij"),
    ("\\frac13", "\\int_0^1 x^2 dx"),
    ("\\frac14", "\\int_0^1 \\int_0^1 xy \\, dx \\, dy"),
    ("7", "\\int^7_0 dx"),
    ("6", "\\sum^3_{k=1} k"),
    ("1", "\\int_0^\\infty e^{-x} dx"),
    ("e", "\\lim_{n\\to\\infty} (1+\\frac1n)^n"),
    ("\\infty", "\\lim_{x\\to 0^+} \\frac1x"),
    ("3x^2", "\\frac{d}{dx} x^3"),
    ("(3, 6)", "(3, \\sum_{k=1}^3 k)"),
]


@pytest.mark.parametrize(("value", "form"), SUMS)
def test_a_sum_is_worked_out_in_a_gold_and_in_an_answer_only_on_demand(value, form):
    assert status(value, form) == "correct"
    assert status(form, value) == "incorrect"
    assert status(form, value, working_out) == "correct"
    assert status(f"{value}+1", form) == status(form, f"{value}+1", working_out) == "incorrect"


def test_a_sum_beside_a_gold_of_the_same_form():
    assert status("S=\\sum_{j=1}^{n} j", "\\sum_{k=1}^n k") == "correct"
    assert status("\\sum_{j=1}^{n} j(j+1)", "\\sum_{k=1}^n (k^2+k)") == "correct"
    assert status("\\sum_{j=1}^{n} j^2", "\\sum_{k=1}^n k") == "incorrect"
    assert status("\\sum_{j=0}^{n-1} (j+1)", "\\sum_{k=1}^n k") == "incorrect"
    assert status("S=\\sum_{k=1}^{100} k=5050", "5050") == "correct"
    assert status("S=\\sum_{k=1}^{100} k=5051", "5051") == "incorrect"
    assert status("\\sum_{k=1}^{3} F_k", "3F_k", working_out) == "incorrect"


HOSTILE = [
    ("(1+x)^{3600}", "((x+1)^{60})^{60}"),
    ("(1+\\sin x)^{60}+1", "(1+\\sin x)^{30}(\\sin x+1)^{30}"),
    ("\\sin(64x)", "2\\sin(32x)\\cos(32x)+10^{-60}"),
    ("\\ln(1234567890123457^{x})+1", "x\\ln 1234567890123457"),
    ("x^{10^6}", "x^{10^6-1}x"),
    ("x^{x^{x^{x}}}", "((x^x)^x)^x"),
    ("\\lfloor x\\rfloor", "\\max(\\lfloor x\\rfloor,-1000,-2000-|x|)"),
    ("n", "\\binom{n}{10^9}"),
    ("(n+10^8)!", "(n+10^8)\\cdot(n+10^8-1)!"),
    ("(x+y)^{40}=(x-y)^{40}z", "z=\\frac{(x+y)^{40}}{(x-y)^{40}}"),
    ("7", "\\sum_{k=1}^{10^9} 2^k"),
    ("7", "\\sum_{k=1}^{n}\\sum_{j=1}^{10^9} 2^j"),
    ("7", "\\prod_{k=1}^{9999} k"),
    ("7", "\\sum_{a=1}^{99}\\sum_{b=1}^{99}\\sum_{c=1}^{99} abc"),
    ("7", "\\sum_{k=1}^{10^{10^{10}}} k"),
    ("7", "\\sum_{k=1}^{\\infty} \\frac{1}{k^k}"),
    ("7", "\\int_0^1 x^x dx"),
    ("7", "\\int_0^1" * 30 + "x" + "dx" * 30),
    ("7", "\\lim_{x\\to\\infty} \\frac{x^{x^x}}{e^{e^x}}"),
    ("7", "\\frac{d}{dx} (\\sin x)^{x^{x^x}}"),
    ("7", "\\frac{1}{\\sum_{k=1}^{3} 0}"),
    ("7", "\\sum_{k=1}^{x=3} k"),
]


@pytest.mark.parametrize("require_evaluated", [True, False])
def test_hostile_expressions_are_each_answered_in_time(require_evaluated):
    items = [(f"\\boxed{{{answer}}}", gold, {}) for gold, answer in HOSTILE]
    with VerifierHost(VerifierSpec("math", {"require_evaluated": require_evaluated}), timeout=5.0) as host:
        verdicts = host.verify(items)
    bad = {
        answer: verdict.status
        for (_, answer), verdict in zip(HOSTILE, verdicts, strict=True)
        if verdict.status not in ("incorrect", "limit")
    }
    assert bad == {}


PLAIN = """
import sys
from deltarl.rewards.math import MathVerifier
verifier = MathVerifier()
pairs = [("72", "72"), ("1,234", "1234"), ("2/3", "0.6667"), ("28\\\\%", "28"), ("\\\\sqrt8", "2\\\\sqrt2"),
         ("5050", "\\\\sum_{k=1}^{100} k"), ("(a+b)^2", "a^2+2ab+b^2"), ("7", "x=3+5"), ("1", "\\\\sin x")]
for gold, answer in pairs:
    verifier.verify("\\\\boxed{%s}" % answer, gold, meta={})
assert "sympy" not in sys.modules
verifier.verify("\\\\boxed{\\\\sin^2 x+\\\\cos^2 x}", "1", meta={})
assert "sympy" in sys.modules
"""


def test_plain_answers_do_not_import_sympy():
    subprocess.run([sys.executable, "-P", "-c", PLAIN], check=True)
