"""The verifier bench: its data, its counts, its peer, and what it says to bad input."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from deltarl.rewards import VerifierSpec, load_verifier
from deltarl.rl.bench import verifiers
from deltarl.rl.bench.hostile import Hostile, hostile_cases
from deltarl.rl.cli import main

FAULTS = VerifierSpec(f"{Path(__file__).parents[1] / 'rewards' / 'fault_verifier.py'}:FaultVerifier")
RESPONSES = Path(verifiers.__file__).parent / "data" / "responses.jsonl"


def test_labels_of_the_worked_solutions_hold():
    solutions = verifiers.read_solutions([RESPONSES])
    worked = [solution for solution in solutions if solution.kind.startswith("worked")]
    math = load_verifier("math")
    assert len(solutions) == 800 and len(worked) == 687
    wrong = [s for s in worked if (math.verify(s.response, s.gold, meta={}).status == "correct") != s.expected]
    assert wrong == []


def test_hostile_names_are_distinct():
    assert len({case.name for case in hostile_cases()}) == len(hostile_cases()) >= 60


def test_late_answers_wrong_positives_and_lost_processes_are_told_apart():
    cases = [Hostile(response, response, gold="7") for response in ("hang", "7", "8", "exit", "raise")]
    cases += [Hostile(f"right {response}", response, gold="7", right=True) for response in ("7", "8")]
    assert verifiers.hostile_names(FAULTS, cases) == (["hang"], ["7"], ["right 8"], ["hang", "exit"])


def test_wrong_verdicts_are_counted_by_label(tmp_path):
    rows = [
        {"suite": "a", "gold": "7", "pred": "7", "expected": True},
        {"suite": "a", "gold": "7", "pred": "8", "expected": True},
        {"suite": "a", "gold": "7", "pred": "7", "expected": False},
        {"suite": "b", "gold": ["1", "7"], "pred": "7", "expected": True},
    ]
    file = tmp_path / "cases.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrong = verifiers.wrong_verdicts(verifiers.OURS_LENIENT, verifiers.read_solutions([file]), workers=1)
    assert wrong == Counter({("a", True): 1, ("a", False): 1})


@pytest.mark.parametrize(
    ("response", "gold", "status"),
    [
        ("So it is $\\boxed{\\frac{2}{4}}$.", "\\frac12", "correct"),
        ("\\frac{1}{2}", ["3", "0.5"], "correct"),
        ("So it is $\\boxed{3}$.", "2", "incorrect"),
        ("", "2", "no_answer"),
    ],
)
def test_peer(response, gold, status):
    assert load_verifier(verifiers.PEER).verify(response, gold, meta={}).status == status


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "none.jsonl"], "no file none.jsonl"),
        (["--data", "bad.jsonl"], "bad.jsonl, line 2: KeyError 'expected'"),
        (["--data", "blank.jsonl"], "blank.jsonl holds no rows"),
        (["--cases", "empty"], "empty holds no .jsonl file"),
        (["--workers", "0"], "give at least 1"),
    ],
)
def test_refused(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("blank.jsonl").touch()
    Path("bad.jsonl").write_text('{"gold": "7", "pred": "7", "expected": true}\n{"gold": "7", "pred": "7"}\n')
    assert main(["bench", "verifiers", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_without_the_peer_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert main(["bench", "verifiers"]) == 2
    assert "pip install 'math-verify==0.9.*'" in capsys.readouterr().err
