"""The scan in segments in Triton's interpreter, in fp32: sequences cut where they would not be, by smaller limits.

Run by hand where triton is installed (3.7 or newer; the CPU profile has none):

    TRITON_INTERPRET=1 pytest tests/kernels/triton_interpreter_scan.py
"""

import pytest
import torch
from kda_inputs import doubled, raw_inputs, rms_ratio

from deltarl.kernels import kda_reference
from deltarl.kernels.fused import segments
from deltarl.kernels.fused.chunk import kda_chunk

# fp32 with sums over 64 tokens and 32 to 64 channels; gradients pass through twice as many of them.
VALUE_RATIO, GRADIENT_RATIO = 1e-5, 5e-5


@pytest.fixture
def cut(monkeypatch):
    """Segments of one chunk, as long as there is room for so many."""
    monkeypatch.setattr(segments, "SHORTEST", 1)
    segments.segments_of.cache_clear()
    yield
    segments.segments_of.cache_clear()


CASES = {
    "two segments": ({"tokens": 70}, None, True),
    "four segments": ({"tokens": 200}, None, True),
    "four segments, neither initial nor final state": ({"tokens": 200}, None, False),
    "more columns than channels": ({"tokens": 140, "value": 64}, None, True),
    "more channels than columns": ({"tokens": 140, "key": 64}, None, True),
    "packed, one sequence empty": ({"tokens": 300}, [0, 3, 3, 100, 300], True),
    "two rows of two heads": ({"tokens": 130, "batch": 2, "heads": 2}, None, False),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_match_the_reference(cut, name):
    shape, bounds, ends = CASES[name]
    shape = {"batch": 1, "heads": 1, "key": 32, "value": 32, **shape}
    inputs = raw_inputs(**shape)
    inputs["g"] = inputs["g"] - 4  # what one segment leaves must matter to the next
    options = {} if bounds is None else {"cu_seqlens": torch.tensor(bounds)}
    sequences = shape["batch"] if bounds is None else len(bounds) - 1
    generator = torch.Generator().manual_seed(1)
    if ends:
        inputs["initial_state"] = torch.randn(
            sequences, shape["heads"], shape["key"], shape["value"], generator=generator
        )
    leaves = {key: x.detach().requires_grad_() for key, x in inputs.items()}
    exact = {key: x.requires_grad_() for key, x in doubled(inputs).items()}
    found = kda_chunk(**leaves, output_final_state=ends, **options)
    expected = kda_reference(**exact, output_final_state=ends, **options)
    found, expected = ([x for x in pair if x is not None] for pair in (found, expected))
    for one, other in zip(found, expected, strict=True):
        assert rms_ratio(one.detach(), other.detach()) <= VALUE_RATIO
    incoming = [torch.randn(x.shape, generator=generator) for x in found]
    got = torch.autograd.grad(found, list(leaves.values()), incoming)
    wanted = torch.autograd.grad(expected, list(exact.values()), [x.double() for x in incoming])
    for key, one, other in zip(inputs, got, wanted, strict=True):
        assert rms_ratio(one, other) <= GRADIENT_RATIO, key


def test_what_follows_never_changes_what_came_before(cut):
    first = {name: x.requires_grad_() for name, x in raw_inputs(1, 180, 1, 32, 32).items()}
    second = {name: x.detach().clone() for name, x in first.items()}
    at = 100
    names = ("q", "k", "v", "g", "beta")
    for name in names:
        second[name][:, at:] = torch.randn_like(second[name][:, at:]) * 3
    second = {name: x.requires_grad_() for name, x in second.items()}
    before = [kda_chunk(**inputs)[0][:, :at] for inputs in (first, second)]
    assert torch.equal(*before)
    one, other = (
        torch.autograd.grad(o.square().sum(), [inputs[name] for name in names])
        for o, inputs in zip(before, (first, second), strict=True)
    )
    for name, a, b in zip(names, one, other, strict=True):
        assert torch.equal(a[:, :at], b[:, :at]) and not b[:, at:].any(), name


def test_nan_stays_in_its_packed_sequence(cut):
    inputs = raw_inputs(1, 240, 1, 32, 32)
    inputs["v"][:, 75] = torch.nan
    token_wise = [inputs[name].requires_grad_() for name in ("q", "k", "v", "g", "beta")]
    o, state = kda_chunk(**inputs, output_final_state=True, cu_seqlens=torch.tensor([0, 65, 200, 240]))
    assert o[:, 130:200].isnan().all() and state[[0, 2]].isfinite().all()
    for x in (o, *torch.autograd.grad(o.sum(), token_wise)):
        assert x[:, :65].isfinite().all() and x[:, 200:].isfinite().all()
