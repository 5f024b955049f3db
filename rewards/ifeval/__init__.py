"""`ifeval`: whether a response follows the checkable instructions of its prompt (IFEval, arXiv 2311.07911)."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from deltarl.rewards.ifeval.instructions import INSTRUCTIONS
from deltarl.rewards.math.extract import without_thoughts
from deltarl.rewards.types import Verdict

MODES = ("strict", "loose")
SCORES = ("all", "share")

Steps = list[tuple[str, dict[str, Any]]]


class IfevalVerifier:
    """Correct when the response follows all instructions of its prompt.

    The instructions are {"instruction_id_list": [...], "kwargs": [...]}, one object of arguments for each, as the
    published prompts have them (arguments of null are left out): the gold, in JSON, or else the same keys of meta.

    mode: "strict" looks at the response as it is; "loose" also at the seven variants of section 2 of the paper, without
    asterisks, without its first line, its last, both, and takes an instruction as followed when one of them does.
    score: "all" is 1 when all instructions are followed, else 0 (prompt-level accuracy); "share" is the share that is
    followed (its mean over the instructions of a set is instruction-level accuracy).

    Text in <think> blocks does not count; a response that was cut off is looked at as far as it goes.

    Raises ValueError for another mode or score.
    """

    name = "ifeval"
    version = "1"

    def __init__(self, mode: str = "strict", score: str = "all") -> None:
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
        if score not in SCORES:
            raise ValueError(f"score {score!r} is not one of {', '.join(SCORES)}")
        self.mode = mode
        self.score = score

    def check_gold(self, gold: str | Sequence[str]) -> str | None:
        """A gold that is no JSON object may belong to a meta with the instructions, which is not known here."""
        data = as_object(gold)
        try:
            parse(data) if data else None
        except ValueError as error:
            return str(error)
        return None

    def verify(self, response: str, gold: str | Sequence[str], *, meta: Mapping[str, Any]) -> Verdict:
        try:
            steps = parse(as_object(gold) or meta)
        except ValueError as error:
            return Verdict(None, "gold_error", info={"reason": str(error)})
        shown = without_thoughts(response).strip()
        if not shown:
            return Verdict(0.0, "no_answer", info={"reason": "the response is empty"})
        texts = variants(shown) if self.mode == "loose" else [shown]
        followed = [any(INSTRUCTIONS[name].check(text, **kwargs) for text in texts) for name, kwargs in steps]
        failed = [name for (name, _), done in zip(steps, followed, strict=True) if not done]
        score = sum(followed) / len(steps) if self.score == "share" else float(not failed)
        reason = f"not followed: {', '.join(failed)}" if failed else "all instructions are followed"
        info = {"reason": reason, "instructions": [name for name, _ in steps], "followed": followed}
        return Verdict(score, "incorrect" if failed else "correct", shown, info)


def as_object(gold: str | Sequence[str]) -> dict[str, Any]:
    """The JSON object that a gold is; empty when it is none."""
    try:
        data = json.loads(gold) if isinstance(gold, str) else None
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def parse(data: Mapping[str, Any]) -> Steps:
    """The instructions with their arguments. Raises ValueError with one line for what cannot be checked."""
    names, arguments = data.get("instruction_id_list"), data.get("kwargs")
    if not isinstance(names, (list, tuple)) or not names:
        raise ValueError("no instruction_id_list: give it and kwargs as the gold, in JSON, or in meta")
    if not isinstance(arguments, (list, tuple)) or len(arguments) != len(names):
        raise ValueError(f"kwargs must be a list with one object for each of the {len(names)} instructions")
    return [step(str(name), given) for name, given in zip(names, arguments, strict=True)]


def step(name: str, given: Any) -> tuple[str, dict[str, Any]]:
    if name not in INSTRUCTIONS:
        near = difflib.get_close_matches(name, INSTRUCTIONS, n=1, cutoff=0.3)
        raise ValueError(f"unknown instruction {name!r}: {f'did you mean {near[0]!r}?' if near else 'see IFEval'}")
    kwargs = {key: value for key, value in (given or {}).items() if value is not None}
    needed = INSTRUCTIONS[name].arguments
    for key, usable in needed.items():
        if key not in kwargs:
            raise ValueError(f"instruction {name} lacks its argument {key}")
        if not usable(kwargs[key]):
            raise ValueError(f"instruction {name} cannot use {key}={str(kwargs[key])[:80]!r}")
    unknown = sorted(set(kwargs) - set(needed))
    if unknown:
        raise ValueError(f"instruction {name} has no argument {unknown[0]!r}: it takes {', '.join(needed) or 'none'}")
    return name, kwargs


def variants(response: str) -> list[str]:
    """The response without first line, last line, both, neither; each with and without its asterisks. None is empty."""
    lines = response.split("\n")
    cuts = ["\n".join(part).strip() for part in (lines, lines[1:], lines[:-1], lines[1:-1])]
    return [text for cut in cuts for text in (cut, cut.replace("*", "").strip()) if text]
