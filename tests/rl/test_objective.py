"""The job's settings become the loss they name, however the batch is cut into micro-batches."""

import dataclasses

import pytest
import torch

from deltarl.rl.errors import UserError
from deltarl.rl.jobs import Job, RLConfig, validate
from deltarl.rl.objective import MicroBatch, Tally, critic_loss, policy_loss

LENGTHS = [5, 2, 4, 3]
CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # fp64


@pytest.fixture
def batch():
    torch.manual_seed(0)
    mask = (torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    old = -torch.rand(4, 5, dtype=torch.float64)
    return MicroBatch(
        logprobs=(old + 0.3 * torch.randn(4, 5, dtype=torch.float64)).requires_grad_(),
        entropies=torch.rand(4, 5, dtype=torch.float64),
        mask=mask,
        advantages=torch.tensor([[1.5], [-0.7], [0.4], [-1.2]], dtype=torch.float64),
        old=old,
        sampler=old + 0.2 * torch.randn(4, 5, dtype=torch.float64),
        reference=old + 0.2 * torch.randn(4, 5, dtype=torch.float64),
        sequences=4.0,
        tokens=14.0,
    )


def part(batch, rows):
    whole = {"sequences": batch.sequences, "tokens": batch.tokens}
    cut = {name: x[rows] for name, x in vars(batch).items() if isinstance(x, torch.Tensor)}
    return MicroBatch(**cut, **whole)


def loss(rl, batch, tally):
    return policy_loss(rl, batch, tally, tau=0.3)


def settings(**options):
    return RLConfig(**{"beta": 0.1, "max_completion_length": 8, **options})


VARIANTS = [
    {"loss_type": "grpo"},
    {"loss_type": "dr_grpo", "entropy_bonus": 0.01},
    {"loss_type": "dapo", "epsilon_high": 0.28, "kl_estimator": "k2"},
    {"loss_type": "cispo", "epsilon_high": 1.2, "importance_sampling": "geometric_mask"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "importance_sampling": "sequence_truncate"},
    {"algorithm": "kimi", "entropy_bonus": 0.01},
    {"algorithm": "ppo", "critic": {}, "loss_type": "dapo"},
]


@pytest.mark.parametrize("options", VARIANTS)
def test_micro_batches_add_up(batch, options):
    rl, whole, parts = settings(**options), Tally(), Tally()
    expected = loss(rl, batch, whole)
    cut = sum(loss(rl, part(batch, rows), parts) for rows in (slice(0, 1), slice(1, 4)))
    torch.testing.assert_close(cut, expected, **CLOSE)
    one, two = whole.take(), parts.take()
    assert one.keys() == two.keys()
    for name in one.keys() - {"is_ess"}:  # a share of each micro-batch
        assert one[name] == pytest.approx(two[name], rel=1e-6), name


def test_tokens_outside_the_mask_do_not_matter(batch):
    inside = batch.mask.bool()
    damaged = dataclasses.replace(
        batch,
        logprobs=torch.where(inside, batch.logprobs, -3.0),
        sampler=torch.where(inside, batch.sampler, torch.nan),
        reference=torch.where(inside, batch.reference, 2.0),
    )
    for options in VARIANTS:
        tally, other = Tally(), Tally()
        expected = loss(settings(**options), batch, tally)
        torch.testing.assert_close(loss(settings(**options), damaged, other), expected, **CLOSE)
        assert tally.take() == pytest.approx(other.take(), rel=1e-6)


def test_without_correction_the_sampler_is_only_measured(batch):
    rl = settings(importance_sampling="none")
    elsewhere = dataclasses.replace(batch, sampler=batch.sampler - 1.0)
    near, far = Tally(), Tally()
    torch.testing.assert_close(loss(rl, batch, near), loss(rl, elsewhere, far), **CLOSE)
    near, far = near.take(), far.take()
    assert far["logp_gap_mean"] > near["logp_gap_mean"] + 0.5 and far["is_ratio_mean"] > near["is_ratio_mean"]


def test_an_agreeing_engine_needs_no_correction(batch):
    agreeing = dataclasses.replace(batch, sampler=batch.old)
    for mode in ("token_mask", "sequence_truncate", "geometric_truncate"):
        tally = Tally()
        found = loss(settings(importance_sampling=mode), agreeing, tally)
        torch.testing.assert_close(found, loss(settings(importance_sampling="none"), agreeing, Tally()), **CLOSE)
        found = tally.take()
        assert found["is_ratio_mean"] == 1.0 and found["is_ess"] == pytest.approx(1.0) and found["engine_kl"] == 0.0


def test_kimi_is_mirror_descent_plus_what_regularises(batch):
    """Sums over a sequence, the mean over sequences; truncated weights of each token in both sums of mirror descent."""
    rl = settings(algorithm="kimi", entropy_bonus=0.01, importance_sampling_cap=1.1)
    mask = batch.mask
    weights = (batch.old - batch.sampler).exp().clamp(max=1.1)
    gain = (batch.logprobs * weights * mask).sum(1) * batch.advantages.flatten()
    drift = ((batch.logprobs - batch.old) * weights * mask).sum(1)
    kl = ((batch.reference - batch.logprobs).exp() - 1 + batch.logprobs - batch.reference) * mask
    each = -gain + 0.15 * drift**2 + 0.1 * kl.sum(1) - 0.01 * (batch.entropies * mask).sum(1)
    torch.testing.assert_close(loss(rl, batch, Tally()), each.mean(), **CLOSE)


def test_kl_in_the_reward_is_not_in_the_loss(batch):
    without = dataclasses.replace(batch, reference=None)
    in_reward = settings(kl_in="reward", scale_rewards="none")
    tally = Tally()
    torch.testing.assert_close(loss(in_reward, batch, tally), loss(in_reward, without, Tally()), **CLOSE)
    assert tally.take()["kl"] > 0, "it is still measured"


def test_advantages_of_tokens_are_each_tokens_own(batch):
    by_token = dataclasses.replace(batch, advantages=batch.advantages.expand(4, 5).clone())
    rl = settings(algorithm="ppo", critic={})
    torch.testing.assert_close(loss(rl, by_token, Tally()), loss(rl, batch, Tally()), **CLOSE)
    by_token.advantages[0, 1] = 0.0
    other = dataclasses.replace(by_token, reference=None)
    (found,) = torch.autograd.grad(loss(rl, other, Tally()), batch.logprobs)
    assert found[0, 1] == 0 and found[0, 0] != 0


def test_critic_loss_by_hand(batch):
    """1/2 (0.5 - 1)^2; 1/2 (0.2 - 1)^2, as clipping leaves the worse; the third token was not graded."""
    values = torch.tensor([[0.5, 1.0, 9.0]], requires_grad=True)
    critic = {
        "values": values,
        "old_values": torch.tensor([[0.5, 0.0, 9.0]]),
        "returns": torch.tensor([[1.0, 1.0, torch.nan]]),
        "mask": torch.tensor([[1, 1, 1]]),
        "tokens": 6.0,
    }
    tally = Tally()
    found = critic_loss(settings(algorithm="ppo", critic={}), dataclasses.replace(batch, **critic), tally)
    assert found.item() == pytest.approx((0.125 + 0.32) / 6)
    assert tally.take()["value_loss"] == pytest.approx((0.125 + 0.32) / 2)
    (gradient,) = torch.autograd.grad(found, values)
    assert gradient.flatten().tolist() == pytest.approx([-0.5 / 6, 0.0, 0.0])


def test_a_tally_starts_anew_once_taken():
    tally = Tally()
    tally.mean("x", torch.tensor([[1.0, 5.0]]), torch.tensor([[1, 0]]))
    tally.max("y", torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False]))
    tally.max("y", torch.tensor([7.0]), torch.tensor([False]))
    tally.max("nothing", torch.tensor([7.0]), torch.tensor([False]))
    assert tally.take() == {"x": 1.0, "y": 2.0}
    assert tally.take() == {}


@pytest.mark.parametrize("options", VARIANTS)
def test_no_value_is_read_back_before_the_tally_is_taken(batch, options):
    """A tensor on the meta device has no value: reading one raises."""
    tensors = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in tensors.items()}
    tally = Tally()
    loss(settings(**options), MicroBatch(**meta), tally)
    with pytest.raises(RuntimeError, match="meta"):
        tally.take()


def test_cispo_needs_its_cap():
    with pytest.raises(UserError, match="cispo needs epsilon_high"):
        validate(Job, {"name": "x", "rl": {"loss_type": "cispo"}}, "job.yaml")
