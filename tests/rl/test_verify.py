"""`deltarl verify` on files, good and bad."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deltarl.rewards import STATUSES
from deltarl.rl.cli import main
from deltarl.rl.errors import UserError
from deltarl.rl.verify import read_rows

GOOD = {"gold": "4", "pred": "2+2", "expected": True}


@pytest.fixture
def verify(tmp_path, capsys, monkeypatch):
    """Writes rows (objects, or lines as bytes) to rows.jsonl and runs the command: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(rows, *arguments):
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        Path("rows.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
        code = main(["verify", "--data", "rows.jsonl", "--workers", "1", *arguments])
        return code, *capsys.readouterr()

    return run


def summary(result):
    code, out, _ = result
    assert code == 0
    (line,) = out.splitlines()
    return json.loads(line)


def test_counts_against_expected(verify):
    rows = [
        GOOD,
        {"gold": "\\frac12", "pred": "So we get $x = 0.5$", "expected": 1},
        {"gold": ["3", "5"], "pred": "\\boxed{5}", "expected": True, "meta": {"level": 1}},
        {"gold": 7, "pred": "7.5", "expected": 0},
        {"gold": "7", "pred": "8", "expected": True},
        {"gold": "9", "pred": "9", "expected": False},
        {"gold": "9", "pred": "9"},
    ]
    result = summary(verify(rows, "--json"))
    assert (result["n"], result["labelled"]) == (7, 6)
    assert (result["false_positives"], result["false_negatives"]) == (1, 1)
    assert result["accuracy"] == pytest.approx(4 / 6, abs=1e-6)
    assert result["statuses"] == dict.fromkeys(STATUSES, 0) | {"correct": 5, "incorrect": 2}
    assert 0 < result["p50_ms"] <= result["p99_ms"] <= result["max_ms"]
    assert result["per_second"] > 0


def test_null_is_no_answer_and_no_gold(verify):
    rows = [
        {"gold": None, "pred": "4", "expected": False},
        {"gold": [], "pred": "4", "expected": False},
        {"gold": "4", "pred": None, "expected": False},
    ]
    result = summary(verify(rows, "--json"))
    assert result["statuses"] == dict.fromkeys(STATUSES, 0) | {"gold_error": 2, "no_answer": 1}
    assert result["accuracy"] == 1.0


def test_without_expected_no_accuracy(verify):
    result = summary(verify([{"gold": "4", "pred": "4"}], "--json"))
    assert not {"accuracy", "false_positives", "false_negatives", "labelled"} & set(result)


PROSE = "Altogether that makes 4 apples for everyone here."


def test_a_response_is_read_as_in_training_and_a_pred_leniently(verify):
    as_pred = summary(verify([{"gold": "4", "pred": PROSE}], "--json"))
    assert as_pred["statuses"]["correct"] == 1
    as_response = summary(verify([{"gold": "4", "response": PROSE}], "--json"))
    assert as_response["statuses"]["no_answer"] == 1
    told = summary(verify([{"gold": "4", "pred": PROSE}], "--json", "--option", "extraction=anchored"))
    assert told["statuses"]["no_answer"] == 1


def test_traces_of_a_run(verify):
    trace = {"step": 1, "prompt": "2+2?", "gold": "4", "status": "correct", "reward": 1.0, "info": {}, "advantage": 0.5}
    rows = [
        {**trace, "response": "\\boxed{4}", "finish_reason": "stop"},
        {**trace, "response": "\\boxed{4} and", "finish_reason": "length"},
    ]
    assert summary(verify(rows, "--json"))["statuses"] == dict.fromkeys(STATUSES, 0) | {"correct": 1, "no_answer": 1}


def test_errors_are_listed_and_cannot_write_to_the_terminal(verify):
    rows = [
        GOOD,
        {"gold": "7", "pred": "\\boxed{8}", "expected": True},
        {"gold": "\u202e9", "pred": "\x1b[2J9\ud800", "expected": False},
        {"gold": "\\frac{", "pred": "1"},
    ]
    code, out, err = verify(rows, "--show-errors")
    listed = [line for line in out.splitlines() if "rows.jsonl:" in line]
    assert code == 0
    assert listed[0] == "false negative  rows.jsonl:2  gold 7  graded 8"
    assert "rows.jsonl:4" in listed[-1]
    assert listed[-1].startswith("gold_error")
    assert not {"\x1b", "\u202e", "\ud800"} & set(out + err)
    assert "first gold_error: rows.jsonl:4" in err
    assert "accuracy" in out
    code, out, err = verify(rows, "--show-errors", "--json")
    assert json.loads(out)["n"] == 4
    assert "false negative  rows.jsonl:2" in err


HOSTILE = [
    "9^{9^{9^{9}}}",
    "8" * 1_200_000,
    "\udfff\ud8008",
    "\x00\\boxed{\x008}",
    "\\boxed{" * 20_000,
    "\u202e\u200b8\u200b8",
    "__import__('os').system('true')",
    "",
]


def test_hostile_rows_are_all_counted(verify):
    rows = [{"gold": "7", "pred": text, "expected": False} for text in HOSTILE]
    raw = [
        b'{"gold": "7", "pred": "\x00 null \x01", "expected": false}',
        b'{"gold": 7, "pred": ' + b"8" * 10_000 + b', "expected": false}',
        '{"gold": "7", "pred": "\ud800", "expected": false}'.encode("utf-8", "surrogatepass"),
        b'{"gold": [7, 7.0], "pred": [8], "expected": false}',
    ]
    result = summary(verify(rows + raw, "--json"))
    assert result["n"] == sum(result["statuses"].values()) == len(rows) + len(raw)
    assert result["false_positives"] == 0


BAD_ROWS = {
    "not JSON": (b"{'gold': 4}", "rows.jsonl:2: not JSON"),
    "not an object": (b"[1]", "rows.jsonl:2: not an object"),
    "deep": (b"[" * 100_000, "rows.jsonl:2: not JSON"),
    "not UTF-8": (b'{"gold": "\xff", "pred": "4"}', "rows.jsonl:2: not UTF-8"),
    "no gold": ({"pred": "4"}, "rows.jsonl:2: no gold"),
    "gold an object": ({"gold": {}, "pred": "4"}, "rows.jsonl:2: no gold"),
    "no pred": ({"gold": "4"}, "rows.jsonl:2: no pred or response"),
    "response among preds": ({"gold": "4", "response": "4"}, "it has response, and the rows before have pred"),
    "expected": ({**GOOD, "expected": "yes"}, "expected is 'yes': use true or false"),
    "meta": ({**GOOD, "meta": [1]}, "meta is not an object"),
}


@pytest.mark.parametrize(("row", "says"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_refused_rows(tmp_path, monkeypatch, row, says):
    monkeypatch.chdir(tmp_path)
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    Path("rows.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + line)
    with pytest.raises(UserError) as refused:
        list(read_rows(["rows.jsonl"]))
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_bad_row_ends_the_command_with_one_line(verify):
    code, out, err = verify([GOOD, {"gold": "4"}])
    assert (code, out) == (2, "")
    assert err == "deltarl: error: rows.jsonl:2: no pred or response\n"


BAD_ARGUMENTS = {
    "verifier": (["--verifier", "maths"], "did you mean math"),
    "verifier file": (["--verifier", "none.py:Mine"], "none.py"),
    "option": (["--option", "extractoin=strict"], "did you mean 'extraction'?"),
    "option value": (["--option", "extraction=loose"], "use strict, anchored or lenient"),
    "option form": (["--option", "strict"], "KEY=VALUE"),
    "option YAML": (["--option", "extraction={"], "not YAML"),
    "timeout": (["--timeout", "0"], "timeout is 0"),
    "workers": (["--workers", "-1"], "workers is -1"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_refused_arguments(verify, arguments, says):
    code, out, err = verify([GOOD], *arguments)
    (line,) = err.splitlines()
    assert (code, out) == (2, "")
    assert says in line


def test_refused_files(verify, capsys):
    assert "no rows" in verify([])[2]
    assert "no rows" in verify([b"", b"  "])[2]
    for path, says in (("none.jsonl", "No such file"), (".", "./*.jsonl")):
        assert main(["verify", "--data", path]) == 2
        assert says in capsys.readouterr().err


def children(pid):
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {int(child) for task in tasks for child in (task / "children").read_text().split()}


def test_ctrl_c_stops_at_once_and_leaves_no_process(tmp_path):
    """The pipe stays open: the command waits for more rows."""
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    command = [sys.executable, "-P", "-m", "deltarl", "verify", "--data", str(pipe), "--workers", "2", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with pipe.open("w") as rows:
        rows.write(json.dumps(GOOD) + "\n")
        rows.flush()
        deadline = time.monotonic() + 60
        while len(workers := children(process.pid)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines() == ["deltarl: stopped at once"]
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text((json.dumps({"gold": "4", "pred": "5", "expected": True}) + "\n") * 50)
    command = [sys.executable, "-P", "-m", "deltarl", "verify", "--data", str(rows), "--workers", "1", "--show-errors"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == ""
    process.stderr.close()
