"""The suites of other projects, graded: nearly all of their labels hold, and every one that does not is listed."""

import json
from pathlib import Path

import pytest
from srepr import UnknownForm, srepr_tree

from deltarl.rewards.math import MathVerifier
from deltarl.rewards.math.compare import equivalent
from deltarl.rewards.math.lexer import LimitError
from deltarl.rewards.math.scalars import Rules
from deltarl.rewards.math.verifier import read

CASES = Path(__file__).parents[1] / "data" / "verifier_cases"
PARSER_SUITE = "latex2sympy2_extended"
SUITES = sorted(f.stem for f in CASES.glob("*.jsonl") if f.stem not in (PARSER_SUITE, "disputed"))
ACCURACY = 0.97
PARSED = 0.85


def rows(suite: str) -> list[dict]:
    return [json.loads(line) for line in (CASES / f"{suite}.jsonl").read_text().splitlines()]


def disputed(suite: str) -> dict[int, dict]:
    return {entry["row"]: entry for entry in rows("disputed") if entry["suite"] == suite}


def verifier_for(row: dict) -> MathVerifier:
    """As the suite sets it: rllm wants a box, the others take an answer where they find it, to `precision` digits."""
    settings = row.get("cfg")
    precision = settings["precision"] if isinstance(settings, dict) else 6
    return MathVerifier("strict" if row["suite"] == "rllm_math_reward" else "lenient", precision=precision)


def passes(row: dict) -> bool:
    return verifier_for(row).verify(row["pred"], row["gold"], meta={}).status == "correct"


@pytest.mark.parametrize("suite", SUITES)
def test_labels_hold_outside_of_the_disputed_ones(suite):
    graded = [(row, passes(row) == row["expected"]) for i, row in enumerate(rows(suite)) if i not in disputed(suite)]
    missed = [(row["gold"], row["pred"], row["expected"]) for row, holds in graded if not holds]
    assert len(missed) <= (1 - ACCURACY) * len(graded), missed


@pytest.mark.parametrize("suite", SUITES)
def test_every_false_positive_is_disputed(suite):
    found = {i for i, row in enumerate(rows(suite)) if passes(row) and not row["expected"]}
    assert found == {i for i, entry in disputed(suite).items() if not entry["expected"]}


@pytest.mark.parametrize("suite", SUITES)
def test_a_disputed_label_is_the_suites_own_and_gives_a_reason(suite):
    suite_rows = rows(suite)
    for i, entry in disputed(suite).items():
        row = suite_rows[i]
        assert [entry[key] for key in ("gold", "pred", "expected")] == [
            row[key] for key in ("gold", "pred", "expected")
        ]
        assert entry["reason"]
        assert passes(row) != row["expected"], "a label that holds is not to be disputed"


def test_the_disputed_list_is_short():
    assert len(rows("disputed")) <= 0.04 * sum(len(rows(suite)) for suite in SUITES)


def test_latex_reads_as_the_expression_that_a_parser_suite_gives():
    working_out = Rules(require_evaluated=False)
    suite = rows(PARSER_SUITE)
    missed = []
    for row in suite:
        try:
            gold = srepr_tree(row["gold"])
            right = any(equivalent(gold, tree, working_out) for tree in read(row["pred"]).trees)
        except (LimitError, UnknownForm):
            right = False
        if not right:
            missed.append((row["gold"], row["pred"]))
    assert len(missed) <= (1 - PARSED) * len(suite), missed
