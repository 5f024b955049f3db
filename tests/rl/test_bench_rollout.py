"""The bench of decode speed on a real CPU engine, at a tiny size, and what it refuses."""

import json

import pytest

from deltarl.rl.cli import main

TINY = ["--arms", "kda", "--model", "tiny", "--steps", "4", "--share", "0.01", "--max-sequences", "4"]


def test_rows_of_a_tiny_engine(tmp_path, capsys) -> None:
    out = tmp_path / "rows.jsonl"
    case = ["--contexts", "64", "600", "--equal", "2", "2", "--whole", "2", "16", "4", "--out", str(out), "--json"]
    code = main(["bench", "rollout", *TINY, *case])
    printed = json.loads(capsys.readouterr().out)
    assert (code, printed["failures"]) == (0, [])
    assert [json.loads(line) for line in out.read_text().splitlines()] == printed["rows"]
    start, whole, *decode = printed["rows"]
    assert start["kind"] == "start" and start["seconds"] > 0
    assert whole["kind"] == "whole" and whole["batch"] == 2
    assert [(row["context"], row["batch"]) for row in decode] == [(64, 2), (64, 4), (600, 2), (600, 4)]
    for row in decode:
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["ms_per_token"])
    assert decode[0]["cache_bytes"] < decode[2]["cache_bytes"]


def test_an_engine_that_fails_is_told_with_its_last_words(capsys) -> None:
    code = main(["bench", "rollout", *TINY, "--contexts", "64", "--equal", "2", "--max-sequences", "4", "--limit", "1"])
    assert code == 1
    assert "kda by deltarl: not done after 1 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (["--contexts", "64", "128", "--equal", "2"], "--equal has 1 numbers for 2 --contexts"),
        (["--contexts", "0", "--equal", "2"], "must be 1 or more"),
    ],
)
def test_unfit_options_are_named(case, message, capsys) -> None:
    assert main(["bench", "rollout", *TINY, *case]) == 2
    assert message in capsys.readouterr().err
