"""The `format` verifier: whether a response has the form that the job asks for, whatever it says."""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from deltarl.rewards.math import extract
from deltarl.rewards.types import Verdict

SCRIPTS = {
    "arabic": {"ARABIC"},
    "cjk": {"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO"},
    "cyrillic": {"CYRILLIC"},
    "devanagari": {"DEVANAGARI"},
    "greek": {"GREEK"},
    "han": {"CJK"},
    "hangul": {"HANGUL"},
    "hebrew": {"HEBREW"},
    "kana": {"HIRAGANA", "KATAKANA"},
    "latin": {"LATIN"},
    "thai": {"THAI"},
}
TAG = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
COMMAND = re.compile(r"\\[A-Za-z]+")


class FormatVerifier:
    """Checks the form of a response; the gold is not looked at.

    sections: names of tags; each `<name>…</name>` must be there exactly once, not empty, in this order, none inside of
    another. prefilled: the prompt already ends with the first section's opening tag. only_sections: nothing but white
    space stands outside of the sections. box: a closed, not empty \\boxed{} outside of <think> blocks.
    script, script_share: of the letters at least this share are of this script; forbid_scripts: no letter is of these.
    Letters of LaTeX commands and tags do not count, and a response without letters passes. Scripts are those of
    `SCRIPTS`; "cjk" is Chinese, Japanese and Korean together.
    partial: score the share of checks passed (one check per section, one for their order, one per other option asked
    for); False: 1 for all of them, else 0. The status is correct when all pass; `info["failed"]` lists what does not.

    Raises ValueError for an option value it does not know, and where no check is asked for.
    """

    name = "format"
    version = "1"

    def __init__(
        self,
        sections: Sequence[str] = (),
        prefilled: bool = False,
        only_sections: bool = False,
        box: bool = False,
        script: str | None = None,
        script_share: float = 1.0,
        forbid_scripts: Sequence[str] = (),
        partial: bool = False,
    ) -> None:
        if isinstance(sections, str) or isinstance(forbid_scripts, str):
            raise ValueError("sections and forbid_scripts are lists: write [think, answer]")
        for section in sections:
            if not isinstance(section, str) or not TAG.fullmatch(section):
                raise ValueError(f"section {section!r}: give the tag's name without brackets, such as think")
        if len(set(sections)) != len(sections):
            raise ValueError("sections names one tag twice: each stands exactly once")
        for name in (*forbid_scripts, *([script] if script is not None else [])):
            if name not in SCRIPTS:
                raise ValueError(f"script {name!r}: use one of {', '.join(sorted(SCRIPTS))}")
        if not 0 < script_share <= 1:
            raise ValueError(f"script_share {script_share}: give a share above 0, at most 1")
        if (prefilled or only_sections) and not sections:
            raise ValueError("prefilled and only_sections speak of sections: name them")
        if not (sections or box or script or forbid_scripts):
            raise ValueError("nothing to check: set sections, box, script or forbid_scripts")
        self.sections = tuple(sections)
        self.prefilled = prefilled
        self.only_sections = only_sections
        self.box = box
        self.script = script
        self.script_share = script_share
        self.forbid_scripts = tuple(forbid_scripts)
        self.partial = partial

    def check_gold(self, gold: str | Sequence[str]) -> None:
        """Any gold will do."""

    def verify(self, response: str, gold: str | Sequence[str], *, meta: Mapping[str, Any]) -> Verdict:
        checks = list(self.problems(response))
        failed = [problem for problem in checks if problem]
        if not failed:
            return Verdict(1.0, "correct", info={"reason": "the form asked for", "failed": []})
        score = 1 - len(failed) / len(checks) if self.partial else 0.0
        return Verdict(score, "incorrect", info={"reason": failed[0], "failed": failed})

    def problems(self, response: str) -> Iterator[str | None]:
        """For each check None when it passes, else the line that says why it does not."""
        text = f"<{self.sections[0]}>{response}" if self.prefilled else response
        if self.sections:
            yield from self._section_problems(text)
        if self.box:
            content = extract.boxed(extract.without_thoughts(text))
            yield None if content and content.strip() else "no closed \\boxed{} with an answer"
        if self.script or self.forbid_scripts:
            yield from self._script_problems(text)

    def _section_problems(self, text: str) -> Iterator[str | None]:
        spans = []
        for name in self.sections:
            opening, closing = f"<{name}>", f"</{name}>"
            start, end = text.find(opening), text.find(closing)
            if text.count(opening) != 1 or text.count(closing) != 1 or end < start:
                yield f"{opening}…{closing} must stand exactly once"
            elif not text[start + len(opening) : end].strip():
                yield f"{opening} is empty"
            else:
                spans.append((start, end + len(closing)))
                yield None
        whole = len(spans) == len(self.sections)
        ordered = whole and all(a[1] <= b[0] for a, b in pairwise(spans))
        yield None if ordered else f"the sections must follow each other: {', '.join(self.sections)}"
        if self.only_sections:
            edges = [0, *(edge for span in spans for edge in span), len(text)]
            outside = [text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
            yield "text outside of the sections" if not ordered or any(part.strip() for part in outside) else None

    def _script_problems(self, text: str) -> Iterator[str | None]:
        counts = letters_by_script(text, self.sections)
        total = sum(counts.values())
        if self.script:
            share = _count(counts, self.script) / total if total else 1.0
            wrong = share < self.script_share
            yield (
                f"a share of {share:.3g} of the letters is {self.script}, below {self.script_share:g}"
                if wrong
                else None
            )
        if self.forbid_scripts:
            found = [name for name in self.forbid_scripts if _count(counts, name)]
            yield f"letters of {', '.join(found)}" if found else None


def letters_by_script(text: str, tags: Sequence[str] = ()) -> dict[str, int]:
    """How many letters of each script (the first word of the character's Unicode name) a text has, styled letters as
    their plain ones; the names of LaTeX commands and of the tags given are left out."""
    for tag in tags:
        text = text.replace(f"<{tag}>", " ").replace(f"</{tag}>", " ")
    counts: dict[str, int] = {}
    for character in COMMAND.sub(" ", text):
        if character.isalpha():
            script = script_of(character)
            counts[script] = counts.get(script, 0) + 1
    return counts


@lru_cache(maxsize=65536)
def script_of(letter: str) -> str:
    """LATIN, GREEK, CJK, …; OTHER for a letter without a name."""
    plain = unicodedata.normalize("NFKC", letter)[:1]
    return unicodedata.name(plain, "OTHER").split()[0]


def _count(counts: Mapping[str, int], script: str) -> int:
    return sum(counts.get(name, 0) for name in SCRIPTS[script])
