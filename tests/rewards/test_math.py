"""The math verifier, case by case: (gold, answer) pairs that mean the same, and pairs that do not."""

import re
from pathlib import Path

import pytest

from deltarl.rewards.math import MathVerifier

REWARDS = Path(__file__).parents[2] / "rewards"
SANDBOXED = REWARDS / "sandbox" / "runner.py"  # runs the programs of the `code` verifier in a process of its own
verifier = MathVerifier()

SAME = [
    ("7", "7.0"), ("-5", "-5"), ("1234567", "1,234,567"), ("12000023", "12,\\!000,\\!023"), ("14916", "14{,}916"),
    ("1000", "1 000"), ("1/2", "0.5"), ("1/2", "\\frac12"), ("\\frac{1}{2}", "\\dfrac{2}{4}"), (".1", "0.1"),
    ("2.5", "2\\frac{1}{2}"), ("5/4", "1 1/4"), ("10^3", "1000"), ("1e-7", "10^{-7}"), ("1/2^{99}", "2^{-99}"),
    ("\\sqrt{8}", "2\\sqrt2"), ("2", "\\sqrt[3]{8}"), ("-2", "\\sqrt[3]{-8}"), ("\\frac{1}{\\sqrt2}", "\\sqrt{2}/2"),
    ("\\sqrt{2}+\\sqrt{3}", "\\sqrt{5+2\\sqrt6}"), ("\\pi/2", "pi/2"), ("e^{16}-1", "-1 + exp(16)"),
    ("14-i", "14.0 + -1.0i"), ("-1", "e^{i\\pi}"), ("0", "\\sin(\\pi)"), ("3", "\\log_2 8"), ("2", "\\ln e^2"),
    ("120", "5!"), ("10", "\\binom{5}{2}"), ("x^2+2x+1", "(x+1)^2"), ("(a+b)(a-b)", "a^2-b^2"),
    ("\\tan^2 y + 1", "\\sec^2(y)"), ("2\\sin b\\cos a", "2 \\cos a \\sin b"),
    ("\\frac{x+2}{7}", "\\frac{x}{7}+\\frac27"), ("2^{n+1}", "2\\cdot 2^n"), ("n!", "n\\cdot(n-1)!"),
    ("x^{2/3}", "\\sqrt[3]{x}^2"), ("(-1)^{2n}", "1"), ("\\frac{1}{1-x}", "-\\frac{1}{x-1}"), ("x=5", "5"),
    ("5", "x = 5"), ("x = 5", "5 = x"), ("f(x)=2x+1", "f(t) = 1 + 2t"), ("y=2x+3", "2x+3"),
    ("2x+4y-3=0", "y=-\\frac12 x+\\frac34"), ("x^2/4+y^2/3=1", "x^2/16+y^2/12=1/4"), ("5", "x = 2 + 3 = 5"),
    ("(3,2)", "(p,q)=(3,2)"), ("(1,\\frac92)", "(1, 4.5)"), ("1,2,3", "\\{3,2,1\\}"),
    ("1,2,3", "2, 3 \\text{ and } 1"), ("1,3", "x=1 \\text{ or } x=3"), ("\\pm 3", "3, -3"),
    ("1\\pm\\sqrt2", "1-\\sqrt2, 1+\\sqrt2"), ("w=16, d=3", "(16,3)"), ("a=1, b=2", "b=2, a=1"),
    ("p=5,q=2;p=7,q=2", "(5,2),(7,2)"), ("x_1=3, x_2=4", "4, 3"), ("[-2,7]", "-2 \\le x \\le 7"),
    ("x > 5", "(5, \\infty)"), ("x<1", "-x > -1"), ("x \\ne 3", "(-\\infty,3)\\cup(3,\\infty)"),
    ("(0,2)", "(0,1] \\cup [1,2)"), ("|x|<2", "(-2,2)"), ("\\mathbb{R}", "(-\\infty,\\infty)"),
    ("x<1 \\text{ or } x>3", "(3,\\infty)\\cup(-\\infty,1)"), ("(2,5)", "(2,\\infty)\\cap(-\\infty,5)"),
    ("f(2)<f(1)<f(4)", "f(4)>f(1)>f(2)"), ("x+y<1", "1 > y + x"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{bmatrix}1\\\\2\\end{bmatrix}"),
    ("(1,2)", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("\\begin{pmatrix}6&8\\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}+\\begin{pmatrix}5&6\\end{pmatrix}"),
    ("28\\%", "28"), ("28\\%", "28 percent"), ("28\\%", "0.28"), ("90^\\circ", "90"), ("15", "15\\text{ cm}^2"),
    ("10", "\\$10"), ("125\\text{ miles}", "125"), ("7:32", "S:T = 7:32"), ("1:2", "2:4"), ("204_5", "204_5"),
    ("12:00", "12:00"), ("\\text{Evelyn}", "Evelyn"), ("\\text{even}", "\\text{Even}"), ("C", "(C)"),
    ("(D) Alina", "D"), ("x^2", "x\u00b2"), ("7", "\uff17"), ("0.3333333", "1/3"), ("7.78", "70/9"),
    ("\\sqrt{17}", "4.123105625617661"), ("1/3", "0.333333"), ("3.1416", "3.14159"), ("1.22", "1,22"),
    ("100,200", "200, 100"), ("a_{n+1}", "a_{n+1}"), ("\\sum_{k=1}^n k", "\\sum_{k=1}^n k"),
]  # fmt: skip

DIFFERENT = [
    ("1/2^{99}", "1/2^{98}"), ("0", "10^{-7}"), ("10^{20}", "\\sqrt{10^{40}+1}"), ("10^{200}", "\\sqrt{10^{400}+1}"),
    ("0", "e^{-1000}"), ("7", "7.0000001"), ("7", "5, 7"), ("7", "5 \\text{ or } 7"), ("5", "x = 5 = 7 = 42"),
    ("42", "x=5=7=42"), ("7", "\\pm 7"), ("2/3", "0.67"), ("0.5", "12/25"), ("2.23", "2.232"), ("2.232", "2.23"),
    ("2", "2.0001"), ("1/3", "0.333"), ("0.28", "28"), ("28", "28/100"), ("2", "2\\frac23"), ("10", "4 10/3"),
    ("4", "4 4/9"), ("2", "\\frac{1+\\sqrt5}{2}"), ("32349", "32, 349"), ("x", "|x|"), ("x", "\\sqrt{x^2}"),
    ("x+2n+1", "x+1"), ("(x+1)^2", "x^2+2x-1"), ("\\ln 2", "\\log 2"), ("x^2", "y^2"),
    ("\\frac{1}{2004!}", "\\frac{1}{2006!}"), ("7=11a+c", "11a+c"), ("0", "a+3z=0"), ("x=3", "y=3"),
    ("x+y-z+2=0", "5x-7y+11z+4=0"), ("(3,1)", "1,3"), ("(1,2)", "(2,1)"), ("(1,2)", "\\{1,2\\}"), ("1,2,3", "1,2"),
    ("1,2", "1,2,3"), ("w=16,d=3", "(3,16)"), ("a=1,b=2", "a=2,b=1"), ("[0,1)", "(0,1)"), ("[0,1]", "(0,1)"),
    ("x>5", "x<5"), ("x \\ge 5", "x > 5"), ("(0,1)\\cup(1,2)", "(0,2)"), ("x<1", "x>-1"), ("x+y<1", "x+y>1"),
    ("\\begin{pmatrix}1&2\\end{pmatrix}", "\\begin{pmatrix}1&3\\end{pmatrix}"),
    ("\\begin{pmatrix}1&2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"), ("1112112_3", "1112122_3"),
    ("12:00", "1:00"), ("\\text{west}", "\\text{east}"), ("B", "A"), ("5050", "\\sum_{k=1}^{100} k"),
    ("\\infty", "-\\infty"), ("1", "0^0"), ("1", "0/0"), ("0", "\\infty-\\infty"), ("7", "x"), ("1/2", "1 2"),
    ("5", "5x"), ("12", "1\u200b3"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_means_the_same(gold, answer):
    assert verifier.verify(f"\\boxed{{{answer}}}", gold, meta={}).status == "correct"


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_does_not_mean_the_same(gold, answer):
    verdict = verifier.verify(f"\\boxed{{{answer}}}", gold, meta={})
    assert (verdict.status, verdict.score) == ("incorrect", 0.0)


@pytest.mark.parametrize(
    ("response", "extracted"),
    [
        ("so \\boxed{1} and then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\fbox{3}", "3"),
        ("\\boxed{1} and \\boxed{2}", "1, 2"),
        ("$\\boxed{1}$, $\\boxed{-2}$", "1, -2"),
        ("first \\boxed{1}. Later we find \\boxed{2}", "2"),
        ("<think>\\boxed{1}</think> \\boxed{2}", "2"),
        ("\\boxed{1}</think>The answer is 2.", "2"),
        ("We add. The final answer is $\\frac{1}{2}$. I hope it is correct.", "\\frac{1}{2}"),
        ("**Answer:** 42", "42"),
        ("The answer is 3, no: the answer is 4.", "4"),
        ("Therefore the answer is -3", "-3"),
        ("The answer is 90 degrees because the sides are equal to one another.", "90"),
        ("Final Answer: The largest $n$ is 34.", "34"),
        ("2+3=5\n#### 5", "5"),
        ("The answer is near.\n#### 1,234", "1,234"),
        ("42", "42"),
        ("$x = 3$", "$x = 3$"),
        ("\\framebox{3}", "3"),
        ("\\boxed{\\{1, \\sqrt{2}\\}}", "\\{1, \\sqrt{2}\\}"),
        ("$y_1 = \\boxed{2x}$ and $y_2 = \\boxed{3x}$", "y_1 = 2x, y_2 = 3x"),
        ("<answer>3</answer> in short: <answer> $4$ </answer>", "4"),
        ("The answer is 3.\n<answer>4</answer>", "4"),
        ("\\boxed{3} <answer>4</answer>", "3"),
        ("**Final Answer**\n\n42", "42"),
        ("### Final answer\n$\\frac12$", "\\frac12"),
        ("Answer: Ann has to pay 220 $ within 12 months.", "220"),
        ("Por lo tanto, la respuesta es 12.", "12"),
        ("\u7b54\u6848\uff1a\u6bcf\u4efd\u5e94\u8be5\u662f $\\frac25$ \u5428\u3002", "\\frac25"),
        ("The answer is 3 per day.", "3 per day"),
    ],
)
def test_extraction(response, extracted):
    assert verifier.verify(response, "0", meta={}).extracted == extracted


@pytest.mark.parametrize(
    "response",
    [
        "",
        "   ",
        "we add 3 and 4, which gives 7 as everyone can see",
        "<think>\\boxed{7}",
        "<think>the answer is 7</think>",
        "\\boxed{}",
        "so it is 7, \\boxed{7",
        "\\boxed{8} no, \\boxed{7",
    ],
)
def test_no_answer(response):
    assert verifier.verify(response, "7", meta={}).status == "no_answer"


@pytest.mark.parametrize(
    ("gold", "response"),
    [
        ("B", "So the answer is (B)."),
        ("B", "The correct option is **B**, as the others are odd"),
        ("B", "Answer: B. 12 apples"),
        ("D", "The answer is D, it cannot be A or B"),
        ("(D) Alina", "D"),
        ("C Cecile", "(C)"),
        ("B", "\\boxed{\\textbf{(B)}\\ 5}"),
    ],
)
def test_the_letter_of_a_multiple_choice(gold, response):
    assert verifier.verify(response, gold, meta={}).status == "correct"


@pytest.mark.parametrize(
    "response",
    [
        "The answer is A or B",
        "The answer is A, B.",
        "The answer is not B",
        "The answer is A, not B.",
        "Both A and B",
        "\\boxed{A, B}",
        "\\boxed{A} and \\boxed{B}",
        "The answer is b=2",
        "B is what I thought of first. The answer is C.",
    ],
)
@pytest.mark.parametrize("extraction", ["anchored", "lenient"])
def test_letters_that_are_not_the_choice(response, extraction):
    assert MathVerifier(extraction).verify(response, "B", meta={}).score == 0.0


@pytest.mark.parametrize(
    "response",
    [
        "The answer is 5 or 6.",
        "The answer is between 4 and 5",
        "The answer is less than 5",
        "#### 5 or 6",
        "It is not 5 or 6",
    ],
)
def test_a_statement_that_names_no_one_number_is_not_mined_for_one(response):
    assert MathVerifier("lenient").verify(response, "5", meta={}).score == 0.0


def test_a_response_cut_off_has_no_answer():
    assert verifier.verify("\\boxed{7}", "7", meta={"truncated": True}).status == "no_answer"


def test_thoughts_count_when_asked():
    asked = MathVerifier(thoughts="count")
    for response in ("<think>\\boxed{7}</think>", "<think>so \\boxed{7}", "<think>the answer is 7</think>"):
        assert verifier.verify(response, "7", meta={}).status == "no_answer"
        assert asked.verify(response, "7", meta={}).status == "correct"
    with pytest.raises(ValueError, match="thoughts 'no'"):
        MathVerifier(thoughts="no")


def test_strict_takes_the_box_alone_and_lenient_the_last_number():
    strict, lenient = MathVerifier(extraction="strict"), MathVerifier(extraction="lenient")
    assert strict.verify("The answer is 7.", "7", meta={}).status == "no_answer"
    assert strict.verify("\\boxed{7}", "7", meta={}).status == "correct"
    text = "we have 3 apples and then 4 more of them, so in the end there are 7 apples"
    assert lenient.verify(text, "7", meta={}).status == "correct"
    assert verifier.verify(text, "7", meta={}).status == "no_answer"


@pytest.mark.parametrize("gold", ["", "  ", "\\frac{1}{", "\\boxed{}", "((", "\\foo{3}", "x=5=7", [], ["", "?"]])
def test_gold_that_cannot_be_graded_against(gold):
    verdict = verifier.verify("\\boxed{7}", gold, meta={})
    assert (verdict.status, verdict.score) == ("gold_error", None)
    assert verdict.info["reason"] == verifier.check_gold(gold) != ""


def test_any_of_several_golds_and_golds_with_their_solution():
    assert verifier.verify("\\boxed{1/2}", ["one half", "0.5"], meta={}).status == "correct"
    assert verifier.verify("\\boxed{3}", ["", "3"], meta={}).status == "correct"
    assert verifier.verify("\\boxed{72}", "48/2 = <<48/2=24>>24 clips\n#### 72", meta={}).status == "correct"
    assert verifier.verify("\\boxed{72}", "so \\boxed{72}", meta={}).status == "correct"


def test_options():
    assert MathVerifier(precision=3).verify("\\boxed{0.333}", "1/3", meta={}).status == "correct"
    assert MathVerifier(percent="strict").verify("\\boxed{28}", "28\\%", meta={}).status == "incorrect"
    assert MathVerifier(percent="strict").verify("\\boxed{0.28}", "28\\%", meta={}).status == "correct"
    with pytest.raises(ValueError, match="precision 0"):
        MathVerifier(precision=0)


def test_nothing_evaluates_text_as_code():
    calls = re.compile(r"\b(?:eval|exec|sympify|parse_expr|parse_latex|literal_eval|__import__|compile)\s*\(")
    found = [
        (file.name, line)
        for file in REWARDS.rglob("*.py")
        if file != SANDBOXED
        for line in file.read_text().splitlines()
        if calls.search(line.replace("re.compile(", ""))
    ]
    assert found == []
