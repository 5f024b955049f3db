"""Responses made to hang, exhaust, crash or fool a grader, and a few that only look so and are right.

The bench times graders on them, and the tests of the math verifier go through them all.
"""

from collections.abc import Iterator
from typing import NamedTuple

DEEP = 10_000
MEGABYTE = 1_000_000


class Hostile(NamedTuple):
    """right: the response answers the gold, in a form that a grader may stumble over; else it must not pass."""

    name: str
    response: str
    gold: str
    right: bool = False


def hostile_cases() -> list[Hostile]:
    """All of them, built anew at each call: some are a megabyte."""
    return [*_boxed(), *_whole_responses(), *_right()]


def _boxed() -> Iterator[Hostile]:
    for name, answer in {**NUMBERS, **NESTED, **LONG, **SYMBOLIC, **CODE, **CHARACTERS, **FOOLING}.items():
        yield Hostile(name, boxed(answer), "7")
    for name, (answer, gold) in BESIDE_A_GOLD.items():
        yield Hostile(name, boxed(answer), gold)


def _whole_responses() -> Iterator[Hostile]:
    for name, response in RESPONSES.items():
        yield Hostile(name, response, "7")


def _right() -> Iterator[Hostile]:
    for name, (answer, gold) in RIGHT.items():
        yield Hostile(name, boxed(answer), gold, right=True)


def boxed(answer: str) -> str:
    return f"So it is $\\boxed{{{answer}}}$."


def matrix(rows: int, cell: str = "1") -> str:
    return "\\begin{pmatrix}" + "\\\\".join(["&".join([cell] * rows)] * rows) + "\\end{pmatrix}"


def nested(before: str, after: str, times: int, inside: str) -> str:
    return before * times + inside + after * times


PRIMES = [p for p in range(3, 200) if all(p % d for d in range(2, p))]
ECHO = "the question again"
ROOT = "\\sqrt[3]{7^{21000}+1}"

NUMBERS = {
    "power tower": "9^{9^{9^{9^{9}}}}",
    "plain power tower": "9**9**9**9",
    "huge exponent": "2^{10^{12}}",
    "negative huge exponent": "2^{-10^{12}}",
    "exponent of 5000 digits": "2^{10^{5000}}",
    "irrational to a huge power": "\\sqrt{2}^{10^{15}}",
    "huge rational power": "2^{1234567/7654321}",
    "e to a tower": "e^{e^{e^{e^{e}}}}",
    "exp tower": "exp(exp(exp(exp(100))))",
    "sinh of much": "\\sinh(10^{30})",
    "sine of a tower": "\\sin(10^{10^{6}})",
    "sine of much": "\\sin(10^{500})",
    "tangents of much": "+".join(["\\tan(10^{500})"] * 130),
    "sines to many digits": "+".join(["\\sin 2"] * 300) + "+2^{-4800}",
    "complex powers": "+".join(["(1+i)^{i\\pi}"] * 140) + "+2^{-4000}",
    "scientific": "1e999999999",
    "scientific negative": "1e-999999999",
    "factorial": "(10^9)!",
    "factorial of 5000 digits": "(10^{5000})!",
    "factorials": "9!!!!!!",
    "factorial of a factorial": "((((3!)!)!)!)!",
    "many factorials": "+".join(["4000!"] * 600),
    "gamma": "(10^{9}+\\frac12)!",
    "gamma to many digits": "(\\frac12)!+2^{-4500}\\sqrt2",
    "many gammas": "+".join(f"(\\frac{{{k}}}{{7}})!" for k in range(1, 200)),
    "binomial": "\\binom{10^9}{5\\cdot10^8}",
    "binomial deep": "\\binom{4000}{2000}^{4000}",
    "many binomials": "+".join(["\\binom{4000}{2000}"] * 200),
    "binomials of fractions": "+".join(["\\binom{1/3}{4000}"] * 200),
    "sum of large fractions": "+".join(f"\\frac{{1}}{{{p}^{{7000}}}}" for p in PRIMES),
    "products of large fractions": "".join(f"(\\frac{{{p}}}{{{p + 2}}})^{{5000}}" for p in PRIMES),
    "least common multiple": "\\operatorname{lcm}(" + ",".join(f"{p}^{{7000}}" for p in PRIMES) + ")",
    "cube root of 59000 bits": ROOT,
    "many cube roots": "+".join([ROOT] * 100),
    "root of high degree": "\\sqrt[99999]{7^{20000}+1}",
    "roots of high degree": "+".join(f"\\sqrt[{k}]{{7^{{20000}}+1}}" for k in range(900, 1000)),
    "sum": "\\sum_{k=1}^{10^9} k",
    "sum without a closed form": "\\sum_{k=1}^{10^9} \\frac{1}{k^2}",
    "sum of sums": "\\sum_{i=1}^{10^5} \\sum_{j=1}^{10^5} \\frac{1}{i+j}",
    "sum of large fractions written out": "x=\\sum_{k=1}^{6000} \\frac{1}{k^3}=8",
    "product": "\\prod_{k=1}^{10^9} k",
    "product of fractions": "\\prod_{k=1}^{10^9} (1 + \\frac{1}{k^2})",
    "unknown function of 5000 digits": "f(10^{5000})",
    "digits of a base": "1" * 900 + "_{36}",
    "determinant of names": "\\begin{vmatrix}" + "\\\\".join(["&".join("x" * 12)] * 12) + "\\end{vmatrix}",
    "determinant": "\\begin{vmatrix}" + "\\\\".join(["&".join(["2"] * 12)] * 12) + "\\end{vmatrix}",
}
NESTED = {
    "braces": nested("{", "}", DEEP, "7"),
    "parentheses": nested("(", ")", DEEP, "7"),
    "open parentheses": "(" * DEEP,
    "roots": nested("\\sqrt{", "}", DEEP, "8"),
    "roots of sums": nested("\\sqrt{1+", "}", 300, "8"),
    "fractions": nested("\\frac{1}{", "}", DEEP, "8"),
    "continued fraction": nested("1+\\frac{1}{", "}", 300, "8"),
    "mixed numbers": nested("2\\frac{", "}{y}", 18, "x"),
    "calls or products": nested("P(", "+1)", 18, "x"),
    "calls": nested("f(", "+1)", 18, "x"),
    "minus signs": "-" * 3999 + "7",
    "400 minus signs": "-" * 400 + "7",
    "divisions": "8" + "/1" * 400,
    "exclamation marks": "2" + "!" * 400,
    "caret chain": "2" + "^2" * 900,
    "bars": "|" * 3000,
    "absolute values": "|" * 30 + "x" + "|" * 30,
    "powers nested": nested("x^{", "}", 500, "2"),
    "subscripts nested": nested("x_{", "}", 500, "2"),
    "boxes in the box": nested("\\boxed{", "}", 500, "8"),
    "environments": nested("\\begin{pmatrix}", "\\end{pmatrix}", 100, "8"),
    "integrals": "\\int_0^1" * 30 + "x" + "dx" * 30,
    "cases in cases": nested("\\begin{cases}x&", "\\end{cases}", 100, "x>0"),
}
LONG = {
    "a megabyte of digits": "8" * MEGABYTE,
    "a megabyte of braces": "{}" * (MEGABYTE // 2),
    "digits under the cap": "8" * 3999,
    "decimals": "7." + "0" * 100_000 + "1",
    "decimals under the cap": "7." + "0" * 900 + "1",
    "matrix of 60 by 60": matrix(60),
    "matrix power": matrix(2) + "^{10^9}",
    "matrix products": matrix(2) * 60,
    "five matrices of 12 by 12": matrix(12) * 5,
    "a sum times a matrix": "(" + "+".join(["x"] * 200) + ")" + matrix(25),
    "a sum of matrices": "+".join([matrix(2)] * 120),
    "200 intervals": "\\cup".join(f"({i},{i + 1})" for i in range(200)),
    "130 intervals with roots": "\\cup".join(f"({i}+\\sqrt2,{i + 1})" for i in range(130)),
    "set differences": "\\setminus".join(f"[{i},{200 - i}]" for i in range(90)),
    "900 items": ",".join(map(str, range(900))),
    "a set of 900": "\\{" + ",".join(map(str, range(900))) + "\\}",
    "polynomial": "+".join(f"x^{{{k}}}" for k in range(300)),
    "plus minus": "\\pm 1" * 300,
    "root of many roots": "\\sqrt{" + "+".join(f"\\sqrt{{{k}}}" for k in range(2, 60)) + "}",
    "plus minus roots": "+".join(["\\pm\\sqrt{2}"] * 200),
    "backslashes": "\\" * 3000,
    "carets": "^" * 3000,
    "dollars": "$" * 3001,
    "ampersands": "&" * 2000,
    "commas": "," * 3000,
    "letters and commas": "A" + "," * 3900 + "x",
    "spaces": " " * 3500 + "8",
    "groups of thousands": "1 000 " * 600,
    "commas between thousands": "1,000," * 600,
    "rows with open brackets": "\\\\[" * 1300,
    "and or": "and or " * 500,
}
SYMBOLIC = {
    "high degree": "(x+1)^{100000}",
    "product of binomials": "".join(f"(x+{k})" for k in range(300)),
    "coefficients of 20000 bits": "(\\frac{x}{3^{6000}}+\\frac{y}{5^{4000}}+1)^{20}=y",
    "long equation": "y=" + "+".join(["(1+x)^{64}(1-x)^{64}"] * 60),
    "integral": "\\int_0^{\\infty} e^{-x^2} dx",
    "integral of a tower": "\\int_0^1 x^{x^{x^x}} dx",
    "limit": "\\lim_{n\\to\\infty} (1+1/n)^n",
    "limit of factorials": "\\lim_{n \\to \\infty} (n!)^{1/n} / n",
    "integral in a chain": "x=\\int_0^1 \\frac{\\ln(1+x^3)\\sin x}{1+x^2} dx=8",
    "integral without a closed form in a chain": "x=\\int_0^\\infty \\frac{\\sin^5 x e^{-x^2}}{\\sqrt{1+x^7}} dx=8",
    "limit in a chain": "x=\\lim_{x\\to 0}\\frac{\\sin(\\tan x)-\\tan(\\sin x)}{\\arcsin(\\arctan x)-\\arctan x}=8",
    "limit at 40 of a tower": "x=\\lim_{x\\to 40} 2^{2^x}=8",
    "sum without end in a chain": "x=\\sum_{k=1}^{\\infty}\\frac{k^7+3k}{2^k(k^2+1)}=8",
    "derivative of a tower": "x=\\frac{d}{dx} (\\sin x)^{x^{x^x}}=8",
}
CODE = {
    "import": "__import__('os').system('sleep 9')",
    "import in text": "\\text{__import__('time').sleep(9)}",
    "import in a name": "\\operatorname{__import__}(time).sleep(9)",
    "import in a function": "f(__import__('os').getcwd())",
    "import spelled out": "getattr(__builtins__,'__imp'+'ort__')('os')",
    "lambda": "(lambda: 7)()",
    "attribute": "().__class__.__bases__[0]",
    "format string": "{7!r:>{10**9}}",
    "sympy by name": "S('7')",
    "assignment": "verifier=lambda *a: 1",
}
CHARACTERS = {
    "fullwidth other number": "\uff18",
    "zero width between digits": "7\u200b7",
    "right to left": "\u202e7 8",
    "surrogate": "\ud800",
    "surrogate beside the answer": "7\ud800\udc00x",
    "null byte": "7\x008",
    "null byte alone": "\x00",
    "combining marks": "7" + "\u0301" * 3000,
    "ligatures that grow": "\ufdfa" * 200,
    "mathematical bold other number": "\U0001d7d6",
    "circled other number": "\u2467",
    "roman other number": "\u2167",
    "superscripts": "7\u2078",
    "emoji": "7\ufe0f\u20e3x",
    "private use": "\ue0008",
}
FOOLING = {
    "nan": "nan",
    "infinity": "\\infty",
    "0/0": "0/0",
    "1/0": "\\frac{1}{0}",
    "0^0": "0^0",
    "log 0": "\\log 0",
    "infinity minus infinity": "\\infty - \\infty",
    "infinity over infinity": "7\\frac{\\infty}{\\infty}",
    "a root of nothing real": "\\sqrt{-49}",
    "list with the answer": "5, 6, 7, 8",
    "every digit": "0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
    "or": "5 \\text{ or } 7",
    "or in words": "7\\text{ or 8}",
    "and in words": "7\\text{ and }8",
    "chain": "x = 5 = 7",
    "chain reversed": "x = 7 = 5",
    "interval around": "[7, 7.0001]",
    "set of two": "\\{7, 8\\}",
    "plus minus the answer": "\\pm 7",
    "near": "7 + 10^{-300}",
    "near root": "\\sqrt{49 + 10^{-200}}",
    "near sine": "7 + \\sin(10^{-90})",
    "near e": "7 + e^{-20000}",
    "near tanh": "6 + \\tanh(1000)",
    "near cosine": "6 + \\cos(10^{-90})",
    "near arctangent": "7 + \\frac{\\pi}{2} - \\arctan(10^{300})",
    "self reference": "x = x",
    "words": "\\text{seven apples or eight}",
    "equation": "7x = 7x",
    "seven of something": "7x",
    "empty box": " ",
    "comma": ",",
    "a point lost": ".7",
    "a point too many": "7.7.7",
    "power of the answer": "7^2",
    "approximately another": "9 \\approx 7",
}
BESIDE_A_GOLD = {
    "half of it": ("\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}"),
    "nearly 0": ("10^{-7}", "0"),
    "nearly 10^20": ("\\sqrt{10^{40}+1}", "10^{20}"),
    "factorial next door": ("\\frac{1}{2006!}", "\\frac{1}{2004!}"),
    "true of all x": ("x = x", "x = 3"),
    "far apart in one place": ("x^2 + 10^{-20}\\sin(x)", "x^2"),
    ECHO: ("\\sum_{k=1}^{100} k", "5050"),
    "brackets the wrong way round": ("[9,1]", "[3,1]"),
    "another bracket the wrong way round": ("[9,1]", "(3,1]"),
    "gap smaller than a float": ("[0,1]\\cup(1+10^{-20},2]", "[0,2]"),
    "interval smaller than a float": ("(2,5)\\cup(7,7+10^{-30})", "(2,5)"),
    "gap at a root": ("[0,\\sqrt2]\\cup(\\sqrt2+10^{-100},2]", "[0,2]"),
    "ends past a float": ("(0,10^{400})", "(0,10^{401})"),
    "coefficient nearly the gold's": ("y=(\\sqrt2+10^{-40})x", "y=\\sqrt2 x"),
    "argument nearly the gold's": ("f(7+10^{-40}\\sqrt2)", "f(7)"),
    "steps for a line": ("\\lfloor x\\rfloor\\le 3", "x\\le 3"),
    "polynomial for a line": ("x+x(x-1)(x-2)(x+7)<3", "x<3"),
    "name taken": ("f(t)=t+x", "f(x)=2x"),
    "point lost": (".5", "5"),
    "point for a comma": ("1.2", "1,2"),
    "many choices": ("A) B) C) D)", "A"),
    "two choices": ("A, B", "A"),
    "choices side by side": ("\\text{(A) or (B)}", "A"),
    "every root of a long list": (
        ",".join(f"\\sqrt{{{k}}}+\\sqrt[3]{{{k + 1}}}" for k in range(2, 102)),
        ",".join(f"\\sqrt{{{k}}}-\\sqrt[3]{{{k + 1}}}" for k in range(2, 102)),
    ),
    "lists of identities": (",".join(["\\sin^2 x"] * 60), ",".join(["1-\\cos^2 y"] * 60)),
    "tower behind an undefined root": (
        "\\sqrt{-1-x^2}+\\sin(x" + nested("(", ")^{64}", 7, "2") + ")",
        "x",
    ),
    "coefficients in powers of powers": ("\\sqrt{-1-x^2}+" + nested("(", ")^{64}", 7, "3x"), "x"),
    "binomial of a name": ("\\binom{n}{10^9}", "n"),
    "factorials of names": ("(n+10^8)\\cdot(n+10^8-1)!", "(n+10^8)!+1"),
    "powers of powers": ("((x+1)^{60})^{60}", "(1+x)^{3600}+1"),
    "names in a tower": ("((x^x)^x)^x", "x^{x^{x^{x}}}"),
    "sine of 64 angles": ("2\\sin(32x)\\cos(32x)+10^{-60}", "\\sin(64x)"),
    "floors in floors": (nested("\\lfloor x+", "\\rfloor", 15, "\\frac12"), "x"),
    "complex inequality": ("ix<1", "2ix<2+i"),
    "quotients of high powers": ("z=\\frac{(x+y)^{40}}{(x-y)^{40}}+1", "(x+y)^{40}=(x-y)^{40}z"),
    "tangents to the ninth": (
        "\\tan^9(x+y)\\sin^{12}(3x)\\cos^{8}(5x)+10^{-50}",
        "\\tan^9(x+y)\\sin^{12}(3x)\\cos^{8}(5x)",
    ),
    "logarithms of sums": ("\\ln(x+y)", "\\ln x+\\ln y"),
}
RESPONSES = {
    "20000 unclosed boxes": "\\boxed{" * 20_000,
    "20000 unclosed boxes around the answer": "\\boxed{" * 20_000 + "7}",
    "20000 empty boxes": "\\boxed{}" * 20_000,
    "box in a thought": "<think>It is \\boxed{7}.</think> It is \\boxed{8}.",
    "statements": "the final answer is " * 20_000,
    "a megabyte of letters": "a" * MEGABYTE,
    "a megabyte of lines": "\n" * MEGABYTE,
    "spaces before the answer": " " * 900_000 + "8",
    "spaces behind the word": "answer" + " " * (MEGABYTE - 10) + "8x",
    "spaces behind many words": ("the answer" + " " * 40) * 20_000,
    "thoughts left open": "<think>" * 140_000 + "\\boxed{7}",
    "thoughts that close before they open": "</think><think>" * 60_000,
    "spans left open": "#### " + "\\[" * 300_000,
    "spans left open in a paragraph": "the answer is " + "\\(" * 300_000,
    "dollar signs": "#### " + "$" * 300_001,
    "sign and spaces": "#### -" + " " * 900_000 + "x",
    "label and spaces between boxes": "\\boxed{1} a=" + " " * 900_000 + "b \\boxed{2}",
    "boxes side by side": "\\boxed{7}, \\boxed{8}" * 20_000,
    "hashes": "#" * MEGABYTE,
    "lines of hashes": "####\n" * 150_000 + "#### 8",
    "words of statements": "is are equals answer " * 40_000,
    "stars": "answer " + "*" * 900_000 + " is 8",
    "numbers": "1,234.5/6% " * 80_000,
    "letters": "(A) " * 200_000,
    "surrogates": "the answer is \ud800\udfff" + "\ud800" * 100_000,
    "null bytes": "\x00" * 500_000 + "#### \x008\x00",
    "right to left throughout": "\u202e" * 100_000 + "the answer is 8",
    "no answer at all": "",
}
RIGHT = {
    "fullwidth digits": ("\uff17", "7"),
    "zero width at the end": ("7\u200b\u200d", "7"),
    "bold digits": ("\U0001d7d5", "7"),
    "leading zeros": ("000" * 300 + "7", "7"),
    "999 digits": ("9" * 999, "10^{999}-1"),
    "a hundred items in another order": (",".join(map(str, range(100))), ",".join(map(str, range(99, -1, -1)))),
    "a hundred intervals": (
        "\\cup".join(f"({i},{i + 1})" for i in range(60)),
        "\\cup".join(f"({i},{i + 1})" for i in range(59, -1, -1)),
    ),
    "a power worked out": ("(x+1)^{20}", "((1+x)^4)^5"),
    "cancelled factorials": ("\\frac{2024!}{2023!}", "2024"),
    "binomial of 4000": ("\\binom{4000}{2}", "7998000"),
    "root of 800 digits": ("\\sqrt{10^{800}}", "10^{400}"),
    "the last digit of a power": ("7^{1000}\\bmod 10", "1"),
    "matrix of 30 by 30": (matrix(30), matrix(30, "1.0")),
    "determinant of 6 by 6": ("\\begin{vmatrix}" + "\\\\".join(["&".join("123456")] * 6) + "\\end{vmatrix}", "0"),
    "deep continued fraction": (nested("1+\\frac{1}{", "}", 15, "1"), "\\frac{1597}{987}"),
}
