"""The norm of the residual stream beside fp64, and what it refuses."""

import pytest
import torch

from deltarl.kernels import add_rms_norm_

EPS = 1e-5


def exact(stream: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    stream = stream.double()
    return weight.double() * stream / (stream.square().mean(-1, keepdim=True) + EPS).sqrt()


def test_it_norms_the_sum_and_leaves_it_in_the_residual() -> None:
    torch.manual_seed(0)
    x, weight, residual = torch.randn(5, 24), torch.randn(24), torch.randn(5, 24)
    total = residual + x
    y = add_rms_norm_(x, weight, eps=EPS, residual=residual)
    assert torch.equal(residual, total)
    torch.testing.assert_close(y.double(), exact(total, weight), rtol=1e-5, atol=1e-6)
    alone = add_rms_norm_(x, weight, eps=EPS)
    torch.testing.assert_close(alone.double(), exact(x, weight), rtol=1e-5, atol=1e-6)


def test_small_additions_in_bf16_are_not_lost() -> None:
    """A thousand times 2^-9 to 1: in bf16 each addition would round back to 1."""
    x, weight = torch.full((1, 8), 2.0**-9).bfloat16(), torch.ones(8)
    residual = torch.ones(1, 8)
    for _ in range(1024):
        y = add_rms_norm_(x, weight, eps=EPS, residual=residual)
    assert y.dtype == torch.bfloat16
    assert torch.equal(residual, torch.full((1, 8), 3.0))


@pytest.mark.parametrize(
    ("weight", "residual"),
    [
        (torch.ones(7), None),
        (torch.ones(8), torch.ones(3, 8)),
        (torch.ones(8), torch.ones(2, 8).bfloat16()),
        (torch.ones(8), torch.ones(8, 2).t()),
    ],
)
def test_what_does_not_fit_is_refused(weight, residual) -> None:
    with pytest.raises(ValueError, match="must be"):
        add_rms_norm_(torch.ones(2, 8), weight, eps=EPS, residual=residual)
