"""Decoding's Triton kernel in Triton's interpreter, in fp32: see triton_interpreter.py."""

import pytest
import torch
from kda_inputs import raw_inputs, rms_ratio

from deltarl.kernels import Pending
from deltarl.kernels.fused.decode import kda_decode_
from deltarl.kernels.recurrent import kda_decode_ as kda_decode_torch

# fp32 with sums over 32 to 64 channels, ordered otherwise than in torch.
RATIO = 1e-5
SLOTS = torch.tensor([4, 0, 2])


def one_token(key: int = 32, value: int = 64, width: int | None = None) -> dict[str, torch.Tensor]:
    """Four heads of v to two of q and k, rows of q, k and v as views of one projection; `width` decays a head."""
    inputs = {name: x[0] if x.ndim > 2 else x for name, x in raw_inputs(1, 3, 4, key, value).items()}
    width = width or key
    inputs["g"], inputs["dt_bias"] = inputs["g"][..., :width], inputs["dt_bias"][: 4 * width]
    mixed = torch.cat([inputs["q"][:, :2].flatten(1), inputs["k"][:, :2].flatten(1), inputs["v"].flatten(1)], 1)
    q, k, v = mixed.split([2 * key, 2 * key, 4 * value], 1)
    return {**inputs, "q": q.unflatten(1, (2, key)), "k": k.unflatten(1, (2, key)), "v": v.unflatten(1, (4, value))}


def both(inputs: dict[str, torch.Tensor], slots: torch.Tensor = SLOTS, **options) -> torch.Tensor:
    """o of the kernel, after its values and states are judged by torch's; other slots are untouched, bit for bit."""
    pool = torch.randn(6, 4, inputs["q"].shape[-1], inputs["v"].shape[-1])
    before, expected_pool = pool.clone(), pool.clone()
    o = kda_decode_(**inputs, state=pool, slots=slots, **options)
    expected = kda_decode_torch(**inputs, state=expected_pool, slots=slots, **options)
    assert rms_ratio(o, expected) <= RATIO and rms_ratio(pool, expected_pool) <= RATIO
    others = [slot for slot in range(6) if slot not in slots.tolist()]
    assert torch.equal(pool[others], before[others])
    return o


@pytest.mark.parametrize("width", [1, 32])
@pytest.mark.parametrize("bound", [None, -5.0])
def test_gates_and_decays_per_head_and_per_channel(width, bound):
    both(one_token(width=width), gate_lower_bound=bound)


@pytest.mark.parametrize(("key", "value"), [(64, 16), (16, 16), (16, 128)])
def test_the_columns_of_a_head_in_one_program_and_in_several(key, value):
    both(one_token(key, value))


def test_the_columns_of_a_head_one_after_the_other_before_its_norm():
    inputs = one_token(16, 256)
    both(inputs, norm_weight=torch.randn(256), norm_gate=torch.randn(3, 4, 256))


def test_a_log_decay_of_the_callers_without_norms():
    inputs = one_token()
    del inputs["A_log"], inputs["dt_bias"]
    inputs["g"], inputs["beta"] = -100 * inputs["g"].abs(), inputs["beta"].sigmoid()
    both(inputs, use_qk_l2norm=False, scale=0.3)


def test_the_norm_of_the_output():
    weight, gate = torch.randn(64), torch.randn(3, 4, 128)[..., ::2]
    both(one_token(), norm_weight=weight, norm_gate=gate, norm_eps=1e-2)


def test_padding_writes_nothing_and_is_zero():
    assert not both(one_token(), torch.tensor([-1, 0, -1]))[[0, 2]].any()


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("width", [1, 32])
@pytest.mark.parametrize(("normed", "most"), [(False, 2), (True, 3)])
def test_tokens_pending_and_taken_in(width, normed, most, raw):
    """Three tokens in a row, padding among them; the state is written with the last, whether more could be pending."""
    value, slots, real = 128, torch.tensor([4, -1, 2]), [0, 2]
    pool = torch.randn(6, 4, 32, value)
    before, twin = pool.clone(), pool.clone()
    pair = [
        Pending(torch.full((3, 4, most, 32 + width + value), torch.nan), torch.zeros(2, dtype=torch.int32))
        for _ in range(2)
    ]
    options = {"norm_weight": torch.randn(value), "norm_gate": torch.randn(3, 4, value)} if normed else {}
    inputs = one_token(32, value, width)
    if not raw:
        del inputs["A_log"], inputs["dt_bias"]
        inputs["g"], inputs["beta"] = -inputs["g"].abs(), inputs["beta"].sigmoid()
    for number in range(3):
        for pending in pair:
            pending.place.copy_(torch.tensor([number, number < 2]))
        kept, wanted = (pending.tokens[real][:, :, :number] for pending in pair)
        assert torch.equal(pool, before) and (not number or rms_ratio(kept, wanted) <= RATIO)
        assert pair[0].tokens[:, :, number:].isnan().all()
        moved = inputs | {name: inputs[name].roll(number, 0) for name in ("q", "k", "v", "g", "beta")}
        o = kda_decode_(**moved, state=pool, slots=slots, pending=pair[0], **options)
        expected = kda_decode_torch(**moved, state=twin, slots=slots, pending=pair[1], **options)
        assert rms_ratio(o, expected) <= RATIO and not o[1].any()
    assert rms_ratio(pool, twin) <= RATIO and torch.equal(pool[[0, 1, 3, 5]], before[[0, 1, 3, 5]])
    assert pair[0].tokens[1].isnan().all()
