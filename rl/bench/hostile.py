"""Responses made to hang, exhaust, crash or fool a grader."""

from collections.abc import Iterator
from dataclasses import dataclass

DEEP = 10_000


@dataclass(frozen=True, slots=True)
class Hostile:
    """One response that does not answer `gold`: a grader answers in time, and not with "correct"."""

    name: str
    response: str
    gold: str


def hostile_cases() -> list[Hostile]:
    """All of them: 100 kB to 1 MB of text, so built anew at each call."""
    boxed = [Hostile(name, f"So it is $\\boxed{{{answer}}}$.", gold) for name, answer, gold in _answers()]
    return boxed + [Hostile(name, response, gold) for name, response, gold in _responses()]


def _answers() -> Iterator[tuple[str, str, str]]:
    """(name, content of the box, gold)."""
    for name, answer in {
        "power tower": "9^{9^{9^{9^{9}}}}",
        "power tower, plain": "9**9**9**9**9",
        "exponent of 10^12": "2^{10^{12}}",
        "exponent of -10^12": "2^{-10^{12}}",
        "root to 10^15": "\\sqrt{2}^{10^{15}}",
        "tower of e": "e^{e^{e^{e^{e}}}}",
        "scientific 10^9": "1e999999999",
        "sine of a tower": "\\sin(10^{10^{6}})",
        "factorial of 10^9": "(10^9)!",
        "factorials in a row": "9!!!!!!",
        "factorial of factorials": "(((((3!)!)!)!)!)!",
        "binomial of 10^9": "\\binom{10^9}{5 \\cdot 10^8}",
        "binomial to a power": "\\binom{4000}{2000}^{4000}",
        "sum to 10^9": "\\sum_{k=1}^{10^9} \\frac{1}{k^2}",
        "sum of sums": "\\sum_{i=1}^{10^5} \\sum_{j=1}^{10^5} \\frac{1}{i+j}",
        "product to 10^9": "\\prod_{k=1}^{10^9} (1 + \\frac{1}{k^2})",
        "integral without a name": "\\int_0^1 x^{x^{x^x}} dx",
        "limit": "\\lim_{n \\to \\infty} (n!)^{1/n} / n",
        "braces, 10000 deep": "{" * DEEP + "8" + "}" * DEEP,
        "parentheses, 10000 deep": "(" * DEEP + "8" + ")" * DEEP,
        "roots, 10000 deep": "\\sqrt{" * DEEP + "8" + "}" * DEEP,
        "fractions, 10000 deep": "\\frac{1}{" * DEEP + "8" + "}" * DEEP,
        "roots, 300 deep": "\\sqrt{1+" * 300 + "8" + "}" * 300,
        "powers, 500 deep": "x^{" * 500 + "2" + "}" * 500,
        "signs, 3999": "-" * 3999 + "8",
        "absolute values, open": "|" * 3000,
        "digits, 900 kB": "8" * 900_000,
        "digits, 3999": "8" * 3999,
        "decimals, 100000": "7." + "0" * 100_000 + "1",
        "decimals, 900": "7." + "0" * 900 + "1",
        "matrix of 60x60": "\\begin{pmatrix}" + "\\\\".join(["&".join("1" * 60)] * 60) + "\\end{pmatrix}",
        "matrix to 10^9": "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}^{10^9}",
        "matrices, 60 in a row": "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}" * 60,
        "determinant of 12x12": "\\begin{vmatrix}" + "\\\\".join(["&".join("x" * 12)] * 12) + "\\end{vmatrix}",
        "intervals, 200": " \\cup ".join(f"({2 * i},{2 * i + 1})" for i in range(200)),
        "items, 900": ",".join(map(str, range(900))),
        "sum of 300 powers": "+".join(f"x^{{{k}}}" for k in range(300)),
        "binomial to 100000": "(x+1)^{100000}",
        "product of 300 binomials": "".join(f"(x+{k})" for k in range(300)),
        "roots of a sum": "\\sqrt{" + "+".join(f"\\sqrt{{{k}}}" for k in range(2, 60)) + "}",
        "plus-minus, 200": "+".join(["\\pm\\sqrt{2}"] * 200),
        "import": "__import__('os').system('sleep 9')",
        "import in text": "\\text{__import__('time').sleep(9)}",
        "import as an operator": "\\operatorname{__import__}(time).sleep(9)",
        "lambda": "(lambda: 7)()",
        "attributes": "().__class__.__base__.__subclasses__()",
        "fullwidth eight": "\uff18",
        "zero width between digits": "7\u200b7",
        "right to left": "\u202e8 7",
        "null byte": "7\x008",
        "surrogate": "8\ud800",
        "nan": "nan",
        "infinity": "\\infty",
        "0/0": "\\frac{0}{0}",
        "1/0": "\\frac{1}{0}",
        "commas, 2000": "," * 2000,
        "carets, 3000": "^" * 3000,
        "backslashes, 3000": "\\" * 3000,
        "groups of digits": "1 000 " * 600,
        "every digit": "0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
        "either": "7 \\text{ or } 8",
        "chain": "x = 5 = 7 = 8",
        "interval around": "[7, 7.0001]",
        "nearly 7": "7 + 10^{-30}",
        "nearly 7, sine": "7 + \\sin(10^{-40})",
        "seven of something else": "7x",
    }.items():
        yield name, answer, "7"
    yield "half of it", "\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}"
    yield "nearly 0", "10^{-7}", "0"
    yield "nearly 10^20", "\\sqrt{10^{40}+1}", "10^{20}"
    yield "factorial next door", "\\frac{1}{2006!}", "\\frac{1}{2004!}"
    yield "the question again", "\\sum_{k=1}^{100} k", "5050"
    yield "true of all x", "x = x", "x = 3"
    yield "far apart in one place", "x^2 + 10^{-20}\\sin(x)", "x^2"


def _responses() -> Iterator[tuple[str, str, str]]:
    """(name, response, gold): the answer hides, or there is none."""
    yield "boxes, 20000 open", "\\boxed{" * 20_000, "7"
    yield "boxes, 20000 empty", "\\boxed{}" * 20_000, "7"
    yield "box not closed", "So it is \\boxed{7", "7"
    yield "thoughts, 20000 open", "<think>" * 20_000 + "8", "7"
    yield "box in a thought", "<think>It is \\boxed{7}.</think> It is \\boxed{8}.", "7"
    yield "statements, 20000", "the final answer is " * 20_000, "7"
    yield "dollars, 50001", "$" * 50_001, "7"
    yield "letters, 900 kB", "a" * 900_000, "7"
    yield "spaces, 900 kB", " " * 900_000 + "8", "7"
    yield "line ends, 900 kB", "\n" * 900_000, "7"
    yield "stars behind the statement", "the answer is" + "*: " * 200_000, "7"
    yield "hashes, 200000", "#### " * 200_000, "7"
