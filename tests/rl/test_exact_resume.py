"""A run killed at any moment and resumed is, number by number, the run that nobody stopped."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_train import MEASURED_TIME

SEED = 20
KILLS = 10
VERIFIER = """
from deltarl.rewards import Verdict

class Digits:
    name, version = "digits", "1"

    def verify(self, response, gold, *, meta):
        share = sum(c.isdigit() for c in response) / max(1, len(response))
        return Verdict(share, "correct" if share > 0.2 else "incorrect", response)

def make_digits():
    return Digits()
"""
JOB = {
    "seed": 7,
    "model": {"vocab_size": 300},
    "data": {"train_size": 24, "heldout_size": 2},
    "sft": {"steps": 3, "batch_size": 2, "learning_rate": 3e-3, "max_length": 96},
    "rollout": {"engine": "hf", "max_model_len": 96, "max_num_seqs": 8},
    "rewards": {"verifier": "./digits.py:make_digits", "timeout": 5.0},
    "rl": {
        "steps": 5,
        "prompts_per_step": 3,
        "num_generations": 2,
        "minibatches": 3,
        "beta": 0.01,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "max_completion_length": 5,
        "checkpoint_every": 2,
    },
    "eval": {"every": 3, "temperature": 1.0},
}
# Runs `deltarl train` in forks of one process that has imported everything. Each line it reads: a signal's name or
# "none", when to send it (after so many seconds, or once a file is there), and the arguments. It answers with exit code
# and seconds.
STARTER = """
import os, signal, sys, time
import deltarl.rl.train, deltarl.rollout.hf_worker, deltarl.rl.sft
from deltarl.rl.cli import main
for line in sys.stdin:
    name, when, *arguments = line.split()
    child, began = os.fork(), time.perf_counter()
    if child == 0:
        os._exit(main(["train", *arguments]))
    if when.startswith("/"):
        while not os.path.exists(when):
            time.sleep(0.01)
    else:
        time.sleep(float(when))
    if name != "none":
        os.kill(child, getattr(signal, name))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, time.perf_counter() - began, flush=True)
"""


class Starter:
    """Runs `deltarl train` again and again in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def train(self, *arguments: str, stop: str = "none", when: float | Path = 0.0) -> tuple[int, float]:
        """Exit code, and seconds that it took."""
        print(stop, when, *arguments, file=self.process.stdin, flush=True)
        code, seconds = self.process.stdout.readline().split()
        return int(code), float(seconds)

    def said(self) -> str:
        """The end of what the runs have written to stderr."""
        return (self.folder / "log").read_text()[-5000:]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def rows(run: Path, *kinds: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if row["kind"] in kinds]
    return [{key: value for key, value in row.items() if key not in MEASURED_TIME} for row in found]


@pytest.fixture(scope="module")
def starter(tmp_path_factory) -> Starter:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "digits.py").write_text(VERIFIER)
    (folder / "job.yaml").write_text(yaml.safe_dump(JOB))
    starter = Starter(folder)
    yield starter
    starter.close()


@pytest.fixture(scope="module")
def whole(starter) -> tuple[Path, float]:
    """A run that nobody stopped, and the seconds that it took."""
    code, seconds = starter.train("job.yaml", "--set", "name=whole")
    assert code == 0, starter.said()
    return starter.folder / "runs" / "whole", seconds


def test_a_run_killed_ten_times_is_the_run_nobody_killed(starter, whole):
    """Each start is killed at a moment drawn from the length of a whole run. Then one ends the run; then its last
    checkpoint is damaged, and the steps since the one before are repeated."""
    expected, seconds = whole
    run = starter.folder / "runs" / "killed"
    moments = random.Random(SEED)
    for _ in range(KILLS):
        resumed = ["--resume", str(run)] if (run / "job.yaml").is_file() else ["job.yaml", "--set", "name=killed"]
        code, _ = starter.train(*resumed, stop="SIGKILL", when=moments.uniform(0.05, 0.35) * seconds)
        assert code in (0, -signal.SIGKILL), starter.said()
    code, _ = starter.train("--resume", str(run))
    assert code == 0, starter.said()
    same_run(run, expected)

    weights = run / "checkpoints" / "5" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    code, _ = starter.train("--resume", str(run))
    assert code == 0, starter.said()
    assert "checkpoint 5 is damaged" in starter.said() and "going on with checkpoint 4" in starter.said()
    assert [row["step"] for row in rows(run, "event") if row["what"] == "damaged_checkpoint"] == [5]
    same_run(run, expected)


def same_run(run: Path, expected: Path) -> None:
    assert rows(run, "sft", "rl", "eval") == rows(expected, "sft", "rl", "eval")
    last = Path("checkpoints") / str(JOB["rl"]["steps"])
    for name in ("model.safetensors", "optimizer.pt"):
        assert (run / last / name).read_bytes() == (expected / last / name).read_bytes(), name
    for traces in (expected / "traces").iterdir():
        assert (run / "traces" / traces.name).read_bytes() == traces.read_bytes(), traces.name


def test_a_run_stopped_between_two_updates_goes_on_there(starter, whole):
    """The traces of a step are written before its first update; the stop comes before its last."""
    expected, _ = whole
    run = starter.folder / "runs" / "stopped"
    arguments = ["job.yaml", "--set", "name=stopped"]
    code, _ = starter.train(*arguments, stop="SIGINT", when=run / "traces" / "step_00003.jsonl")
    assert code == 130, starter.said()
    (inside,) = (run / "window" / "checkpoints").iterdir()
    assert 6 < int(inside.name) < 9, "in the third step, of three updates each"
    assert len(rows(run, "rl")) == 2
    code, _ = starter.train("--resume", str(run))
    assert code == 0, starter.said()
    same_run(run, expected)
    assert not (run / "window").exists(), "of no use any more"
