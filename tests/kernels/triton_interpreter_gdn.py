"""Gated DeltaNet in Triton without a GPU: through Triton's interpreter, in fp32, where what remains of an error is a
mistake.

Run by hand where triton is installed (3.7 or newer; the CPU profile has none):

    TRITON_INTERPRET=1 pytest tests/kernels/triton_interpreter_gdn.py
"""

import pytest
import torch
from kda_inputs import doubled, raw_inputs, rms_ratio

from deltarl.kernels import kda_reference
from deltarl.kernels.fused.gdn import gdn_chunk

# fp32 with sums over 64 tokens and 32 to 64 channels; gradients pass through twice as many of them.
VALUE_RATIO, GRADIENT_RATIO = 1e-5, 5e-5


def one_decay_per_head(tokens: int, key_heads: int = 1, heads: int = 2, key: int = 32, value: int = 32) -> dict:
    inputs = raw_inputs(1, tokens, heads, key, value)
    inputs |= {name: inputs[name][:, :, :key_heads] for name in "qk"}
    return inputs | {"g": inputs["g"][..., 0], "dt_bias": inputs["dt_bias"][:heads]}


def reference(**inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    return kda_reference(**inputs | {"g": inputs["g"].unsqueeze(-1)})


def gated(inputs: dict) -> dict:
    del inputs["A_log"], inputs["dt_bias"]
    return {**inputs, "g": -inputs["g"].abs(), "beta": inputs["beta"].sigmoid()}


def strong(inputs: dict) -> dict:
    inputs = gated(inputs)
    inputs["g"][:, ::7] = -300.0
    return inputs


def as_in_the_model(inputs: dict) -> dict:
    """q, k and v as views of one projection."""
    sizes = [inputs[name][0, 0].numel() for name in "qkv"]
    mixed = torch.cat([inputs[name].flatten(2) for name in "qkv"], 2).split(sizes, 2)
    return {**inputs, **{name: x.view(inputs[name].shape) for name, x in zip("qkv", mixed, strict=True)}}


CASES = {
    "two chunks, heads share keys": ({"tokens": 70}, {}, as_in_the_model),
    "bounded gate": ({"tokens": 17, "key_heads": 2}, {"gate_lower_bound": -5.0}, dict),
    "one token, K=8 V=48": ({"tokens": 1, "key": 8, "value": 48}, {}, dict),
    "packed, decay of -300": ({"tokens": 100, "heads": 1, "value": 64}, {"bounds": [0, 3, 3, 70, 100]}, strong),
    "lengths kept, K=64": ({"tokens": 40, "heads": 1, "key": 64}, {"scale": 0.3, "use_qk_l2norm": False}, gated),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_match_the_reference(name):
    shape, options, change = CASES[name]
    options = dict(options)
    inputs = change(one_decay_per_head(**shape))
    if not options.get("use_qk_l2norm", True):
        inputs["k"] = inputs["k"] / inputs["k"].norm(dim=-1, keepdim=True)
    sequences = 1
    if "bounds" in options:
        options["cu_seqlens"] = torch.tensor(options.pop("bounds"))
        sequences = len(options["cu_seqlens"]) - 1
    generator = torch.Generator().manual_seed(1)
    heads, value = inputs["v"].shape[2:]
    inputs["initial_state"] = torch.randn(sequences, heads, inputs["k"].shape[-1], value, generator=generator)
    leaves = {key: x.detach().requires_grad_() for key, x in inputs.items()}
    exact = {key: x.requires_grad_() for key, x in doubled(inputs).items()}
    o, state = gdn_chunk(**leaves, output_final_state=True, **options)
    expected, expected_state = reference(**exact, output_final_state=True, **options)
    assert rms_ratio(o.detach(), expected.detach()) <= VALUE_RATIO
    assert rms_ratio(state.detach(), expected_state.detach()) <= VALUE_RATIO
    do, dstate = torch.randn(o.shape, generator=generator), torch.randn(state.shape, generator=generator)
    got = torch.autograd.grad((o, state), list(leaves.values()), (do, dstate))
    wanted = torch.autograd.grad((expected, expected_state), list(exact.values()), (do.double(), dstate.double()))
    for key, one, other in zip(inputs, got, wanted, strict=True):
        assert rms_ratio(one, other) <= GRADIENT_RATIO, key


def test_what_follows_never_changes_what_came_before():
    first = {name: x.requires_grad_() for name, x in one_decay_per_head(70, heads=1).items()}
    second = {name: x.detach().clone() for name, x in first.items()}
    cut, names = 50, ("q", "k", "v", "g", "beta")
    for name in names:
        second[name][:, cut:] = torch.randn_like(second[name][:, cut:]) * 3
    second = {name: x.requires_grad_() for name, x in second.items()}
    before = [gdn_chunk(**inputs)[0][:, :cut] for inputs in (first, second)]
    assert torch.equal(*before)
    one, other = (
        torch.autograd.grad(o.square().sum(), [inputs[name] for name in names])
        for o, inputs in zip(before, (first, second), strict=True)
    )
    for name, a, b in zip(names, one, other, strict=True):
        assert torch.equal(a[:, :cut], b[:, :cut]) and not b[:, cut:].any(), name


def test_nan_stays_in_its_packed_sequence():
    inputs = one_decay_per_head(90, heads=1)
    inputs["v"][:, 35], inputs["k"][:, 40], inputs["g"][:, 45] = torch.nan, torch.nan, torch.nan
    token_wise = [inputs[name].requires_grad_() for name in ("q", "k", "v", "g", "beta")]
    o, state = gdn_chunk(**inputs, output_final_state=True, cu_seqlens=torch.tensor([0, 33, 50, 90]))
    assert o[:, 33:50].isnan().any() and state[[0, 2]].isfinite().all()
    do = torch.ones_like(o)
    do[:, 45] = torch.nan
    for x in (o, *torch.autograd.grad(o, token_wise, do)):
        assert x[:, :33].isfinite().all() and x[:, 50:].isfinite().all()


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_gradients_of_any_size_scale_exactly(size):
    """Powers of two bring them into range: a power of two outside changes nothing but the exponent."""
    inputs = {name: x.requires_grad_() for name, x in one_decay_per_head(20, heads=1).items()}
    leaves = list(inputs.values())
    size = 2.0 ** round(torch.tensor(size).log2().item()) if size else size
    o, _ = gdn_chunk(**inputs)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(2))
    one = torch.autograd.grad(o, leaves, do, retain_graph=True)
    other = torch.autograd.grad(o, leaves, do * size)
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a * size, b, rtol=1e-6, atol=1e-43)


def test_shapes_that_do_not_fit_are_named():
    inputs = one_decay_per_head(4)
    with pytest.raises(ValueError, match=r"initial_state must be \(1, 2, 32, 32\)"):
        gdn_chunk(**inputs, initial_state=torch.zeros(1, 1, 32, 32))
