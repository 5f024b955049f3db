"""The 25 checkable instructions of IFEval (Zhou et al. 2023, arXiv 2311.07911, table 1), each a function of a response.

Where the table leaves a detail open the choice is written at the check. A check takes the response, stripped and not
empty, and the instruction's arguments by name, and says whether the response follows it.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deltarl.rewards.ifeval.language import LANGUAGES, is_language, language

RELATIONS = ("at least", "less than")
CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
WORD = re.compile(r"\w+")
CASED_WORD = re.compile(r"\w+(?:[-'’.&]\w+)*")
PLACEHOLDER = re.compile(r"\[[^\[\]\n]*\]")
BULLET = re.compile(r"^[ \t]*(?:\*(?!\*)|-(?!-)|\+)[ \t]*\S.*$", re.MULTILINE)
HIGHLIGHT = re.compile(r"(\*{1,2})(?![\s*])[^\n*]*(?<![\s*])\1")
ABBREVIATED = re.compile(r"(?:[A-Za-z]\.)+[A-Za-z]?\.?")
TITLE = re.compile(r"<<(?P<title>[^\n<>]+)>>")
FENCE = re.compile(r"\A```(?:json)?\s*\n(?P<body>.*)\n\s*```\Z", re.DOTALL | re.IGNORECASE)
DIVIDER = re.compile(r"\s?\*\*\*\s?")
SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？।॥]+")
ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'“])(?:mr|mrs|ms|dr|prof|rev|st|sr|jr|vs|etc|e\.g|i\.e|inc|ltd|co|no|vol|fig|approx|[a-z]|(?:[a-z]\.)+[a-z]"
    r"|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec)\.$",
    re.IGNORECASE,
)
ENUMERATOR = re.compile(r"(?:^|\n)[ \t]*(?:[*-][ \t]*)?\d{1,3}\.$")
ENDING_ABBREVIATIONS = ("etc.", "inc.", "ltd.", "co.", "jr.", "sr.", "i.", "no.")
NEXT_LOWER = re.compile(r"\s+[a-z]")


@dataclass(frozen=True, slots=True)
class Instruction:
    """check(response, **arguments) -> bool; arguments: what it needs, with the test that each must pass."""

    check: Callable[..., bool]
    arguments: Mapping[str, Callable[[Any], bool]]


def sentences(text: str) -> int:
    """Sentences end with . ! ? … or a full stop of another script; not in abbreviations, initials and list numbers."""
    count = start = 0
    for match in SENTENCE_END.finditer(text):
        end = match.end()
        if match[0] == "." and (ENUMERATOR.search(text, max(0, end - 20), end) or is_abbreviation(text, end)):
            continue
        count += WORD.search(text, start, end) is not None
        start = end
    return count + (WORD.search(text, start) is not None)


def is_abbreviation(text: str, end: int) -> bool:
    """An initial or an abbreviation, unless the text ends there; "etc." and the like only before a small letter."""
    found = ABBREVIATION.search(text, max(0, end - 12), end)
    if not found or end == len(text):
        return False
    may_end = found[0].strip(" (\"'“\n").casefold() in ENDING_ABBREVIATIONS
    return NEXT_LOWER.match(text, end) is not None if may_end else True


def related(count: int, relation: str, bound: int) -> bool:
    return count >= bound if relation == "at least" else count < bound


def occurrences(response: str, phrase: str) -> int:
    """Without regard to case, also inside of longer words."""
    return response.casefold().count(phrase.casefold())


def has_keywords(response: str, keywords: list[str]) -> bool:
    return all(occurrences(response, keyword) for keyword in keywords)


def keyword_frequency(response: str, keyword: str, frequency: int, relation: str) -> bool:
    return related(occurrences(response, keyword), relation, frequency)


def lacks_words(response: str, forbidden_words: list[str]) -> bool:
    """Whole words, without regard to case."""
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", response, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return related(response.casefold().count(letter.casefold()), let_relation, let_frequency)


def in_language(response: str, language: str) -> bool:
    return is_language(response, language)


def sentence_count(response: str, num_sentences: int, relation: str) -> bool:
    return related(sentences(response), relation, num_sentences)


def paragraph_count(response: str, num_paragraphs: int) -> bool:
    """Exactly that many between the markdown dividers ***; a divider at either end separates nothing."""
    parts = DIVIDER.split(response)
    inner = parts[1:-1]
    return all(part.strip() for part in inner) and sum(bool(part.strip()) for part in parts) == num_paragraphs


def word_count(response: str, num_words: int, relation: str) -> bool:
    return related(len(WORD.findall(response)), relation, num_words)


def nth_paragraph_starts(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs stand between blank lines; the first word counts without the punctuation around it."""
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", response) if part.strip()]
    if len(paragraphs) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    word = re.match(r"\W*(\w+(?:['’-]\w+)*)", paragraphs[nth_paragraph - 1])
    return word is not None and word[1].casefold() == first_word.casefold()


def placeholder_count(response: str, num_placeholders: int) -> bool:
    return len(PLACEHOLDER.findall(response)) >= num_placeholders


def has_postscript(response: str, postscript_marker: str) -> bool:
    """The marker, without regard to case; an abbreviation such as P.P.S also with blanks after its stops."""
    marker = postscript_marker.strip()
    if ABBREVIATED.fullmatch(marker):
        pattern = r"\.\s?".join(re.findall("[A-Za-z]", marker)) + (r"\." if marker.endswith(".") else r"(?!\w)")
    else:
        pattern = re.escape(marker)
    return re.search(rf"(?<!\w)(?<!\w\.){pattern}", response, re.IGNORECASE) is not None


def bullet_count(response: str, num_bullets: int) -> bool:
    """Exactly that many lines that start with *, - or +."""
    return len(BULLET.findall(response)) == num_bullets


def is_constrained(response: str) -> bool:
    """One of the three answers stands in the response."""
    return any(answer in response for answer in CONSTRAINED)


def highlight_count(response: str, num_highlights: int) -> bool:
    """*text* or **text** within a line; as in markdown, no blank inside next to an asterisk."""
    return len(HIGHLIGHT.findall(response)) >= num_highlights


def section_count(response: str, section_spliter: str, num_sections: int) -> bool:
    """Headings: the word, then a number, or the X of the examples."""
    pattern = rf"(?<!\w){re.escape(section_spliter.strip())}\s+(?:\d+|[IVX]+)(?!\w)"
    return len(re.findall(pattern, response)) >= num_sections


def is_json(response: str) -> bool:
    """All of the response is one JSON value, which may stand in a markdown fence."""
    fenced = FENCE.match(response)
    try:
        json.loads(fenced["body"] if fenced else response)
    except (ValueError, RecursionError):
        return False
    return True


def has_title(response: str) -> bool:
    return any(match["title"].strip() for match in TITLE.finditer(response))


def two_responses(response: str) -> bool:
    """Two different texts with ****** between them; a divider at either end separates nothing."""
    parts = [part.strip() for part in response.split("******")]
    inner = [part for i, part in enumerate(parts) if part or i not in (0, len(parts) - 1)]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


def repeats_prompt(response: str, prompt_to_repeat: str) -> bool:
    """The response starts with the request, without regard to case."""
    return response.casefold().startswith(prompt_to_repeat.strip().casefold())


def ends_with(response: str, end_phrase: str) -> bool:
    """Without regard to case, and to a quotation mark around the whole response."""
    return response.strip('"').rstrip().casefold().endswith(end_phrase.strip().strip('"').casefold())


def capital_words(response: str, capital_frequency: int, capital_relation: str) -> bool:
    """Words whose letters are all capital, "I" among them."""
    return related(sum(word.isupper() for word in CASED_WORD.findall(response)), capital_relation, capital_frequency)


def all_capital(response: str) -> bool:
    return response.isupper() and may_be_english(response)


def all_lowercase(response: str) -> bool:
    return response.islower() and may_be_english(response)


def may_be_english(response: str) -> bool:
    """English, or in Latin letters with no sign of another language (a name, a line of a poem)."""
    latin = sum(letter.isascii() for letter in response if letter.isalpha())
    return language(response) in ("en", None) and 2 * latin > sum(map(str.isalpha, response))


def lacks_commas(response: str) -> bool:
    return "," not in response


def is_quoted(response: str) -> bool:
    return len(response) > 1 and response[0] == response[-1] == '"'


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(is_text, value))


def is_count(value: Any) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value) and 0 <= value < 10**6
    )


def is_relation(value: Any) -> bool:
    return value in RELATIONS


def is_known_language(value: Any) -> bool:
    return value in LANGUAGES


INSTRUCTIONS: dict[str, Instruction] = {
    "keywords:existence": Instruction(has_keywords, {"keywords": are_texts}),
    "keywords:frequency": Instruction(
        keyword_frequency, {"keyword": is_text, "frequency": is_count, "relation": is_relation}
    ),
    "keywords:forbidden_words": Instruction(lacks_words, {"forbidden_words": are_texts}),
    "keywords:letter_frequency": Instruction(
        letter_frequency, {"letter": is_text, "let_frequency": is_count, "let_relation": is_relation}
    ),
    "language:response_language": Instruction(in_language, {"language": is_known_language}),
    "length_constraints:number_sentences": Instruction(
        sentence_count, {"num_sentences": is_count, "relation": is_relation}
    ),
    "length_constraints:number_paragraphs": Instruction(paragraph_count, {"num_paragraphs": is_count}),
    "length_constraints:number_words": Instruction(word_count, {"num_words": is_count, "relation": is_relation}),
    "length_constraints:nth_paragraph_first_word": Instruction(
        nth_paragraph_starts, {"num_paragraphs": is_count, "nth_paragraph": is_count, "first_word": is_text}
    ),
    "detectable_content:number_placeholders": Instruction(placeholder_count, {"num_placeholders": is_count}),
    "detectable_content:postscript": Instruction(has_postscript, {"postscript_marker": is_text}),
    "detectable_format:number_bullet_lists": Instruction(bullet_count, {"num_bullets": is_count}),
    "detectable_format:constrained_response": Instruction(is_constrained, {}),
    "detectable_format:number_highlighted_sections": Instruction(highlight_count, {"num_highlights": is_count}),
    "detectable_format:multiple_sections": Instruction(
        section_count, {"section_spliter": is_text, "num_sections": is_count}
    ),
    "detectable_format:json_format": Instruction(is_json, {}),
    "detectable_format:title": Instruction(has_title, {}),
    "combination:two_responses": Instruction(two_responses, {}),
    "combination:repeat_prompt": Instruction(repeats_prompt, {"prompt_to_repeat": is_text}),
    "startend:end_checker": Instruction(ends_with, {"end_phrase": is_text}),
    "startend:quotation": Instruction(is_quoted, {}),
    "change_case:capital_word_frequency": Instruction(
        capital_words, {"capital_frequency": is_count, "capital_relation": is_relation}
    ),
    "change_case:english_capital": Instruction(all_capital, {}),
    "change_case:english_lowercase": Instruction(all_lowercase, {}),
    "punctuation:no_comma": Instruction(lacks_commas, {}),
}
