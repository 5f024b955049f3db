"""The short convolution against torch's own, and its state."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from deltarl.kernels import causal_conv1d, causal_conv1d_decode_

WIDTH = 4


def by_torch(x: torch.Tensor, weight: torch.Tensor, activation: str | None) -> torch.Tensor:
    channels, width = weight.shape
    y = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), padding=width - 1, groups=channels)[..., : x.shape[1]]
    return (F.silu(y) if activation else y).transpose(1, 2)


@pytest.mark.parametrize("tokens", [1, 3, 4, 17])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("activation", ["silu", None])
def test_equals_torch_conv1d(tokens, width, activation):
    x, weight = torch.randn(2, tokens, 5), torch.randn(5, width)
    y, state = causal_conv1d(x, weight, activation=activation)
    assert state is None
    assert torch.allclose(y, by_torch(x, weight, activation), atol=1e-6)


@pytest.mark.parametrize("bounds", [None, torch.tensor([0, 2, 2, 7])])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("activation", ["silu", None])
def test_gradients(bounds, width, activation):
    sequences = 1 if bounds is None else 3
    x, weight, state = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 7, 2), (2, width), (sequences, 2, width - 1))
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


def test_bf16_is_summed_in_fp32_and_rounded_once():
    x, weight = (20 * torch.randn(2, 9, 6)).bfloat16(), torch.randn(6, WIDTH)
    y, state = causal_conv1d(x, weight, output_final_state=True)
    assert y.dtype == state.dtype == torch.bfloat16
    # Half a unit in the last of bf16's 8 bits, and what fp32 itself loses where a sum cancels.
    assert torch.allclose(y.double(), by_torch(x.double(), weight.double(), "silu"), rtol=2**-8 * 1.001, atol=1e-4)


def test_later_inputs_change_nothing_before():
    first, weight = torch.randn(1, 20, 3), torch.randn(3, WIDTH)
    second = torch.cat((first[:, :12], 9 * torch.randn(1, 8, 3)), 1)
    outputs = []
    for x in (first, second):
        x.requires_grad_()
        y, _ = causal_conv1d(x, weight)
        outputs.append((y[:, :12], torch.autograd.grad(y[:, :12].square().sum(), x)[0][:, :12]))
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("activation", ["silu", None])
def test_decoding_token_by_token_equals_one_pass(width, activation):
    x, weight = torch.randn(3, 9, 5), torch.randn(5, width)
    whole, final = causal_conv1d(x, weight, activation=activation, output_final_state=True)
    _, state = causal_conv1d(x[:, :4], weight, output_final_state=True)
    pool, slots = torch.full((7, width - 1, 5), torch.nan).transpose(1, 2), torch.tensor([5, 0, 3], dtype=torch.int32)
    pool[slots] = state
    for token in range(4, 9):
        y = causal_conv1d_decode_(x[:, token], weight, pool, slots, activation=activation)
        assert torch.allclose(y, whole[:, token], atol=1e-6)
    assert torch.equal(pool[slots], final) and pool[[1, 2, 4, 6]].isnan().all()


def test_decoding_passes_over_padding():
    x, weight, pool = torch.randn(3, 5), torch.randn(5, WIDTH), torch.randn(2, 5, WIDTH - 1)
    alone, before = pool.clone(), pool.clone()
    y = causal_conv1d_decode_(x, weight, pool, torch.tensor([-1, 1, -1]))
    assert torch.equal(y[1:2], causal_conv1d_decode_(x[1:2], weight, alone, torch.tensor([1])))
    assert torch.equal(pool, alone) and torch.equal(pool[0], before[0]) and not y[[0, 2]].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "relu"}, "activation must be"),
        ({"weight": torch.zeros(4, WIDTH)}, "weight"),
        ({"state": torch.zeros(2, 3, WIDTH)}, r"state must be \[slots, 3, 3\]"),
        ({"slots": torch.tensor([0])}, "slots"),
    ],
)
def test_decoding_refuses_inputs_that_do_not_fit(arguments, message):
    fitting = {"x": torch.zeros(2, 3), "weight": torch.zeros(3, WIDTH), "state": torch.zeros(2, 3, WIDTH - 1)}
    with pytest.raises(ValueError, match=message):
        causal_conv1d_decode_(**{**fitting, "slots": torch.tensor([0, 1]), **arguments})


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
