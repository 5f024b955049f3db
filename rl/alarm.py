"""The alarm for when the engine that draws and the learner that learns are no longer the same function."""

from __future__ import annotations

from collections.abc import Mapping

from deltarl.rl.parts import say
from deltarl.rl.rolloutsections import AlarmConfig
from deltarl.rl.runfolder import RunFolder


class Alarm:
    """Holds each step's mismatch of engine and learner against `rollout.alarm`.

    A measure that passes its limit gives an event `mismatch` in metrics.jsonl and a line on stderr, once, until it is
    back within. `is_ess` is a least value, the others are largest ones; the measures are those of `RlRow`.
    """

    def __init__(self, limits: AlarmConfig, run: RunFolder) -> None:
        self.limits, self.run = limits.model_dump(), run
        self.beyond: set[str] = set()

    def check(self, step: int, measured: Mapping[str, float | None]) -> None:
        """Look at the measures of a completed step; those that were not taken are passed over."""
        for name, limit in self.limits.items():
            value = measured.get(name)
            if limit is None or value is None:
                continue
            inside = value >= limit if name == "is_ess" else value <= limit
            if inside:
                self.beyond.discard(name)
            elif name not in self.beyond:
                self.beyond.add(name)
                side = "under" if name == "is_ess" else "over"
                line = f"{name} is {value:.3g}, {side} rollout.alarm.{name} = {limit:g}"
                self.run.event("mismatch", step, line)
                say(f"step {step}: engine and learner disagree: {line}")
