"""Decoding in place: the output's norm, padding, and what it refuses."""

import pytest
import torch
from kda_inputs import raw_inputs

from deltarl.kernels import gdn_decode_, kda_decode_


def one_token(sequences: int = 3) -> dict[str, torch.Tensor]:
    return {name: x[0] if x.ndim > 2 else x for name, x in raw_inputs(1, sequences).items()}


def test_the_norm_of_the_output_is_over_each_head_and_gated():
    inputs, slots = one_token(), torch.tensor([2, 0, 1])
    pool, weight, gate = torch.randn(3, 2, 8, 6), torch.randn(6), torch.randn(3, 2, 6)
    o = kda_decode_(**inputs, state=pool.clone(), slots=slots)
    normed = kda_decode_(**inputs, state=pool.clone(), slots=slots, norm_weight=weight, norm_gate=gate, norm_eps=1e-2)
    expected = o / (o.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight * gate.sigmoid()
    assert torch.allclose(normed, expected, rtol=1e-5, atol=1e-6)


def test_the_norm_is_of_the_output_before_it_is_rounded():
    inputs, slots = one_token(), torch.tensor([2, 0, 1])
    short = {name: x.bfloat16() if x.ndim > 1 else x for name, x in inputs.items()}
    exact = {name: x.float() for name, x in short.items()}
    pool, weight, gate = torch.randn(3, 2, 8, 6), torch.randn(6), torch.randn(3, 2, 6).bfloat16()
    norm = {"norm_weight": weight, "norm_gate": gate}
    expected = kda_decode_(**exact, state=pool.clone(), slots=slots, **norm)
    assert torch.equal(kda_decode_(**short, state=pool, slots=slots, **norm), expected.bfloat16())


@pytest.mark.parametrize("real", [[1], [0, 2], []])
def test_padding_changes_no_state_and_is_zero(real):
    inputs, pool = one_token(), torch.randn(4, 2, 8, 6)
    slots = torch.full((3,), -1)
    slots[real] = torch.tensor([3, 1])[: len(real)]
    taken = {name: x[real] if x.ndim > 1 else x for name, x in inputs.items()}
    expected_pool = pool.clone()
    expected = kda_decode_(**taken, state=expected_pool, slots=slots[real])
    o = kda_decode_(**inputs, state=pool, slots=slots)
    assert torch.equal(pool, expected_pool) and torch.equal(o[real], expected)
    assert not o[[i for i in range(3) if i not in real]].any()


def test_one_decay_per_head_is_that_decay_for_every_channel():
    inputs, slots = one_token(), torch.tensor([2, 0, 1])
    pool, g, bias = torch.randn(3, 2, 8, 6), torch.randn(3, 2), torch.randn(2)
    wide = inputs | {"g": g.unsqueeze(-1).expand(3, 2, 8), "dt_bias": bias.repeat_interleave(8)}
    expected_pool = pool.clone()
    expected = kda_decode_(**wide, state=expected_pool, slots=slots)
    o = gdn_decode_(**(inputs | {"g": g, "dt_bias": bias}), state=pool, slots=slots)
    assert torch.allclose(o, expected, atol=1e-6) and torch.allclose(pool, expected_pool, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"state": torch.zeros(3, 2, 6, 8)}, r"state must be \[slots, 2, 8, 6\]"),
        ({"slots": torch.tensor([0, 1])}, r"and slots \[3\]"),
        ({"norm_weight": torch.ones(6)}, "norm_weight and norm_gate belong together"),
        ({"norm_weight": torch.ones(8), "norm_gate": torch.ones(3, 2, 6)}, r"norm_weight must be \[V\]"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    arguments = {**one_token(), "state": torch.zeros(3, 2, 8, 6), "slots": torch.tensor([0, 1, 2])}
    with pytest.raises(ValueError, match=message):
        kda_decode_(**(arguments | changed))
