"""A verifier in a file: the math verifier with part marks, for models too weak to be right often enough to learn from.

rewards:
  verifier: examples/shaped_verifier.py:ShapedVerifier
  options: {stated: 0.2, finished: 0.1}
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from deltarl.rewards import Verdict, load_verifier


class ShapedVerifier:
    """1 for a right answer, `stated` for a wrong one, `finished` for ending without one, 0 for a cut-off response."""

    name, version = "shaped", "1"

    def __init__(self, stated: float = 0.2, finished: float = 0.1) -> None:
        self.math = load_verifier("math")
        self.stated, self.finished = stated, finished

    def verify(self, response: str, gold: str | Sequence[str], *, meta: Mapping[str, Any]) -> Verdict:
        verdict = self.math.verify(response, gold, meta=meta)
        if verdict.status == "incorrect":
            return replace(verdict, score=self.stated)
        if verdict.status == "no_answer" and not meta.get("truncated"):
            return replace(verdict, score=self.finished)
        return verdict
