"""From rewards to advantages and returns, as the job's settings say."""

import math

import torch

from deltarl.rl.jobs import RLConfig
from deltarl.rl.losses import explained_variance, gae, group_advantages, reinforce_plus_plus, token_rewards, whiten
from deltarl.rl.targets import make_targets

CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # fp64
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]])
REWARDS = torch.tensor([1.0, 0.0, 0.0, math.nan], dtype=torch.float64)


def random(seed):
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


OLD, REFERENCE, VALUES = random(0), random(1), random(2)


def targets(**options):
    rl = RLConfig(**{"num_generations": 2, **options})
    return make_targets(rl, REWARDS, 2, MASK, old=OLD, reference=REFERENCE, values=VALUES)


def test_of_groups():
    found = targets(scale_rewards="none")
    torch.testing.assert_close(found.advantages, torch.tensor([[0.5], [-0.5], [0.0], [0.0]]).double(), **CLOSE)
    assert found.returns is None


def test_kl_lowers_the_reward_of_a_sequence():
    """RLOO: the advantage of each of two is the difference of their rewards, each less beta x the KL of its tokens."""
    found = targets(
        baseline="leave_one_out", scale_rewards="none", beta=0.1, kl_in="reward", kl_estimator="k1"
    ).advantages
    cost = 0.1 * ((OLD - REFERENCE) * MASK).sum(1)
    first = (1 - cost[0]) - (0 - cost[1])
    torch.testing.assert_close(found[:2, 0], torch.stack([first, -first]), **CLOSE)
    assert found[2:].flatten().tolist() == [0.0, 0.0], "the other of the pair was not graded"


def test_kl_in_the_loss_leaves_the_rewards_alone():
    torch.testing.assert_close(targets(beta=0.1).advantages, targets().advantages, **CLOSE)


def test_reinforce_plus_plus_by_its_options():
    found = targets(baseline="none", scale_rewards="batch", beta=0.1, kl_in="reward", kl_estimator="k1")
    expected = reinforce_plus_plus(REWARDS, MASK, OLD - REFERENCE, beta=0.1)
    torch.testing.assert_close(found.advantages, expected, **CLOSE)
    single = targets(num_generations=1, baseline="none", scale_rewards="batch").advantages
    torch.testing.assert_close(single[:, 0], group_advantages(REWARDS, 1, baseline="none", scale="batch"), **CLOSE)


def ppo(**options):
    return targets(algorithm="ppo", critic={"gamma": 0.9, "lam": 0.5, "whiten_advantages": False, **options})


def test_ppo_learns_from_graded_tokens_only():
    found = ppo()
    graded = MASK.clone()
    graded[3] = 0
    scores = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    advantages, returns = gae(token_rewards(scores, MASK), VALUES, MASK, gamma=0.9, lam=0.5)
    torch.testing.assert_close(found.advantages, advantages * graded, **CLOSE)
    torch.testing.assert_close(found.returns, torch.where(graded.bool(), returns, torch.nan), **CLOSE, equal_nan=True)
    assert found.returns[3].isnan().all()


def test_ppo_by_hand():
    """Reward 1 at the second of two tokens, values 0.5 and 0.25, gamma 1, lambda 1: advantages 0.5 and 0.75."""
    rl = RLConfig(algorithm="ppo", critic={"lam": 1.0, "whiten_advantages": False})
    values = torch.tensor([[0.5, 0.25]])
    found = make_targets(rl, torch.tensor([1.0]), 1, torch.ones(1, 2, dtype=torch.long), values=values)
    torch.testing.assert_close(found.advantages, torch.tensor([[0.5, 0.75]]))
    torch.testing.assert_close(found.returns, torch.tensor([[1.0, 1.0]]))


def test_ppo_whitens_what_it_is_told_to():
    graded = MASK.clone()
    graded[3] = 0
    plain, whitened = ppo(), ppo(whiten_advantages=True)
    torch.testing.assert_close(whitened.advantages, whiten(plain.advantages, graded), **CLOSE)
    torch.testing.assert_close(whitened.returns, plain.returns, **CLOSE, equal_nan=True)
    by_token = token_rewards(torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64), graded)
    advantages, _ = gae(whiten(by_token, graded, shift_mean=False), VALUES, graded, gamma=0.9, lam=0.5)
    torch.testing.assert_close(ppo(whiten_rewards=True).advantages, advantages, **CLOSE)


def test_a_perfect_critic_leaves_no_advantage():
    """Values that are the expected return: nothing to learn, and all of the variance explained."""
    rl = RLConfig(algorithm="ppo", critic={"lam": 0.9, "whiten_advantages": False})
    rewards = torch.tensor([1.0, 0.0])
    values = rewards.unsqueeze(1).expand(2, 4)
    found = make_targets(rl, rewards, 1, torch.ones(2, 4, dtype=torch.long), values=values)
    torch.testing.assert_close(found.advantages, torch.zeros(2, 4))
    assert explained_variance(values, found.returns, torch.ones(2, 4)).item() == 1.0
