"""`deltarl compare`: which runs it makes of a comparison file, and that two arms and their report come out of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deltarl.rl.cli import main

BASE = {
    "data": {"train_size": 30, "heldout_size": 4},
    "sft": {"steps": 2, "batch_size": 4},
    "rollout": {"max_model_len": 64, "max_num_seqs": 8},
    "rl": {
        "steps": 2,
        "prompts_per_step": 2,
        "num_generations": 2,
        "token_budget": 400,
        "max_completion_length": 8,
    },
    "eval": {"every": 1},
}
COMPARISON = {"base": "base.yaml", "arms": ["kda", "mla"], "seeds": [3], "set": {"rl.learning_rate": 1e-4}}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(yaml.safe_dump(BASE))
    Path("two.yaml").write_text(yaml.safe_dump(COMPARISON))
    return tmp_path


def test_runs_differ_in_arm_and_seed_alone(folder, capsys):
    assert main(["compare", "two.yaml", "--set", "seeds=[3, 4]", "--set", "set.rl.steps=5", "--dry-run"]) == 0
    jobs = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [(job["model"]["arm"], job["seed"]) for job in jobs] == [("kda", 3), ("kda", 4), ("mla", 3), ("mla", 4)]
    assert {(job["rl"]["steps"], job["rl"]["learning_rate"]) for job in jobs} == {(5, 1e-4)}
    rest = {yaml.safe_dump({**job, "seed": 0, "name": "", "model": {**job["model"], "arm": ""}}) for job in jobs}
    assert len(rest) == 1


def test_variants_differ_in_what_they_set(folder, capsys):
    variants = {"grpo": {"rl.algorithm": "grpo"}, "ppo": {"rl.algorithm": "ppo", "rl.critic": {"kind": "head"}}}
    Path("three.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "variants": variants, "seeds": [0, 1]}))
    assert main(["compare", "three.yaml", "--dry-run"]) == 0
    jobs = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [(job["name"], job["rl"]["algorithm"]) for job in jobs] == [
        ("grpo-s0", "grpo"), ("grpo-s1", "grpo"), ("ppo-s0", "ppo"), ("ppo-s1", "ppo"),
    ]  # fmt: skip
    assert jobs[0]["rl"]["critic"] is None and jobs[2]["rl"]["critic"]["kind"] == "head"


@pytest.mark.parametrize("override", ["variants.a.seed=1", "arms=[kda]", "arms=[]"])
def test_arms_or_variants_two_at_least(folder, capsys, override):
    assert main(["compare", "two.yaml", "--set", override]) == 2
    assert "give arms or variants, one of them and at least two" in capsys.readouterr().err


def test_unknown_arm_is_refused_before_any_run(folder, capsys):
    assert main(["compare", "two.yaml", "--set", "arms=[kda, rnn]"]) == 2
    assert "known arms are gdn, kda, kda-1:1, kda-7:1, mla, mla-rope" in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_both_arms_are_trained_and_drawn(folder):
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "deltarl", "compare", "two.yaml"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    out = folder / "runs" / "two"
    assert (out / "comparison.html").is_file() and (out / "comparison.png").is_file()
    numbers = json.loads((out / "comparison.json").read_text())
    sizes = [numbers["arms"][arm]["parameters"] for arm in ("kda", "mla")]
    assert abs(sizes[0] - sizes[1]) <= 0.02 * sizes[0]
    asked = [
        [
            json.loads(line)["problem_id"]
            for line in (out / f"{arm}-s3/traces/step_00002.jsonl").read_text().splitlines()
        ]
        for arm in ("kda", "mla")
    ]
    assert asked[0] == asked[1], "both arms are asked the same problems in the same order"
