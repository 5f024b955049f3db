"""Several tokens decoded in a row with the states written once: the same values as token by token."""

import pytest
import torch
from kda_inputs import raw_inputs, rms_ratio

from deltarl.kernels import Pending, gdn_decode_, kda_decode_

MOST = 4
# fp32, a few tokens' contributions added up in another order.
RATIO = 2e-6


def tokens(count: int, sequences: int = 3) -> list[dict[str, torch.Tensor]]:
    """`count` tokens for each of the sequences, one after another, with the same gate."""
    inputs = raw_inputs(sequences, count)
    return [{name: x[:, t] if x.ndim > 2 else x for name, x in inputs.items()} for t in range(count)]


def room(sequences: int = 3, width: int = 8) -> Pending:
    return Pending(torch.full((sequences, 2, MOST, 8 + width + 6), torch.nan), torch.zeros(2, dtype=torch.int32))


def burst(decode, steps, pool, slots, pending, **options) -> list[torch.Tensor]:
    outputs = []
    for number, step in enumerate(steps):
        pending.place.copy_(torch.tensor([number, number < len(steps) - 1]))
        outputs.append(decode(**step, state=pool, slots=slots, pending=pending, **options))
    return outputs


@pytest.mark.parametrize("length", range(1, MOST + 2))
@pytest.mark.parametrize("bound", [None, -5.0])
def test_a_burst_is_its_steps_and_writes_states_at_its_end(length, bound):
    steps, slots, pool = tokens(length), torch.tensor([2, 0, 3]), torch.randn(5, 2, 8, 6)
    alone, before = pool.clone(), pool.clone()
    expected = [kda_decode_(**step, state=alone, slots=slots, gate_lower_bound=bound) for step in steps]
    pending = room()
    for number, step in enumerate(steps):
        assert torch.equal(pool, before), "a state was written before the burst's end"
        pending.place.copy_(torch.tensor([number, number < length - 1]))
        o = kda_decode_(**step, state=pool, slots=slots, gate_lower_bound=bound, pending=pending)
        assert rms_ratio(o, expected[number]) <= RATIO
    assert rms_ratio(pool[slots], alone[slots]) <= RATIO and torch.equal(pool[[1, 4]], before[[1, 4]])


def test_a_token_by_itself_is_what_it_is_without_pending_ones():
    (step,), slots, pool = tokens(1), torch.tensor([2, 0, 1]), torch.randn(3, 2, 8, 6)
    twin = pool.clone()
    o = kda_decode_(**step, state=pool, slots=slots, pending=room())
    assert torch.equal(o, kda_decode_(**step, state=twin, slots=slots)) and torch.equal(pool, twin)


def test_strong_decays_within_a_burst_lose_nothing():
    steps, slots, pool = tokens(MOST), torch.tensor([2, 0, 1]), torch.randn(3, 2, 8, 6)
    for step in steps:
        del step["A_log"], step["dt_bias"]
        step["g"], step["beta"] = -torch.rand(3, 2, 8) * 300, step["beta"].sigmoid()
    alone = pool.clone()
    expected = [kda_decode_(**step, state=alone, slots=slots) for step in steps]
    found = burst(kda_decode_, steps, pool, slots, room())
    assert all(rms_ratio(a, b) <= RATIO for a, b in zip(found, expected, strict=True))
    assert rms_ratio(pool, alone) <= RATIO


def test_one_decay_per_head():
    steps, slots, pool = tokens(MOST), torch.tensor([2, 0, 1]), torch.randn(3, 2, 8, 6)
    steps = [step | {"g": step["g"][..., 0], "dt_bias": step["dt_bias"][:2]} for step in steps]
    alone = pool.clone()
    expected = [gdn_decode_(**step, state=alone, slots=slots) for step in steps]
    found = burst(gdn_decode_, steps, pool, slots, room(width=1))
    assert all(rms_ratio(a, b) <= RATIO for a, b in zip(found, expected, strict=True))
    assert rms_ratio(pool, alone) <= RATIO


def test_padding_keeps_its_row_s_tokens_and_the_others_theirs():
    steps, pool = tokens(3), torch.randn(3, 2, 8, 6)
    taken = [{name: x[[0, 2]] if x.ndim > 1 else x for name, x in step.items()} for step in steps]
    twin, pending = pool.clone(), room()
    found = burst(kda_decode_, steps, pool, torch.tensor([2, -1, 0]), pending)
    expected = burst(kda_decode_, taken, twin, torch.tensor([2, 0]), room(2))
    for o, wanted in zip(found, expected, strict=True):
        assert torch.equal(o[[0, 2]], wanted) and not o[1].any()
    assert torch.equal(pool, twin) and pending.tokens[1].isnan().all()


@pytest.mark.parametrize(
    ("pending", "message"),
    [
        (Pending(torch.zeros(2, 2, 4, 22), torch.zeros(2, dtype=torch.int32)), r"fp32 \[3 or more, 2, most, 22\]"),
        (Pending(torch.zeros(3, 2, 4, 16), torch.zeros(2, dtype=torch.int32)), r"got torch.float32 \(3, 2, 4, 16\)"),
        (Pending(torch.zeros(3, 2, 4, 22).half(), torch.zeros(2, dtype=torch.int32)), "got torch.float16"),
        (Pending(torch.zeros(3, 2, 4, 22), torch.zeros(2)), r"place must be int32 \[2\]"),
    ],
)
def test_what_does_not_fit_is_refused(pending, message):
    with pytest.raises(ValueError, match=message):
        kda_decode_(**tokens(1)[0], state=torch.zeros(3, 2, 8, 6), slots=torch.arange(3), pending=pending)
