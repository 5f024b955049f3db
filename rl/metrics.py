"""The record of a run: metrics.jsonl, one JSON object per line, and everything else a report reads from a run folder.

Rows by `kind` (keys may be absent; a value that is not finite is stored as null; shares and accuracies lie in [0, 1]):

| kind  | what it records                                                         | keys          |
|-------|-------------------------------------------------------------------------|---------------|
| run   | one start of the process: what is trained, on what; the last one counts | `RunRow`      |
| sft   | one supervised step                                                     | `SftRow`      |
| rl    | one policy step                                                         | `RlRow`       |
| eval  | one pass over the held-out problems                                     | `EvalRow`     |
| event | something that happened: resumed, interrupted, checkpoint, …            | `EventRow`    |
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import yaml

from deltarl.rl.errors import UserError

KINDS = ("run", "sft", "rl", "eval", "event")
STATUSES = ("correct", "incorrect", "no_answer", "timeout", "error", "limit", "gold_error")
PHASES = ("generate", "wait", "sync", "verify", "logprobs", "update", "other")

Stage = Literal["sft", "rl"]
Row = dict[str, Any]


class RunRow(TypedDict, total=False):
    """`parameters` counts weights; `dtype` is the learner's ("float32", "bfloat16"); `versions`: name to version."""

    kind: Literal["run"]
    arm: str
    size: str
    parameters: int
    dtype: str
    device: str
    engine: str
    versions: dict[str, str]


class SftRow(TypedDict, total=False):
    """`loss` in nats per target token; `skipped`: 1 if it was left out, for it was not finite; `tokens` seen in this
    step; `seconds` it took."""

    kind: Literal["sft"]
    step: int
    loss: float
    skipped: int
    learning_rate: float
    tokens: int
    seconds: float


class RlRow(TypedDict, total=False):
    """One policy step.

    `accuracy` is the share of training samples with verdict `correct`; lengths are in completion tokens; `entropy` in
    nats per token; `kl` to the policy RL started from, in nats per token (the k3 estimator, Schulman 2020,
    "Approximating KL divergence"), null where it was not measured; `logp_gap_*` is |log p_trainer - log p_engine| per
    sampled token in nats; `is_ratio_mean` and `is_ess` are mean and effective sample size (a share) of the importance
    weights; `update_kl` is the KL of the policy before the step's updates to the one they made, mean over the updates;
    `time` maps phase to seconds, `verdicts` maps status to count, `parts` each part of a combined verifier to its mean
    score. `skipped` counts the step's updates that were left out because loss or gradient were not finite; `loss` is
    the mean over the others, null without any.

    PPO: `value_loss`, `critic_grad_norm`, and `explained_variance` of the returns by the values before the updates.
    Kimi: `tau`, as the step used it, `minibatches`, and `length_reward`, its mean. `ptx_loss` in nats per supervised
    token. A curriculum: the share of the problems admitted, and the mean success rate of those tried.

    `tokens_drawn` counts what the engine drew for the step, dropped and unfinished completions included, and
    `tokens_per_second` divides it by the seconds in which it had something to draw. `overlap` has `engine_idle`, the
    share of the time since the last batch in which it had not, and `verify_hidden`, the seconds of drawing in which a
    verdict was awaited as well. With `rollout.dynamic_sampling`: `groups_dropped`, and `accuracy_drawn` with them. With
    partial or asynchronous rollouts: `staleness_*`, the learner's version minus that of each token, and
    `groups_carried`, the groups left in flight. With `rollout.stop_repetition`: `repeated`, the share of completions
    that were stopped.
    """

    kind: Literal["rl"]
    step: int
    reward_mean: float
    reward_std: float
    accuracy: float
    frac_zero_std: float
    length_mean: float
    length_max: float
    truncated: float
    entropy: float
    kl: float | None
    logp_gap_mean: float
    logp_gap_max: float
    engine_kl: float
    is_ratio_mean: float
    is_ess: float
    update_kl: float
    value_loss: float
    explained_variance: float
    critic_grad_norm: float
    tau: float
    minibatches: int
    length_reward: float
    ptx_loss: float
    curriculum_admitted: float
    curriculum_success: float
    clip_ratio: float
    grad_norm: float
    loss: float | None
    skipped: int
    learning_rate: float
    weight_version: int
    tokens_generated: int
    tokens_per_second: float
    verdicts: dict[str, int]
    parts: dict[str, float]
    time: dict[str, float]
    tokens_drawn: int
    overlap: dict[str, float]
    groups_dropped: int
    accuracy_drawn: float
    staleness_mean: float
    staleness_max: int
    groups_carried: int
    repeated: float


class EvalRow(TypedDict, total=False):
    """`n` problems, `samples_per_problem` samples each; `stderr` is the standard error of `accuracy`; `step` of RL."""

    kind: Literal["eval"]
    step: int
    stage: Literal["before", "during", "after"]
    n: int
    accuracy: float
    stderr: float
    samples_per_problem: int
    temperature: float
    length_mean: float
    by_task: dict[str, dict[str, float]]
    verdicts: dict[str, int]
    parts: dict[str, float]


class EventRow(TypedDict, total=False):
    kind: Literal["event"]
    step: int
    what: str
    detail: str


class MetricsLog:
    """Appends rows to a metrics.jsonl; each row is one write, so that a kill costs at most the row being written.

    Opening a file whose last line was cut by a kill drops that line and records it as an event `torn_line`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and (torn := _torn_tail(data := self.path.read_bytes())):
            os.truncate(self.path, len(data) - len(torn))
            self._open()
            self.append(_torn_event(torn))
        else:
            self._open()

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row.  ValueError for an unknown kind, or for a row other than `run` without an int `step`."""
        if row.get("kind") not in KINDS:
            raise ValueError(f"metrics row of kind {row.get('kind')!r}: must be one of {', '.join(KINDS)}")
        if row["kind"] != "run" and not isinstance(row.get("step"), int):
            raise ValueError(f"metrics row of kind {row['kind']!r} has step {row.get('step')!r}: must be an int")
        os.write(self._file, _line(row))

    def truncate_after(self, stage: Stage, step: int) -> None:
        """Forget what was measured after `step` of `stage`, which training now repeats.

        Rows of kind run and event stay: they tell what happened, not what the weights are.  Resuming in stage "sft"
        drops every rl and eval row; in stage "rl" it drops the final evaluation and whatever is later than `step`.
        """
        rows = [row for row in read_metrics(self.path) if _survives(row, stage, step)]
        os.close(self._file)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_bytes(b"".join(map(_line, rows)))
        os.replace(temporary, self.path)
        self._open()

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[Row]:
    """All rows in file order; [] when the file does not exist.

    A last line cut by a kill is left out, and an event row `torn_line` at the end says so.  UserError for any other
    line that is not a JSON object.
    """
    return read_jsonl(path, torn_row=_torn_event)


def read_jsonl(path: str | Path, *, torn_row: Callable[[bytes], Row] | None = None) -> list[Row]:
    """Rows of a JSON-lines file that a kill may have cut; `torn_row(cut bytes)` stands in for a cut last line."""
    path = Path(path)
    if not path.exists():
        return []
    data = path.read_bytes()
    torn = _torn_tail(data)
    rows = []
    for number, line in enumerate(data[: len(data) - len(torn)].split(b"\n"), start=1):
        if line.strip():
            rows.append(_parse(line, path, number))
    if torn and torn_row is not None:
        rows.append(torn_row(torn))
    return rows


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says about its run, finished or not.  Of rows repeated for one step the last counts."""

    folder: Path
    job: Row
    rows: list[Row]

    @property
    def name(self) -> str:
        return self.folder.name

    def of(self, kind: str) -> list[Row]:
        """Rows of kind sft or rl, one per step, ascending."""
        latest = {row["step"]: row for row in self.rows if row["kind"] == kind}
        return [latest[step] for step in sorted(latest)]

    @property
    def evals(self) -> list[Row]:
        """Evaluations by step, one per step and stage."""
        latest = {(row["step"], row.get("stage")): row for row in self.rows if row["kind"] == "eval"}
        return sorted(latest.values(), key=lambda row: row["step"])

    def eval_at(self, stage: str) -> Row | None:
        return next((row for row in reversed(self.evals) if row.get("stage") == stage), None)

    @property
    def last_eval(self) -> Row | None:
        """The evaluation after RL, or of an unfinished run the latest one during it."""
        return self.eval_at("after") or self.eval_at("during")

    @property
    def events(self) -> list[Row]:
        return [row for row in self.rows if row["kind"] == "event"]

    @property
    def about(self) -> Row:
        """The last `run` row: arm, size, parameters, device, versions; {} when there is none."""
        return next((row for row in reversed(self.rows) if row["kind"] == "run"), {})


def load_run(folder: str | Path) -> RunRecord:
    """Read a run folder.  UserError when it is none: neither job.yaml nor metrics.jsonl is there."""
    folder = Path(folder)
    job_file, metrics_file = folder / "job.yaml", folder / "metrics.jsonl"
    if not job_file.exists() and not metrics_file.exists():
        raise UserError(f"{folder} is not a run folder (no job.yaml, no metrics.jsonl): give a folder under runs/")
    job = yaml.safe_load(job_file.read_text(encoding="utf-8")) if job_file.exists() else {}
    return RunRecord(folder.resolve(), job or {}, read_metrics(metrics_file))


def series(rows: Iterable[Row], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have a number under `key`."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def totals(rows: Iterable[Row], key: str, names: Iterable[str]) -> dict[str, float]:
    """Sum of the mappings under `key` (verdicts, time) over rows, for the names that occur, in the order of `names`."""
    sums: dict[str, float] = {}
    for row in rows:
        for name, value in (row.get(key) or {}).items():
            sums[name] = sums.get(name, 0) + (value or 0)
    return {name: sums[name] for name in [*names, *sorted(set(sums) - set(names))] if name in sums}


def _survives(row: Row, stage: Stage, step: int) -> bool:
    match row["kind"]:
        case "sft":
            return stage == "rl" or row["step"] <= step
        case "rl":
            return stage == "rl" and row["step"] <= step
        case "eval":
            return stage == "rl" and row.get("stage") != "after" and row["step"] <= step
        case _:
            return True


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(_storable(row), allow_nan=False, ensure_ascii=False) + "\n").encode()


def _storable(value: Any) -> Any:
    """Plain JSON values: zero-dimensional tensors and NumPy scalars become numbers, non-finite numbers become None."""
    if isinstance(value, Mapping):
        return {str(key): _storable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _torn_tail(data: bytes) -> bytes:
    """The bytes after the last newline: every whole row ends with one."""
    return data[data.rfind(b"\n") + 1 :]


def _torn_event(torn: bytes) -> Row:
    detail = f"the last line was cut while being written ({len(torn)} bytes) and is left out"
    return {"kind": "event", "step": 0, "what": "torn_line", "detail": detail}


def _parse(line: bytes, path: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise UserError(f"{path} line {number} is not a JSON object: restore the file, or delete the line")
    return row
