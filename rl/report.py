"""The report of a run: one HTML file with everything in it, readable offline and after an interruption."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deltarl.rl.comparison import write_comparison
from deltarl.rl.metrics import PHASES, STATUSES, Row, RunRecord, load_run, read_jsonl, series, totals
from deltarl.rl.page import DASH, TEMPLATES, embedded, write_atomically
from deltarl.rl.plots import draw_run, human_count

__all__ = ["write_comparison", "write_report"]

SHOWN_STATUSES = ("correct", "incorrect", "no_answer", "error", "timeout", "limit", "gold_error")
TRACE_FILES_PER_END = 3
TEXT_LIMIT = 4000
TRACE_FACTS = (
    ("step", "step", "{}"),
    ("task", "task", "{}"),
    ("problem_id", "problem", "{}"),
    ("gold", "gold", "{}"),
    ("extracted", "graded", "{}"),
    ("reward", "reward", "{:g}"),
    ("advantage", "advantage", "{:+.2f}"),
    ("n_tokens", "tokens", "{}"),
    ("finish_reason", "ended by", "{}"),
    ("weight_version", "weights", "version {}"),
)


def write_report(run_dir: str | Path) -> Path:
    """Draw the run's pictures and write report.html into its folder; an unfinished run is shown as far as it got.

    The file replaces an earlier one at once, or not at all.  UserError when `run_dir` is no run folder.
    """
    run = load_run(run_dir)
    pictures = draw_run(run.folder)
    steps = run.of("rl")
    job_file = run.folder / "job.yaml"
    page = TEMPLATES.get_template("report.html").render(
        run=run,
        subtitle=_subtitle(run),
        headline=_headline(run),
        warnings=list(_warnings(run)),
        picture=embedded(pictures[0]) if pictures else None,
        times=_bars(totals(steps, "time", PHASES), "{:,.1f}"),
        time_note=_time_note(steps),
        verdicts=_bars(totals(steps, "verdicts", STATUSES), "{:,.0f}"),
        evals=[_eval_cells(row, _tasks(run)) for row in run.evals],
        tasks=_tasks(run),
        traces=[_trace_card(trace) for trace in sample_traces(run.folder / "traces")],
        about=_about(run),
        events=run.events,
        job_yaml=job_file.read_text(encoding="utf-8") if job_file.exists() else None,
    )
    return write_atomically(run.folder / "report.html", page)


def arm_of(run: RunRecord) -> str:
    """The arm of a model built from scratch, else the path of the one that was loaded."""
    model = run.job.get("model") or {}
    return run.about.get("arm") or model.get("path") or model.get("arm") or "model"


def sample_traces(folder: Path) -> list[Row]:
    """For each status one trace of the earliest steps and one of the latest that have it, early before late."""
    files = sorted(folder.glob("step_*.jsonl"))
    early = files[:TRACE_FILES_PER_END]
    late = files[len(early) :][-TRACE_FILES_PER_END:]
    chosen = []
    for end in (early, late[::-1]):
        first_of: dict[str, Row] = {}
        for file in end:
            for row in read_jsonl(file):
                first_of.setdefault(row.get("status", ""), row)
        chosen += [first_of[status] for status in SHOWN_STATUSES if status in first_of]
    return chosen


def _subtitle(run: RunRecord) -> str:
    about, steps = run.about, run.of("rl")
    planned = (run.job.get("rl") or {}).get("steps")
    done = steps[-1]["step"] if steps else 0
    parts = [arm_of(run)]
    if about.get("parameters"):
        parts.append(f"{human_count(about['parameters'])} parameters")
    if "seed" in run.job:
        parts.append(f"seed {run.job['seed']}")
    parts.append(f"{done} of {planned} RL steps" if planned is not None else f"{done} RL steps")
    parts.append("finished" if run.eval_at("after") else "not finished")
    return " · ".join(parts)


def _headline(run: RunRecord) -> dict[str, Any]:
    before, latest = run.eval_at("before"), run.last_eval
    head: dict[str, Any] = {"before": None, "latest": None, "change": None, "note": "No held-out evaluation yet."}
    if before and before.get("accuracy") is not None:
        head |= {"before": _with_error(before), "note": _eval_note(before)}
    if latest and latest.get("accuracy") is not None:
        label = "after RL" if latest["stage"] == "after" else f"at RL step {latest['step']}"
        head |= {
            "latest": _with_error(latest),
            "latest_label": f"held-out accuracy {label}",
            "note": _eval_note(latest),
        }
    if head["before"] and head["latest"]:
        change, error = _change(before, latest)
        head["change"] = f"{change:+.1f}" + (f" ± {error:.1f}" if error is not None else "")
        head["direction"] = "up" if change > 0 else "down" if change < 0 else ""
    return head


def _change(before: Row, after: Row) -> tuple[float, float | None]:
    """Difference in points, and its standard error as if the two evaluations had been on different problems."""
    change = 100 * (after["accuracy"] - before["accuracy"])
    if before.get("stderr") is None or after.get("stderr") is None:
        return change, None
    return change, 100 * (before["stderr"] ** 2 + after["stderr"] ** 2) ** 0.5


def _with_error(row: Row) -> str:
    error = f" ± {100 * row['stderr']:.1f}" if row.get("stderr") is not None else ""
    return f"{100 * row['accuracy']:.1f}{error} %"


def _eval_note(row: Row) -> str:
    parts = [f"n = {row['n']} held-out problems"] if row.get("n") else []
    if row.get("samples_per_problem"):
        parts.append(f"{row['samples_per_problem']} sample{'s' * (row['samples_per_problem'] != 1)} each")
    if row.get("temperature") is not None:
        parts.append("greedy" if row["temperature"] == 0 else f"temperature {row['temperature']:g}")
    return ", ".join(parts)


def _warnings(run: RunRecord) -> Iterator[str]:
    steps = run.of("rl")
    recent = steps[-max(5, len(steps) // 10) :]
    counts = totals(steps, "verdicts", STATUSES)
    failed = counts.get("error", 0) + counts.get("timeout", 0) + counts.get("limit", 0)
    if failed > 0.01 * sum(counts.values()):
        share = failed / sum(counts.values())
        yield f"The verifier failed on {share:.1%} of the samples (error, timeout or limit); look at their traces."
    if counts.get("gold_error"):
        yield f"{counts['gold_error']:,.0f} samples had a gold answer that does not parse and taught nothing."
    gap = _mean(series(recent, "logp_gap_mean")[1])
    dtype = run.about.get("dtype") or (run.job.get("model") or {}).get("dtype")
    limit = 1e-3 if dtype == "float32" else 5e-2
    if gap is not None and gap > limit:
        yield (
            f"Trainer and engine disagree by {gap:.2g} nats per token on average (last {len(recent)} steps; at most "
            f"{limit:g} is usual in {dtype or 'low precision'}): the samples are off-policy."
        )
    truncated = _mean(series(recent, "truncated")[1])
    if truncated is not None and truncated > 0.1:
        yield f"{truncated:.0%} of the latest responses hit the length limit: raise rl.max_completion_length."
    flat = _mean(series(recent, "frac_zero_std")[1])
    if flat is not None and flat > 0.8:
        yield f"{flat:.0%} of the latest groups have equal rewards and teach nothing: change the problems' difficulty."
    bad = [row["step"] for row in steps if any(key in row and row[key] is None for key in ("loss", "grad_norm"))]
    if bad:
        yield f"Loss or gradient norm was not finite in {len(bad)} steps, first in step {bad[0]}."
    before, after = run.eval_at("before"), run.eval_at("after")
    if after is None:
        yield "The run is not finished; go on with deltarl train --resume."
    elif before and None not in (before.get("accuracy"), after.get("accuracy")):
        change, error = _change(before, after)
        if error is not None and abs(change) < 2 * error:
            yield "The change in held-out accuracy is less than two standard errors: it may be chance."


def _bars(sums: dict[str, float], form: str) -> list[dict[str, Any]]:
    whole, largest = sum(sums.values()) or 1, max(sums.values(), default=0) or 1
    return [
        {
            "name": name,
            "value": form.format(value),
            "share": f"{value / whole:.1%}",
            "width": 100 * value / largest,
        }
        for name, value in sums.items()
    ]


def _time_note(steps: list[Row]) -> str:
    timed = [sum(value or 0 for value in row["time"].values()) for row in steps if row.get("time")]
    parts = [f"{len(timed)} steps of {_mean(timed):.2f} s on average"] if timed else []
    rate = _mean(series(steps, "tokens_per_second")[1])
    if rate is not None:
        parts.append(f"{rate:,.0f} tokens/s while generating")
    return "; ".join(parts)


def _tasks(run: RunRecord) -> list[str]:
    return sorted({task for row in run.evals for task in row.get("by_task") or {}})


def _eval_cells(row: Row, tasks: list[str]) -> list[str]:
    by_task = row.get("by_task") or {}
    accuracies = [by_task.get(task, {}).get("accuracy") for task in tasks]
    return [
        str(row["step"]),
        row.get("stage", ""),
        str(row.get("n", "")),
        _or_dash(row.get("accuracy"), "{:.1%}"),
        _or_dash(row.get("stderr"), "{:.1%}"),
        _or_dash(row.get("length_mean"), "{:.1f}"),
        *(_or_dash(accuracy, "{:.1%}") for accuracy in accuracies),
    ]


def _trace_card(trace: Row) -> dict[str, Any]:
    facts = [(name, form.format(trace[key])) for key, name, form in TRACE_FACTS if trace.get(key) is not None]
    return {
        "status": trace.get("status", ""),
        "facts": facts,
        "prompt": _clipped(trace.get("prompt") or ""),
        "response": _clipped(trace.get("response") or ""),
    }


def _clipped(text: str) -> str:
    if len(text) <= TEXT_LIMIT:
        return text
    return f"{text[:TEXT_LIMIT]}\n… {len(text) - TEXT_LIMIT:,} more characters"


def _about(run: RunRecord) -> list[tuple[str, str]]:
    about = run.about
    facts = [("arm" if about.get("arm") else "model", arm_of(run))]
    if about.get("parameters"):
        facts.append(("parameters", f"{about['parameters']:,}"))
    facts += [(key, str(about[key])) for key in ("size", "dtype", "device", "engine") if about.get(key)]
    return facts + sorted((about.get("versions") or {}).items())


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _or_dash(value: float | None, form: str) -> str:
    return DASH if value is None else form.format(value)
