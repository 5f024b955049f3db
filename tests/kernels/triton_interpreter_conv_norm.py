"""The Triton kernels of the short convolution and the norms in Triton's interpreter, beside torch's in fp64.

test_triton.py runs this file; by hand, with triton 3.7 or newer:

    TRITON_INTERPRET=1 pytest tests/kernels/triton_interpreter_conv_norm.py
"""

from itertools import pairwise

import pytest
import torch
from kda_inputs import doubled

from deltarl.kernels import conv as in_torch
from deltarl.kernels.add_norm import add_rms_norm_ as add_rms_norm_in_torch
from deltarl.kernels.fused.add_norm import add_rms_norm_
from deltarl.kernels.fused.conv import causal_conv1d
from deltarl.kernels.fused.conv_decode import causal_conv1d_decode_
from deltarl.kernels.fused.gated_norm import gated_rms_norm
from deltarl.kernels.gated_norm import gated_rms_norm as gated_rms_norm_in_torch

# fp32 sums of four products, of all tokens for dweight, through one exp: some ten roundings of 6e-8.
RATIO = 1e-6
# The interpreter cuts a number off where a GPU rounds it to bf16: by less than 2^-7 of the number.
BF16_RATIO = 2**-7


def close(got: torch.Tensor, expected: torch.Tensor, ratio: float) -> bool:
    """Whether the RMS of the difference is at most `ratio` of that of what was expected."""
    return got.shape == expected.shape and bool((got.double() - expected).norm() <= ratio * expected.norm())


def conv_inputs(batch: int, tokens: int, channels: int, width: int, sequences: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens * 10 + width)
    return {
        "x": torch.randn(batch, tokens, channels, generator=generator),
        "weight": torch.randn(channels, width, generator=generator),
        "initial_state": torch.randn(sequences, channels, width - 1, generator=generator),
    }


def run(operator, inputs: dict[str, torch.Tensor], **options) -> dict[str, torch.Tensor]:
    """y, the final state and the gradients of all inputs for one fixed gradient of both."""
    inputs = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y, final = operator(**inputs, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    dy, dfinal = (torch.randn(t.shape, generator=generator).to(t.dtype) for t in (y, final))
    gradients = torch.autograd.grad((y, final), list(inputs.values()), (dy, dfinal))
    return {"y": y.detach(), "final": final.detach(), **{f"d{k}": g for k, g in zip(inputs, gradients, strict=True)}}


CONV_CASES = {
    "rows": {"batch": 2, "tokens": 37, "bounds": None},
    "blocks of 16, and widths that are no power of two": {"tokens": 70, "channels": 40, "bounds": [0, 33, 70]},
    "shorter than the state": {"tokens": 12, "bounds": [0, 1, 3, 3, 6, 12]},
    "one token": {"tokens": 1, "bounds": [0, 1]},
    "no tokens": {"tokens": 0, "bounds": [0, 0, 0]},
    "width 2": {"tokens": 21, "width": 2, "bounds": [0, 1, 21]},
    "width 3": {"tokens": 21, "width": 3, "bounds": [0, 1, 2, 21]},
    "no activation": {"tokens": 18, "bounds": None, "activation": None},
}


@pytest.mark.parametrize("name", CONV_CASES)
def test_convolution_and_gradients_match_torch(name):
    options = {"batch": 1, "channels": 16, "width": 4, "activation": "silu", **CONV_CASES[name]}
    bounds, activation = options.pop("bounds"), options.pop("activation")
    sequences = options["batch"] if bounds is None else len(bounds) - 1
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    inputs = conv_inputs(**options, sequences=sequences)
    got, expected = (
        run(operator, tensors, activation=activation, cu_seqlens=cu_seqlens)
        for operator, tensors in ((causal_conv1d, inputs), (in_torch.causal_conv1d, doubled(inputs)))
    )
    for key in got:
        assert close(got[key], expected[key], RATIO), key


def test_convolution_of_a_view_in_bf16_without_states():
    projection = torch.randn(1, 40, 48).bfloat16()
    x, weight = projection[..., 16:32].requires_grad_(), torch.randn(16, 4, requires_grad=True)
    exact, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    dy = torch.randn(1, 40, 1).bfloat16().expand(1, 40, 16)
    bounds = torch.tensor([0, 25, 40])
    y, state = causal_conv1d(x, weight, cu_seqlens=bounds)
    expected, _ = in_torch.causal_conv1d(exact, exact_weight, cu_seqlens=bounds)
    assert state is None and y.dtype == torch.bfloat16
    assert close(y.detach(), expected.detach(), BF16_RATIO)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    exact_dx, exact_dweight = torch.autograd.grad(expected, (exact, exact_weight), dy.double())
    assert dx.dtype == torch.bfloat16 and dweight.dtype == torch.float32
    assert close(dx, exact_dx, BF16_RATIO)
    assert close(dweight, exact_dweight, RATIO)


def test_gradient_of_the_final_state_alone():
    inputs = conv_inputs(1, 20, 16, 4, 2)
    x, state = inputs["x"].requires_grad_(), inputs["initial_state"].requires_grad_()
    _, final = causal_conv1d(
        x, inputs["weight"], cu_seqlens=torch.tensor([0, 18, 20]), initial_state=state, output_final_state=True
    )
    dfinal = torch.randn(final.shape)
    dx, dstate = torch.autograd.grad(final, (x, state), dfinal)
    assert torch.equal(dx[0, 15:18].t(), dfinal[0]) and torch.equal(dx[0, 18:].t(), dfinal[1, :, 1:])
    assert not dx[0, :15].any() and not dstate[0].any()
    assert torch.equal(dstate[1, :, 2], dfinal[1, :, 0]) and not dstate[1, :, :2].any()


def test_later_inputs_change_nothing_before_and_nan_stays_in_its_sequence():
    inputs = conv_inputs(1, 60, 16, 4, 3)
    other = {**inputs, "x": inputs["x"].clone()}
    other["x"][:, 41:] = torch.nan
    bounds = torch.tensor([0, 10, 50, 60])
    (y, _), (other_y, _) = (causal_conv1d(**x, cu_seqlens=bounds) for x in (inputs, other))
    assert torch.equal(y[:, :41], other_y[:, :41]) and other_y[:, 41:].isnan().all()

    inputs["x"][:, 12] = torch.nan
    got = run(causal_conv1d, inputs, cu_seqlens=bounds)
    for key in ("y", "dx"):
        assert got[key][:, 12].isnan().all()
        for (begin, end), packed in zip(pairwise(bounds.tolist()), (False, True, False), strict=True):
            assert packed or got[key][:, begin:end].isfinite().all()
    assert got["final"].isfinite().all()


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("layout", ["channels first", "channels last"])
@pytest.mark.parametrize("count", [3, 65])
def test_decoding_matches_torch_in_both_layouts_of_the_pool(width, layout, count):
    x, weight = torch.randn(count, 40)[:, :24], torch.randn(24, width)
    pool = torch.randn(80, 24, width - 1) if layout == "channels first" else torch.randn(80, width - 1, 24).mT
    expected_pool, slots = pool.clone(), torch.randperm(80)[:count]
    slots[1] = -1
    y = causal_conv1d_decode_(x, weight, pool, slots)
    expected = in_torch.causal_conv1d_decode_(x, weight, expected_pool, slots)
    assert close(y, expected, RATIO) and not y[1].any()
    assert torch.equal(pool, expected_pool)


def contiguous(x: torch.Tensor) -> torch.Tensor:
    return x


def part_of_a_projection(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as heads of a wider last dimension, so that rows are not at one distance."""
    wide = torch.cat((x.flatten(-2), x.flatten(-2)[..., :5]), -1)
    return wide[..., :-5].unflatten(-1, x.shape[-2:])


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


NORM_CASES = {
    "many tiles": ((2, 70, 2, 128), contiguous, "sigmoid"),
    "SiLU, gate and gradient as parts of a projection": ((1, 7, 3, 32), part_of_a_projection, "silu"),
    "a width that is no power of two": ((5, 48), contiguous, "sigmoid"),
    "another memory order": ((3, 2, 64), transposed, "sigmoid"),
    "one row of 256": ((256,), contiguous, "sigmoid"),
    "no rows": ((0, 2, 32), contiguous, "sigmoid"),
}


@pytest.mark.parametrize("name", NORM_CASES)
def test_gated_norm_and_gradients_match_torch(name):
    shape, layout, activation = NORM_CASES[name]
    generator = torch.Generator().manual_seed(2)
    x, gate, dy = (torch.randn(shape, generator=generator) for _ in range(3))
    inputs = {"x": x, "gate": layout(gate), "weight": torch.randn(shape[-1:], generator=generator)}
    options = {"eps": 1e-5, "activation": activation}
    got = [t.detach().requires_grad_() for t in inputs.values()]
    exact = [t.requires_grad_() for t in doubled(inputs).values()]
    y, expected = gated_rms_norm(*got, **options), gated_rms_norm_in_torch(*exact, **options)
    assert close(y.detach(), expected.detach(), RATIO)
    gradients = torch.autograd.grad(y, got, layout(dy))
    for key, one, other in zip(inputs, gradients, torch.autograd.grad(expected, exact, dy.double()), strict=True):
        assert close(one, other, RATIO), key


def test_gated_norm_of_bf16_with_extreme_rows():
    x, gate = torch.randn(6, 32).bfloat16(), torch.randn(6, 32).bfloat16()
    x[0], x[1], gate[2], gate[3] = 0.0, 1e18, 300.0, -300.0
    weight = torch.randn(32)
    leaves = [t.requires_grad_() for t in (x, gate, weight)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y, expected = gated_rms_norm(*leaves, eps=1e-5), gated_rms_norm_in_torch(*exact, eps=1e-5)
    assert y.dtype == torch.bfloat16 and close(y.detach(), expected.detach(), BF16_RATIO)
    dy = torch.randn(6, 32).bfloat16()
    for one, other in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, exact, dy.double()), strict=True
    ):
        assert close(one, other, BF16_RATIO)


@pytest.mark.parametrize("width", [16, 24])
def test_norm_of_the_residual_stream(width):
    wide = torch.randn(5, 2 * width)
    x, weight, residual = wide[:, width:], torch.randn(width), torch.randn(5, width)
    exact = residual.double()
    expected = add_rms_norm_in_torch(x, weight, eps=1e-5, residual=(kept := residual.clone()))
    got = add_rms_norm_(x, weight, eps=1e-5, residual=residual)
    assert torch.equal(residual, kept) and not torch.equal(residual.double(), exact)
    assert close(got, expected.double(), RATIO)
    assert close(add_rms_norm_(x, weight, eps=1e-5), add_rms_norm_in_torch(x, weight, eps=1e-5).double(), RATIO)
    short = add_rms_norm_(x.bfloat16(), weight, eps=1e-5, residual=residual)
    assert short.dtype == torch.bfloat16
    assert add_rms_norm_(x[:0], weight, eps=1e-5).shape == (0, width)
