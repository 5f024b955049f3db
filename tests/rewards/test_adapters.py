import pickle

import pytest

from deltarl.rewards import VerifierHost, as_trl_reward, from_trl_reward, load_verifier
from deltarl.rewards.math import MathVerifier


def half_for_trying(prompts, completions, gold, **_):
    return [None if g == "?" else 1.0 if g in c else 0.5 for c, g in zip(completions, gold, strict=True)]


def test_verifier_as_trl_reward():
    reward = as_trl_reward(MathVerifier(), gold_column="answer")
    completions = ["\\boxed{1/2}", [{"role": "assistant", "content": "\\boxed{3}"}], "\\boxed{1}"]
    scores = reward(prompts=["p"] * 3, completions=completions, answer=["0.5", "4", ""], trainer_state=object())
    assert scores == [1.0, 0.0, None]
    assert reward.__name__ == "math"
    with pytest.raises(ValueError, match="no column 'answer'"):
        reward(prompts=["p"], completions=["x"], gold=["1"])


def test_host_as_trl_reward():
    with VerifierHost("math") as host:
        reward = as_trl_reward(host)
        assert reward(prompts=["p"] * 2, completions=["\\boxed{1}", "\\boxed{2}"], gold=["1", "1"]) == [1.0, 0.0]


def test_trl_reward_as_verifier():
    verifier = pickle.loads(pickle.dumps(from_trl_reward(half_for_trying)))
    verdicts = [
        verifier.verify(r, g, meta={"prompt": "p", "row": 1}) for r, g in (("a 3", "3"), ("a", "3"), ("a", "?"))
    ]
    assert [(v.score, v.status) for v in verdicts] == [(1.0, "correct"), (0.5, "incorrect"), (None, "gold_error")]


def test_exact_and_numeric():
    exact = load_verifier("exact")
    assert [exact.verify(r, "a b", meta={}).status for r in (" a  b\n", "A b", "")] == [
        "correct",
        "incorrect",
        "no_answer",
    ]
    assert exact.verify("a", " ", meta={}).status == "gold_error"
    numeric = load_verifier("numeric")
    assert [numeric.verify(r, "1,234.5", meta={}).status for r in ("is 1234.50", "1234.5 or 3", "none")] == [
        "correct",
        "incorrect",
        "no_answer",
    ]
    assert numeric.verify("3", "three", meta={}).status == "gold_error"
    assert numeric.verify("9" * 2000, "3", meta={}).status == "limit"
