"""Gated DeltaNet and DPLR against KDA's definition, and value heads that share a query head."""

import pytest
import torch
from kda_inputs import raw_inputs, rms_ratio

from deltarl.kernels import (
    dplr_reference,
    gdn_chunk,
    gdn_decode_,
    gdn_recurrent,
    kda_chunk,
    kda_decode_,
    kda_recurrent,
    kda_reference,
)

FP32_RATIO = 1e-5  # as in test_kda.py


def one_decay_per_head(batch: int, tokens: int, **options) -> dict:
    inputs = raw_inputs(batch, tokens, **options)
    return inputs | {"g": inputs["g"][..., 0], "dt_bias": inputs["dt_bias"][: inputs["A_log"].numel()]}


def as_kda(inputs: dict) -> dict:
    """The same gates, every channel of a head given the head's."""
    width = inputs["k"].shape[-1]
    return inputs | {
        "g": inputs["g"].unsqueeze(-1).expand_as(inputs["k"]),
        "dt_bias": inputs["dt_bias"].repeat_interleave(width),
    }


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 130])
@pytest.mark.parametrize("operator", [gdn_chunk, gdn_recurrent])
def test_is_kda_with_one_decay_per_head(operator, tokens):
    inputs = one_decay_per_head(2, tokens)
    state = torch.randn(2, 2, 8, 6)
    expected, expected_state = kda_reference(
        **{name: x.double() for name, x in as_kda(inputs).items()}, initial_state=state, output_final_state=True
    )
    o, final = operator(**inputs, initial_state=state, output_final_state=True)
    assert rms_ratio(o, expected) <= FP32_RATIO
    assert rms_ratio(final, expected_state) <= FP32_RATIO


def test_gradients():
    inputs = {
        name: x.requires_grad_() for name, x in one_decay_per_head(1, 35, key=2, value=2, dtype=torch.float64).items()
    }

    def run(*values):
        return gdn_chunk(**dict(zip(inputs, values, strict=True)))[0]

    assert torch.autograd.gradcheck(run, tuple(inputs.values()), fast_mode=True)


def test_strong_decay_loses_nothing():
    inputs = one_decay_per_head(1, 70)
    del inputs["A_log"], inputs["dt_bias"]
    g = -inputs["g"].abs()
    g[:, ::7] = -300.0
    inputs |= {"g": g, "beta": inputs["beta"].sigmoid()}
    wide = inputs | {"g": g.unsqueeze(-1).expand_as(inputs["k"])}
    expected, _ = kda_reference(**{name: x.double() for name, x in wide.items()})
    assert rms_ratio(gdn_chunk(**inputs)[0], expected) <= FP32_RATIO


def test_decoding_updates_the_pool_as_the_recurrence_does():
    inputs = one_decay_per_head(3, 1)
    pool, slots = torch.randn(5, 2, 8, 6), torch.tensor([4, 0, 2])
    gates = {name: inputs.pop(name) for name in ("A_log", "dt_bias")}
    expected, states = gdn_recurrent(**inputs, **gates, initial_state=pool[slots], output_final_state=True)
    o = gdn_decode_(**{name: x[:, 0] for name, x in inputs.items()}, state=pool, slots=slots, **gates)
    assert rms_ratio(o, expected[:, 0]) <= FP32_RATIO
    assert rms_ratio(pool[slots], states) <= FP32_RATIO


def test_dplr_contains_kda():
    inputs = {name: x.double() for name, x in raw_inputs(2, 20).items()}
    del inputs["A_log"], inputs["dt_bias"]
    inputs |= {"g": -inputs["g"].abs(), "beta": inputs["beta"].sigmoid(), "k": inputs["k"] / 3}
    q, k, v, g, beta = (inputs[name] for name in ("q", "k", "v", "g", "beta"))
    written = beta.unsqueeze(-1) * k
    general = dplr_reference(q, written, v, g, -written, k * g.exp(), scale=0.5)
    expected, _ = kda_reference(**inputs, use_qk_l2norm=False, scale=0.5)
    assert rms_ratio(general, expected) <= 1e-12


@pytest.mark.parametrize("operator", [kda_chunk, kda_recurrent])
def test_value_heads_share_query_and_key_heads(operator):
    inputs = raw_inputs(2, 40, heads=6)
    shared = inputs | {"q": inputs["q"][:, :, :2], "k": inputs["k"][:, :, :2]}
    copied = inputs | {name: shared[name].repeat_interleave(3, 2) for name in ("q", "k")}
    o, state = operator(**shared, output_final_state=True)
    expected, expected_state = operator(**copied, output_final_state=True)
    assert torch.equal(o, expected) and torch.equal(state, expected_state)


def test_value_heads_share_query_and_key_heads_when_decoding():
    inputs = raw_inputs(3, 1, heads=4)
    gates = {name: inputs.pop(name) for name in ("A_log", "dt_bias")}
    token = {name: x[:, 0] for name, x in inputs.items()}
    shared = token | {"q": token["q"][:, :2], "k": token["k"][:, :2]}
    copied = token | {name: shared[name].repeat_interleave(2, 1) for name in ("q", "k")}
    pool = torch.randn(3, 4, 8, 6)
    other = pool.clone()
    slots = torch.arange(3)
    assert torch.equal(
        kda_decode_(**shared, state=pool, slots=slots, **gates),
        kda_decode_(**copied, state=other, slots=slots, **gates),
    )
    assert torch.equal(pool, other)


def test_heads_that_do_not_divide_are_refused():
    inputs = raw_inputs(1, 4, heads=3)
    with pytest.raises(ValueError, match="multiple of q's heads"):
        kda_chunk(**inputs | {"q": inputs["q"][:, :, :2], "k": inputs["k"][:, :, :2]})
