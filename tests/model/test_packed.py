"""Packed sequences through attention, ours and transformers', and layers whose activations are computed again."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from deltarl.model import build_model
from deltarl.model.packed import IMPLEMENTATION, Packing, enable_packing

LENGTHS = [5, 1, 19, 8]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
FP32 = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def ids():
    return torch.randint(0, 64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))


def gradients(model, logits):
    model.zero_grad()
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_llama_packed_is_llama_alone(ids):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(LENGTHS, 1)], 1)
    expected = gradients(model, alone)
    assert enable_packing(model)
    packing = Packing(LENGTHS, ids.device)
    packed = model(ids, position_ids=packing.positions.unsqueeze(0), packing=packing, use_cache=False).logits
    torch.testing.assert_close(packed, alone, **FP32)
    torch.testing.assert_close(gradients(model, packed), expected, rtol=1e-4, atol=1e-4)


def test_a_packed_implementation_still_takes_padding(ids):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 4:] = 0
    before = model(ids[:, :18].view(2, 9), attention_mask=mask, use_cache=False).logits
    assert enable_packing(model)
    after = model(ids[:, :18].view(2, 9), attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(after, before, **FP32)


@pytest.mark.parametrize(
    "model",
    [MistralForCausalLM(MistralConfig(**SIZES)), Gemma2ForCausalLM(Gemma2Config(**SIZES, query_pre_attn_scalar=16))],
    ids=["sliding window", "soft caps"],
)
def test_a_model_that_cannot_be_packed_stays_as_it_was(model):
    before = model.config._attn_implementation
    assert not enable_packing(model)
    assert model.config._attn_implementation == before != IMPLEMENTATION


@pytest.mark.parametrize("kinds", [["linear"], ["mla", "ffn"], ["linear", "mla", "ffn"]])
def test_recomputed_layers_give_the_same(ids, kinds):
    torch.manual_seed(0)
    model = build_model("kda", "2m", vocab_size=64).train()
    cu_seqlens = Packing(LENGTHS, ids.device).cu_seqlens
    plain = model(ids, cu_seqlens=cu_seqlens).logits
    expected = gradients(model, plain)
    model.recompute(kinds)
    again = model(ids, cu_seqlens=cu_seqlens).logits
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    torch.testing.assert_close(gradients(model, again), expected, rtol=0, atol=0)


def test_recomputing_keeps_less(ids):
    model = build_model("kda", "2m", vocab_size=64).train()

    def kept() -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model(ids)
        return sum(sizes)

    whole = kept()
    model.recompute(["ffn"])
    less = kept()
    model.recompute(["linear", "mla", "ffn"])
    assert kept() < less < whole


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="known are ffn, linear, mla"):
        build_model("kda", "2m", vocab_size=64).recompute(["attention"])
