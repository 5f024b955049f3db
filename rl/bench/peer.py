"""math-verify as a verifier, so that the same host runs both graders under the same deadline."""

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from math_verify import parse, verify

from deltarl.rewards import Verdict

MATH_MARKS = ("$", "\\(", "\\[", "\\boxed")


class MathVerify:
    """math-verify with its own defaults.

    It reads LaTeX only inside of math marks: a gold without any is put in dollars, and so is a response in which it
    finds nothing as it stands.
    """

    name = "math-verify"
    version = version("math-verify")

    def __init__(self) -> None:
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs each text that it cannot read

    def warm_up(self) -> None:
        self.verify("$\\boxed{\\frac{x}{2}}$", "0.5x", meta={})

    def verify(self, response: str, gold: str | Sequence[str], *, meta: Mapping[str, Any]) -> Verdict:
        golds = [gold] if isinstance(gold, str) else gold
        answer = parse(response) or parse(f"${response}$")
        if not answer:
            return Verdict(0.0, "no_answer")
        correct = any(verify(parse_gold(text), answer) for text in golds)
        return Verdict(float(correct), "correct" if correct else "incorrect", str(answer[-1]))


def parse_gold(text: str) -> list:
    return parse(text if any(mark in text for mark in MATH_MARKS) else f"${text}$")
