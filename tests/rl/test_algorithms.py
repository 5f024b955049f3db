"""What the algorithms do around their losses: when, and what is carried over a stop."""

import io

import pytest
import torch

from deltarl.rewards import Verdict
from deltarl.rl.algorithms import Algorithm, Scores
from deltarl.rl.batch import Batch, Sample
from deltarl.rl.critic import Critic
from deltarl.rl.jobs import RLConfig
from deltarl.rl.problems import Problem
from deltarl.rollout import Trace

LENGTHS = (2, 4, 3, 3)
REWARDS = (1.0, 1.0, 0.0, 1.0)


def batch():
    samples = [
        Sample(
            Problem(f"p{index // 2}", "?", "1"),
            Trace([1], [2] * length, [-1.0] * length, [0] * length, "stop"),
            "",
            Verdict(reward, "correct" if reward else "incorrect"),
        )
        for index, (length, reward) in enumerate(zip(LENGTHS, REWARDS, strict=True))
    ]
    return Batch(samples, 2)


def scores(**known):
    mask = (torch.arange(4) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    return Scores(mask=mask, sampler=-torch.ones(4, 4), **known)


def kimi(**settings):
    return Algorithm(RLConfig(algorithm="kimi", num_generations=2, minibatches=8, kimi=settings))


def ppo(**settings):
    rl = RLConfig(algorithm="ppo", num_generations=2, critic={"whiten_advantages": False, **settings})
    return Algorithm(rl, Critic(rl.critic, 8))


def test_length_reward_begins_after_its_warm_up():
    """Group 1: both right, lengths 2 and 4: +0.5 and -0.5, weight 0.2. Group 2: one length, so nothing."""
    algorithm = kimi(length_weight=0.2, length_warmup=3)
    early = algorithm.begin(batch(), scores(), 2).advantages.flatten()
    assert early.tolist() == [0.0, 0.0, -0.5, 0.5]
    late = algorithm.begin(batch(), scores(), 3).advantages.flatten()
    assert late.tolist() == pytest.approx([0.1, -0.1, -0.5, 0.5])
    assert algorithm.after_step({})["length_reward"] == pytest.approx(0.0)


def test_minibatches_follow_the_effective_sample_size():
    """Half of the tokens with weight 3, half with 1: (sum w)^2 / (n sum w^2) = 16 / 20, so 6 of 8 minibatches."""
    mask = scores().mask
    ratios = torch.ones(4, 4)
    ratios[(mask.cumsum(1) % 2 == 1) & mask.bool()] = 3.0
    assert ratios[mask.bool()].tolist().count(3.0) == 7 and mask.sum() == 12
    known = scores(old=ratios.log() - 1)
    expected = (7 * 3 + 5) ** 2 / (12 * (7 * 9 + 5))
    assert kimi(adapt_minibatches=True).minibatches(known) == round(8 * expected)
    assert kimi().minibatches(known) == 8


def test_tau_is_adapted_to_what_was_measured():
    algorithm = kimi(tau=0.1, target_kl=0.02)
    assert algorithm.after_step({"update_kl": 0.5})["tau"] == 0.1, "as the step used it"
    assert algorithm.after_step({"update_kl": 0.5})["tau"] == 0.2
    fixed = kimi(tau=0.1)
    fixed.after_step({"update_kl": 0.5})
    assert fixed.after_step({"update_kl": 0.5})["tau"] == 0.1


def test_the_critic_learns_alone_at_first():
    algorithm = ppo(warmup_steps=2)
    assert [algorithm.learns_policy(step) for step in range(4)] == [False, False, True, True]
    assert kimi().learns_policy(0)


def test_explained_variance_is_of_the_values_before_the_updates():
    values = torch.tensor(REWARDS).unsqueeze(1).expand(4, 4) * scores().mask
    algorithm = ppo(lam=1.0)
    targets = algorithm.begin(batch(), scores(values=values), 0)
    assert algorithm.after_step({})["explained_variance"] == pytest.approx(1.0)
    torch.testing.assert_close(targets.advantages, torch.zeros(4, 4))


@pytest.mark.parametrize("make", [lambda: kimi(target_kl=0.02, length_weight=0.1), ppo])
def test_state_is_carried_over_a_stop(make):
    first, known = make(), scores()
    if first.critic is not None:
        known = scores(values=torch.zeros(4, 4))
        first.critic(None, torch.ones(3, 8)).sum().backward()
        first.after_update()
    first.begin(batch(), known, 0)
    first.after_step({"update_kl": 0.5})
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make()
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.after_step({"update_kl": 0.02}) == first.after_step({"update_kl": 0.02})
    if first.critic is not None:
        states = torch.randn(5, 8)
        assert first.critic.head.weight.abs().sum() > 0
        torch.testing.assert_close(second.critic(None, states), first.critic(None, states), rtol=0, atol=0)
