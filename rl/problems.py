"""Problems with ground truth: procedural, from JSONL files, or from the Hugging Face hub."""

import itertools
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from deltarl.rewards.types import UNUSABLE
from deltarl.rl.errors import UserError
from deltarl.rl.procedural import exercises

QUESTION_FIELDS = ("question", "problem", "prompt")
GOLD_FIELDS = ("answer", "gold", "final_answer")
GOLD_MARK = "####"
CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class Problem:
    """A question with its ground truth.

    Attributes:
        id: where it came from: `file:line`, `name/split:row`, or task and operands.
        question: the bare question, before `data.instruction` is put around it.
        gold: the answer, or several equally right ones.
        solution: a worked solution, if the source has one.
        meta: the row's other fields, or task, operands and difficulty; handed to the verifier.
    """

    id: str
    question: str
    gold: str | tuple[str, ...]
    solution: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


class DataSettings(Protocol):
    """The part of a job's `data` section that is read here."""

    source: str
    subset: str | None
    heldout: str | None
    train_size: int | None
    heldout_size: int
    tasks: dict[str, float]
    difficulty: int
    question_field: str | None
    gold_field: str | None


class LoadedProblems(NamedTuple):
    """`report` says, as plain numbers and names, what was read, dropped and kept."""

    train: list[Problem]
    heldout: list[Problem]
    report: dict[str, Any]


class Row(NamedTuple):
    """One row of a source; `where` names it in errors and becomes the problem's id."""

    where: str
    values: dict[str, Any]


def load_problems(cfg: DataSettings, seed: int) -> LoadedProblems:
    """Training and held-out problems: no question occurs twice, none is in both.

    Two questions are the same when `normalised` makes them equal; procedural problems also differ in their operands.
    The choice and order of the problems depend on `cfg` and `seed` alone.

    Raises:
        UserError: a missing file, bad JSON, a row without question or gold (each with its line number), no rows, fewer
            problems than `train_size` and `heldout_size` ask for, or a hub data set that cannot be loaded.
    """
    if cfg.source == "procedural":
        return _procedural(cfg, seed)

    rows_read, duplicates, train = _read_distinct(cfg, cfg.source, cfg.subset)
    report: dict[str, Any] = {"source": cfg.source, "rows_read": rows_read, "duplicates_dropped": duplicates}
    rng = random.Random(f"{seed}:split")
    if cfg.heldout is None:
        rng.shuffle(train)
        heldout, train = train[: cfg.heldout_size], train[cfg.heldout_size :]
    else:
        source, subset = _heldout_source(cfg)
        heldout_rows, heldout_duplicates, heldout = _read_distinct(cfg, source, subset)
        held_questions = {normalised(problem.question) for problem in heldout}
        kept = [problem for problem in train if normalised(problem.question) not in held_questions]
        report |= {
            "heldout_source": source,
            "heldout_rows_read": heldout_rows,
            "heldout_duplicates_dropped": heldout_duplicates,
            "overlap_dropped": len(train) - len(kept),
        }
        train = kept
        rng.shuffle(heldout)
        rng.shuffle(train)
        heldout = heldout[: cfg.heldout_size]

    if len(heldout) < cfg.heldout_size:
        raise UserError(
            f"{cfg.heldout or cfg.source} has {len(heldout)} distinct problems and data.heldout_size asks for "
            f"{cfg.heldout_size}: lower data.heldout_size"
        )
    if not train:
        raise UserError(f"{cfg.source} leaves no problem to train on: lower data.heldout_size or add rows")
    if cfg.train_size is not None and len(train) < cfg.train_size:
        raise UserError(
            f"{cfg.source} leaves {len(train)} distinct problems and data.train_size asks for {cfg.train_size}: "
            "lower data.train_size or leave it out"
        )
    train = train[: cfg.train_size]
    return LoadedProblems(train, heldout, report | {"train": len(train), "heldout": len(heldout)})


def user_messages(problem: Problem, instruction: str) -> list[dict[str, str]]:
    """The conversation that asks `problem`: one user turn, `instruction` with the question in place of {question}."""
    return [{"role": "user", "content": instruction.replace("{question}", problem.question)}]


def first_gold(problem: Problem) -> str:
    """The gold, or the first of several."""
    return problem.gold if isinstance(problem.gold, str) else problem.gold[0]


def drop_bad_golds(
    problems: Sequence[Problem], check_golds: Callable[[list[str | tuple[str, ...]]], Sequence[Any]], share: float
) -> tuple[list[Problem], list[tuple[Problem, str]]]:
    """Split `problems` into those whose gold can be graded against and, with the reason, those whose gold cannot.

    Args:
        check_golds: as `VerifierHost.check_golds`: golds to verdicts in order, status `gold_error` for a bad one.
        share: the largest share of bad golds to put up with.

    Raises:
        UserError: more golds than that are bad; the first few are named.
    """
    verdicts = check_golds([problem.gold for problem in problems])
    good, bad = [], []
    for problem, verdict in zip(problems, verdicts, strict=True):
        if verdict.status in UNUSABLE:
            bad.append((problem, str(verdict.info.get("reason", "does not parse"))))
        else:
            good.append(problem)
    if len(bad) > share * len(problems):
        examples = ", ".join(f"{problem.id} ({first_gold(problem)[:40]!r})" for problem, _ in bad[:3])
        raise UserError(
            f"{len(bad)} of {len(problems)} golds do not parse, more than data.max_bad_gold = {share}: {examples}; "
            "fix the rows, or set data.gold_field or rewards.verifier"
        )
    return good, bad


def normalised(question: str) -> str:
    """The form in which questions are compared: compatibility characters unified, no case, no white space."""
    return "".join(unicodedata.normalize("NFKC", question).casefold().split())


def _procedural(cfg: DataSettings, seed: int) -> LoadedProblems:
    if cfg.train_size is None:
        raise UserError("data.source procedural has no end: set data.train_size")
    if cfg.heldout is not None:
        raise UserError("data.source procedural makes its own held-out problems: leave data.heldout out")
    heldout, train = (
        [
            Problem(
                id=f"{exercise.task}:{','.join(map(str, exercise.operands))}",
                question=exercise.question,
                gold=exercise.gold,
                solution=exercise.solution,
                meta={"task": exercise.task, "operands": list(exercise.operands), "difficulty": cfg.difficulty},
            )
            for exercise in drawn
        ]
        for drawn in exercises(cfg.tasks, cfg.difficulty, (cfg.heldout_size, cfg.train_size), seed)
    )
    report = {"source": "procedural", "tasks": dict(cfg.tasks), "train": len(train), "heldout": len(heldout)}
    return LoadedProblems(train, heldout, report)


def _heldout_source(cfg: DataSettings) -> tuple[str, str | None]:
    """Source and subset of `cfg.heldout`: a file, `owner/name[:split]`, or a split of the source itself."""
    if _is_file_name(cfg.heldout) or "/" in cfg.heldout:
        return cfg.heldout, None
    if _is_file_name(cfg.source):
        raise UserError(f"data.heldout {cfg.heldout} is no .jsonl file, and the source {cfg.source} has no splits")
    return f"{cfg.source.partition(':')[0]}:{cfg.heldout}", cfg.subset


def _read_distinct(cfg: DataSettings, source: str, subset: str | None) -> tuple[int, int, list[Problem]]:
    """Rows read, duplicates dropped, and the problems left, in the source's order."""
    rows = read_jsonl(Path(source)) if _is_file_name(source) else _hub_rows(source, subset)
    read, distinct = 0, {}
    for row in rows:
        read += 1
        problem = _problem(row, cfg.question_field, cfg.gold_field)
        distinct.setdefault(normalised(problem.question), problem)
    if not read:
        raise UserError(f"{source} holds no rows")
    return read, read - len(distinct), list(distinct.values())


def _problem(row: Row, question_field: str | None, gold_field: str | None) -> Problem:
    """The problem in a row.  A gold field with `####` holds the worked solution before the mark (as in GSM8K)."""
    question_field = _present(row, question_field, QUESTION_FIELDS, "question")
    gold_field = _present(row, gold_field, GOLD_FIELDS, "gold")
    question = row.values[question_field]
    if not isinstance(question, str):
        raise UserError(f"{row.where}: {question_field} is not text; set data.question_field to a text field")
    meta = {key: value for key, value in row.values.items() if key not in (question_field, gold_field)}
    written = meta.get("solution")
    solution = written if isinstance(written, str) and written.strip() else None
    gold = row.values[gold_field]
    if isinstance(gold, str) and GOLD_MARK in gold:
        working, _, gold = gold.rpartition(GOLD_MARK)
        solution = CALCULATOR_MARK.sub("", working).strip() or None
    golds = tuple(_gold_text(row, gold_field, value) for value in (gold if isinstance(gold, list) else [gold]))
    if not golds or not all(golds):
        raise UserError(f"{row.where}: {gold_field} holds no answer; every row needs a gold")
    return Problem(row.where, question.strip(), golds if isinstance(gold, list) else golds[0], solution, meta)


def _present(row: Row, configured: str | None, usual: tuple[str, ...], what: str) -> str:
    """The name of the field that holds `what`, present and not blank."""
    names = (configured,) if configured else usual
    for name in names:
        value = row.values.get(name)
        if value is not None and not (isinstance(value, str) and not value.strip()):
            return name
    raise UserError(f"{row.where}: no {what} (looked for {', '.join(names)}); fix the row or set data.{what}_field")


def _gold_text(row: Row, gold_field: str, gold: Any) -> str:
    if isinstance(gold, bool) or not isinstance(gold, str | int | float):
        raise UserError(f"{row.where}: {gold_field} is neither text nor a number; set data.gold_field")
    return str(gold).strip()


def _is_file_name(source: str) -> bool:
    return source.endswith(".jsonl")


def read_jsonl(path: Path) -> Iterator[Row]:
    """The objects of a JSON Lines file; blank lines are skipped.  Raises UserError with the line number."""
    if not path.is_file():
        raise UserError(f"data file {path} does not exist; check the path (relative to {Path.cwd()})")
    with path.open(encoding="utf-8-sig") as lines:
        for number in itertools.count(1):
            try:
                line = next(lines, None)
                if line is None:
                    return
                values = json.loads(line) if line.strip() else None
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text; convert it") from error
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number} is not valid JSON ({error.msg}); each line is one object") from error
            if values is not None:
                if not isinstance(values, dict):
                    raise UserError(f"{path}:{number} is not a JSON object; each line is one object")
                yield Row(f"{path}:{number}", values)


def _hub_rows(source: str, subset: str | None) -> Iterable[Row]:
    """The rows of `owner/name[:split]`, split `train` when none is named."""
    name, _, split = source.partition(":")
    split = split or "train"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(
            f"data source {source} is neither procedural, a .jsonl file, nor a hub name such as openai/gsm8k"
        )
    import datasets  # takes seconds to import

    try:
        loaded = datasets.load_dataset(name, subset, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"hub data set {name} was not found; check its name, log in with `hf auth login` if it is gated, "
            "or point data.source to a .jsonl file"
        ) from error
    except OSError as error:
        raise UserError(
            f"the hub cannot be reached for {name} ({type(error).__name__}); check the network and HF_ENDPOINT, "
            "or point data.source to a .jsonl file"
        ) from error
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{name}, split {split}: {reason}; set data.subset and data.heldout") from error
    return (Row(f"{name}/{split}:{index}", dict(values)) for index, values in enumerate(loaded))
