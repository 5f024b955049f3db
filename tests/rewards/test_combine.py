"""`combine`: weights, gates, the first that applies, and what becomes of a part that cannot grade."""

import pickle
from pathlib import Path

import pytest

from deltarl.rewards import VerifierHost, VerifierLoadError, VerifierSpec, load_verifier

FAULT = f"{Path(__file__).with_name('fault_verifier.py')}:FaultVerifier"
SHAPED = [
    {"verifier": "math"},
    {"verifier": "format", "name": "form", "weight": 0.2, "options": {"sections": ["think"]}},
    {"verifier": "length", "weight": 0.5, "needs": "math", "options": {"shape": "overlong", "limit": 20, "cache": 10}},
]


def combined(parts, **options):
    return load_verifier(VerifierSpec("combine", {"parts": parts, **options}))


@pytest.fixture(scope="module")
def host():
    with VerifierHost(VerifierSpec("combine", {"parts": SHAPED})) as host:
        yield host


@pytest.mark.parametrize(
    ("response", "n_tokens", "score", "status", "statuses"),
    [
        (r"<think>a</think>\boxed{4}", 5, 1.2, "correct", ["correct", "correct", "correct"]),
        (r"<think>a</think>\boxed{4}", 20, 0.7, "correct", ["correct", "correct", "incorrect"]),
        (r"<think>a</think>\boxed{5}", 20, 0.2, "incorrect", ["incorrect", "correct", "skipped"]),
        (r"\boxed{4}", 5, 1.0, "correct", ["correct", "incorrect", "correct"]),
        ("I do not know what this is", 5, 0.0, "no_answer", ["no_answer", "incorrect", "skipped"]),
    ],
)
def test_weighted_and_gated(host, response, n_tokens, score, status, statuses):
    (verdict,) = host.verify([(response, "4", {"n_tokens": n_tokens})])
    assert (verdict.score, verdict.status) == (pytest.approx(score, abs=1e-12), status)
    parts = verdict.info["parts"]
    assert [parts[name]["status"] for name in ("math", "form", "length")] == statuses
    assert (parts["length"]["score"] is None) == (statuses[2] == "skipped")
    assert verdict.info["reason"].startswith(f"math {statuses[0]}, form {statuses[1]}")


def test_extracted_and_status_are_those_of_the_part_named():
    parts = [{"verifier": "format", "options": {"box": True}}, {"verifier": "math"}]
    assert combined(parts).verify(r"\boxed{5}", "4", meta={}).status == "correct"
    verdict = combined(parts, status="math").verify(r"\boxed{5}", "4", meta={})
    assert (verdict.status, verdict.extracted, verdict.score) == ("incorrect", "5", 1.0)


def test_an_unusable_gold_of_a_part_that_matters_is_a_gold_error(host):
    (verdict,) = host.verify([(r"<think>a</think>\boxed{4}", r"\frac{1}{", {"n_tokens": 5})])
    assert (verdict.score, verdict.status) == (None, "gold_error")
    assert verdict.info["reason"].startswith("math: ")
    assert verdict.info["parts"]["form"]["status"] == "correct"
    assert [v.status for v in host.check_golds(["4", r"\frac{1}{"])] == ["correct", "gold_error"]


def test_an_unusable_gold_of_a_part_that_is_only_logged_is_not():
    verifier = combined([{"verifier": "exact"}, {"verifier": "numeric", "weight": 0}])
    verdict = verifier.verify("four", "four", meta={})
    assert (verdict.score, verdict.status) == (1.0, "correct")
    assert verdict.info["parts"]["numeric"] == {"score": None, "status": "gold_error", "reason": "not a number: 'four'"}
    assert verifier.check_gold("four") is None


def test_a_part_that_raises_is_an_error_in_the_pool():
    with VerifierHost(VerifierSpec("combine", {"parts": [{"verifier": "numeric"}, {"verifier": FAULT}]})) as host:
        (verdict,) = host.verify([("raise", "4", {})])
    assert (verdict.score, verdict.status) == (0.0, "error")
    assert "no such key" in verdict.info["reason"]


@pytest.mark.parametrize(
    ("response", "gold", "status", "score", "reached"),
    [
        ("so 4", "4", "correct", 1.0, ["numeric"]),
        ("so 5", "4", "incorrect", 0.0, ["numeric"]),
        ("Paris", "Paris", "correct", 0.5, ["numeric", "exact"]),
        ("four", "4", "incorrect", 0.0, ["numeric", "exact"]),
        ("", "4", "no_answer", 0.0, ["numeric", "exact"]),
        ("4", "", "gold_error", None, ["numeric", "exact"]),
    ],
)
def test_the_first_that_applies(response, gold, status, score, reached):
    verifier = combined([{"verifier": "numeric"}, {"verifier": "exact", "weight": 0.5}], how="first")
    verdict = verifier.verify(response, gold, meta={})
    assert (verdict.status, verdict.score, list(verdict.info["parts"])) == (status, score, reached)
    assert (verifier.check_gold(gold) is None) == (status != "gold_error")


def test_the_first_does_not_pass_on_a_limit():
    """What one part refuses as too big must not be decided by a laxer one."""
    verifier = combined([{"verifier": "numeric"}, {"verifier": "exact"}], how="first")
    assert verifier.verify("1" * 2000, "4", meta={}).status == "limit"


def test_combinations_nest_and_pickle():
    inner = {"verifier": "combine", "name": "any", "options": {"how": "first", "parts": [{"verifier": "numeric"}]}}
    verifier = pickle.loads(pickle.dumps(combined([inner, {"verifier": "exact", "weight": 2, "needs": "any"}])))
    verifier.warm_up()
    verdict = verifier.verify("4", "4", meta={})
    assert verdict.score == 3.0
    assert verdict.info["parts"]["any"]["parts"]["numeric"]["status"] == "correct"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": []}, "at least one"),
        ({"parts": {"verifier": "math"}}, "give a list"),
        ({"parts": ["math"]}, "a part is a mapping with a verifier"),
        ({"parts": [{"verifier": "math", "wieght": 1}]}, "no key 'wieght'"),
        ({"parts": [{"verifier": "maths"}]}, "did you mean math"),
        ({"parts": [{"verifier": "math", "options": {"precison": 3}}]}, "did you mean 'precision'"),
        ({"parts": [{"verifier": "math"}, {"verifier": "math"}]}, "two parts are called 'math'"),
        ({"parts": [{"verifier": "math", "weight": "big"}]}, "weight 'big' is no finite number"),
        ({"parts": [{"verifier": "math", "needs": "exact"}, {"verifier": "exact"}]}, "stands before it"),
        ({"parts": [{"verifier": "math"}], "how": "max"}, "use weighted or first"),
        ({"parts": [{"verifier": "math"}], "status": "form"}, "name a part"),
        ({"parts": [{"verifier": "math"}, {"verifier": "exact", "needs": "math"}], "how": "first"}, "belongs to how"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message):
    with pytest.raises(VerifierLoadError, match=message) as caught:
        load_verifier(VerifierSpec("combine", options))
    assert "\n" not in str(caught.value)
