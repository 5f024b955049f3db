"""The Triton kernels in Triton's interpreter, in fp32, where what remains of an error is a mistake.

test_triton.py runs this file; by hand, with triton 3.7 or newer:

    TRITON_INTERPRET=1 pytest tests/kernels/triton_interpreter.py
"""

import pytest
import torch
from kda_inputs import doubled, raw_inputs, rms_ratio
from torch.utils.checkpoint import checkpoint

from deltarl.kernels import kda_reference
from deltarl.kernels.fused.chunk import kda_chunk

# fp32 with sums over 64 tokens and 32 to 64 channels; gradients pass through twice as many of them.
VALUE_RATIO, GRADIENT_RATIO = 1e-5, 5e-5


def gated(inputs: dict) -> dict:
    del inputs["A_log"], inputs["dt_bias"]
    return {**inputs, "g": -inputs["g"].abs(), "beta": inputs["beta"].sigmoid()}


def strong(inputs: dict) -> dict:
    inputs = gated(inputs)
    inputs["g"][:, ::7] = -300.0
    return inputs


def as_in_the_model(inputs: dict) -> dict:
    """q, k and v as views of one projection."""
    mixed = torch.stack([inputs[name] for name in "qkv"], 2)
    return {**inputs, **dict(zip("qkv", mixed.unbind(2), strict=True))}


CASES = {
    "two chunks": ({"tokens": 70}, {}, as_in_the_model),
    "bounded gate": ({"tokens": 17}, {"gate_lower_bound": -5.0}, dict),
    "one token": ({"tokens": 1}, {}, dict),
    "packed, decay of -300": ({"tokens": 100, "heads": 1, "value": 64}, {"bounds": [0, 3, 3, 70, 100]}, strong),
    "two blocks of channels": ({"tokens": 40, "heads": 1, "key": 64}, {"scale": 0.3}, gated),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_match_the_reference(name):
    shape, options, change = CASES[name]
    shape = {"batch": 1, "heads": 2, "key": 32, "value": 32, **shape}
    options = dict(options)
    inputs = change(raw_inputs(**shape))
    sequences = 1
    if "bounds" in options:
        options["cu_seqlens"] = torch.tensor(options.pop("bounds"))
        sequences = len(options["cu_seqlens"]) - 1
    generator = torch.Generator().manual_seed(1)
    state_shape = (sequences, shape["heads"], shape["key"], shape["value"])
    inputs["initial_state"] = torch.randn(state_shape, generator=generator)
    leaves = {key: x.detach().requires_grad_() for key, x in inputs.items()}
    exact = {key: x.requires_grad_() for key, x in doubled(inputs).items()}
    o, state = kda_chunk(**leaves, output_final_state=True, **options)
    expected, expected_state = kda_reference(**exact, output_final_state=True, **options)
    assert rms_ratio(o.detach(), expected.detach()) <= VALUE_RATIO
    assert rms_ratio(state.detach(), expected_state.detach()) <= VALUE_RATIO
    do, dstate = torch.randn(o.shape, generator=generator), torch.randn(state.shape, generator=generator)
    got = torch.autograd.grad((o, state), list(leaves.values()), (do, dstate))
    wanted = torch.autograd.grad((expected, expected_state), list(exact.values()), (do.double(), dstate.double()))
    for key, one, other in zip(inputs, got, wanted, strict=True):
        assert rms_ratio(one, other) <= GRADIENT_RATIO, key


HALF_LIMITS = {"o": 3e-3, "state": 3e-3, "q": 6e-3, "k": 6e-3, "v": 6e-3, "g": 12e-3, "beta": 12e-3}
HALF_LIMITS |= {"A_log": 6e-3, "dt_bias": 6e-3, "initial_state": 6e-3}


@pytest.mark.parametrize("writes", [True, False])
def test_fp16_products_stay_in_range(writes):
    """Limits of the table that runs on a GPU. Without writes the pairs' gradients are 0 beside those of the states."""
    generator, inputs = torch.Generator().manual_seed(1), raw_inputs(1, 70, 2, 64, 64)
    if not writes:
        inputs["beta"] -= 100.0
    inputs["initial_state"] = torch.randn(1, 2, 64, 64, generator=generator)
    inputs = {key: x if key in ("A_log", "dt_bias", "initial_state") else x.half() for key, x in inputs.items()}
    leaves = {key: x.clone().requires_grad_() for key, x in inputs.items()}
    exact = {key: x.requires_grad_() for key, x in doubled(inputs).items()}
    o, state = kda_chunk(**leaves, output_final_state=True)
    expected, expected_state = kda_reference(**exact, output_final_state=True)
    do, dstate = torch.randn(o.shape, generator=generator).half(), torch.randn(state.shape, generator=generator)
    got = torch.autograd.grad((o, state), list(leaves.values()), (do, dstate))
    wanted = torch.autograd.grad((expected, expected_state), list(exact.values()), (do.double(), dstate.double()))
    pairs = {"o": (o.detach(), expected.detach()), "state": (state.detach(), expected_state.detach())}
    pairs |= {key: (one, other) for key, one, other in zip(inputs, got, wanted, strict=True)}
    for key, (one, other) in pairs.items():
        if other.abs().max() > 1e-20:
            assert rms_ratio(one, other) <= HALF_LIMITS[key], key


def test_what_follows_never_changes_what_came_before():
    first = {name: x.requires_grad_() for name, x in raw_inputs(1, 70, 1, 32, 32).items()}
    second = {name: x.detach().clone() for name, x in first.items()}
    cut = 50
    for name in ("q", "k", "v", "g", "beta"):
        second[name][:, cut:] = torch.randn_like(second[name][:, cut:]) * 3
    second = {name: x.requires_grad_() for name, x in second.items()}
    before = [kda_chunk(**inputs)[0][:, :cut] for inputs in (first, second)]
    assert torch.equal(*before)
    names = ("q", "k", "v", "g", "beta")
    one, other = (
        torch.autograd.grad(o.square().sum(), [inputs[name] for name in names])
        for o, inputs in zip(before, (first, second), strict=True)
    )
    for name, a, b in zip(names, one, other, strict=True):
        assert torch.equal(a[:, :cut], b[:, :cut]) and not b[:, cut:].any(), name


def test_nan_stays_in_its_packed_sequence():
    inputs = raw_inputs(1, 90, 1, 32, 32)
    inputs["v"][:, 35], inputs["k"][:, 40], inputs["g"][:, 45] = torch.nan, torch.nan, torch.nan
    token_wise = [inputs[name].requires_grad_() for name in ("q", "k", "v", "g", "beta")]
    o, state = kda_chunk(**inputs, output_final_state=True, cu_seqlens=torch.tensor([0, 33, 50, 90]))
    assert o[:, 33:50].isnan().any() and state[[0, 2]].isfinite().all()
    for x in (o, *torch.autograd.grad(o.sum(), token_wise)):
        assert x[:, :33].isfinite().all() and x[:, 50:].isfinite().all()


def test_value_heads_share_key_heads_and_a_decay_per_head():
    inputs = raw_inputs(1, 20, 2, 32, 32)
    inputs["q"], inputs["k"], inputs["g"] = inputs["q"][:, :, :1], inputs["k"][:, :, :1], inputs["g"][..., :1]
    inputs["dt_bias"] = inputs["dt_bias"][:2]
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    exact = {name: x.requires_grad_() for name, x in doubled(inputs).items()}
    o, expected = kda_chunk(**leaves)[0], kda_reference(**exact)[0]
    assert rms_ratio(o.detach(), expected.detach()) <= VALUE_RATIO
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(o, list(leaves.values()), do)
    wanted = torch.autograd.grad(expected, list(exact.values()), do.double())
    for name, one, other in zip(inputs, got, wanted, strict=True):
        assert one.shape == other.shape and rms_ratio(one, other) <= GRADIENT_RATIO, name


def test_a_second_backward_and_activations_computed_again_change_no_bit():
    """Backward uses up what forward kept for it; a checkpoint keeps none of it."""
    inputs = {name: x.requires_grad_() for name, x in raw_inputs(1, 70, 1, 32, 32).items()}
    leaves = list(inputs.values())
    kept, again = kda_chunk(**inputs)[0], checkpoint(lambda: kda_chunk(**inputs)[0], use_reentrant=False)
    do = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1))
    first = torch.autograd.grad(kept, leaves, do, retain_graph=True)
    for others in (torch.autograd.grad(kept, leaves, do), torch.autograd.grad(again, leaves, do)):
        for name, one, other in zip(inputs, first, others, strict=True):
            assert torch.equal(one, other), name


def test_the_tiles_forward_keeps_go_where_the_hooks_of_saved_tensors_put_them():
    inputs = {name: x.requires_grad_() for name, x in raw_inputs(1, 130, 1, 32, 32).items()}
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(x.shape), lambda nothing: nothing):
        kda_chunk(**inputs)
    chunks, heads = 3, 1
    kept = 8  # all but A, which backward needs only where beta is no projection
    assert sum(shape[:2] == (chunks, heads) for shape in shapes) == kept
