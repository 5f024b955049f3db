"""The `multiple_choice` verifier: which one of lettered options a response settles on."""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from deltarl.rewards.math import extract
from deltarl.rewards.types import Verdict

WITHOUT_CHOICES = string.ascii_uppercase[:10]
CHOICE_FIELDS = ("choices", "options")
MAX_STATEMENT_CHARS = 400

TAGGED = re.compile(r"<answer>((?:(?!<answer>).){0,2000}?)</answer>", re.DOTALL | re.IGNORECASE)
PHRASE = re.compile(
    r"\b(?:(?:answer|choice|option)\s*(?:is|:|=|would\s+be|must\s+be|should\s+be|could\s+be)"
    r"|I(?:'ll| will| would)?\s+(?:choose|pick|select|go\s+with|went\s+with))[\s:]*",
    re.IGNORECASE,
)
IS_CORRECT = re.compile(
    r"\b(?:option|choice|answer)\s+(?P<option>\(?[A-Z]\)?)\s+is\s+(?:the\s+)?(?:correct|right|best)\b", re.IGNORECASE
)
MARKUP = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathsf)\s*(?=\{)|[*_`$\"{}]|\\[()\[\],;:! ]")
LEAD = re.compile(
    r"(?:(?:either|both|probably|likely|clearly|definitely|simply|the|option|choice|letter|answer)\s+)+", re.IGNORECASE
)
LETTER = re.compile(r"(?P<open>[(\[])?(?P<letter>[A-Za-z])(?P<close>[)\]])?(?![A-Za-z0-9'])(?P<rest>.*)", re.DOTALL)
SEPARATOR = re.compile(r"\s*(?:[.():,;!\n]|[-–—]\s|$)")
REASON = re.compile(r"\s+(?:because|since|as|is\s+(?:correct|right|the))\b")
ANOTHER = re.compile(
    r"(?:[,/;&\n]|\bor\b|\band\b|\bnor\b)\s*(?:(?:option|choice|maybe|perhaps|also|or|and)\s+)*[(\[]?([A-Z])(?![\w'])"
)
EDGES = " \t\n.,;:!?()[]-–—"


class MultipleChoiceVerifier:
    """Correct when the response settles on the gold's option, and on no other.

    The gold is a letter (B, (B), b.) or, where meta gives the options, the text of one; with `index_from` it is a
    number, the options counted from there (MMLU's `answer: 1` with index_from 0 is B). Several golds: any will do.
    meta["choices"] (or "options") is a list of texts for A, B, …, a mapping of letters to texts, or
    {"label": [letters], "text": [texts]}; without it the options are A to J.

    The answer is taken from the last \\boxed{}, else the last <answer>…</answer>, else the last "the answer is …",
    "I choose …" or "option … is correct", else the last line where that is nothing but an answer. It is a letter with
    or without its option's text, or that text alone. Two letters ("A or B") are incorrect, and so is a letter with
    another option's text; the word "a" is no letter. Text in <think> blocks does not count; a response whose meta says
    `truncated: true` has no answer. Raises ValueError for another `index_from` than 0 or 1.
    """

    name = "multiple_choice"
    version = "1"

    def __init__(self, index_from: int | None = None) -> None:
        if index_from not in (None, 0, 1):
            raise ValueError(f"index_from {index_from}: use 0 or 1, or leave it out where golds are letters or texts")
        self.index_from = index_from

    def check_gold(self, gold: str | Sequence[str]) -> str | None:
        """A gold that is a text can only be looked up among a row's options."""
        return None if any(text.strip() for text in _texts(gold)) else "the gold is empty"

    def verify(self, response: str, gold: str | Sequence[str], *, meta: Mapping[str, Any]) -> Verdict:
        try:
            options = _options(meta)
            golds = {self._gold_letter(text, options) for text in _texts(gold)} or {None}
        except ValueError as error:
            return Verdict(None, "gold_error", info={"reason": str(error)})
        if None in golds:
            return Verdict(None, "gold_error", info={"reason": f"the gold {str(gold)[:80]!r} is none of the options"})
        if meta.get("truncated"):
            return Verdict(0.0, "no_answer", info={"reason": "the response was cut off"})
        statement = stated(response, options)
        if statement is None:
            return Verdict(0.0, "no_answer", info={"reason": "no option is stated as the answer"})
        letters = letters_in(statement, options)
        if len(letters) > 1:
            return Verdict(
                0.0, "incorrect", statement, {"reason": f"names several options: {', '.join(sorted(letters))}"}
            )
        if not letters:
            return Verdict(0.0, "incorrect", statement, {"reason": "the answer is none of the options"})
        (letter,) = letters
        if letter in golds:
            return Verdict(1.0, "correct", letter, {"reason": f"settles on {letter}"})
        return Verdict(0.0, "incorrect", letter, {"reason": f"settles on {letter}"})

    def _gold_letter(self, gold: str, options: Mapping[str, str]) -> str | None:
        if self.index_from is not None:
            if not gold.strip().isdecimal():
                raise ValueError(f"the gold {gold[:80]!r} is not a number: leave index_from out")
            index = int(gold) - self.index_from
            return list(options)[index] if 0 <= index < len(options) else None
        letters = letters_in(gold, options)
        return next(iter(letters)) if len(letters) == 1 else None


def stated(response: str, options: Mapping[str, str]) -> str | None:
    """The words that state the answer; None where no anchor announces one and the last line is no answer itself."""
    text = extract.without_thoughts(response)
    if extract.BOX.search(text):
        box = extract.boxed(text)
        return box if box and box.strip() else None
    tagged = TAGGED.findall(text)
    if tagged:
        return tagged[-1].strip() or None
    anchors = [*PHRASE.finditer(text), *IS_CORRECT.finditer(text)]
    said = None
    if anchors:
        last = max(anchors, key=re.Match.end)
        tail = last["option"] if last.re is IS_CORRECT else text[last.end() : last.end() + MAX_STATEMENT_CHARS]
        said = tail.strip().split("\n")[0].strip() or None
        if said and letters_in(said, options):
            return said
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    bare = lines and len(lines[-1]) <= MAX_STATEMENT_CHARS and len(letters_in(lines[-1], options)) == 1
    return lines[-1] if bare else said


def letters_in(statement: str, options: Mapping[str, str]) -> set[str]:
    """The options that a statement names: one where it settles, several where it hesitates or contradicts itself."""
    text = MARKUP.sub("", statement[:MAX_STATEMENT_CHARS]).strip()
    lead = LEAD.match(text)
    text = text[lead.end() :] if lead else text
    by_text = {letter for letter, option in options.items() if option and _normal(option) == _normal(text)}
    found = LETTER.fullmatch(text)
    letter = found["letter"].upper() if found else None
    if letter not in options:
        return by_text
    rest = found["rest"]
    others = set(ANOTHER.findall(rest)) & set(options)
    if others - {letter}:
        return others | {letter}
    bracketed = found["close"] is not None
    same_text = {key for key, option in options.items() if option and _opens_with(rest, option)}
    separated = SEPARATOR.match(rest) is not None or bracketed
    if found["letter"].islower() and not (bracketed or not rest.strip(EDGES) or rest[:1] == "."):
        return by_text
    if not (separated or letter in same_text or REASON.match(rest)):
        return by_text
    return {letter} if not same_text or letter in same_text else same_text | {letter}


def _opens_with(rest: str, option: str) -> bool:
    """Whether what follows a letter is the option's text, alone or up to the end of its sentence."""
    rest, option = _normal(rest), _normal(option)
    return bool(option) and rest.startswith(option) and not rest[len(option) :][:1].isalnum()


def _normal(text: str) -> str:
    return " ".join(MARKUP.sub("", text).casefold().split()).strip(EDGES)


def _options(meta: Mapping[str, Any]) -> dict[str, str]:
    """Letters to texts. Raises ValueError for choices of another form."""
    given = next((meta[field] for field in CHOICE_FIELDS if meta.get(field)), None)
    if given is None:
        return dict.fromkeys(WITHOUT_CHOICES, "")
    if isinstance(given, Mapping) and set(given) >= {"label", "text"}:
        given = dict(zip(given["label"], given["text"], strict=True))
    if isinstance(given, Mapping):
        options = {str(letter).strip(EDGES).upper(): str(text) for letter, text in given.items()}
    elif isinstance(given, Sequence) and not isinstance(given, str) and len(given) <= len(string.ascii_uppercase):
        options = dict(zip(string.ascii_uppercase, map(str, given), strict=False))
    else:
        raise ValueError(f"choices {str(given)[:80]!r}: give a list of texts, or letters with texts")
    if not all(len(letter) == 1 and letter in string.ascii_uppercase for letter in options):
        raise ValueError(f"choices are lettered {', '.join(options)}: use single letters")
    return options


def _texts(gold: str | Sequence[str] | None) -> list[str]:
    return [gold] if isinstance(gold, str) else [str(text) for text in gold or ()]
