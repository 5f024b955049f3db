"""Chunked and recurrent KDA against the token-by-token definition, and what packing and causality promise."""

import os
import subprocess
import sys

import pytest
import torch
from kda_inputs import doubled, raw_inputs, rms_ratio

from deltarl.kernels import dispatch, kda_chunk, kda_decode_, kda_recurrent, kda_reference

# fp32 keeps 24 bits; sums over a chunk of 32 tokens and 8 channels lose a few of them.
FP32_RATIO = 1e-5
LENGTHS = (1, 15, 16, 17, 63, 64, 65, 130)


def assert_matches_reference(inputs: dict, operator=kda_chunk, **options) -> None:
    expected, expected_state = kda_reference(**doubled(inputs), output_final_state=True, **options)
    o, state = operator(**inputs, output_final_state=True, **options)
    assert rms_ratio(o, expected) <= FP32_RATIO
    assert rms_ratio(state, expected_state) <= FP32_RATIO


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("operator", [kda_chunk, kda_recurrent])
@pytest.mark.parametrize("bound", [None, -5.0])
def test_matches_reference(tokens, operator, bound):
    inputs = raw_inputs(2, tokens)
    inputs["initial_state"] = torch.randn(2, 2, 8, 6)
    assert_matches_reference(inputs, operator, gate_lower_bound=bound)


@pytest.mark.parametrize("operator", [kda_chunk, kda_recurrent, kda_reference])
def test_gradients_of_every_input(operator):
    inputs = {name: x.requires_grad_() for name, x in raw_inputs(1, 5, key=3, value=2, dtype=torch.float64).items()}
    inputs["initial_state"] = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def run(*values):
        return operator(**dict(zip(inputs, values, strict=True)), output_final_state=True)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


def test_gradients_across_chunks_and_packed_sequences():
    bounds = torch.tensor([0, 35, 36, 45])
    inputs = {name: x.requires_grad_() for name, x in raw_inputs(1, 45, 1, 2, 2, dtype=torch.float64).items()}
    inputs["initial_state"] = torch.randn(3, 1, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(*values):
        return kda_chunk(**dict(zip(inputs, values, strict=True)), cu_seqlens=bounds, output_final_state=True)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()), fast_mode=True)


def gated_inputs(tokens: int) -> dict:
    inputs = raw_inputs(2, tokens)
    del inputs["A_log"], inputs["dt_bias"]
    return {**inputs, "g": -inputs["g"].abs(), "beta": inputs["beta"].sigmoid()}


def test_strong_decay_neither_overflows_nor_loses_the_rest():
    inputs = gated_inputs(70)
    inputs["g"][:, ::7] = -300.0
    inputs["g"][:, 40:44] = -300.0
    assert_matches_reference(inputs)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    kda_chunk(**leaves)[0].sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves.values())


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_writing_strength_at_its_ends(strength):
    inputs = gated_inputs(65)
    inputs["beta"] = torch.full_like(inputs["beta"], strength)
    inputs["initial_state"] = torch.randn(2, 2, 8, 6)
    assert_matches_reference(inputs)


def test_identical_keys_written_at_full_strength_without_decay():
    inputs = gated_inputs(64)
    inputs["k"] = inputs["k"][:, :1].expand(-1, 64, -1, -1)
    inputs["beta"] = torch.ones_like(inputs["beta"])
    inputs["g"] = torch.zeros_like(inputs["g"])
    assert_matches_reference(inputs)


def test_packed_equals_separate():
    lengths = [3, 64, 0, 31, 1, 40]
    inputs, states = raw_inputs(1, sum(lengths)), torch.randn(len(lengths), 2, 8, 6)
    gate = {name: inputs.pop(name) for name in ("A_log", "dt_bias")}
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    o, state = kda_chunk(**inputs, **gate, initial_state=states, output_final_state=True, cu_seqlens=bounds)
    for i, length in enumerate(lengths):
        alone = {name: x[:, bounds[i] : bounds[i + 1]] for name, x in inputs.items()}
        expected, final = kda_chunk(**alone, **gate, initial_state=states[i : i + 1], output_final_state=True)
        assert torch.allclose(o[:, bounds[i] : bounds[i + 1]], expected, atol=1e-6), length
        assert torch.allclose(state[i], final[0], atol=1e-6), length


def test_nan_stays_in_its_packed_sequence():
    inputs = raw_inputs(1, 90)
    inputs["v"][:, 35], inputs["k"][:, 40], inputs["g"][:, 45] = torch.nan, torch.nan, torch.nan
    bounds = torch.tensor([0, 33, 50, 90])
    token_wise = [inputs[name].requires_grad_() for name in ("q", "k", "v", "g", "beta")]
    o, state = kda_chunk(**inputs, output_final_state=True, cu_seqlens=bounds)
    assert o[:, 33:50].isnan().any()
    assert o[:, :33].isfinite().all() and o[:, 50:].isfinite().all()
    assert state[[0, 2]].isfinite().all()
    for gradient in torch.autograd.grad(o.sum(), token_wise):
        assert gradient[:, :33].isfinite().all() and gradient[:, 50:].isfinite().all()


@pytest.mark.parametrize("prefill", [1, 31, 32, 50])
def test_prefill_then_decoding_equals_one_pass(prefill):
    inputs = raw_inputs(2, 60)
    gate = {name: inputs.pop(name) for name in ("A_log", "dt_bias")}
    whole, final = kda_chunk(**inputs, **gate, output_final_state=True)
    head = {name: x[:, :prefill] for name, x in inputs.items()}
    o, state = kda_chunk(**head, **gate, output_final_state=True)
    pieces = [o]
    for t in range(prefill, 60):
        token = {name: x[:, t : t + 1] for name, x in inputs.items()}
        o, state = kda_recurrent(**token, **gate, initial_state=state)
        pieces.append(o)
    assert rms_ratio(torch.cat(pieces, 1), whole) <= FP32_RATIO
    assert rms_ratio(state, final) <= FP32_RATIO


def test_decoding_in_place_changes_only_the_named_slots():
    inputs = raw_inputs(3, 1)
    gate = {name: inputs.pop(name) for name in ("A_log", "dt_bias")}
    pool = torch.randn(6, 2, 8, 6)
    before, slots = pool.clone(), torch.tensor([4, 0, 2])
    o = kda_decode_(**{name: x[:, 0] for name, x in inputs.items()}, **gate, state=pool, slots=slots)
    expected, states = kda_recurrent(**inputs, **gate, initial_state=before[slots])
    # The in-place step reads the state once for both products: the same sums in another order, so fp32 rounding apart.
    assert torch.allclose(o, expected[:, 0], rtol=1e-5, atol=1e-6)
    assert torch.allclose(pool[slots], states, rtol=1e-5, atol=1e-6)
    assert torch.equal(pool[[1, 3, 5]], before[[1, 3, 5]])


def test_packed_single_tokens_are_a_decoding_batch():
    inputs, states = raw_inputs(1, 4), torch.randn(4, 2, 8, 6)
    o, state = kda_recurrent(**inputs, initial_state=states, cu_seqlens=torch.arange(5))
    expected, final = kda_chunk(**inputs, initial_state=states, cu_seqlens=torch.arange(5), output_final_state=True)
    assert torch.allclose(o, expected, atol=1e-6) and torch.allclose(state, final, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 20, 32, 50])
def test_what_follows_never_changes_what_came_before(cut):
    """Bit for bit, in outputs and in the gradients of outputs before the cut."""
    first = {name: x.requires_grad_() for name, x in raw_inputs(1, 70).items()}
    second = {name: x.detach().clone() for name, x in first.items()}
    for name in ("q", "k", "v", "g", "beta"):
        second[name][:, cut:] = torch.randn_like(second[name][:, cut:]) * 3
    second = {name: x.requires_grad_() for name, x in second.items()}
    before = [kda_chunk(**inputs)[0][:, :cut] for inputs in (first, second)]
    assert torch.equal(*before)
    gradients = [
        torch.autograd.grad(o.square().sum(), list(inputs.values()))
        for o, inputs in zip(before, (first, second), strict=True)
    ]
    for name, one, other in zip(first, *gradients, strict=True):
        if name in ("A_log", "dt_bias"):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-6), name
        else:
            assert torch.equal(one[:, :cut], other[:, :cut]), name
            assert not one[:, cut:].any() and not other[:, cut:].any(), name


def test_autocast_does_not_reach_inside():
    inputs = raw_inputs(1, 40)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast, _ = kda_chunk(**inputs)
    assert torch.equal(under_autocast, kda_chunk(**inputs)[0])


def test_low_precision_inputs_are_computed_in_fp32():
    inputs = {name: x.bfloat16() for name, x in raw_inputs(1, 40).items()}
    o, state = kda_chunk(**inputs, output_final_state=True)
    expected, expected_state = kda_chunk(**{name: x.float() for name, x in inputs.items()}, output_final_state=True)
    assert o.dtype == torch.bfloat16 and torch.equal(o, expected.bfloat16())
    assert state.dtype == torch.float32 and torch.equal(state, expected_state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(1, 3, 2, 6)}, "v must be"),
        ({"k": torch.zeros(1, 4, 2, 5)}, "q and k must"),
        ({"g": torch.zeros(1, 4, 2, 5)}, "g must be"),
        ({"initial_state": torch.zeros(2, 2, 8, 6)}, "initial_state must be"),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, "cu_seqlens"),
        ({"gate_lower_bound": 1.0}, "gate_lower_bound must be negative"),
        ({"A_log": None}, "pass A_log"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        kda_chunk(**{**raw_inputs(1, 4), **change})


def test_an_unknown_choice_of_kernels_is_refused():
    command = [sys.executable, "-P", "-c", "import deltarl.kernels"]
    done = subprocess.run(command, env={**os.environ, "DELTARL_KERNELS": "cuda"}, capture_output=True, text=True)
    assert done.returncode != 0 and "DELTARL_KERNELS is 'cuda': use torch, or triton" in done.stderr


@pytest.mark.parametrize(
    ("choice", "capability", "triton"),
    [
        (None, (9, 0), True),
        (None, (8, 0), False),
        (None, (10, 0), False),
        ("torch", (9, 0), False),
        ("triton", (8, 0), True),
    ],
)
def test_triton_is_for_hopper_unless_asked_for(monkeypatch, choice, capability, triton):
    monkeypatch.setattr(dispatch, "CHOICE", choice)
    assert dispatch.takes_triton(capability) is triton
