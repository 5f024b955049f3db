"""The critic: what it starts from, what it learns, whose weights it touches, and how it is carried over a stop."""

import io

import pytest
import torch

from deltarl.model import build_model
from deltarl.rl.algorithmsections import CriticConfig
from deltarl.rl.critic import Critic
from deltarl.rl.forward import enable_scoring, packed_logprobs
from deltarl.rl.packing import make_packs
from deltarl.rollout import Trace

SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}


def model(seed=0):
    torch.manual_seed(seed)
    made = build_model("mla", "2m", vocab_size=300, pad_token_id=0, bos_token_id=None, eos_token_id=1, **SMALL)
    enable_scoring(made)
    return made


def pack():
    generator = torch.Generator().manual_seed(0)
    traces = [
        Trace(torch.randint(300, (p,), generator=generator).tolist(), list(range(c)), [0.0] * c, [0] * c, "stop")
        for p, c in ((3, 4), (2, 1), (5, 3))
    ]
    (found,) = make_packs(traces, range(3), 100)
    return found


def critic(kind="head", seed=0, **settings):
    torch.manual_seed(seed)
    return Critic(CriticConfig(kind=kind, **settings), 64, model(seed) if kind == "model" else None)


def learn(made, states, target, steps):
    for _ in range(steps):
        loss = (made(pack(), states) - target).square().mean()
        loss.backward()
        made.update(1.0)
    return loss.item()


def test_values_are_zero_at_first():
    states = torch.randn(8, 64)
    for kind in ("head", "model"):
        assert critic(kind)(pack(), states).tolist() == [0.0] * 8


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_policy_gets_its_share_of_the_gradient(share):
    made = critic(trunk_gradient=share)
    torch.nn.init.normal_(made.head.weight)
    states = torch.randn(8, 64, requires_grad=True)
    values = made(pack(), states)
    torch.testing.assert_close(values, (states @ made.head.weight.T + made.head.bias).squeeze(-1))
    values.sum().backward()
    torch.testing.assert_close(states.grad, share * made.head.weight.detach().expand(8, 64))
    torch.testing.assert_close(made.head.weight.grad, states.detach().sum(0, keepdim=True))


def test_a_head_learns_what_the_states_tell():
    torch.manual_seed(1)
    states = torch.randn(8, 64)
    target = states[:, 0] * 0.5 + 0.2
    assert learn(critic(learning_rate=0.02), states, target, 200) < 1e-3 * target.square().mean()


def test_a_model_of_its_own_learns_without_the_policy():
    policy = model(1)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    states = packed_logprobs(policy, pack(), hidden=True).hidden
    target = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    assert learn(critic("model", learning_rate=3e-3), states, target, 40) < 0.05, "a quarter is what a constant leaves"
    assert all(parameter.grad is None for parameter in policy.parameters())
    for name, tensor in policy.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["head", "model"])
def test_goes_on_as_if_it_had_not_been_stopped(kind):
    states, target = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), torch.ones(8)
    made = critic(kind)
    learn(made, states, target, 3)
    file = io.BytesIO()
    torch.save(made.learned(), file)
    file.seek(0)
    again = critic(kind, seed=5)
    again.go_on(torch.load(file, weights_only=True))
    for one in (made, again):
        learn(one, states, target, 2)
    torch.testing.assert_close(made(pack(), states), again(pack(), states), rtol=0, atol=0)


def test_gradients_that_are_not_finite_are_dropped():
    made = critic()
    (made(pack(), torch.randn(8, 64)) * torch.nan).sum().backward()
    assert not torch.tensor(made.update(1.0)).isfinite()
    assert made.head.weight.abs().sum() == 0 and made.head.weight.grad is None
