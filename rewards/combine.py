"""The `combine` verifier: one verdict from several verifiers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deltarl.rewards.registry import load_verifier
from deltarl.rewards.types import Verdict, Verifier, VerifierSpec

PART_KEYS = ("verifier", "options", "name", "weight", "needs")
PASSED_ON = ("gold_error", "no_answer")
BROKEN = ("error", "timeout")


@dataclass(frozen=True, slots=True)
class Part:
    """One of the verifiers: its name among the parts, its weight, and the part that must be correct first."""

    name: str
    verifier: Verifier
    weight: float
    needs: str | None


class CombineVerifier:
    """Runs other verifiers on the same response and makes one verdict of theirs.

    parts: a list of {verifier, options, name, weight, needs}. `verifier` and `options` are as in a job; `name` is the
    verifier's unless given; `weight` is 1 unless given. With `needs: other` a part runs, and counts, only when the
    earlier part `other` is correct; else it adds nothing and is logged as "skipped".
    how: "weighted" runs every part; the score is the sum of weight x score, weights as they are. "first" gives the
    verdict, times its weight, of the first part that applies: whose status is neither gold_error nor no_answer; where
    none applies, that of the last one with no_answer, or gold_error where no part can use the gold.
    status: the part whose status and extracted text are the verdict's under "weighted"; the first one unless given.

    Under "weighted" a part matters when its weight is not 0, another needs it, or it gives the status. Where one that
    matters is a gold_error, the whole is a gold_error without a score; else where one is an "error" or "timeout", the
    whole is that, scored 0. A part that raises raises here, too.

    `info["parts"]` maps each part that was reached to its score, status and reason. A part sees the parts before it in
    `meta["parts"]` in the same form. Raises ValueError for parts that make no sense and VerifierLoadError for one that
    does not load.
    """

    name = "combine"
    version = "1"

    def __init__(
        self,
        parts: Sequence[Mapping[str, Any]],
        how: Literal["weighted", "first"] = "weighted",
        status: str | None = None,
    ) -> None:
        if how not in ("weighted", "first"):
            raise ValueError(f"how {how!r}: use weighted or first")
        if isinstance(parts, (str, Mapping)) or not parts:
            raise ValueError("parts: give a list of {verifier: name, options: {…}, weight: 1.0}, at least one")
        self.how = how
        self.parts: list[Part] = []
        for part in parts:
            self.parts.append(_part(part, [p.name for p in self.parts]))
        self.grouped = any(getattr(part.verifier, "grouped", False) for part in self.parts)
        names = [part.name for part in self.parts]
        if status is not None and (how == "first" or status not in names):
            raise ValueError(f"status {status!r}: name a part ({', '.join(names)}), and only where how is weighted")
        if how == "first" and any(part.needs for part in self.parts):
            raise ValueError("needs: belongs to how: weighted; under first the order of the parts decides")
        self.status = status or names[0]
        self.matter = {part.name for part in self.parts if part.weight} | {p.needs for p in self.parts} | {self.status}

    def warm_up(self) -> None:
        for part in self.parts:
            warm_up = getattr(part.verifier, "warm_up", None)
            if warm_up is not None:
                warm_up()

    def check_gold(self, gold: str | Sequence[str]) -> str | None:
        """Under "first" a gold will do when one part can use it; else every part that matters must."""
        problems = {p.name: p.verifier.check_gold(gold) for p in self.parts if hasattr(p.verifier, "check_gold")}
        if self.how == "first":
            usable = len(problems) < len(self.parts) or any(problem is None for problem in problems.values())
            return None if usable else _named(*next(iter(problems.items())))
        return next((_named(name, line) for name, line in problems.items() if line and name in self.matter), None)

    def verify(self, response: str, gold: str | Sequence[str], *, meta: Mapping[str, Any]) -> Verdict:
        return (self._weighted if self.how == "weighted" else self._first)(response, gold, meta)

    def _weighted(self, response: str, gold: str | Sequence[str], meta: Mapping[str, Any]) -> Verdict:
        done: dict[str, dict[str, Any]] = {}
        extracted = None
        for part in self.parts:
            if part.needs is not None and done[part.needs]["status"] != "correct":
                done[part.name] = {"score": None, "status": "skipped", "reason": f"{part.needs} is not correct"}
                continue
            verdict = part.verifier.verify(response, gold, meta={**meta, "parts": done})
            done[part.name] = _record(verdict)
            if part.name == self.status:
                extracted = verdict.extracted
        for failure in ("gold_error", *BROKEN):
            failed = next((n for n, row in done.items() if row["status"] == failure and n in self.matter), None)
            if failed is not None:
                info = {"reason": _named(failed, done[failed]["reason"] or failure), "parts": done}
                return Verdict(None if failure == "gold_error" else 0.0, failure, extracted, info)
        score = math.fsum(part.weight * (done[part.name]["score"] or 0.0) for part in self.parts)
        leading = done[self.status]
        status = "incorrect" if leading["status"] == "skipped" else leading["status"]
        terms = ", ".join(f"{name} {row['status']}" for name, row in done.items())
        return Verdict(score, status, extracted, {"reason": terms, "parts": done})

    def _first(self, response: str, gold: str | Sequence[str], meta: Mapping[str, Any]) -> Verdict:
        done: dict[str, dict[str, Any]] = {}
        answer: tuple[Part, Verdict] | None = None
        for part in self.parts:
            verdict = part.verifier.verify(response, gold, meta={**meta, "parts": done})
            done[part.name] = _record(verdict)
            if answer is None or verdict.status != "gold_error":
                answer = part, verdict
            if verdict.status not in PASSED_ON:
                break
        part, verdict = answer
        score = None if verdict.score is None else part.weight * verdict.score
        reason = _named(part.name, done[part.name]["reason"] or verdict.status)
        return Verdict(score, verdict.status, verdict.extracted, {"reason": reason, "parts": done})


def _part(settings: Mapping[str, Any], before: Sequence[str]) -> Part:
    if not isinstance(settings, Mapping) or "verifier" not in settings:
        raise ValueError(f"a part is a mapping with a verifier, such as {{verifier: math}}, not {settings!r}")
    unknown = [key for key in settings if key not in PART_KEYS]
    if unknown:
        raise ValueError(f"part {settings['verifier']}: no key {unknown[0]!r}, it takes {', '.join(PART_KEYS)}")
    verifier = load_verifier(VerifierSpec(settings["verifier"], settings.get("options") or {}))
    name, weight, needs = settings.get("name", verifier.name), settings.get("weight", 1.0), settings.get("needs")
    if name in before:
        raise ValueError(f"two parts are called {name!r}: give one of them another name")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ValueError(f"part {name}: weight {weight!r} is no finite number")
    if needs is not None and needs not in before:
        raise ValueError(
            f"part {name} needs {needs!r}: name a part that stands before it ({', '.join(before) or 'none'})"
        )
    return Part(name, verifier, float(weight), needs)


def _record(verdict: Verdict) -> dict[str, Any]:
    row = {"score": verdict.score, "status": verdict.status, "reason": verdict.info.get("reason")}
    return row | ({"parts": verdict.info["parts"]} if "parts" in verdict.info else {})


def _named(part: str, reason: Any) -> str:
    return f"{part}: {reason}"
