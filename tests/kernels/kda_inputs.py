"""Random inputs for the operators, and the distance tests judge them by."""

import torch
from torch import Tensor


def raw_inputs(batch: int, tokens: int, heads: int = 2, key: int = 8, value: int = 6, **options) -> dict[str, Tensor]:
    """Raw projections with A_log and dt_bias, as the model passes them, from a seed of the shape."""
    generator = torch.Generator().manual_seed(batch * 1000 + tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, **options)

    return {
        "q": draw(batch, tokens, heads, key),
        "k": draw(batch, tokens, heads, key),
        "v": draw(batch, tokens, heads, value),
        "g": draw(batch, tokens, heads, key),
        "beta": draw(batch, tokens, heads),
        "A_log": draw(heads),
        "dt_bias": draw(heads * key),
    }


def doubled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() for name, x in inputs.items()}


def rms_ratio(got: Tensor, expected: Tensor) -> float:
    """RMS of the difference over the RMS of what was expected."""
    return float((got - expected).norm() / expected.norm())
