"""Multiple choice: the letter that a gold stands for, and the one that a text settles on."""

import re

OPENING = " \n\t*\"'("
FILLER = r"(?:(?:for sure|definitely|clearly|option|choice|letter|the) )*\(?"
STANDS_FOR = re.compile(
    FILLER + r"([A-Ja-j])(?:\s?\*{0,2}[).:\u3002]\*{0,2}|\*{0,2}$|\s+(?=[A-Z][a-z]))(?P<rest>.*)", re.DOTALL
)
SETTLES_ON = re.compile(FILLER + r"([A-J])(?![\w'=+^/<>-])(?P<rest>.*)", re.DOTALL)
BEFORE_OTHER_SCRIPT = re.compile(r"([A-J])(?=[^\x00-\x7f])")
CUE = re.compile(r"\b(?:it's|it is|is|choose|pick|select|[Oo]ption|[Cc]hoice)\s+[(*]*([A-J])\b(?!['=+^/<>-])")
ANOTHER = re.compile(r"[*).]{0,3}\s?(?:,|;|/|&|and\b|or\b|et\b|ou\b)\s?(?:and\s|or\s)?\(?[A-J](?![\w'])")
LONE = re.compile(r"(?<![\w'])[A-HJ](?![\w'])")
ARTICLE = re.compile(r"\s+(?!(?:because|since|as|not|non|is)\b)[a-z]+")
SEVERAL = re.compile(r"[A-J](?:[\s,;&]*(?:and[\s,;&]*)?[A-J])*")
FILLED = ("option", "choice", "for sure", "definitely", "clearly", "letter", "the ")
MAX_START = 200


def letter_of(text: str) -> str | None:
    """C for C, (c), C., `(C) Alina` and `C Alina`; None for a text that names another letter beside it."""
    text = text.lstrip(OPENING)
    found = STANDS_FOR.fullmatch(text[0].lower() + text[1:] if text.casefold().startswith(FILLED) else text)
    if found is None or LONE.search(found["rest"]) or (found[1].islower() and found["rest"].strip()):
        return None
    return found[1].upper()


def settled_on(statement: str) -> str | None:
    """The letter that an answer's sentence begins with; None where it goes on to list another."""
    found = SETTLES_ON.match(statement[:MAX_START].lstrip(OPENING))
    if found is None or ANOTHER.match(found["rest"]) or (found[1] in "AI" and ARTICLE.match(found["rest"])):
        return None
    return found[1]


def chosen_in(response: str) -> str | None:
    """The letter that a response without an anchored answer starts with, else the last that it calls its choice."""
    start = response[:MAX_START].lstrip(OPENING)
    found = STANDS_FOR.match(start) or BEFORE_OTHER_SCRIPT.match(start)
    if found and found[1].isupper():
        return found[1]
    cues = CUE.findall(response)
    return cues[-1] if cues else None


def letters(text: str) -> tuple[str, ...]:
    """The letters of `A, C`, `A and C` and AC, in alphabetical order; empty for any other text."""
    return tuple(sorted(re.findall(r"[A-J]", text))) if SEVERAL.fullmatch(text) else ()
