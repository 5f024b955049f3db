"""Text that looks like an answer: tokens in any order, and answers with something cut, doubled, swapped or put in."""

import re

from hypothesis import strategies as st

BRACES = re.compile(r"\\.|[{}]", re.DOTALL)

ANSWERS = [
    "7", "-3", "1{,}234", "1,234,567", "0.3333", ".5", "2\\frac{1}{2}", "2 1/2", "\\frac{63}{400}", "\\dfrac{2}{3}",
    "-\\frac12", "10^{-7}", "1.5e-3", "2^{99}", "\\sqrt{2}+\\sqrt[3]{5}", "\\frac{1+\\sqrt5}{2}", "3\\pi/4",
    "e^{i\\pi}", "14-i", "\\ln 2", "\\log_2 8", "5!", "\\binom{10}{3}", "|x-1|", "\\lfloor x\\rfloor", "28\\%",
    "90^\\circ", "\\$12.50", "15\\text{ cm}^2", "60 \\text{ miles per hour}", "7 \\text{ apples}", "x^2+2x+1",
    "(x+1)(x-2)^3", "\\frac{x^2-1}{x-1}", "\\sin^2 x+\\cos^2 x", "\\tan\\left(\\frac{x}{2}\\right)", "2^{n+1}-1",
    "n(n+1)/2", "(-1)^n", "x=5", "y=2x+3", "x=1 \\text{ or } x=3", "f(x)=x^2", "w=16, d=3", "(p,q)=(3,2)",
    "x_1=3, x_2=4", "a+b=c", "(1,2)", "(1,\\frac92,-3)", "\\{1,2,3\\}", "1, 2, 3", "\\pm 3", "1\\pm\\sqrt2", "[-2,7)",
    "(-\\infty,3)\\cup(3,\\infty)", "x > 5", "-2 \\le x < 7", "|x|<2", "x \\ne 3", "x\\in\\mathbb{R}", "\\emptyset",
    "f(2)<f(1)<f(4)", "7:32", "204_5", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}",
    "\\begin{bmatrix}x\\\\0\\end{bmatrix}", "3\\pmod{7}", "x\\equiv 3 \\pmod 7",
    "\\begin{cases}x&x>0\\\\-x&x\\le 0\\end{cases}", "\\sum_{k=1}^{n} k", "\\int_0^1 x^2\\,dx",
    "\\lim_{x\\to 0}\\frac{\\sin x}{x}", "\\prod_{k=1}^{5} k", "\\frac{d}{dx} x^3", "\\text{Evelyn}", "(C)", "B. 12",
    "\\text{east}", "12:30", "\\text{no solution}", "\\left(\\frac{1}{2}, \\sqrt{3}\\right)", "S_{n}=2n^2",
    "a_{n+1}=2a_n", "\\overline{AB}", "\\angle ABC=30^\\circ", "0.\\overline{6}",
]  # fmt: skip
CHARACTERS = "0123456789xynkabefiCP+-*/^_=<>()[]{}|,;:!%&$.'\\~? #"
COMMANDS = (
    "frac dfrac sqrt binom pi theta infty cdot times div pm mp le ge ne approx in cup cap setminus left right log "
    "ln sin cos tan arctan lim sum prod int to begin end text mathrm operatorname boxed fbox overline mathbb pmod "
    "bmod circ degree quad dots emptyset lfloor rfloor angle max min gcd choose vec"
)
PIECES = [
    *CHARACTERS, *(f"\\{name}" for name in COMMANDS.split(" ")),
    "\n", "\u2212", "\u00d7", "\u221a", "\u221e", "\u03c0", "\u2264", "\u222a", "\uff17", "\uff0c", "\u200b",
    "\u202e", "\u0301", "\u0663", "\x00", "\x08", "\x0c", "\ud800", "\U0001d7d5", "\\frac{", "\\sqrt[3]{",
    "\\text{ or }", "\\text{", "\\boxed{", "\\begin{pmatrix}", "\\end{pmatrix}", "\\begin{cases}", "\\end{cases}",
    "\\\\", "\\{", "\\}", "\\(", "\\)", "\\[", "\\]", "\\,", "\\!", "^{", "_{", "}}", "\\sum_{k=1}^{9}", "\\int_0^1",
    "dx", "\\lim_{x\\to 0}", "e^{", "10^{9}", "!!", "999999999", "1e400", "0.000001", ",000", "1/0", "0^0", "sqrt(",
    " and ", " or ", "the answer is ", "Final answer: ", "#### ", "<think>", "</think>", "**", "A) ", "(B)", " cm",
    "percent",
]  # fmt: skip

soup = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """An answer after up to four changes, or two answers grown together."""
    text = draw(st.sampled_from(ANSWERS))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 8)))
        change = draw(st.sampled_from(("cut", "double", "insert", "replace", "graft")))
        if change == "cut":
            text = text[:start] + text[end:]
        elif change == "double":
            text = text[:end] + text[start:]
        elif change == "insert":
            text = text[:start] + draw(st.sampled_from(PIECES)) + text[start:]
        elif change == "replace":
            text = text[:start] + draw(st.sampled_from(PIECES)) + text[end:]
        else:
            text = text[:start] + draw(st.sampled_from(ANSWERS)) + text[start:]
    return text


texts = st.one_of(mutated(), soup)


def balanced(text: str) -> bool:
    """Whether every brace is closed, so that a box around the text ends where the text does."""
    depth = 0
    for found in BRACES.findall(text):
        depth += {"{": 1, "}": -1}.get(found, 0)
        if depth < 0:
            return False
    return depth == 0 and not text.endswith("\\")
