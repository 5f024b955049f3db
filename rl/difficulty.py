"""How hard the problems are for a policy: measured pass rates, their table, and the moderate band of it.

Kimi k1.5 (arXiv 2501.12599, section 2.1) rates a problem by the share of right ones among ten answers of an SFT model
at a high temperature; Kimi Linear (arXiv 2510.26692) trains on problems of moderate difficulty for the checkpoint that
RL starts from.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltarl.rl.errors import UserError
from deltarl.rl.problems import Problem, read_jsonl

BINS = 10
FEW = 16
"""With so many answers to a problem or fewer, the histogram has a line for each number of right ones."""


def pass_rates(samples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per problem, {"id", "pass_rate", "n"}, from rows with `problem_id` and `status`, one per sample.

    n counts the graded samples; a problem that has none is left out.
    """
    graded: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for sample in samples:
        graded[sample["problem_id"]] += sample["status"] != "gold_error"
        right[sample["problem_id"]] += sample["status"] == "correct"
    return [{"id": name, "pass_rate": right[name] / n, "n": n} for name, n in graded.items() if n]


def write_pass_rates(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the table, one JSON object a line; a kill leaves the whole file or none."""
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    os.replace(temporary, path)


def read_pass_rates(path: Path) -> dict[str, float]:
    """Pass rate by problem id. Raises UserError: no such file, or a line that is no row of such a table."""
    rates = {}
    for row in read_jsonl(path):
        name, rate = row.values.get("id"), row.values.get("pass_rate")
        if not isinstance(name, str) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise UserError(f"{row.where} is no pass rate; a row has id and pass_rate in [0, 1] (`deltarl difficulty`)")
        rates[name] = float(rate)
    return rates


def in_band(problems: Sequence[Problem], rates: Mapping[str, float], band: tuple[float, float]) -> list[Problem]:
    """The problems whose pass rate was measured and lies in the band, ends included.

    Raises UserError where none is left.
    """
    low, high = band
    kept = [problem for problem in problems if problem.id in rates and low <= rates[problem.id] <= high]
    if not kept:
        measured = sum(problem.id in rates for problem in problems)
        raise UserError(
            f"data.pass_band = [{low}, {high}] leaves no problem: data.pass_rates has {measured} of {len(problems)}; "
            "widen the band, or measure the job's own problems with `deltarl difficulty`"
        )
    return kept


def describe(rows: Sequence[Mapping[str, Any]], band: tuple[float, float]) -> str:
    """The table's histogram, and what the band keeps, as text."""
    rates = [row["pass_rate"] for row in rows]
    lines = ["right       problems"]
    for label, count in histogram(rows):
        lines.append(f"{label:9s}  {count:8d}  {'#' * round(40 * count / max(1, len(rates)))}")
    low, high = band
    kept = sum(low <= rate <= high for rate in rates)
    never, always = rates.count(0.0), rates.count(1.0)
    lines.append(f"{never} never right, {always} always right; {kept} of {len(rates)} in the band [{low:g}, {high:g}]")
    return "\n".join(lines)


def histogram(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Problems by number of right answers, or by tenths of their pass rates where more than `FEW` were sampled."""
    most = max((row["n"] for row in rows), default=0)
    if most <= FEW:
        counts = Counter(round(row["pass_rate"] * most) for row in rows)
        return [(f"{number} of {most}", counts[number]) for number in range(most + 1)]
    counts = Counter(min(BINS - 1, int(row["pass_rate"] * BINS)) for row in rows)
    return [(f"{index / BINS:.1f} - {(index + 1) / BINS:.1f}", counts[index]) for index in range(BINS)]
