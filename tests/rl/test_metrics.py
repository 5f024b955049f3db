"""metrics.jsonl: what is written comes back, a kill costs one row at most, and a resume forgets what it repeats."""

import json
import math
import os

import numpy
import pytest

from deltarl.rl.errors import UserError
from deltarl.rl.metrics import MetricsLog, load_run, read_metrics, series, totals

ROWS = [
    {"kind": "run", "arm": "kda", "size": "2m", "parameters": 2_047_360, "versions": {"torch": "2.13.0"}},
    {"kind": "sft", "step": 10, "loss": 1.25, "learning_rate": 3e-4, "tokens": 4096, "seconds": 0.5},
    {"kind": "eval", "step": 0, "stage": "before", "n": 200, "accuracy": 0.3, "by_task": {"chain_sum": {"n": 200}}},
    {"kind": "rl", "step": 1, "accuracy": 0.25, "kl": None, "verdicts": {"correct": 1, "incorrect": 3}},
    {"kind": "rl", "step": 2, "accuracy": 0.5, "kl": 0.01, "verdicts": {"correct": 2, "no_answer": 2}},
    {"kind": "eval", "step": 2, "stage": "during", "n": 200, "accuracy": 0.4},
    {"kind": "event", "step": 2, "what": "checkpoint", "detail": "checkpoints/2"},
    {"kind": "rl", "step": 3, "accuracy": 0.75, "kl": 0.02},
    {"kind": "eval", "step": 3, "stage": "after", "n": 200, "accuracy": 0.6},
]


@pytest.fixture
def path(tmp_path):
    with MetricsLog(tmp_path / "run" / "metrics.jsonl") as log:
        for row in ROWS:
            log.append(row)
    return tmp_path / "run" / "metrics.jsonl"


def test_rows_come_back_as_written(path):
    assert read_metrics(path) == ROWS


def test_rows_are_on_disk_before_the_log_is_closed(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(ROWS[0])
    assert read_metrics(tmp_path / "metrics.jsonl") == ROWS[:1]
    log.close()


def test_non_finite_numbers_become_null_and_scalars_of_libraries_become_numbers(tmp_path):
    row = {"kind": "rl", "step": 1, "loss": math.nan, "kl": numpy.float32("inf"), "time": {"sync": -math.inf}}
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.append({**row, "grad_norm": numpy.float32(0.5), "length_max": numpy.int64(7), "lengths": (1, math.nan)})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    stored = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert stored == {
        "kind": "rl", "step": 1, "loss": None, "kl": None, "time": {"sync": None},
        "grad_norm": 0.5, "length_max": 7, "lengths": [1, None],
    }  # fmt: skip


@pytest.mark.parametrize(
    "row", [{"kind": "train", "step": 1}, {"step": 1}, {"kind": "rl"}, {"kind": "rl", "step": 1.5}]
)
def test_a_row_without_known_kind_or_step_is_refused_and_not_written(path, row):
    with MetricsLog(path) as log, pytest.raises(ValueError, match="must be"):
        log.append(row)
    assert read_metrics(path) == ROWS


def test_a_line_cut_by_a_kill_is_reported_by_the_reader(path):
    os.truncate(path, path.stat().st_size - 20)
    *rows, event = read_metrics(path)
    assert rows == ROWS[:-1]
    assert event["what"] == "torn_line" and "cut" in event["detail"]


def test_a_whole_looking_last_line_without_newline_counts_as_cut(path):
    os.truncate(path, path.stat().st_size - 1)
    assert [row["kind"] for row in read_metrics(path)][-2:] == ["rl", "event"]


def test_a_log_opened_on_a_cut_file_goes_on_with_a_fresh_line(path):
    os.truncate(path, path.stat().st_size - 20)
    with MetricsLog(path) as log:
        log.append(ROWS[-1])
    rows = read_metrics(path)
    assert [row for row in rows if row.get("what") != "torn_line"] == ROWS
    assert sum(row.get("what") == "torn_line" for row in rows) == 1


def test_damage_before_the_last_line_is_an_error_that_names_the_line(path):
    lines = path.read_text().splitlines()
    lines[3] = lines[3][:-5]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="line 4"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("stage", "step", "kept"),
    [("rl", 2, [0, 1, 2, 3, 4, 5, 6]), ("rl", 0, [0, 1, 2, 6]), ("sft", 10, [0, 1, 6]), ("sft", 5, [0, 6])],
)
def test_resume_forgets_what_will_be_measured_again(path, stage, step, kept):
    with MetricsLog(path) as log:
        log.truncate_after(stage, step)
        log.append({"kind": "event", "step": step, "what": "resumed"})
    assert read_metrics(path)[:-1] == [ROWS[i] for i in kept]
    assert read_metrics(path)[-1]["what"] == "resumed"
    assert sorted(p.name for p in path.parent.iterdir()) == ["metrics.jsonl"]


def test_run_record_takes_the_last_row_of_a_repeated_step(path):
    with MetricsLog(path) as log:
        log.append({"kind": "rl", "step": 3, "accuracy": 0.8, "kl": None})
    run = load_run(path.parent)
    assert series(run.of("rl"), "accuracy") == ([1, 2, 3], [0.25, 0.5, 0.8])
    assert series(run.of("rl"), "kl") == ([2], [0.01])
    assert totals(run.of("rl"), "verdicts", ("correct", "incorrect")) == {"correct": 3, "incorrect": 3, "no_answer": 2}
    assert (run.eval_at("before")["accuracy"], run.eval_at("after")["accuracy"]) == (0.3, 0.6)
    assert run.about["parameters"] == 2_047_360


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        load_run(tmp_path)
