"""The laws by which the Kimi recipe adapts, worked by hand."""

import pytest

from deltarl.rewards import Verdict
from deltarl.rl.kimi import AdaptiveKL, adapted_minibatches, length_penalties


def test_tau_follows_the_measured_kl():
    tau = AdaptiveKL(0.1, target=0.02)
    for measured, expected in ((0.031, 0.2), (0.029, 0.2), (0.014, 0.2), (0.013, 0.1), (0.0, 0.05)):
        tau.update(measured)
        assert tau.coefficient == pytest.approx(expected), measured


def test_tau_stays_in_reach_of_its_start():
    tau = AdaptiveKL(0.1, target=0.02)
    for _ in range(50):
        tau.update(0.0)
    assert tau.coefficient == pytest.approx(0.1 / 64)
    for _ in range(50):
        tau.update(1.0)
    assert tau.coefficient == pytest.approx(0.1 * 64)
    again = AdaptiveKL(0.1, target=0.02)
    again.load_state_dict(tau.state_dict())
    again.update(0.0)
    assert again.coefficient == pytest.approx(0.1 * 32)


def test_minibatches_grow_as_the_sample_shrinks():
    shares = (1.0, 0.95, 0.75, 0.5, 0.26, 0.18, 0.01)
    assert [adapted_minibatches(8, share) for share in shares] == [8, 8, 6, 4, 2, 1, 1]
    assert adapted_minibatches(1, 0.3) == 1


def test_length_penalty_by_hand():
    """Lengths 10, 20, 30: lambda 0.5, 0, -0.5; a wrong short answer earns nothing, a wrong long one is punished."""
    verdicts = [Verdict(1.0, "correct"), Verdict(1.0, "correct"), Verdict(0.0, "incorrect")]
    second = [Verdict(0.0, "no_answer"), Verdict(1.0, "correct"), Verdict(1.0, "correct")]
    found = length_penalties([*verdicts, *second], [10, 20, 30, 10, 20, 30], 3, weight=0.2)
    assert found == pytest.approx([0.1, 0.0, -0.1, 0.0, 0.0, -0.1])
    assert length_penalties(verdicts, [7, 7, 7], 3, weight=0.2) == [0.0, 0.0, 0.0]
