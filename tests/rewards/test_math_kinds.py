"""Kind by kind: answers that mean the same as the gold, and answers that come near it and do not."""

import pytest

from deltarl.rewards.math import MathVerifier

verifier = MathVerifier()
ABS = "\\begin{cases}x & x\\ge0\\\\-x & x<0\\end{cases}"

SAME = {
    "numbers": [
        ("1/3", "\\frac{2}{6}"),
        ("3\\times10^{-4}", "0.0003"),
        ("6.02e23", "6.02\\times 10^{23}"),
        ("12,345.67", "12345.67"),
        ("-\\frac{1}{2}", "\\frac{-1}{2}"),
        ("5", "=5"),
        ("5", "\\approx 5"),
        ("5", "\\text{The answer is } 5"),
        ("-3", "negative 3"),
        ("twelve", "12"),
        ("21", "twenty-one"),
        ("5", "five"),
    ],
    "rounded values": [
        ("\\pi", "\\pi \\approx 3.14"),
        ("\\frac23", "\\frac{2}{3} \\approx 0.7"),
        ("\\sqrt2", "\\sqrt{2} \\approx 1.41"),
        ("7", "7 \\approx 7.0001"),
    ],
    "digits that the gold shows": [("0.33", "1/3"), ("0.67", "\\frac23"), ("3.14", "\\pi")],
    "taken back": [("7", "7\\text{ cm}"), ("7", "(7)"), ("7", "[7]")],
    "repeating decimals": [
        ("0.\\overline{3}", "1/3"),
        ("0.1\\overline{6}", "\\frac16"),
        ("\\frac{14}{11}", "1.\\overline{27}"),
        ("0.\\dot{3}", "1/3"),
        ("1", "0.\\overline{9}"),
        ("1/3", "0.333..."),
        ("-\\frac13", "-0.\\bar{3}"),
    ],
    "mixed numbers": [("2\\frac{3}{4}", "11/4"), ("2 3/4", "2.75"), ("-2\\frac{1}{3}", "-7/3")],
    "base n": [("101_2", "(101)_2"), ("1010_2", "1010_{\\text{two}}"), ("101_2", "5"), ("(1232)_5", "1232_5")],
    "choices and factorials": [
        ("120", "{10 \\choose 3}"),
        ("120", "C(10,3)"),
        ("C_{10}^3", "120"),
        ("120", "^{10}C_3"),
        ("6", "\\gcd(12,18)"),
        ("\\gcd(2.4, 3.6)", "1.2"),
        ("\\operatorname{lcm}(1/2, 3)", "3"),
    ],
    "plus-minus": [
        ("x=\\pm2", "x=2 \\text{ or } x=-2"),
        ("\\pm\\frac{\\sqrt2}{2}", "\\frac{1}{\\sqrt2},-\\frac{1}{\\sqrt2}"),
        ("\\pm 1 \\pm \\sqrt2", "1+\\sqrt2,1-\\sqrt2,-1+\\sqrt2,-1-\\sqrt2"),
        ("\\pm1,\\pm2", "1,-1,2,-2"),
    ],
    "infinities": [("\\infty", "+\\infty"), ("\\infty", "\\text{infinity}"), ("-\\infty", "\\text{negative infinity}")],
    "intervals and inequalities": [
        ("(-\\infty,2)\\cup(2,\\infty)", "\\mathbb{R}\\setminus\\{2\\}"),
        ("k<-2 \\text{ or } k>2", "|k|>2"),
        ("2x<6", "x<3"),
        ("x \\geq \\frac12", "[0.5,\\infty)"),
        ("(-\\infty,\\infty)", "all real numbers"),
        ("30^\\circ<x<60^\\circ", "30<x<60"),
        ("\\{1,2\\} \\cup \\{2,3\\}", "\\{1,2,3\\}"),
    ],
    "sets and lists": [
        ("\\emptyset", "\\text{no solution}"),
        ("\\{1,2\\}", "\\{1,2,2\\}"),
        ("1,1,2", "2,1,1"),
        ("1,2", "1,1,2"),
        ("(1,2),(3,4)", "(3,4) \\text{ and } (1,2)"),
        ("1;2", "2,1"),
    ],
    "labels": [
        ("(x,y)=(1,2)", "x=1,y=2"),
        ("x=1, y=2", "y=2, x=1"),
        ("P(X=1)=\\frac12", "0.5"),
        ("\\frac{dy}{dx}=2x", "2x"),
        ("f^{-1}(x)=\\frac{x-1}{2}", "\\frac{x-1}{2}"),
        ("m\\angle A=30^\\circ", "30^{\\circ}"),
    ],
    "vectors and matrices": [
        ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "[[1,2],[3,4]]"),
        ("\\langle 1,2,3\\rangle", "(1,2,3)"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "(1,2)^T"),
        ("\\begin{pmatrix}1&3\\\\2&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}^T"),
        ("\\frac{1}{2}\\begin{pmatrix}2&4\\\\6&8\\end{pmatrix}", "\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}"),
        ("\\left(\\begin{array}{cc}1&2\\\\3&4\\end{array}\\right)", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
    ],
    "equations": [
        ("(x-1)^2+(y+2)^2=9", "x^2+y^2-2x+4y-4=0"),
        ("y-1=2(x-3)", "y=2x-5"),
        ("2x+3y=6", "4x+6y-12=0"),
        ("f(x)=x^2", "y=x^2"),
        ("\\begin{cases}x=1\\\\y=2\\end{cases}", "x=1,y=2"),
    ],
    "names of no matter": [
        ("f(x)=x^2", "f(t)=t^2"),
        ("x^2+C", "x^2+c"),
        ("\\sin x+C", "\\sin x + K"),
        ("c_1e^x+c_2e^{-x}", "C_1e^x+C_2e^{-x}"),
        ("n\\pi, n\\in\\mathbb{Z}", "k\\pi, k\\in\\mathbb{Z}"),
        ("x=\\frac{\\pi}{4}+k\\pi", "\\frac{\\pi}{4}+n\\pi"),
    ],
    "cases": [
        (ABS, "\\begin{cases}x,& \\text{if } x\\ge0,\\\\-x,& \\text{if } x<0\\end{cases}"),
        (ABS, "\\begin{cases}-x & x<0\\\\x & x\\ge0\\end{cases}"),
        (ABS, "\\begin{cases}x & x>0\\\\-x & x\\le0\\end{cases}"),
        (ABS, "\\begin{cases}x & x\\ge0\\\\-x & \\text{otherwise}\\end{cases}"),
        (ABS, "\\begin{cases}t & t>0\\\\0 & t=0\\\\-t & t<0\\end{cases}".replace("t=0", "0\\le t\\le 0")),
        (
            "\\begin{cases}1 & \\text{even}\\\\0 & \\text{odd}\\end{cases}",
            "\\begin{cases}0 & \\text{odd}\\\\1 & \\text{even}\\end{cases}",
        ),
    ],
    "remainders": [
        ("3\\pmod 7", "3"),
        ("x\\equiv 3\\pmod 7", "3 \\pmod{7}"),
        ("x\\equiv 3 \\pmod 7", "x\\equiv 10\\pmod 7"),
        ("3 \\pmod 7", "3 (\\text{mod } 7)"),
    ],
    "ratios": [("7:3", "14:6"), ("3:4:5", "6:8:10"), ("1:2", "\\frac12")],
    "percent, degrees, currency and units": [
        ("\\frac{3}{4}", "75\\%"),
        ("\\text{25 percent}", "25\\%"),
        ("60^{\\circ}", "60 degrees"),
        ("30^\\circ", "\\frac{\\pi}{6}"),
        ("\\frac12", "\\sin 30^\\circ"),
        ("\\cos 60^\\circ", "0.5"),
        ("25^\\circ C", "25"),
        ("\\$5.50", "5.50 dollars"),
        ("5\\text{ cm}", "5 centimeters"),
        ("20\\text{ cm}^2", "20 \\text{ square cm}"),
        ("3 hours", "3\\text{ hrs}"),
        ("3/4 cup", "3/4"),
        ("60 miles per hour", "60"),
        ("12", "12 m/s"),
        ("5\\text{ m}", "5"),
        ("\\frac12\\,\\mathrm{s}", "0.5 seconds"),
        ("9.8\\text{ m/s}^2", "9.8"),
        ("30^\\circ", "\\frac{\\pi}{6}\\text{ radians}"),
    ],
    "words and choices": [
        ("\\text{Yes}", "yes."),
        ("\\textbf{(A)}\\ 5", "A"),
        ("B", "\\text{(B)}"),
        ("B", "Option B"),
        ("D", "D: 15"),
        ("AC", "A, C"),
        ("\\text{A and C}", "A, C"),
        ("A,C", "C and A"),
        ("\\text{does not exist}", "DNE"),
    ],
}

DIFFERENT = {
    "digits that the gold shows": [("0.3", "1/3"), ("0.34", "1/3"), ("0.66", "2/3"), ("3.15", "\\pi")],
    "numbers": [
        ("9.11", "9.9"),
        ("1.5", "15"),
        ("1e5", "1e6"),
        ("0.3", "0.30000000000000004"),
        ("5", "5?7"),
        ("-3", "3"),
        ("12", "1,2"),
        ("2^{1000}", "2^{1001}"),
        ("100!", "101!"),
    ],
    "rounded values": [("9", "7 \\approx 9"), ("3.15", "\\pi \\approx 3.15"), ("0.8", "\\frac23 \\approx 0.8")],
    "taken back": [
        ("7", "7\\text{ not}"),
        ("7", "7\\text{ is wrong}"),
        ("7", "\\text{not } 7"),
        ("7", "(7]"),
        ("7", "[7)"),
    ],
    "repeating decimals": [
        ("0.\\overline{9}", "0.9"),
        ("\\overline{12}", "12"),
        ("0.\\overline{3}", "0.3"),
        ("0.1\\overline{6}", "0.16"),
    ],
    "mixed numbers": [("2\\frac12", "1"), ("2\\frac{1}{2}", "\\frac{2}{2}")],
    "base n": [("101_2", "101_3"), ("101", "101_2"), ("12_5", "12_6")],
    "choices and factorials": [("\\binom{10}{3}", "\\binom{10}{4}"), ("C_1^2", "0"), ("C_1^2", "1")],
    "plus-minus": [("5", "\\pm5"), ("\\pm5", "5"), ("\\pm 1 \\pm \\sqrt2", "1+\\sqrt2,1-\\sqrt2,-1+\\sqrt2,1")],
    "infinities": [("\\infty", "-\\infty"), ("\\infty", "0"), ("\\infty", "x"), ("\\frac{1}{0}", "\\infty")],
    "intervals and inequalities": [
        ("(0,1)", "[0,1]"),
        ("x<3", "x\\le3"),
        ("x>3", "3"),
        ("x\\neq 3", "x=3"),
        ("(1,2)\\cup(3,4)", "(1,2),(3,4)"),
        ("\\mathbb{R}", "\\mathbb{Z}"),
        ("\\mathbb{R}", "\\mathbb{R}\\setminus\\{0\\}"),
        ("5", "<5"),
    ],
    "sets and lists": [
        ("\\emptyset", "0"),
        ("\\emptyset", "\\{0\\}"),
        ("1,1,2", "1,2"),
        ("1,1,2", "1,2,2"),
        ("\\{1\\}", "\\{1,2\\}"),
        ("no solution", "1"),
        ("5", "5;7"),
        ("5", "1,2,3,4,5"),
        ("5", "5 \\text{ and } 6"),
        ("5", "4 \\text{ or } 5"),
    ],
    "labels": [
        ("x=1,y=2", "x=2,y=1"),
        ("x=1,y=2", "2,1"),
        ("x=5", "x>5"),
        ("P(X=1)=\\frac12", "P(X=2)=\\frac12"),
        ("7", "x=5=7"),
    ],
    "vectors and matrices": [
        ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "[[1,3],[2,4]]"),
        ("\\langle 1,2\\rangle", "\\langle 2,1\\rangle"),
        ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{vmatrix}1&2\\\\3&4\\end{vmatrix}"),
        ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}^T"),
    ],
    "equations": [
        ("x=y", "x=-y"),
        ("x^2=1", "x=1"),
        ("x=1", "x^2=1"),
        ("y=2x", "y=2x+1"),
        ("x+1", "x+1=0"),
        ("f(x)=x", "g(x)=x"),
        ("\\begin{cases}x=1\\\\y=2\\end{cases}", "\\begin{cases}x=2\\\\y=1\\end{cases}"),
    ],
    "names of no matter": [
        ("f(x)=x+a", "f(a)=2a"),
        ("x+C", "x"),
        ("x^2+C", "2x^2+c"),
        ("kx", "cx"),
        ("2n+1", "2k+1"),
        ("f(x)=x", "y=t"),
        ("\\frac{\\pi}{4}+k\\pi", "\\frac{\\pi}{4}+2n\\pi"),
        ("c_1e^x+c_2e^{-x}", "C_2e^x+C_1e^{-x}"),
    ],
    "cases": [
        (ABS, "x"),
        (ABS, "\\begin{cases}x & x\\ge1\\\\-x & x<1\\end{cases}"),
        (ABS, "\\begin{cases}x & x\\ge0\\\\x & x<0\\end{cases}"),
        (ABS, "\\begin{cases}x & x\\ge0\\\\-x & x<-1\\end{cases}"),
        ("\\begin{cases}1 & x\\ge0\\\\0 & x<0\\end{cases}", "\\begin{cases}1 & x>0\\\\0 & x\\le0\\end{cases}"),
        (
            "\\begin{cases}1 & \\text{even}\\\\0 & \\text{odd}\\end{cases}",
            "\\begin{cases}1 & \\text{odd}\\\\0 & \\text{even}\\end{cases}",
        ),
    ],
    "remainders": [("3 \\pmod 7", "3 \\pmod 5"), ("3\\pmod 7", "4"), ("3\\pmod 7", "10"), ("3 \\pmod 7", "4 \\pmod 7")],
    "ratios": [("2:3", "3:2"), ("3:4:5", "3:4:6"), ("3:4:5", "3:4"), ("12:30", "12:31")],
    "percent, degrees, currency and units": [
        ("30^\\circ", "30\\%"),
        ("90", "\\pi/2"),
        ("3\\text{ hours}", "3 \\text{ minutes}"),
        ("\\$5", "5 cents"),
        ("5 cm", "5 km"),
        ("\\sin 30", "\\frac12"),
        ("25\\%", "0.25\\%"),
        ("12", "12m"),
        ("5 cm", "5 m"),
        ("5\\text{ s}", "5\\text{ m}"),
        ("2", "2 x"),
        ("\\$5", "500"),
    ],
    "words and choices": [
        ("\\text{yes}", "\\text{no}"),
        ("A", "AB"),
        ("A", "A or B"),
        ("(A)", "(A),(B)"),
        ("C", "C, D"),
        ("D", "A B C D"),
        ("AC", "A, B"),
        ("B", "b=2"),
        ("A", "The answer is not A"),
    ],
}


def pairs(table):
    return [pytest.param(*pair, id=f"{kind}: {pair[0]} | {pair[1]}") for kind, rows in table.items() for pair in rows]


@pytest.mark.parametrize(("gold", "answer"), pairs(SAME))
def test_means_the_same(gold, answer):
    assert verifier.verify(f"\\boxed{{{answer}}}", gold, meta={}).status == "correct"


@pytest.mark.parametrize(("gold", "answer"), pairs(DIFFERENT))
def test_comes_near_and_does_not_mean_the_same(gold, answer):
    assert verifier.verify(f"\\boxed{{{answer}}}", gold, meta={}).score == 0.0


def test_every_kind_has_both():
    assert set(SAME) == set(DIFFERENT)


def status(answer, gold, **options):
    return MathVerifier(**options).verify(f"\\boxed{{{answer}}}", gold, meta={}).status


def test_degrees_as_the_option_says():
    assert status("30", "30^\\circ", degrees="strict") == "incorrect"
    assert status("\\frac{\\pi}{6}", "30^\\circ", degrees="strict") == "correct"
    with pytest.raises(ValueError, match="degrees 'no'"):
        MathVerifier(degrees="no")


def test_units_as_the_option_says():
    assert status("3\\text{ minutes}", "3\\text{ hours}", units="ignore") == "correct"
    assert status("3", "3\\text{ hours}", units="required") == "incorrect"
    assert status("3\\text{ hr}", "3\\text{ hours}", units="required") == "correct"
    assert status("3\\text{ hr}", "3", units="required") == "correct"
    with pytest.raises(ValueError, match="units 'no'"):
        MathVerifier(units="no")
