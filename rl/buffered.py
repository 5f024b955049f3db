"""Graded batches and what was computed about them as plain values and tensors, for checkpoints and replays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from deltarl.rewards import Verdict
from deltarl.rl.batch import Batch, Sample
from deltarl.rl.problems import Problem
from deltarl.rollout import Trace

TYPE = "type of the record"
RECORDS = (Batch, Sample, Problem, Trace, Verdict)


def to_plain(value: Any) -> Any:
    """`value` with every dataclass and named tuple in it as a dict of its fields and its type's name.

    What is neither that nor a plain value becomes its text: a problem may carry anything in `meta`.
    """
    if is_dataclass(value):
        return {TYPE: type(value).__name__, **{f.name: to_plain(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {TYPE: type(value).__name__, **{name: to_plain(getattr(value, name)) for name in value._fields}}
    if isinstance(value, Mapping):
        return {key: to_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_plain(inner) for inner in value)
    if value is None or isinstance(value, bool | Tensor):
        return value
    return next((kind(value) for kind in (int, float) if isinstance(value, kind)), str(value))


def from_plain(value: Any, *records: type) -> Any:
    """What `to_plain` was given; `records`: types that may occur in it besides those of a batch."""
    known = {record.__name__: record for record in (*RECORDS, *records)}

    def restored(value: Any) -> Any:
        if isinstance(value, dict):
            inner = {key: restored(v) for key, v in value.items() if key != TYPE}
            return known[value[TYPE]](**inner) if TYPE in value else inner
        if isinstance(value, list | tuple):
            return type(value)(restored(v) for v in value)
        return value

    return restored(value)
