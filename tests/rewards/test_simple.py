"""`exact` and `numeric`, run in the pool that a job runs them in."""

import pytest

from deltarl.rewards import VerifierHost, VerifierSpec, load_verifier


@pytest.fixture(scope="module")
def numeric():
    with VerifierHost("numeric", timeout=1.0) as host:
        yield host


@pytest.fixture(scope="module")
def exact():
    with VerifierHost(VerifierSpec("exact", {"last_line": True, "case_sensitive": False})) as host:
        yield host


@pytest.mark.parametrize(
    ("response", "gold", "status"),
    [
        ("2 and 2 make 4.", "4", "correct"),
        ("2 and 2 make 5.", "4", "incorrect"),
        ("that is $1,234.50 in all", "1234.5", "correct"),
        ("so −7", "-7", "correct"),
        ("5-3=2, from 5-10", "10", "correct"),
        ("it costs -$5", "5", "incorrect"),
        ("it costs -$5", "-$5", "correct"),
        ("50%", "50", "correct"),
        ("50%", "0.5", "incorrect"),
        ("1.5e3", "1500", "correct"),
        (r"1.5 \times 10^{-3} m", "0.0015", "correct"),
        ("2 x 10^3", "3", "incorrect"),
        ("it is 3/4", "0.75", "correct"),
        ("it is 3/4", "4", "incorrect"),
        ("an area of 12 m^2", "12", "correct"),
        ("an area of 12 m2", "2", "incorrect"),
        ("2^10", "2", "no_answer"),
        (r"\boxed{1{,}234}", "1234", "correct"),
        ("1,23", "1.23", "incorrect"),
        ("<think>it is 4</think> I cannot say", "4", "no_answer"),
        ("<think>it is 4", "4", "no_answer"),
        ("1/0", "1", "incorrect"),
        ("no idea", "4", "no_answer"),
        ("4", "four", "gold_error"),
        ("4", "", "gold_error"),
        ("1" * 2000, "1", "limit"),
        ("1e999999999", "1", "limit"),
        ("1 " * 400_000 + "4", "4", "correct"),
        ("4 and " + "x" * 400_000, "4", "correct"),
    ],
)
def test_numeric(numeric, response, gold, status):
    (verdict,) = numeric.verify([(response, gold, {})])
    assert (verdict.status, verdict.score) == (status, {"correct": 1.0, "gold_error": None}.get(status, 0.0))
    assert verdict.info["reason"] and "\n" not in verdict.info["reason"]


def test_numeric_takes_no_number_from_a_cut_response(numeric):
    (verdict,) = numeric.verify([("it is 12", "12", {"truncated": True})])
    assert (verdict.status, verdict.score) == ("no_answer", 0.0)


def test_numeric_tolerances_are_the_decimals_they_are_written_as():
    """0.3 as a binary fraction lies below 3/10: the answer on the edge must pass all the same, the next must not."""
    verifier = load_verifier(VerifierSpec("numeric", {"abs_tol": 0.3}))
    assert [verifier.verify(text, "1", meta={}).score for text in ("1.3", "0.7", "1.30001")] == [1.0, 1.0, 0.0]
    relative = load_verifier(VerifierSpec("numeric", {"rel_tol": 0.1}))
    assert [relative.verify(text, "-200", meta={}).score for text in ("-220", "-221", "200")] == [1.0, 0.0, 0.0]


def test_numeric_any_of_several_golds(numeric):
    assert [v.score for v in numeric.verify([("so 3", ["2", "3"], {}), ("so 4", ["2", "3"], {})])] == [1.0, 0.0]


@pytest.mark.parametrize("options", [{"abs_tol": -1}, {"rel_tol": float("nan")}, {"abs_tol": float("inf")}])
def test_numeric_refuses_a_tolerance_without_meaning(options):
    with pytest.raises(ValueError, match="must be finite and not negative"):
        load_verifier(VerifierSpec("numeric", options))


@pytest.mark.parametrize(
    ("response", "gold", "status"),
    [
        ("I think:\nNew  York \n", "new york", "correct"),
        ("New York, I think", "New York", "incorrect"),
        ("<think>Boston</think>\nNew York", ["NY", "New York"], "correct"),
        ("<think>New York</think>", "New York", "no_answer"),
        ("New York", " ", "gold_error"),
    ],
)
def test_exact(exact, response, gold, status):
    (verdict,) = exact.verify([(response, gold, {})])
    assert (verdict.status, verdict.score) == (status, {"correct": 1.0, "gold_error": None}.get(status, 0.0))
    assert verdict.info["reason"]


def test_exact_grades_the_whole_response_as_written():
    verifier = load_verifier("exact")
    assert [verifier.verify(text, "Yes", meta={}).status for text in ("Yes", "yes", "so\nYes")] == [
        "correct",
        "incorrect",
        "incorrect",
    ]
    assert verifier.verify("Yes", "Yes", meta={"truncated": True}).status == "no_answer"


def test_golds_are_checked_before_a_run(numeric, exact):
    assert [v.status for v in numeric.check_golds(["3/4", "three"])] == ["correct", "gold_error"]
    assert [v.status for v in exact.check_golds(["x", " "])] == ["correct", "gold_error"]
