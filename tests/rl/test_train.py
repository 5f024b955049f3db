"""Whole runs on the real engine, as a user starts them: what they leave behind, how they stop, how they go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

STEPS = 4
JOB = {
    "seed": 5,
    "data": {"train_size": 40, "heldout_size": 6},
    "sft": {"steps": 12, "batch_size": 8, "learning_rate": 3e-3},
    "rollout": {"max_model_len": 96, "max_num_seqs": 16, "record": True},
    "rl": {
        "steps": STEPS,
        "prompts_per_step": 4,
        "num_generations": 4,
        "token_budget": 400,
        "minibatches": 2,
        "beta": 0.01,
        "learning_rate": 1e-3,
        "max_completion_length": 24,
        "checkpoint_every": 3,
    },
    "eval": {"every": 2, "temperature": 1.0},
}
# A verifier that rewards something a barely trained model does now and then, and fails on a few traces.
VERIFIER = '''
from deltarl.rewards import Verdict

class Digits:
    """Rewards digits; raises on responses with a q, hangs on responses with a z."""
    name, version = "digits", "1"

    def verify(self, response, gold, *, meta):
        if "q" in response:
            raise RuntimeError("no q please")
        while "z" in response:
            pass
        share = sum(c.isdigit() for c in response) / max(1, len(response))
        return Verdict(share, "correct" if share > 0.2 else "incorrect", response)

def make_digits():
    return Digits()
'''
MEASURED_TIME = {"time", "overlap", "tokens_per_second", "seconds"}


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "deltarl", "train", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    _, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    return err


def rows(run: Path, *kinds: str) -> list[dict]:
    """Rows of those kinds without the keys that measure time."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if row["kind"] in kinds]
    return [{key: value for key, value in row.items() if key not in MEASURED_TIME} for row in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    (folder / "digits.py").write_text(VERIFIER)
    rewards = {"verifier": "./digits.py:make_digits", "timeout": 0.5}
    (folder / "job.yaml").write_text(yaml.safe_dump({**JOB, "rewards": rewards}))
    return folder


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """A run that nobody stopped."""
    finish(start(folder, "job.yaml", "--set", "name=whole"))
    return folder / "runs" / "whole"


def test_run_folder_is_complete(whole):
    names = {path.name for path in whole.iterdir()}
    assert {"job.yaml", "metrics.jsonl", "report.html", "overview.png", "traces", "eval", "checkpoints"} <= names
    assert [row["step"] for row in rows(whole, "rl")] == list(range(1, STEPS + 1))
    assert [(row["step"], row["stage"]) for row in rows(whole, "eval")] == [(0, "before"), (2, "during"), (4, "after")]
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {"0", "3", "4"}


def test_every_trace_is_on_record(whole):
    for step in range(1, STEPS + 1):
        traces = [json.loads(line) for line in (whole / "traces" / f"step_{step:05d}.jsonl").read_text().splitlines()]
        row = rows(whole, "rl")[step - 1]
        assert len(traces) == 16
        assert {trace["weight_version"] for trace in traces} == {step - 1}
        assert sum(trace["n_tokens"] for trace in traces) == row["tokens_generated"]
        assert sum(row["verdicts"].values()) == 16
        for first in range(0, 16, 4):
            group = traces[first : first + 4]
            assert len({trace["problem_id"] for trace in group}) == 1
            assert abs(sum(trace["advantage"] for trace in group)) < 1e-3, "group advantages are centred"
            better = max(group, key=lambda trace: trace["reward"])
            assert better["advantage"] == max(trace["advantage"] for trace in group)


def test_verifier_failures_cost_their_own_trace_only(whole):
    traces = [json.loads(line) for path in (whole / "traces").iterdir() for line in path.read_text().splitlines()]
    for trace in traces:
        expected = "error" if "q" in trace["response"] else "timeout" if "z" in trace["response"] else None
        assert expected is None or trace["status"] == expected
        assert expected is not None or trace["status"] in ("correct", "incorrect")
    counted = [row["verdicts"] for row in rows(whole, "rl")]
    for status in ("error", "timeout"):
        assert sum(c.get(status, 0) for c in counted) == sum(trace["status"] == status for trace in traces)


def test_learner_and_engine_are_the_same_model(whole):
    for row in rows(whole, "rl"):
        assert row["logp_gap_mean"] < 1e-5, "fp32 on both sides"
        assert row["logp_gap_max"] < 1e-4


def test_policy_moves_away_from_where_rl_began(whole):
    kl = [row["kl"] for row in rows(whole, "rl")]
    assert 0 <= kl[0] < kl[-1]


def test_a_recorded_run_is_learned_from_again_number_by_number(folder, whole):
    replay = ["rollout.record=false", f"rollout.replay={whole}", "name=again"]
    err = finish(start(folder, "job.yaml", *(part for key in replay for part in ("--set", key))))
    assert "starting the rollout engine" not in err
    assert rows(folder / "runs" / "again", "rl") == rows(whole, "rl")


def test_asynchronous_run_learns_from_tokens_of_several_versions(folder):
    ahead = [
        "rollout.max_staleness=1",
        "rollout.placement=process",
        "rollout.alarm.is_ess=0.999999",
        "rollout.alarm.logp_gap_mean=1e-9",
        "name=ahead",
    ]
    err = finish(start(folder, "job.yaml", *(part for key in ahead for part in ("--set", key))))
    run = folder / "runs" / "ahead"
    steps = rows(run, "rl")
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert all(0 <= row["staleness_max"] <= 1 for row in steps)
    assert any(row["staleness_mean"] > 0 for row in steps)
    assert len(rows(run, "eval")) == 3
    alarms = [row["detail"] for row in rows(run, "event") if row["what"] == "mismatch"]
    assert len(alarms) <= STEPS + 1 and any("over rollout.alarm.logp_gap_mean = 1e-09" in line for line in alarms)
    assert all(line in err for line in alarms)


@pytest.mark.parametrize("stop_at", ["sft", "rl"])
def test_interrupted_run_goes_on_as_if_it_had_not_been(folder, whole, stop_at):
    name = f"stopped-{stop_at}"
    run = folder / "runs" / name
    process = start(folder, "job.yaml", "--set", f"name={name}")
    wait_for_row(process, run / "metrics.jsonl", stop_at)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err[-3000:]
    assert f"deltarl train --resume runs/{name}" in err.splitlines()[-1]
    assert (run / "report.html").is_file()
    assert not list(run.glob("**/.*.tmp")), "nothing half-written"
    assert len(rows(run, "rl")) < STEPS, "stopped before its end"

    finish(start(folder, "--resume", f"runs/{name}"))
    assert rows(run, "sft", "rl", "eval") == rows(whole, "sft", "rl", "eval")
    assert (run / "traces" / "step_00004.jsonl").read_bytes() == (whole / "traces" / "step_00004.jsonl").read_bytes()


def wait_for_row(process: subprocess.Popen, metrics: Path, kind: str) -> None:
    while process.poll() is None:
        if metrics.exists() and f'"kind": "{kind}"' in metrics.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(process.communicate()[1][-3000:])


def test_a_run_whose_engine_is_killed_is_the_same_run(folder, whole):
    arguments = ["job.yaml", "--set", "name=killed", "--set", "rollout.placement=process"]
    process = start(folder, *arguments)
    run = folder / "runs" / "killed"
    wait_for_row(process, run / "metrics.jsonl", "rl")
    (engine,) = [pid for pid in children(process.pid) if "engine_process" in command_line(pid)]
    os.kill(engine, signal.SIGKILL)
    finish(process)
    (event,) = [row for row in rows(run, "event") if row["what"] == "engine restarted"]
    assert "signal SIGKILL" in event["detail"]
    for row, expected in zip(rows(run, "rl", "eval"), rows(whole, "rl", "eval"), strict=True):
        assert same(row, expected), (row, expected)


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def same(found: object, expected: object) -> bool:
    """Equal up to rounding, which depends on what else is in an engine's batch."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == (pytest.approx(expected, rel=1e-3, abs=1e-5) if isinstance(expected, float) else expected)
