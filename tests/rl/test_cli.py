"""Bad input through the command line: one line that names the fix, exit code 2, nothing written."""

import json
from pathlib import Path

import pytest
import yaml

from deltarl.model import build_model
from deltarl.rl.cli import main
from deltarl.rollout import engine

GOOD_ROWS = [{"question": f"What is {n}+{n}?", "answer": f"{n}+{n}={2 * n}. #### {2 * n}"} for n in range(20)]


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Writes a job over a small .jsonl; returns the function that runs it and gives (exit code, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(capsys, rows=GOOD_ROWS, command="train", **sections):
        Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {"data": {"source": "data.jsonl", "heldout_size": 4}, "sft": {"steps": 1}}
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        Path("job.yaml").write_text(yaml.safe_dump(values))
        code = main([command, "job.yaml"])
        return code, capsys.readouterr().err

    return run


CASES = {
    "missing file": ({"data": {"source": "none.jsonl"}}, "data file none.jsonl does not exist"),
    "no source": ({"data": {"source": "numbers"}}, "neither procedural, a .jsonl file, nor a hub name"),
    "unknown key": ({"rl": {"stepz": 1}}, "did you mean rl.steps?"),
    "unknown arm": ({"model": {"arm": "mamba"}}, "unknown arm 'mamba': known arms are gdn, kda, kda-1:1"),
    "unknown size": ({"model": {"size": "3t"}}, "known sizes are"),
    "model folder missing": ({"model": {"path": "nowhere"}}, "nowhere"),
    "long prompts": ({"rl": {"max_completion_length": 250}}, "set rollout.max_model_len to"),
    "unknown verifier": ({"rewards": {"verifier": "mth"}}, "math"),
    "verifier file missing": ({"rewards": {"verifier": "./none.py:make"}}, "none.py"),
    "verifier option": ({"rewards": {"verifier": "math", "options": {"strictt": True}}}, "strictt"),
    "unknown sft source": ({"sft": {"sources": [{"name": "wiki"}]}}, "known sources: solutions, chat"),
    "too few problems": ({"data": {"heldout_size": 50}}, "lower data.heldout_size"),
}


@pytest.mark.parametrize(("sections", "says"), CASES.values(), ids=CASES)
def test_refused(job, capsys, sections, says):
    code, err = job(capsys, **sections)
    lines = [line for line in err.splitlines() if line.startswith("deltarl: error: ")]
    assert code == 2
    assert len(lines) == 1
    assert says in lines[0]
    assert not Path("runs").exists(), "a refused job leaves no run folder"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "holds no rows"),
        ([*GOOD_ROWS, {"question": "What is 1+1?"}], "data.jsonl:21: no gold"),
        ([{**row, "answer": "one half #### \\frac{1}{"} for row in GOOD_ROWS], "golds do not parse"),
    ],
    ids=["empty", "row without gold", "golds that do not parse"],
)
def test_refused_data(job, capsys, rows, says):
    code, err = job(capsys, rows=rows)
    assert code == 2
    assert says in err
    assert not Path("runs").exists()


def test_model_folder_without_weights(job, capsys, tmp_path):
    build_model("kda", "2m", vocab_size=300).config.save_pretrained(tmp_path / "empty")
    code, err = job(capsys, model={"path": "empty"})
    assert code == 2
    assert "weights" in err


@pytest.mark.parametrize(("found", "says"), [(None, "vLLM"), (("vllm", "0.11.0"), "0.11.0")])
def test_engine_missing_or_out_of_range(job, capsys, monkeypatch, found, says):
    monkeypatch.setattr(engine, "installed_vllm", lambda: found)
    code, err = job(capsys)
    assert code == 2
    assert says in err
    assert not Path("runs").exists()


def test_dry_run_prints_the_resolved_job_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text("rl: {steps: 5}")
    assert main(["train", "job.yaml", "--set", "seed=3", "--dry-run"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["rl"]["steps"], printed["seed"], printed["rewards"]["verifier"]) == (5, 3, "math")
    assert list(tmp_path.iterdir()) == [tmp_path / "job.yaml"]


def test_job_and_resume_exclude_each_other(capsys):
    assert main(["train"]) == 2
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["train --resume nowhere", "report nowhere", "eval nowhere.yaml", "compare no.yaml"]
)
def test_missing_paths(command, capsys):
    assert main(command.split()) == 2
    assert "no" in capsys.readouterr().err


def test_verifiers_are_listed_with_their_origin(capsys):
    assert main(["verifiers"]) == 0
    out = capsys.readouterr().out
    assert any(line.startswith("math ") and "built-in" in line for line in out.splitlines())
