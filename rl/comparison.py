"""The report of a comparison: all arms' curves on one picture, and the numbers as a page, JSON, CSV and Markdown."""

import csv
import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltarl.rl.metrics import Row, RunRecord, load_run, series
from deltarl.rl.page import DASH, TEMPLATES, embedded, write_atomically
from deltarl.rl.plots import draw_comparison, human_count, smoothing_window, trailing_mean

FORMS = {
    "held_out_before": ("{:.1f}", 100, " %"),
    "held_out_after": ("{:.1f}", 100, " %"),
    "change": ("{:+.1f}", 100, ""),
    "final_training_accuracy": ("{:.1f}", 100, " %"),
    "steps_to_target": ("{:.0f}", 1, ""),
}
MAY_DIFFER = {"name", "seed", "runs_dir"}


def write_comparison(
    out_dir: str | Path, arms: Mapping[str, Sequence[str | Path]], varied: Collection[str] = ("model.arm",)
) -> Path:
    """Compare runs; `arms` maps an arm's name to its run folders, one per seed.  Returns the path of comparison.html.

    varied: the keys of the job that tell the arms from one another; a difference in others is warned of.
    Beside it lie comparison.png, comparison.json (all numbers), comparison.csv (one line per run) and comparison.md
    (the table by arm).  UserError when a folder is no run, or no run has a training step.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    picture = draw_comparison(arms, out_dir / "comparison.png")
    runs = {arm: [load_run(folder) for folder in folders] for arm, folders in arms.items()}
    numbers = compare(runs)
    headings, arm_rows = _arm_table(numbers)
    notes = _notes(numbers)
    warnings = list(_warnings(runs, numbers, varied))
    write_atomically(out_dir / "comparison.json", json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    write_atomically(out_dir / "comparison.csv", _csv(numbers["runs"]))
    write_atomically(out_dir / "comparison.md", _markdown(headings, arm_rows, [*warnings, *notes]))
    page = TEMPLATES.get_template("comparison.html").render(
        arms=list(runs),
        warnings=warnings,
        picture=embedded(picture),
        headings=headings,
        arm_rows=arm_rows,
        notes=notes,
        run_headings=["arm", "run", "seed", "steps", "before", "after", "change", "final training", "steps to target"],
        run_rows=[_run_cells(run) for run in numbers["runs"]],
    )
    return write_atomically(out_dir / "comparison.html", page)


def compare(runs: Mapping[str, Sequence[RunRecord]]) -> dict[str, Any]:
    """The numbers of a comparison, ready for JSON; accuracies lie in [0, 1], `change` is their difference.

    `held_out_after` is the evaluation after RL, or the latest one of an unfinished run.  `final_training_accuracy` is
    the mean over the last tenth of the steps, at least 5.  `target` is the highest multiple of 5 % which the training
    accuracy (trailing mean of `window` steps) of every run reached, `steps_to_target` the first step at which it did.
    """
    curves = {run.folder: series(run.of("rl"), "accuracy") for group in runs.values() for run in group}
    window = smoothing_window(max((len(steps) for steps, _ in curves.values()), default=0))
    smooth = {folder: (steps, trailing_mean(values, window)) for folder, (steps, values) in curves.items()}
    peaks = [max(values, default=0.0) for _, values in smooth.values()]
    target = int(20 * min(peaks) + 1e-9) / 20
    table = [
        _run_numbers(arm, run, curves[run.folder][1], smooth[run.folder], target)
        for arm, group in runs.items()
        for run in group
    ]
    arms = {}
    for arm in runs:
        rows = [row for row in table if row["arm"] == arm]
        parameters = sorted({row["parameters"] for row in rows if row["parameters"]})
        arms[arm] = {"parameters": parameters[0] if len(parameters) == 1 else None, "seeds": len(rows)}
        arms[arm] |= {key: _spread([row[key] for row in rows]) for key in FORMS}
    return {"target": target or None, "window": window, "arms": arms, "runs": table}


def _run_numbers(
    arm: str, run: RunRecord, accuracy: list[float], smooth: tuple[list[int], list[float]], target: float
) -> Row:
    before, after = ((row or {}).get("accuracy") for row in (run.eval_at("before"), run.last_eval))
    tail = accuracy[-max(5, len(accuracy) // 10) :]
    return {
        "arm": arm,
        "run": run.name,
        "seed": run.job.get("seed"),
        "parameters": run.about.get("parameters"),
        "steps": len(accuracy),
        "finished": run.eval_at("after") is not None,
        "held_out_before": before,
        "held_out_after": after,
        "change": round(after - before, 9) if None not in (before, after) else None,
        "final_training_accuracy": sum(tail) / len(tail) if tail else None,
        "steps_to_target": next((step for step, value in zip(*smooth, strict=True) if value >= target > 0), None),
    }


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return {"mean": sum(known) / len(known), "min": min(known), "max": max(known)} if known else None


def _warnings(
    runs: Mapping[str, Sequence[RunRecord]], numbers: Mapping[str, Any], varied: Collection[str]
) -> Iterator[str]:
    jobs = [_flat(run.job) for group in runs.values() for run in group]
    sections = {".".join(key.split(".")[:2]) for key in varied}
    keys = {key for key in set().union(*jobs) - MAY_DIFFER if ".".join(key.split(".")[:2]) not in sections}
    if differing := sorted(key for key in keys if len({json.dumps(job.get(key), default=str) for job in jobs}) > 1):
        yield f"The jobs differ in more than arm and seed: {', '.join(differing)}."
    seeds = {arm: sorted(str(row["seed"]) for row in numbers["runs"] if row["arm"] == arm) for arm in runs}
    if len({tuple(group) for group in seeds.values()}) > 1:
        yield (
            "The arms have different seeds: "
            + "; ".join(f"{arm} {', '.join(group)}" for arm, group in seeds.items())
            + "."
        )
    sizes = [row["parameters"] for row in numbers["runs"] if row["parameters"]]
    if sizes and max(sizes) > 1.02 * min(sizes):
        yield f"The parameter counts differ by {max(sizes) / min(sizes) - 1:.1%}, more than 2 %."
    if unfinished := [f"{row['run']} (step {row['steps']})" for row in numbers["runs"] if not row["finished"]]:
        yield f"Not finished: {', '.join(unfinished)}; held-out 'after' is their latest evaluation."


def _flat(job: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in job.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _arm_table(numbers: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    target = numbers["target"]
    headings = ["arm", "parameters", "seeds", "held-out before", "held-out after", "change, points",
                "final training accuracy", f"steps to {target:.0%}" if target else "steps to target"]  # fmt: skip
    rows = []
    for arm, row in numbers["arms"].items():
        size = human_count(row["parameters"]) if row["parameters"] else DASH
        cells = [_range(row[key], *form) for key, form in FORMS.items()]
        rows.append([arm, size, str(row["seeds"]), *cells])
    return headings, rows


def _range(spread: Mapping[str, float] | None, form: str, scale: float, unit: str) -> str:
    """Mean, and in brackets the lowest and highest seed where they differ."""
    if spread is None:
        return DASH
    mean, low, high = (form.format(scale * spread[key]) for key in ("mean", "min", "max"))
    return f"{mean}{unit}" if low == high else f"{mean}{unit} ({low} to {high})"


def _run_cells(run: Row) -> list[str]:
    cells = [_range(_spread([run[key]]), *form) for key, form in FORMS.items()]
    seed = DASH if run["seed"] is None else str(run["seed"])
    return [run["arm"], run["run"], seed, str(run["steps"]), *cells]


def _notes(numbers: Mapping[str, Any]) -> list[str]:
    notes = [
        "Mean over seeds, in brackets the lowest and the highest seed. "
        "Final training accuracy: mean of the last tenth of the steps."
    ]
    if numbers["target"]:
        notes.append(
            f"{numbers['target']:.0%} is the highest multiple of 5 % that every run's training accuracy reached "
            f"(trailing mean over {numbers['window']} step{'s' * (numbers['window'] != 1)})."
        )
    return notes


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    rule = ["---", *["---:"] * (len(headings) - 1)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, rule, *rows))
    return "\n\n".join(["![curves](comparison.png)", table, *notes]) + "\n"
