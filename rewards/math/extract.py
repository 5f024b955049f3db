"""The answer that a response states, found by anchors and never by guessing inside of the reasoning.

A response may be a megabyte of anything: every search here takes time in proportion to its length. No two repeats of
one pattern may share characters, and no span is looked for from a start that another start follows. A pattern that is
searched for in whole responses begins with a set of characters, by which the regex engine skips ten times faster.
"""

import re

BOX = re.compile(r"[\\\x08](?:(?<=\\)\\?(?:boxed|fbox|framebox)\s*(?:\{|(?P<bare>\d))|(?<=\x08)oxed\{)")
THOUGHT = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)
THOUGHT_END = re.compile(r"</think(?:ing)?>|</REASONING_END>")
THOUGHT_MARK = re.compile(r"</?think(?:ing)?>")
THOUGHT_START = re.compile(r"<think(?:ing)?>")
BRACES = re.compile(r"[{}\\](?:(?<=\\).)?", re.DOTALL)
AND = re.compile(r"(?:\s|[$,;.&]|\\[()\[\],;: ]|\\text\s*\{[^{}]{0,40}\}|\\q?quad|\band\b|\bor\b)*")
NEAR_BOXES = re.compile(r"\s*(?:\w+\s+){0,2}(?:and|or|,)\s*")
LABEL_BEFORE_BOX = re.compile(r"(?<![A-Za-z0-9\\{}])(?P<label>[A-Za-z](?:_\w|_\{\w{1,3}\})?)\s*=\s*\$?\s*$")
PHRASE_WORD = re.compile(
    r"[aAcCoOrRsS\u017f\u041e\u043e\u7b54]"
    r"(?:(?i:nswer|esult|olution|hoice|ption|\xe9ponse|espuesta|isposta|esposta|ntwort|\u0442\u0432\u0435\u0442)|\u6848)"
)
PHRASE = re.compile(
    r"(?:\b(?:answer|result|solutions?|r\xe9ponse|respuesta|risposta|resposta|antwort|\u043e\u0442\u0432\u0435\u0442"
    r"|(?:(?<=correct )|(?<=right ))(?:choice|option))|\u7b54\u6848)\s*"
    r"(?:\*{1,2}\s*)?(?:is\b|are\b|est\b|es\b|ist\b|\xe8\s|\xe9\s|=|:|\uff1a|\u662f|\u4e3a)[\s:*]*(?:\bis\b\s*|\btherefore\b,?\s*|\bequals?\b\s*|:)?",
    re.IGNORECASE,
)
HEADING = re.compile(r"answer[*:]{0,3}[ \t]*\n\s*(?=\S)", re.IGNORECASE)
HEADING_LEAD = re.compile(r"[#* \t]*(?:the )?(?:final )?", re.IGNORECASE)
NO_NUMBER = re.compile(r"\b(?:between|less|more|greater|fewer|least|most|not|either|or)\b", re.IGNORECASE)
HASHES = re.compile(r"####[ \t]*(?P<answer>[^\n]+)")
MATH_SPAN = re.compile(
    r"\$\$(.+?)\$\$|(?<!\\)\$([^$]+?)(?<!\\)\$|\\\[((?:(?!\\\[).)+?)\\\]|\\\(((?:(?!\\\().)+?)\\\)", re.DOTALL
)
SENTENCE_END = re.compile(r"(?<=[^\d\s])\.(?=\s|$)|(?<=\d)\.(?=\s|$)|\n\n|\n(?=[A-Z])|<\|")
NUMBER_AT_START = re.compile(
    r"[-+]?\s*(?:[$€£]\s*)?(?:\d[\d,]*(?:\.\d+)?(?:\s+\d+/\d+|/\d+)?|\.\d+)\s*(?:%|\\%)?(?=$|[\s.,;:)])"
)
DIGIT = re.compile(r"\d")
NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+,\d{1,2}(?![\d,])|\d+)(?:\.\d+)?(?:/\d+)?(?:\\?%)?"
)
PRICE = re.compile(r"(?<![\\$])\$\s?(\d[\d,]*(?:\.\d+)?)(?![\d$])|(?<![\d.,])(\d[\d,]*(?:\.\d+)?)\s?[$€£](?!\s*[\d$])")
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
TITLE = re.compile(r"[A-Za-z]{2,}\s*:\s")
THAT_IS = re.compile(r".*(?:(?:\bis|\bare|\bequals)\s+|[\u662f\u4e3a]\s*)(?=\S)", re.DOTALL)
HAN = re.compile(r"[\u4e00-\u9fff]")
ANSWER_START, ANSWER_END = "<answer>", "</answer>"
MAX_WORDS = 3
MAX_LABEL_CHARS = 40
MAX_STATEMENT_CHARS = 2000
MAX_BARE_CHARS = 400
MAX_BOXES = 50


def without_thoughts(response: str) -> str:
    """The response without its <think> blocks; empty when a block is still open at the end."""
    if "think" not in response and "REASONING" not in response:
        return response
    closed = max(response.rfind("</think>"), response.rfind("</thinking>")) + len("</thinking>")
    text = THOUGHT.sub("", response[:closed]) + response[closed:]
    ends = list(THOUGHT_END.finditer(text))
    text = text[ends[-1].end() :] if ends else text
    start = THOUGHT_START.search(text)
    return text[: start.start()] if start else text


def boxed(text: str) -> str | None:
    """The content of the last box; boxes side by side (`\\boxed{1} and \\boxed{2}`) are one answer, joined by commas.

    None without a box, and when the last one is never closed: then the response was cut off in its answer.
    """
    starts = list(BOX.finditer(text))[-MAX_BOXES:]
    boxes: list[tuple[int, int, str]] = []
    for match in starts:
        if boxes and match.start() < boxes[-1][1]:
            continue
        end = match.end() if match["bare"] else closing_brace(text, match.end())
        if end is None:
            return None
        boxes.append((match.start(), end, match["bare"] or text[match.end() : end - 1]))
    if not boxes:
        return None
    answers, labels = [boxes[-1][2]], []
    for before, after in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        between, label = _without_label(text[before[1] : after[0]])
        if not (AND.fullmatch(between) and "\n\n" not in between) and not NEAR_BOXES.fullmatch(between):
            break
        answers.insert(0, before[2])
        labels.insert(0, label)
    if labels and all(labels):
        first = _without_label(text[: boxes[-len(answers)][0]][-40:])[1]
        labelled = zip([first, *labels], answers, strict=True)
        return ", ".join(f"{label} = {answer}" if label else answer for label, answer in labelled)
    return ", ".join(dict.fromkeys(answers))


def _without_label(before: str) -> tuple[str, str]:
    """What stands before a box, without the `y_2 =` at its end, and that label."""
    start = max(0, len(before) - MAX_LABEL_CHARS)
    found = LABEL_BEFORE_BOX.search(before, start)
    return (before[: found.start()], found["label"]) if found else (before, "")


def closing_brace(text: str, start: int) -> int | None:
    """The position after the brace that closes the one before `start`; None without one."""
    depth = 1
    for match in BRACES.finditer(text, start):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                return match.end()
    return None


def after_phrase(text: str) -> str | None:
    """What follows the last "the final answer is", up to the end of the sentence."""
    for word in reversed(list(PHRASE_WORD.finditer(text))):
        if phrase := PHRASE.match(text, word.start()):
            end = phrase.end()
            return statement(text[end : end + MAX_STATEMENT_CHARS].lstrip("*: \n")) or None
        if (heading := HEADING.match(text, word.start())) and _opens_line(text, word.start()):
            return statement(text[heading.end() : heading.end() + MAX_STATEMENT_CHARS].lstrip("* ")) or None
    return None


def _opens_line(text: str, position: int) -> bool:
    """Whether nothing but the marks of a heading stands before a position in its line."""
    before = text[max(0, position - MAX_LABEL_CHARS) : position]
    return HEADING_LEAD.fullmatch(before.rpartition("\n")[2]) is not None


def in_tags(text: str) -> str | None:
    """What the last <answer>...</answer> says."""
    start = text.rfind(ANSWER_START)
    end = text.find(ANSWER_END, start + len(ANSWER_START)) if start >= 0 else -1
    if end < 0:
        return None
    inside = text[start + len(ANSWER_START) : end].strip()[:MAX_STATEMENT_CHARS]
    return after_phrase(inside) or statement(inside) or None


def statement(tail: str) -> str:
    """The first sentence of a text, math spans kept whole."""
    position = 0
    while True:
        end = SENTENCE_END.search(tail, position)
        span = MATH_SPAN.search(tail, position)
        if span and (end is None or span.start() < end.start()):
            position = span.end()
            continue
        return tail[: end.start() if end else len(tail)].replace("**", "").strip(" *\n\"'")


def after_hashes(text: str) -> str | None:
    """What stands behind the last `####`."""
    found = HASHES.findall(text)
    return found[-1].strip() if found else None


def stated(text: str) -> str | None:
    """What <answer> tags enclose, else a `####` line at the end, else the last "the answer is", else any `####`."""
    if tagged := in_tags(text):
        return tagged
    hashes = after_hashes(text)
    if hashes is not None and text.rstrip().rpartition("\n")[2].lstrip().startswith("####"):
        return hashes
    return after_phrase(text) or hashes


def readings_of(statement: str) -> list[str]:
    """How to read a statement: its one math span, itself when it is not prose, or the number that it starts with."""
    number = NUMBER_AT_START.match(statement)
    if (len(WORD.findall(statement)) > 1 or HAN.search(statement)) and not number:
        that_is = THAT_IS.match(statement)
        statement = statement[that_is.end() :] if that_is else statement
    spans = _spans(statement)
    if len(spans) == 1:
        return spans
    if len(WORD.findall(statement)) > MAX_WORDS and (price := only_price(statement)):
        return price
    number = NUMBER_AT_START.match(statement)
    number = number if number and not DIGIT.search(statement, number.end()) else None
    itself = [statement] if len(WORD.findall(statement)) <= MAX_WORDS or not number else []
    return [*itself, *([number[0].strip()] if number else [])]


def is_bare(text: str) -> bool:
    """Whether the response is nothing but an answer: short, one math span or none, and hardly a word."""
    text = text.strip()
    if not text or len(text) > MAX_BARE_CHARS or "\n\n" in text or any(c.isalpha() and c > "\u0400" for c in text):
        return False
    words = WORD.findall(MATH_SPAN.sub("", text))
    opens_with_word = WORD.match(text) is not None
    if TITLE.match(text):
        return False
    return len(words) <= 1 or (len(words) <= MAX_WORDS and not opens_with_word)


def lenient(text: str) -> list[str]:
    """The last math span or, where it comes later or the span is prose between two dollar signs, the last number."""
    spans, numbers = list(MATH_SPAN.finditer(text)), list(NUMBER.finditer(text))
    prose = bool(spans) and "\\" not in spans[-1][0] and len(WORD.findall(spans[-1][0])) > 1
    if spans and not prose and (not numbers or numbers[-1].start() < spans[-1].end()):
        return _spans(text)[-1:]
    return [numbers[-1][0]] if numbers else []


def only_price(statement: str) -> list[str]:
    """The amount of money in a sentence that names one amount."""
    prices = PRICE.findall(statement)
    return [prices[0][0] or prices[0][1]] if len(prices) == 1 else []


def only_span(text: str) -> list[str]:
    """The math span of a text that holds no other."""
    spans = _spans(text)
    return spans if len(spans) == 1 else []


def _spans(text: str) -> list[str]:
    return [next(group for group in found if group) for found in MATH_SPAN.findall(text)]
