"""The short convolution against torch's own, and its state."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from deltarl.kernels import causal_conv1d

WIDTH = 4


def by_torch(x: torch.Tensor, weight: torch.Tensor, activation: str | None) -> torch.Tensor:
    channels = x.shape[-1]
    y = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), padding=WIDTH - 1, groups=channels)[..., : x.shape[1]]
    return (F.silu(y) if activation else y).transpose(1, 2)


@pytest.mark.parametrize("tokens", [1, 3, 4, 17])
@pytest.mark.parametrize("activation", ["silu", None])
def test_equals_torch_conv1d(tokens, activation):
    x, weight = torch.randn(2, tokens, 5), torch.randn(5, WIDTH)
    y, state = causal_conv1d(x, weight, activation=activation)
    assert state is None
    assert torch.allclose(y, by_torch(x, weight, activation), atol=1e-6)


@pytest.mark.parametrize("bounds", [None, torch.tensor([0, 2, 2, 7])])
@pytest.mark.parametrize("activation", ["silu", None])
def test_gradients(bounds, activation):
    sequences = 1 if bounds is None else 3
    x, weight, state = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 7, 2), (2, WIDTH), (sequences, 2, WIDTH - 1))
    )

    def run(x, weight, state):
        return causal_conv1d(
            x, weight, activation=activation, cu_seqlens=bounds, initial_state=state, output_final_state=True
        )

    assert torch.autograd.gradcheck(run, (x, weight, state))


@pytest.mark.parametrize("cut", [1, 2, 5, 9])
def test_continuing_from_the_state_equals_one_pass(cut):
    x, weight = torch.randn(2, 10, 3), torch.randn(3, WIDTH)
    whole, final = causal_conv1d(x, weight, output_final_state=True)
    head, state = causal_conv1d(x[:, :cut], weight, output_final_state=True)
    tail, end = causal_conv1d(x[:, cut:], weight, initial_state=state, output_final_state=True)
    assert torch.allclose(torch.cat((head, tail), 1), whole, atol=1e-6)
    assert torch.equal(end, final) and torch.equal(final, x[:, -3:].transpose(1, 2))


def test_packed_equals_separate_and_nan_stays_home():
    x, weight, bounds = torch.randn(1, 20, 3), torch.randn(3, WIDTH), torch.tensor([0, 2, 9, 9, 20])
    states = torch.randn(4, 3, WIDTH - 1)
    x[:, 5] = torch.nan
    y, final = causal_conv1d(x, weight, cu_seqlens=bounds, initial_state=states, output_final_state=True)
    for i, (start, end) in enumerate(pairwise(bounds)):
        alone, state = causal_conv1d(x[:, start:end], weight, initial_state=states[i : i + 1], output_final_state=True)
        assert torch.allclose(y[:, start:end], alone, equal_nan=True)
        assert torch.allclose(final[i], state[0], equal_nan=True)
    assert y[:, :2].isfinite().all() and y[:, 9:].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "relu"}, "activation must be"),
        ({"weight": torch.zeros(4, WIDTH)}, "weight"),
        ({"initial_state": torch.zeros(1, 3, WIDTH)}, "initial_state must be"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{"x": torch.zeros(1, 5, 3), "weight": torch.zeros(3, WIDTH), **arguments})
