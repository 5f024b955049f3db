"""The objectives against cases worked by hand, against TRL's own loss, and by what their formulas imply."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer
from trl.trainer.utils import nanstd

from deltarl.rl.losses import (
    aggregate,
    cispo,
    clipped_surrogate,
    correction_weights,
    effective_sample_size,
    explained_variance,
    gae,
    group_advantages,
    kl_estimate,
    mirror_descent,
    ptx_loss,
    reinforce_plus_plus,
    token_rewards,
    value_loss,
    whiten,
)

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # fp64


@pytest.fixture
def batch():
    torch.manual_seed(0)
    shape = MASK.shape
    old = -torch.rand(shape, dtype=torch.float64)
    return SimpleNamespace(
        logprobs=(old + 0.3 * torch.randn(shape, dtype=torch.float64)).requires_grad_(),
        old=old,
        reference=old + 0.2 * torch.randn(shape, dtype=torch.float64),
        sampler=old + 0.1 * torch.randn(shape, dtype=torch.float64),
        advantages=torch.tensor([1.5, -0.7, 0.4], dtype=torch.float64),
    )


def trl_loss(batch, *, loss_type, level="token", beta=0.0, weights=None, epsilon_high=0.28):
    """TRL's loss on the same tensors: its own code, with a model whose logprobs are given."""
    logprobs, zeros = batch.logprobs, torch.zeros_like(batch.old)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, zeros, None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=epsilon_high,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=10,
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, reduce=lambda x, reduction: x, gather=lambda x: x
        ),
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(MASK.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": torch.ones_like(ids), "completion_ids": ids, "completion_mask": MASK,
        "advantages": batch.advantages, "old_per_token_logps": batch.old, "ref_per_token_logps": batch.reference,
        "importance_sampling_ratio": weights, "num_items_in_batch": MASK.sum(),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, trainer.model, inputs)


def gradient(loss, batch):
    (found,) = torch.autograd.grad(loss, batch.logprobs)
    return found


NORMALISATION = {"grpo": "sequence", "dr_grpo": "length", "dapo": "token", "bnpo": "token", "cispo": "token"}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", NORMALISATION)
def test_equals_trl(batch, loss_type, level):
    """The same number and the same gradient, with a KL term and importance weights on it."""
    weights = correction_weights(batch.old, batch.sampler, MASK, "token_truncate", cap=1.05)
    advantages = batch.advantages.unsqueeze(1)
    if loss_type == "cispo":
        surrogate = cispo(batch.logprobs, batch.old, advantages, MASK, weight_cap=1.1, level=level)
    else:
        surrogate = clipped_surrogate(
            batch.logprobs, batch.old, advantages, MASK, epsilon=0.2, epsilon_high=0.28, level=level
        )
    per_token = surrogate.loss * weights + 0.05 * kl_estimate(batch.logprobs, batch.reference)
    ours = aggregate(per_token, MASK, NORMALISATION[loss_type], sequences=3, tokens=float(MASK.sum()), max_length=10)
    high = 1.1 if loss_type == "cispo" else 0.28
    expected = trl_loss(batch, loss_type=loss_type, level=level, beta=0.05, weights=weights, epsilon_high=high)
    torch.testing.assert_close(ours, expected, **CLOSE)
    torch.testing.assert_close(gradient(ours, batch), gradient(expected, batch), **CLOSE)


def test_micro_batches_add_up_to_the_batch(batch):
    loss = clipped_surrogate(batch.logprobs, batch.old, batch.advantages.unsqueeze(1), MASK).loss
    for how in ("sequence", "length", "token"):
        whole = {"sequences": 3, "tokens": float(MASK.sum()), "max_length": 4}
        parts = [aggregate(loss[rows], MASK[rows], how, **whole) for rows in (slice(0, 1), slice(1, 3))]
        torch.testing.assert_close(sum(parts), aggregate(loss, MASK, how, **whole), **CLOSE)


def test_clipping_by_hand():
    """Ratios 1.5 and 0.5 with epsilon 0.2 and 0.4: min(1.5 A, 1.4 A) for A = 2, min(0.5 A, 0.8 A) for A = -1."""
    ratios = torch.tensor([[1.5], [0.5], [1.1]], dtype=torch.float64)
    advantages = torch.tensor([[2.0], [-1.0], [2.0]], dtype=torch.float64)
    found = clipped_surrogate(
        ratios.log(), torch.zeros(3, 1), advantages, torch.ones(3, 1), epsilon=0.2, epsilon_high=0.4
    )
    torch.testing.assert_close(found.loss, torch.tensor([[-2.8], [0.8], [-2.2]], dtype=torch.float64), **CLOSE)
    assert found.clipped.flatten().tolist() == [True, True, False]


def test_mirror_descent_gradient_is_the_papers(batch):
    """Eq. 3: grad log pi (r - mean r) - tau / 2 grad (log pi / pi_i)^2, summed over tokens."""
    tau, advantages = 0.3, batch.advantages.unsqueeze(1)
    loss = mirror_descent(batch.logprobs, batch.old, advantages, MASK, tau=tau).sum()
    drift = ((batch.logprobs - batch.old) * MASK).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient(loss, batch), -(advantages - tau * drift) * MASK, **CLOSE)


def test_mirror_descent_with_weights_by_hand():
    """Ratios 1.2 and 0.9, weights 2 and 0.5, A = 3, tau = 0.4: a weight multiplies its token in both sums."""
    ratios = torch.tensor([[1.2, 0.9, 7.0]], dtype=torch.float64)
    old = torch.tensor([[-1.0, -2.0, -9.0]], dtype=torch.float64)
    logprobs, weights = (old + ratios.log()).requires_grad_(), torch.tensor([[2.0, 0.5, 8.0]], dtype=torch.float64)
    mask, advantage = torch.tensor([[1, 1, 0]]), torch.tensor([[3.0]], dtype=torch.float64)
    loss = mirror_descent(logprobs, old, advantage, mask, tau=0.4, weights=weights)
    drift = 2 * math.log(1.2) + 0.5 * math.log(0.9)
    expected = -(3 * (2 * (-1 + math.log(1.2)) + 0.5 * (-2 + math.log(0.9))) - 0.2 * drift**2)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    (found,) = torch.autograd.grad(loss.sum(), logprobs)
    torch.testing.assert_close(found, -(3 - 0.4 * drift) * weights * mask, **CLOSE)


def test_first_mirror_descent_step_is_the_policy_gradient(batch):
    """At pi = pi_i the drift is 0: the gradient is REINFORCE's with the mean baseline, whatever tau."""
    at_start = SimpleNamespace(logprobs=batch.old.clone().requires_grad_())
    advantages = batch.advantages.unsqueeze(1)
    loss = mirror_descent(at_start.logprobs, batch.old, advantages, MASK, tau=5.0).sum()
    torch.testing.assert_close(gradient(loss, at_start), -advantages * MASK, **CLOSE)


def test_ptx_loss_is_cross_entropy(batch):
    torch.manual_seed(2)
    logits, targets = torch.randn(3, 4, 7, dtype=torch.float64), torch.randint(7, (3, 4))
    logprobs = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    labels = targets.masked_fill(MASK == 0, -100)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    parts = [ptx_loss(logprobs[rows], MASK[rows], tokens=float(MASK.sum())) for rows in (slice(0, 2), slice(2, 3))]
    torch.testing.assert_close(sum(parts), expected, **CLOSE)


def test_group_advantages_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    centred = torch.tensor([0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, 4, scale="none"), centred, **CLOSE)
    torch.testing.assert_close(group_advantages(rewards, 4), centred / (0.5 + 1e-4), **CLOSE)
    others = torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(
        group_advantages(rewards, 4, baseline="leave_one_out", scale="none"), others, rtol=1e-12, atol=1e-12
    )
    whole = group_advantages(rewards, 4, scale="batch")
    torch.testing.assert_close(whole, centred / (centred.std() + 1e-4), **CLOSE)


def test_an_ungraded_reward_moves_nothing():
    nan = float("nan")
    rewards = torch.tensor([1.0, 0.0, nan, nan, 1.0, nan], dtype=torch.float64)
    found = group_advantages(rewards, 3, scale="none")
    torch.testing.assert_close(found, torch.tensor([0.5, -0.5, 0, 0, 0, 0], dtype=torch.float64), **CLOSE)
    alone = group_advantages(rewards, 3, baseline="leave_one_out", scale="none")
    torch.testing.assert_close(alone, torch.tensor([1.0, -1.0, 0, 0, 0, 0], dtype=torch.float64), **CLOSE)


def test_batch_scale_centres_what_has_no_baseline():
    rewards = torch.tensor([3.0, float("nan"), 1.0, 5.0], dtype=torch.float64)
    found = group_advantages(rewards, 1, baseline="none", scale="batch")
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, -2.0, 2.0], dtype=torch.float64) / (2 + 1e-4), **CLOSE)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_group_advantages_equal_trl(scale):
    """TRL's lines: centred on the group's mean, over its standard deviation + 1e-4 (GRPOTrainer, `scale_rewards`)."""
    torch.manual_seed(0)
    rewards = torch.rand(12, dtype=torch.float64)
    rewards[5] = float("nan")
    grouped = rewards.view(3, 4)
    expected = rewards - torch.nanmean(grouped, dim=1).repeat_interleave(4)
    if scale == "group":
        expected = expected / (nanstd(grouped, dim=1).repeat_interleave(4) + 1e-4)
    found = group_advantages(rewards, 4, scale=scale)  # TRL's Bessel factor is float32: half an ulp after the root
    torch.testing.assert_close(found, expected.nan_to_num(0.0), rtol=2**-24, atol=1e-12)


def test_token_rewards_by_hand():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    kl = torch.tensor([[0.5, -0.25, 1.0], [2.0, float("nan"), 9.0], [9.0, 9.0, 9.0]])
    scores = torch.tensor([1.0, -1.0, 7.0])
    torch.testing.assert_close(
        token_rewards(scores, mask, kl, beta=0.1),
        torch.tensor([[-0.05, 0.025, 0.9], [-1.2, 0.0, 0.0], [0.0, 0.0, 0.0]]),
    )
    torch.testing.assert_close(token_rewards(scores, mask), torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, 0, 0]]))


def test_reinforce_plus_plus_by_hand():
    """Rewards 1 and 0 with KL of 1 a token and beta 0.1: returns 0.8, 0.9, -0.1, whitened; the third is ungraded."""
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    found = reinforce_plus_plus(
        torch.tensor([1.0, 0.0, float("nan")], dtype=torch.float64), mask, torch.ones(3, 2).double(), beta=0.1
    )
    returns = torch.tensor([0.8, 0.9, -0.1], dtype=torch.float64)
    whitened = (returns - returns.mean()) / (returns.var(correction=0) + 1e-8).sqrt()
    expected = torch.stack([whitened[:2], torch.stack([whitened[2], 0 * whitened[2]]), 0 * whitened[:2]])
    torch.testing.assert_close(found, expected, **CLOSE)


def test_groups_must_divide():
    with pytest.raises(ValueError, match="do not divide into groups of 4"):
        group_advantages(torch.zeros(6), 4)
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(torch.zeros(6), 1, baseline="leave_one_out")


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators_are_unbiased(estimator):
    """Their expectation under pi, summed exactly over a vocabulary of 7, is the KL."""
    torch.manual_seed(1)
    pi, reference = torch.randn(2, 7, dtype=torch.float64).log_softmax(-1)
    expected = (pi.exp() * (pi - reference)).sum()
    torch.testing.assert_close((pi.exp() * kl_estimate(pi, reference, estimator)).sum(), expected, **CLOSE)


def test_gradient_of_k2_is_that_of_the_kl():
    """The expected gradient of k2 under pi, over all tokens, is the KL's; that of k1 is zero."""
    torch.manual_seed(1)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(7, dtype=torch.float64).log_softmax(-1)
    pi = logits.log_softmax(-1)
    weights = pi.exp().detach()
    (expected,) = torch.autograd.grad((pi.exp() * (pi - reference)).sum(), logits, retain_graph=True)
    (k2,) = torch.autograd.grad((weights * kl_estimate(pi, reference, "k2")).sum(), logits, retain_graph=True)
    (k1,) = torch.autograd.grad((weights * kl_estimate(pi, reference, "k1")).sum(), logits)
    torch.testing.assert_close(k2, expected, **CLOSE)
    torch.testing.assert_close(k1, torch.zeros_like(k1), **CLOSE)


def test_correction_weights_by_hand():
    learner = torch.tensor([[0.5, -0.5, 9.0], [0.0, 1.0, 9.0]], dtype=torch.float64)
    sampler, mask = torch.zeros_like(learner), torch.tensor([[1, 1, 0], [1, 1, 0]])
    e = torch.tensor([0.5, -0.5, 1.0], dtype=torch.float64).exp()

    def weights(mode, cap=2.0, floor=0.0):
        return correction_weights(learner, sampler, mask, mode, cap=cap, floor=floor)[:, :2]

    one = torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(weights("token_truncate"), torch.stack([e[:2], torch.stack([one, 2 * one])]), **CLOSE)
    torch.testing.assert_close(
        weights("token_mask", floor=0.7), torch.stack([torch.stack([e[0], 0 * one]), torch.stack([one, 0 * one])])
    )
    torch.testing.assert_close(weights("sequence_truncate").flatten(), torch.stack([one, 2 * one]), **CLOSE)
    torch.testing.assert_close(weights("sequence_mask").flatten(), torch.stack([one, 0 * one]), **CLOSE)
    torch.testing.assert_close(weights("geometric_truncate").flatten(), torch.stack([one, e[0]]), **CLOSE)


def test_where_nothing_is_to_be_learned_another_sampler_pulls_at_every_token_unless_it_is_weighed():
    """Each token has the advantage A: in expectation over the sampler q gradient 0 with weights, A (pi - q) without."""
    logits = torch.tensor([0.3, -1.0, 0.7, 0.1], dtype=torch.float64, requires_grad=True)
    q = (logits.detach() + torch.tensor([0.5, -0.4, 0.1, 0.6])).softmax(0)
    pi, ones, advantages = logits.softmax(0), torch.ones(4, 1), torch.full((4, 1), -0.7, dtype=torch.float64)
    logprobs = pi.log().unsqueeze(1)
    weights = correction_weights(logprobs, q.log().unsqueeze(1), ones, "token_truncate", cap=9.0)
    loss, _ = clipped_surrogate(logprobs, logprobs.detach(), advantages, ones)
    (plain,) = torch.autograd.grad((q.unsqueeze(1) * loss).sum(), logits, retain_graph=True)
    (weighed,) = torch.autograd.grad((q.unsqueeze(1) * weights * loss).sum(), logits)
    torch.testing.assert_close(plain, -0.7 * (pi.detach() - q), **CLOSE)
    torch.testing.assert_close(weighed, torch.zeros_like(weighed), **CLOSE)


def test_a_mask_mode_drops_what_lies_outside_its_range():
    gap = torch.tensor([[0.3, -0.3], [0.8, 0.8], [-0.9, -0.1]], dtype=torch.float64)
    sampler, mask = torch.zeros_like(gap), torch.ones(3, 2)
    limits = {"cap": math.exp(0.6), "floor": math.exp(-0.4)}
    geometric = correction_weights(gap, sampler, mask, "geometric_mask", **limits).log().flatten()
    assert geometric.tolist() == pytest.approx([0.0, -math.inf, -math.inf])
    sequence = correction_weights(gap, sampler, mask, "sequence_mask", cap=math.exp(1.7), floor=math.exp(-0.4))
    assert sequence.log().flatten().tolist() == pytest.approx([0.0, 1.6, -math.inf])
    token = correction_weights(gap, sampler, mask, "token_mask", **limits).log()
    assert token.tolist() == [pytest.approx([0.3, -0.3]), [-math.inf] * 2, pytest.approx([-math.inf, -0.1])]
    truncated = correction_weights(gap, sampler, mask, "token_truncate", **limits).log()
    assert truncated[1:].tolist() == [pytest.approx([0.6, 0.6]), pytest.approx([-0.4, -0.1])]


def test_each_token_is_weighed_against_the_version_that_drew_it():
    """Two tokens by version 3, one by version 4: the product over the sequence is that of the three recorded ratios."""
    learner = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64)
    recorded = torch.tensor([[-1.5, -1.8, -0.5]], dtype=torch.float64)
    mask = torch.ones(1, 3)
    token = correction_weights(learner, recorded, mask, "token_truncate", cap=9.0)
    torch.testing.assert_close(token, torch.tensor([[0.5, -0.2, 0.0]], dtype=torch.float64).exp(), **CLOSE)
    sequence = correction_weights(learner, recorded, mask, "sequence_truncate", cap=9.0)
    torch.testing.assert_close(sequence, token.prod(-1, keepdim=True), **CLOSE)


def test_an_unrecorded_logprob_needs_no_correction():
    sampler = torch.tensor([[float("nan"), 0.0]])
    weights = correction_weights(torch.tensor([[-1.0, 0.0]]), sampler, torch.ones(1, 2), "token_truncate", cap=2.0)
    assert weights.tolist() == [[1.0, 1.0]]


def test_effective_sample_size():
    assert effective_sample_size(torch.ones(5)).item() == pytest.approx(1.0)
    assert effective_sample_size(torch.tensor([1.0, 0.0, 0.0, 0.0])).item() == pytest.approx(0.25)
    masked = effective_sample_size(torch.tensor([[1.0, 1.0, 50.0]]), torch.tensor([[1, 1, 0]]))
    assert masked.item() == pytest.approx(1.0)


def test_gae_by_hand():
    """Rewards 0, 0, 1 with values 0.5, 0.4, 0.2, gamma 0.9, lambda 0.5; the second sequence ends a token earlier."""
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 7.0]], dtype=torch.float64)
    values = torch.tensor([[0.5, 0.4, 0.2], [0.5, 0.4, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.5)
    last = 0.8
    middle = 0.9 * 0.2 - 0.4 + 0.45 * last
    first = 0.9 * 0.4 - 0.5 + 0.45 * middle
    short = 0.9 * 0.4 - 0.5 + 0.45 * 0.6
    expected = torch.tensor([[first, middle, last], [short, 0.6, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(advantages, expected, **CLOSE)
    torch.testing.assert_close(returns, (expected + values) * mask, **CLOSE)


def test_gae_with_lambda_one_is_the_return_less_the_value():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 3, 6, dtype=torch.float64)
    mask = torch.ones(3, 6, dtype=torch.long)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, to_go, **CLOSE)
    torch.testing.assert_close(advantages, to_go - values, **CLOSE)


def test_value_clipping_keeps_the_worse_of_two():
    loss = value_loss(torch.tensor([1.0, 0.1]), torch.zeros(2), torch.tensor([1.0, 1.0]), clip=0.2)
    torch.testing.assert_close(loss, torch.tensor([0.5 * 0.8**2, 0.5 * 0.9**2]))
    torch.testing.assert_close(value_loss(torch.ones(1), torch.zeros(1), torch.ones(1), clip=None), torch.zeros(1))


def test_whitening_sees_the_mask_only():
    x = torch.tensor([[1.0, 3.0, 100.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0]])
    torch.testing.assert_close(
        whiten(x, mask), torch.tensor([[-1.0, 1.0, 0.0]], dtype=torch.float64), rtol=0, atol=1e-7
    )
    kept = whiten(x, mask, shift_mean=False)
    torch.testing.assert_close(kept, torch.tensor([[1.0, 3.0, 0.0]], dtype=torch.float64), rtol=0, atol=1e-7)


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 9.0]]), torch.tensor([[1, 1, 1, 0]])
    assert explained_variance(returns.clone(), returns, mask).item() == pytest.approx(1.0)
    assert explained_variance(torch.full_like(returns, 2.0), returns, mask).item() == pytest.approx(0.0)
    assert explained_variance(returns, torch.ones_like(returns), mask).isnan()
