"""The example in examples/shaped_verifier.py, loaded by path as a job does."""

from pathlib import Path

import pytest

from deltarl.rewards import VerifierHost, VerifierSpec

EXAMPLE = Path(__file__).parents[2] / "examples" / "shaped_verifier.py"


@pytest.fixture(scope="module")
def host():
    with VerifierHost(VerifierSpec(f"{EXAMPLE}:ShapedVerifier", {"stated": 0.3})) as host:
        yield host


@pytest.mark.parametrize(
    ("response", "truncated", "status", "score"),
    [
        (r"so \boxed{4}", False, "correct", 1.0),
        (r"so \boxed{5}", False, "incorrect", 0.3),
        ("First I add them up, then I see that this leads nowhere, and so I stop here.", False, "no_answer", 0.1),
        ("I do not know and", True, "no_answer", 0.0),
    ],
)
def test_marks(host, response, truncated, status, score):
    (verdict,) = host.verify([(response, "4", {"truncated": truncated})])
    assert (verdict.status, verdict.score) == (status, score)


def test_unusable_gold_stays_without_score(host):
    (verdict,) = host.verify([(r"\boxed{4}", r"\frac{1}{", {})])
    assert (verdict.status, verdict.score) == ("gold_error", None)
