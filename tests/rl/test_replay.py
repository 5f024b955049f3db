"""Steps of which nothing finite comes: left out, counted, kept, looked into; too many in a row end the run."""

import json
from pathlib import Path

import torch
import yaml

from deltarl.rl.cli import main
from deltarl.rl.guard import Guard

# A reward that float32 cannot hold makes advantages that are not finite; it comes for responses of some lengths.
VERIFIER = """
from deltarl.rewards import Verdict

class Huge:
    name, version = "huge", "1"

    def __init__(self, modulus):
        self.modulus = modulus

    def verify(self, response, gold, *, meta):
        return Verdict(0.5 if len(response) % self.modulus else 1e39, "correct", response)

def {name}():
    return Huge({modulus})
"""
JOB = {
    "seed": 3,
    "model": {"vocab_size": 300},
    "data": {"train_size": 12, "heldout_size": 2},
    "rollout": {"engine": "hf", "max_model_len": 96, "max_num_seqs": 8},
    "rl": {
        "steps": 3,
        "prompts_per_step": 2,
        "num_generations": 2,
        "scale_rewards": "none",
        "max_completion_length": 6,
        "checkpoint_every": 1,
        "max_skipped": 3,
    },
    "eval": {"every": 0},
}


def run_job(folder: Path, modulus: int, **rl) -> tuple[int, Path]:
    name = f"huge_{modulus}"
    (folder / "huge.py").write_text(VERIFIER.format(name=name, modulus=modulus))
    job = {**JOB, "name": "run", "runs_dir": str(folder / "runs"), "rl": {**JOB["rl"], **rl}}
    job["rewards"] = {"verifier": f"{folder / 'huge.py'}:{name}"}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return main(["train", str(folder / "job.yaml")]), folder / "runs" / "run"


def rows(run: Path, kind: str) -> list[dict]:
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def test_a_run_without_finite_steps_stops_with_its_last_checkpoint_named(tmp_path, capsys):
    code, run = run_job(tmp_path, modulus=1, steps=9)
    last = capsys.readouterr().err.splitlines()[-1]
    assert code == 3, last
    assert "3 in a row" in last and str(run / "checkpoints" / "2") in last and "deltarl replay" in last
    assert [row["skipped"] for row in rows(run, "rl")] == [1, 1]
    assert [row["loss"] for row in rows(run, "rl")] == [None, None]
    first, later = (torch.load(run / "checkpoints" / step / "optimizer.pt")["state"] for step in ("1", "2"))
    assert first == later == {}, "the optimizer never moved"

    assert main(["replay", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "RL step 3: 4 traces" in said[0]
    assert "loss nan" in said[1] or "loss inf" in said[1]
    assert sum("not finite: advantages of all tokens" in line for line in said) == 4
    assert main(["replay", str(run / "nonfinite" / "1")]) == 0


def test_a_step_that_is_left_out_changes_nothing_and_the_run_goes_on(tmp_path, capsys):
    code, run = run_job(tmp_path, modulus=7, steps=6, max_skipped=6)
    assert code == 0
    skipped = {row["step"]: row["skipped"] for row in rows(run, "rl")}
    events = [row["step"] for row in rows(run, "event") if row["what"] == "skipped_update"]
    assert events == [step for step, number in skipped.items() if number]
    assert 0 < len(events) < 6, "choose another seed: all steps were alike"
    kept = sorted(int(entry.name) for entry in (run / "nonfinite").iterdir())
    assert kept == events
    capsys.readouterr()


def test_a_warm_up_that_blows_up_stops(tmp_path, capsys):
    job = {**JOB, "name": "run", "runs_dir": str(tmp_path), "sft": {"steps": 9, "batch_size": 2, "learning_rate": 1e30}}
    job["sft"] |= {"warmup_steps": 0, "max_length": 64}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    assert main(["sft", str(tmp_path / "job.yaml")]) == 3
    assert "stopped in SFT step 4" in capsys.readouterr().err.splitlines()[-1]
    assert [row["skipped"] for row in rows(tmp_path / "run", "sft")] == [0, 1, 1]


def test_replay_names_what_it_needs(tmp_path, capsys):
    assert main(["replay", str(tmp_path)]) == 2
    assert "no batch to replay" in capsys.readouterr().err


def test_guard_drops_gradients_that_are_not_finite():
    model = torch.nn.Linear(2, 1)
    guard = Guard(limit=2)
    for bad in (torch.nan, torch.inf):
        model.weight.grad, model.bias.grad = torch.tensor([[1.0, bad]]), torch.ones(1)
        assert not guard.passes([model], torch.tensor(0.0))
        assert model.weight.grad is None and model.bias.grad is None
    assert guard.exhausted and guard.take() == 2 and guard.take() == 0
    model.weight.grad = torch.ones(1, 2)
    assert not guard.passes([model], torch.tensor(torch.nan)), "the loss counts too"
    model.weight.grad = torch.ones(1, 2)
    assert guard.passes([model], torch.tensor(1.0))
    assert guard.in_a_row == 0 and not guard.exhausted and model.weight.grad is not None
