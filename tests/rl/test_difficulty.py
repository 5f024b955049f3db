"""The table of pass rates: what is counted, what is kept, what is refused."""

import pytest

from deltarl.rl.difficulty import describe, in_band, pass_rates, read_pass_rates, write_pass_rates
from deltarl.rl.errors import UserError
from deltarl.rl.problems import Problem


def samples(**statuses):
    return [{"problem_id": name, "status": status} for name, given in statuses.items() for status in given]


def test_pass_rates_are_of_graded_samples():
    rows = pass_rates(
        samples(a=["correct", "incorrect", "no_answer", "correct"], b=["gold_error", "correct"], c=["gold_error"])
    )
    assert rows == [{"id": "a", "pass_rate": 0.5, "n": 4}, {"id": "b", "pass_rate": 1.0, "n": 1}]


def test_table_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "new" / "rates.jsonl"
    write_pass_rates(path, [{"id": "x:1", "pass_rate": 0.25, "n": 8}, {"id": "y", "pass_rate": 1.0, "n": 8}])
    assert read_pass_rates(path) == {"x:1": 0.25, "y": 1.0}
    assert [entry.name for entry in path.parent.iterdir()] == ["rates.jsonl"]


@pytest.mark.parametrize("line", ['{"id": "x"}', '{"id": "x", "pass_rate": 1.5}', '{"id": 3, "pass_rate": 0.5}'])
def test_a_line_that_is_no_pass_rate_is_named(tmp_path, line):
    path = tmp_path / "rates.jsonl"
    path.write_text('{"id": "a", "pass_rate": 0.5}\n' + line + "\n")
    with pytest.raises(UserError, match=r"rates\.jsonl:2 is no pass rate"):
        read_pass_rates(path)


def test_the_moderate_band_is_kept():
    problems = [Problem(name, name, "1") for name in "abcde"]
    rates = {"a": 0.0, "b": 0.1, "c": 0.5, "d": 0.95}
    assert [problem.id for problem in in_band(problems, rates, (0.1, 0.9))] == ["b", "c"]
    with pytest.raises(
        UserError, match=r"data\.pass_band = \[0\.6, 0\.9\] leaves no problem: data\.pass_rates has 4 of 5"
    ):
        in_band(problems, rates, (0.6, 0.9))


@pytest.mark.parametrize(
    ("answers", "counts", "first", "last"),
    [
        (20, [2, 1, 0, 0, 0, 1, 0, 0, 0, 2], "0.0 - 0.1", "0.9 - 1.0"),
        (10, [2, 1, 0, 0, 0, 0, 1, 0, 0, 1, 1], "0 of 10", "10 of 10"),
    ],
)
def test_histogram_counts_every_problem_once(answers, counts, first, last):
    rates = (0.0, 0.0, 0.1, 0.55 if answers == 20 else 0.6, 0.9, 1.0)
    rows = [{"id": str(i), "pass_rate": rate, "n": answers} for i, rate in enumerate(rates)]
    *lines, summary = describe(rows, (0.1, 0.9)).splitlines()[1:]
    assert [int(line.split()[3]) for line in lines] == counts
    assert (lines[0].startswith(first), lines[-1].startswith(last)) == (True, True)
    assert summary == "2 never right, 1 always right; 3 of 6 in the band [0.1, 0.9]"
