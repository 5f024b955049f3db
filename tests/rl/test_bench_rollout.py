"""The bench of decode speed on a real CPU engine, at a tiny size, and what it refuses."""

import json
import sys
from dataclasses import asdict

import pytest
import torch
from vllm.config import KVTransferConfig

from deltarl.rl.bench import rollout_engine
from deltarl.rl.bench.rollout import run_process, write_model
from deltarl.rl.cli import main

TINY = ["--arms", "kda", "--model", "tiny", "--steps", "4", "--share", "0.01", "--max-sequences", "4"]


def test_rows_of_a_tiny_engine(tmp_path, capsys) -> None:
    """The longer context is longer than the positions that the tiny model has by itself."""
    out = tmp_path / "rows.jsonl"
    case = ["--contexts", "64", "5000", "--equal", "2", "2", "--whole", "2", "16", "4", "--out", str(out), "--json"]
    code = main(["bench", "rollout", *TINY, *case])
    printed = json.loads(capsys.readouterr().out)
    assert (code, printed["failures"]) == (0, [])
    assert [json.loads(line) for line in out.read_text().splitlines()] == printed["rows"]
    start, whole, *decode = printed["rows"]
    assert start["kind"] == "start" and start["seconds"] > 0
    assert whole["kind"] == "whole" and whole["batch"] == 2
    assert [(row["context"], row["batch"]) for row in decode] == [(64, 2), (64, 4), (5000, 2), (5000, 4)]
    for row in decode:
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["ms_per_token"])
        assert (row["gpu_ms"] > 0) == torch.cuda.is_available() == bool(row["kernels"])
    assert decode[0]["cache_bytes"] < decode[2]["cache_bytes"]


def test_a_model_has_the_positions_that_the_bench_needs(tmp_path) -> None:
    def positions(size, longest):
        config = json.loads((write_model("kda", size, tmp_path, longest) / "config.json").read_text())
        return config["max_position_embeddings"], config["model_max_length"]

    assert positions("full", (1 << 20) + 72) == ((1 << 20) + 72,) * 2
    assert positions("full", 600) == (1 << 20,) * 2


def test_a_late_engine_is_a_line_of_the_table(tmp_path, capsys) -> None:
    out = tmp_path / "rows.jsonl"
    case = ["--contexts", "64", "--equal", "2", "--limit", "1", "--out", str(out)]
    assert main(["bench", "rollout", *TINY, *case]) == 1
    said = capsys.readouterr()
    _, line = said.out.splitlines()
    assert line == "kda  deltarl  failed: not done after 1 s: give it more with --limit"
    assert json.loads(out.read_text())["kind"] == "failed" and "log of kda by deltarl:" in said.err


def test_an_engine_that_vllm_refuses_is_a_line_of_the_table(capsys) -> None:
    case = ["--contexts", "64", "--equal", "2", "--share", "2"]
    assert main(["bench", "rollout", *TINY, *case]) == 1
    said = capsys.readouterr()
    _, line = said.out.splitlines()
    assert line.startswith("kda  deltarl  failed: ValidationError: ") and "gpu_memory_utilization" in line
    assert "Traceback" in said.err


def test_what_stops_a_measurement_is_its_last_row(tmp_path, monkeypatch) -> None:
    def measure(spec):
        yield rollout_engine.Row(spec.name, spec.served, "start")
        raise ValueError("the cache holds\n  7 sequences; " + 500 * "and more ")

    spec = rollout_engine.Spec(
        "mla", "vllm", "folder", "float32", str(tmp_path / "rows.jsonl"), [64], 128, {}, 4, 4, 0.1, 0.0
    )
    (tmp_path / "spec.json").write_text(json.dumps(asdict(spec)))
    monkeypatch.setattr(sys, "argv", ["rollout_engine", str(tmp_path / "spec.json")])
    monkeypatch.setenv("DELTARL_VLLM_MODEL", "deltarl")
    monkeypatch.setattr(rollout_engine, "measure", measure)
    with pytest.raises(ValueError, match="the cache holds"):
        rollout_engine.main()
    start, failed = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert (start["kind"], failed["kind"], failed["arm"], failed["served"]) == ("start", "failed", "mla", "vllm")
    assert failed["note"].startswith("ValueError: the cache holds 7 sequences; and more") and len(failed["note"]) <= 300


@pytest.mark.parametrize(
    ("program", "ended"),
    [
        ("print('fine')", None),
        ("import os; print('reading weights', flush=True); os.kill(os.getpid(), 9)", "SIGKILL after: reading weights"),
        ("import sys; sys.exit(3)", "exit code 3 after: no word"),
    ],
)
def test_how_a_process_ended(program, ended, tmp_path) -> None:
    assert run_process([sys.executable, "-c", program], tmp_path / "log", 60) == ended


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (["--contexts", "64", "128", "--equal", "2"], "--equal has 1 numbers for 2 --contexts"),
        (["--contexts", "0", "--equal", "2"], "must be 1 or more"),
        (["--contexts", "64", "--equal", "2", "--out", "/no/such/folder/x.jsonl"], "x.jsonl: No such file"),
    ],
)
def test_unfit_options_are_named(case, message, capsys) -> None:
    assert main(["bench", "rollout", *TINY, *case]) == 2
    assert message in capsys.readouterr().err


def test_the_bench_draws_with_the_scheduler_that_rollouts_have():
    assert not KVTransferConfig(**rollout_engine.CONNECTOR).is_kv_consumer  # SteadySteps would leave it all to vLLM
