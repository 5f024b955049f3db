"""Text or LaTeX of one answer, to tokens.

A token is (kind, value, spaced): kind is one of num, sym, func, cmd, text, sep, op; spaced says whether white space
stood before it. Sizes are bounded here, before anything is computed.
"""

import re
import unicodedata

MAX_CHARS = 4000
MAX_TOKENS = 2000
MAX_DIGITS = 1000

Token = tuple[str, str, bool]


class ParseError(ValueError):
    """The text is not an answer that the grammar knows."""


class LimitError(ValueError):
    """The text asks for more than the bounds allow."""


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


FUNCTIONS = words(
    "sin cos tan cot sec csc arcsin arccos arctan arccot asin acos atan sinh cosh tanh coth sech csch "
    "arcsinh arccosh arctanh asinh acosh atanh arsinh arcosh artanh "
    "log ln lg exp sqrt cbrt abs max min gcd lcm floor ceil"
)
CONSTANTS = {"pi": "pi", "Pi": "pi", "infty": "oo", "inf": "oo", "infinity": "oo", "Infinity": "oo", "oo": "oo"}
GREEK = words(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell"
)
UNITS = words(
    "mm cm km ft kg mg lb lbs oz mi hr hrs min mins sec secs mph kph km/h deg rad "
    "yr yrs ml cc hz meter meters metre metres inch inches foot feet yard yards mile miles gram grams "
    "second seconds minute minutes hour hours day days week weeks month months year years degree degrees "
    "dollar dollars cent cents euro euros pound pounds usd unit units square cubic sq "
    "cup cups ton tons gal men way ways per"
)
PERCENT = frozenset(("percent", "percentage", "pct"))
SEPARATORS = frozenset(("and", "or"))

RELATIONS = {
    "leq": "<=", "le": "<=", "leqslant": "<=", "geq": ">=", "ge": ">=", "geqslant": ">=", "lt": "<", "gt": ">",
    "neq": "!=", "ne": "!=", "approx": "~", "simeq": "~", "sim": "~", "equiv": "=", "in": "in",
    "cup": "cup", "cap": "cap", "setminus": "setminus", "backslash": "setminus",
    "cdot": "*", "times": "*", "ast": "*", "div": "/", "pm": "pm", "mp": "mp", "mod": "mod", "bmod": "mod",
    "colon": ":", "mid": "|", "vert": "|", "lvert": "|", "rvert": "|", "circ": "deg", "degree": "deg",
    "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]", "lparen": "(", "rparen": ")", "prime": "'",
    "to": "->", "rightarrow": "->", "Rightarrow": "->", "implies": "->", "longrightarrow": "->",
    "Longrightarrow": "->", "lgroup": "(", "rgroup": ")", "langle": "langle", "rangle": "rangle",
}  # fmt: skip
TEXT_COMMANDS = words(
    "text textbf textit textrm textnormal textsf texttt mbox mathrm mathbf mathit mathsf mathtt operatorname rm bf"
)
IGNORED = words(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr middle displaystyle textstyle limits "
    "quad qquad thinspace enspace mleft mright boldsymbol bold nolimits hspace phantom"
)

UNICODE = str.maketrans({
    "\u2212": "-", "\u2013": "-", "\u2014": "-", "\u00d7": "*", "\u00b7": "*", "\u22c5": "*", "\u2217": "*",
    "\u00f7": "/", "\u2044": "/", "\u2215": "/", "\u2264": "\\le ", "\u2265": "\\ge ", "\u2260": "\\ne ",
    "\u2248": "\\approx ", "\u221e": "\\infty ", "\u03c0": "\\pi ", "\u221a": "\\sqrt ", "\u222a": "\\cup ",
    "\u2229": "\\cap ", "\u2208": "\\in ", "\u00b0": "\\circ ", "\u00b1": "\\pm ", "\u2213": "\\mp ",
    "\u2205": "\\emptyset ", "\u211d": "\\mathbb{R}", "\u00b2": "^{2}", "\u00b3": "^{3}", "\u00b9": "^{1}",
    "\u2070": "^{0}", "\u2074": "^{4}", "\u2075": "^{5}", "\u2076": "^{6}", "\u2077": "^{7}", "\u2078": "^{8}",
    "\u2079": "^{9}", "\u00bd": " 1/2", "\u2153": " 1/3", "\u00bc": " 1/4", "\u00be": " 3/4", "\u03b8": "\\theta ",
    "\u03b1": "\\alpha ", "\u03b2": "\\beta ", "\u03b3": "\\gamma ", "\u03bb": "\\lambda ", "\u20ac": "",
    "\u00a3": "", "\u00a5": "", "\u2033": "", "\uff0c": ",", "\u3002": ".", "\u201c": "", "\u201d": "",
    "\u2019": "'", "\u2216": "\\setminus ", "\u03bc": "\\mu ", "\u03c3": "\\sigma ", "\u03c6": "\\phi ",
    "\u03c9": "\\omega ", "\u03c1": "\\rho ", "\u03c4": "\\tau ", "\u0394": "\\Delta ", "\u03b4": "\\delta ",
    "\u22ef": "...", "\u2026": "...", "\u27e8": "\\langle ", "\u27e9": "\\rangle ",
})  # fmt: skip
REPAIRS = [
    (re.compile(r"\\?\x0c(?=rac)"), r"\\f"),
    (re.compile(r"\\?\x08(?=oxed|inom|egin)"), r"\\b"),
    (re.compile(r"\\?\t(?=ext\{|imes|heta|frac|an\b)"), r"\\t"),
]
GLUED = [
    (re.compile(r"\\q?quad(?=[a-zA-Z])"), " "),
    (re.compile(r"(?<=[\d)}\]])\s*(or|and)(?=[A-Z(\d\\\s])"), r" \1 "),
]
TWICE_ESCAPED = re.compile(r"(?<!\\)\\\\+(?=[a-zA-Z{}])")
MATH_MARKS = re.compile(r"\\\$|\$|\\\(|\\\)|\\\[|\\\](?!\{)")
GROUPED = re.compile(r"(?<=\d)(?:,\\!\s*|\s*\{,\s*\}\s*|\\[,;:]\s*|\\ )(?=\d{3}(?!\d))")
SPACED_THOUSANDS = re.compile(r"(?<![\d.])(\d{1,3})((?: \d{3})+)(?![\d/])(?! \d)")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])(?!\s*,)")
SCANNER = re.compile(
    r"(?P<space>\s+|~|\\[,;:! ])"
    r"|(?P<num>\d+(?:\.\d+)?(?:[eE][+-]?\d+(?![a-zA-Z]))?|\.\d+|\d+\.(?!\d))"
    r"|(?P<row>\\\\(?:\[[^\]]*\])?)"
    r"|(?P<cmd>\\[a-zA-Z]+)"
    r"|(?P<brace>\\[{}|%#&_])"
    r"|(?P<word>[a-zA-Z]+)"
    r"|(?P<text>[^\W\d_]+)"
    r"|(?P<op><=|>=|!=|==|\*\*|->|[-+*/^_=<>!()\[\]{}|,;:%&'?])"
)
LISTED = re.compile(r"\b(?:or|and)\s+[^A-Za-z\s]")
GROUP = re.compile(r"\s*\{([^{}]*)\}")


REPEATING = re.compile(
    r"(?<![\d.])(?P<whole>\d{0,30})\.(?P<fixed>\d{0,30})\s*\\(?:overline|bar|dot)\s*(?:\{(?P<block>\d{1,30})\}|(?P<digit>\d))"
    r"(?![\d\\])"
)
DOTTED = re.compile(
    r"(?<![\d.])(?P<whole>\d{0,30})\.(?P<fixed>\d{0,30}?)(?P<block>\d)(?P=block){2,30}\s?(?:\\[lc]?dots|\.\.\.)"
)
DECIMAL_DOTS = re.compile(r"(?<![\d.])(\d+\.\d+)\s*(?:\\[lc]?dots(?![a-z])|\.\.\.)")
BASED_IN_BRACKETS = re.compile(r"\(\s*(\d+)\s*\)(?=\s*_)")


def clean(text: str) -> str:
    """Unicode folded to ASCII, invisible characters and math marks removed, digit groups marked in LaTeX joined."""
    for pattern, replacement in REPAIRS:
        text = pattern.sub(replacement, text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(UNICODE))
        text = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cs", "Co", "Cn"))
    for pattern, replacement in GLUED:
        text = pattern.sub(replacement, text)
    if "\\begin" not in text:
        text = TWICE_ESCAPED.sub(r"\\", text)
    text = GROUPED.sub("", MATH_MARKS.sub(" ", text)).strip()
    if "." in text or "_" in text:
        text = REPEATING.sub(_repeating, DOTTED.sub(_repeating, text))
        text = DECIMAL_DOTS.sub(r"\1", BASED_IN_BRACKETS.sub(r"\1", text))
    text = text.rstrip(".,;:!? \n") if not text.endswith("!") or text.endswith("\\!") else text
    return SPACED_THOUSANDS.sub(lambda m: m[1] + m[2].replace(" ", ""), text)


def _repeating(match: re.Match[str]) -> str:
    """0.1\\overline{6} is (16 - 1) / 90."""
    fixed, block = match["whole"] + match["fixed"], match["block"] or match["digit"]
    bottom = (10 ** len(block) - 1) * 10 ** len(match["fixed"])
    return f"{{{int(fixed + block) - int(fixed or 0)}/{bottom}}}"


def has_thousands(text: str) -> bool:
    """Whether commas in the cleaned text may stand between thousands, as they may stand between items of a list."""
    return THOUSANDS.search(text) is not None


def join_thousands(text: str) -> str:
    return THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)


def tokenize(text: str) -> list[Token]:
    """Tokens of a cleaned text. Raises ParseError at a character outside the grammar, LimitError past a bound."""
    if len(text) > MAX_CHARS:
        raise LimitError(f"an answer of {len(text)} characters, limit {MAX_CHARS}")
    tokens: list[Token] = []
    position, spaced = 0, False
    while position < len(text):
        match = SCANNER.match(text, position)
        if match is None:
            raise ParseError(f"unexpected {text[position]!r}")
        kind, value, position = match.lastgroup, match[0], match.end()
        if kind == "space":
            spaced = True
            continue
        if kind == "cmd":
            position = _command(tokens, value[1:], text, position, spaced)
        elif kind == "word":
            _word(tokens, value, spaced)
        elif kind == "num":
            if len(value) > MAX_DIGITS:
                raise LimitError(f"a number of {len(value)} digits, limit {MAX_DIGITS}")
            tokens.append(("num", value, spaced))
        elif kind == "text":
            tokens.append(("text", value, spaced))
        elif kind == "brace":
            tokens.append(("op", {"\\|": "|", "\\%": "%"}.get(value, value), spaced))
        else:
            tokens.append(("op", {"**": "^", "==": "="}.get(value, "\\\\" if kind == "row" else value), spaced))
        spaced = False
        if len(tokens) > MAX_TOKENS:
            raise LimitError(f"more than {MAX_TOKENS} tokens")
    return tokens


def _command(tokens: list[Token], name: str, text: str, position: int, spaced: bool) -> int:
    """Appends what a LaTeX command stands for; gives the position after what it took."""
    if name in TEXT_COMMANDS or (name == "mathbb" and text[position:].lstrip()[:1] == "{"):
        group = GROUP.match(text, position)
        if group is None:
            return position
        if name == "mathbb":
            tokens.append(("sym", f"mathbb{group[1].strip()}", spaced))
        else:
            _text(tokens, group[1], spaced)
        return group.end()
    if name in IGNORED:
        return position + (1 if text[position : position + 1] == "." else 0)
    if name in RELATIONS:
        tokens.append(("op", RELATIONS[name], spaced))
    elif name in FUNCTIONS:
        tokens.append(("func", name, spaced))
    elif name in CONSTANTS:
        tokens.append(("sym", CONSTANTS[name], spaced))
    elif name in GREEK:
        tokens.append(("sym", name, spaced))
    else:
        tokens.append(("cmd", name, spaced))
    return position


def _text(tokens: list[Token], content: str, spaced: bool) -> None:
    """The content of \\text{...}: a separator, a number, a symbol or words."""
    content = " ".join(content.split())
    bare = content.strip("., ")
    if bare.lower() in SEPARATORS or content == ",":
        tokens.append(("sep", bare.lower() or ",", spaced))
    elif bare in FUNCTIONS:
        tokens.append(("func", bare, spaced))
    elif bare == "mod":
        tokens.append(("op", "mod", spaced))
    elif re.fullmatch(r"[-+\d.,/\s]+(?: ?%| percent)?|mod \d+", content) or re.fullmatch(r"\(?[A-Za-z]\)?", bare):
        tokens.extend(tokenize(content))
    elif bare and LISTED.search(bare):
        raise ParseError("a list in words")
    elif bare:
        tokens.append(("text", bare, spaced))


def _word(tokens: list[Token], word: str, spaced: bool) -> None:
    """A run of plain letters: a known name, a unit after a number, a word, or symbols side by side."""
    if word.lower() in SEPARATORS:
        tokens.append(("sep", word.lower(), spaced))
    elif word in FUNCTIONS and not (word == "min" and tokens and tokens[-1][0] == "num"):
        tokens.append(("func", word, spaced))
    elif word in CONSTANTS:
        tokens.append(("sym", CONSTANTS[word], spaced))
    elif len(word) == 1:
        tokens.append(("sym", word, spaced))
    elif word.lower() in PERCENT:
        tokens.append(("op", "%", spaced))
    elif word.lower() in ("negative", "minus"):
        tokens.append(("op", "-", spaced))
    elif word in ("mod", "MOD"):
        tokens.append(("op", "mod", spaced))
    elif word.lower() in UNITS or len(word) > 3 or (spaced and tokens and tokens[-1][0] == "text"):
        tokens.append(("text", word, spaced))
    else:
        tokens.extend(("sym", letter, spaced and i == 0) for i, letter in enumerate(word))
