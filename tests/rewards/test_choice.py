"""`multiple_choice`: what counts as settling on one option, with and without the options' texts."""

import pytest

from deltarl.rewards import VerifierHost, VerifierLoadError, VerifierSpec, load_verifier

CITIES = {"choices": ["London", "Paris", "New York", "A rectangle"]}


@pytest.fixture(scope="module")
def host():
    with VerifierHost("multiple_choice", timeout=1.0) as host:
        yield host


@pytest.mark.parametrize(
    "response",
    [
        r"so \boxed{B}",
        r"\boxed{\text{(B)}}",
        r"\boxed{A}, no: \boxed{b}",
        "<answer> B </answer>",
        "The answer is (B).",
        "**Answer:** B",
        "The correct answer is B because A is too small.",
        "It could be A. The final answer is: B, not C.",
        "I would go with option B.",
        "A looks right, but option B is correct.",
        "C is tempting.\n\n(B)",
        "C is tempting.\n\n**B.**",
        "<think>The answer is C</think>\nB",
        "B",
        "b)",
        "The answer is A.\nWait, the answer is B.",
        "Which option is right? Let me see.\nB",
    ],
)
def test_right_without_texts(host, response):
    right, wrong = host.verify([(response, "B", {}), (response, "(c)", {})])
    assert (right.status, right.score, right.extracted) == ("correct", 1.0, "B")
    assert (wrong.status, wrong.score, wrong.extracted) == ("incorrect", 0.0, "B")
    assert right.info["reason"] == wrong.info["reason"] == "settles on B"


@pytest.mark.parametrize(
    ("response", "status"),
    [
        ("The answer is A or B.", "incorrect"),
        ("The answer is either B or C", "incorrect"),
        (r"\boxed{A, B}", "incorrect"),
        (r"\boxed{B/C}", "incorrect"),
        ("A\nB\nC\nB and C", "no_answer"),
        ("The answer is not B", "incorrect"),
        ("The answer is a big one", "incorrect"),
        ("The answer is A rectangle", "incorrect"),
        (r"\boxed{B", "no_answer"),
        ("I think it is too hard.", "no_answer"),
        ("A is wrong. B is right, I believe, or perhaps not", "no_answer"),
        ("<think>B</think>", "no_answer"),
        ("", "no_answer"),
    ],
)
def test_wrong_without_texts(host, response, status):
    verdicts = host.verify([(response, gold, {}) for gold in "ABC"])
    assert {(v.status, v.score) for v in verdicts} == {(status, 0.0)}
    assert all(v.info["reason"] for v in verdicts)


@pytest.mark.parametrize(
    ("response", "status"),
    [
        ("The answer is Paris.", "correct"),
        ("B. Paris", "correct"),
        ("The answer is B: Paris, the capital", "correct"),
        ("The answer is B Paris", "correct"),
        ("The answer is B. London", "incorrect"),
        ("The answer is Rome", "incorrect"),
        ("The answer is A rectangle", "incorrect"),
        ("Paris", "correct"),
        (r"\boxed{\text{paris}}", "correct"),
    ],
)
@pytest.mark.parametrize("gold", ["B", "Paris"])
def test_texts_of_the_options(host, response, gold, status):
    (verdict,) = host.verify([(response, gold, CITIES)])
    assert (verdict.status, verdict.score) == (status, float(status == "correct"))


def test_an_article_before_an_option_s_text_is_no_letter(host):
    (verdict,) = host.verify([("The answer is A rectangle", "D", CITIES)])
    assert (verdict.status, verdict.extracted) == ("correct", "D")


@pytest.mark.parametrize(
    "choices",
    [{"A": "x", "B": "y"}, {"label": ["A", "B"], "text": ["x", "y"]}, ["x", "y"]],
)
def test_forms_of_choices(host, choices):
    verdicts = host.verify([("The answer is y", "B", {"choices": choices}), ("C", "B", {"options": choices})])
    assert [v.status for v in verdicts] == ["correct", "no_answer"]


@pytest.mark.parametrize(
    ("gold", "meta"),
    [
        ("Rome", CITIES),
        ("E", CITIES),
        ("some text", {}),
        ("", {}),
        ("same", {"choices": ["same", "same"]}),
        ("B", {"choices": "ABCD"}),
        ("1", {"choices": {"1": "x", "2": "y"} | {"10": "z"}}),
    ],
)
def test_a_gold_that_is_no_option(host, gold, meta):
    (verdict,) = host.verify([("B", gold, meta)])
    assert (verdict.status, verdict.score) == ("gold_error", None)
    assert "\n" not in verdict.info["reason"]


def test_golds_that_count_the_options():
    verifier = load_verifier(VerifierSpec("multiple_choice", {"index_from": 0}))
    assert verifier.verify("B", "1", meta=CITIES).status == "correct"
    assert verifier.verify("B", "0", meta=CITIES).status == "incorrect"
    assert verifier.verify("B", "4", meta=CITIES).status == "gold_error"
    assert verifier.verify("B", "B", meta=CITIES).status == "gold_error"


def test_any_of_several_golds_and_a_cut_response(host):
    verdicts = host.verify([("B", ["A", "B"], {}), ("C", ["A", "B"], {}), ("B", "B", {"truncated": True})])
    assert [v.status for v in verdicts] == ["correct", "incorrect", "no_answer"]


@pytest.mark.parametrize(
    "piece", ["the answer is ", "<answer>", "A or ", "\\boxed{", "answer " * 3 + "B and ", "\n", "(" * 9]
)
def test_hostile_text_is_answered_in_time(host, piece):
    """A megabyte of anchors; the pool's deadline is 1 s, and a `timeout` would be the status."""
    (verdict,) = host.verify([((piece * (1_000_000 // len(piece)))[:1_000_000], "B", {})])
    assert verdict.status in ("incorrect", "no_answer")


def test_bad_options_are_refused():
    with pytest.raises(VerifierLoadError, match="index_from 2: use 0 or 1"):
        load_verifier(VerifierSpec("multiple_choice", {"index_from": 2}))
