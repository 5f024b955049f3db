"""The gated norm against its definition in fp64, against transformers' module, and at the ends of its range."""

import pytest
import torch
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated

from deltarl.kernels import gated_rms_norm

EPS = 1e-5
GATES = {"sigmoid": torch.sigmoid, "silu": torch.nn.functional.silu}


def leaves(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """x, gate and weight."""
    generator = torch.Generator().manual_seed(len(shape))
    shapes = (shape, shape, shape[-1:])
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("shape", [(2, 3, 2, 32), (5, 7), (4,)])
def test_values_and_gradients_are_the_definitions(shape, activation):
    x, gate, weight = leaves(*shape, dtype=torch.float64)
    y = gated_rms_norm(x, gate, weight, eps=EPS, activation=activation)
    defined = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight * GATES[activation](gate)
    dy = torch.randn(shape, dtype=torch.float64)
    found, wanted = (torch.autograd.grad(out, (x, gate, weight), dy) for out in (y, defined))
    assert torch.allclose(y, defined, rtol=1e-12)
    assert all(torch.allclose(one, other, rtol=1e-10, atol=1e-12) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_transformers_module(dtype):
    x, gate, weight = leaves(2, 9, 3, 32, dtype=dtype)
    module = KimiLinearRMSNormGated(32, EPS)
    module.weight = torch.nn.Parameter(weight.detach())
    ours, theirs = gated_rms_norm(x, gate, weight, eps=EPS), module(x, gate)
    dy = torch.randn_like(ours)
    found = torch.autograd.grad(ours, (x, gate, weight), dy)
    wanted = torch.autograd.grad(theirs, (x, gate, module.weight), dy)
    # The same fp32 operations, of which some may be fused; then one rounding, which may fall the other way.
    unit = 1e-6 if dtype == torch.float32 else 2**-7
    for one, other in zip((ours, *found), (theirs, *wanted), strict=True):
        assert one.dtype == dtype and torch.allclose(one, other, rtol=unit, atol=1e-5)


def test_rows_of_zeros_large_numbers_and_saturated_gates_stay_finite():
    x, gate, weight = leaves(4, 32)
    with torch.no_grad():
        x[0], x[1], gate[2], gate[3] = 0.0, 1e18, 1e4, -1e4
    for activation in GATES:
        y = gated_rms_norm(x, gate, weight, eps=EPS, activation=activation)
        gradients = torch.autograd.grad(y, (x, gate, weight), torch.ones_like(y))
        assert all(t.isfinite().all() for t in (y, *gradients))
        assert not y[0].any() and not y[3].any()


def test_nan_stays_in_its_row():
    x, gate, weight = leaves(3, 8)
    with torch.no_grad():
        x[1, 2] = torch.nan
    y = gated_rms_norm(x, gate, weight, eps=EPS)
    dx, dgate = torch.autograd.grad(y.sum(), (x, gate))
    for t in (y, dx, dgate):
        assert t[1].isnan().all() and t[[0, 2]].isfinite().all()


def test_no_rows():
    x, gate, weight = leaves(0, 3, 8)
    y = gated_rms_norm(x, gate, weight, eps=EPS)
    assert y.shape == (0, 3, 8) and not torch.autograd.grad(y.sum(), weight)[0].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation must be one of"),
        ({"gate": torch.zeros(2, 1, 8)}, "x and gate must both be"),
        ({"weight": torch.zeros(2, 8)}, r"weight \[V\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(
            **{"x": torch.zeros(2, 8), "gate": torch.zeros(2, 8), "weight": torch.zeros(8), **change}, eps=EPS
        )
