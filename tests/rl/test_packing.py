"""Packs hold every token once within the budget, and what is computed in them equals what is computed alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from deltarl.model import build_model
from deltarl.rl.errors import UserError
from deltarl.rl.forward import checkpoint_activations, enable_scoring, packed_logprobs, pads
from deltarl.rl.packing import alike, first_fit, make_pack, make_packs
from deltarl.rollout import Trace

VOCABULARY = 320
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "kda": lambda: build_model("kda", "2m", vocab_size=VOCABULARY),
    "gdn": lambda: build_model("gdn", "2m", vocab_size=VOCABULARY),
    "mla-rope": lambda: build_model("mla-rope", "2m", vocab_size=VOCABULARY),
    "moe": lambda: build_model("kda", "4m-a2m", vocab_size=VOCABULARY),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "padded": lambda: MistralForCausalLM(MistralConfig(**LLAMA)),
}
TEMPERATURE = 0.7


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    model = MODELS[request.param]().train()
    enable_scoring(model)
    return model


@pytest.fixture
def traces():
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randint(3, VOCABULARY, (n + 3,), generator=generator).tolist() for n in (1, 20, 150, 6, 70)]
    return [Trace(ids[:3], ids[3:], [], [], "stop") for ids in drawn]


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 200))
def test_first_fit_places_everything_once_within_the_budget(lengths, budget):
    groups = first_fit(lengths, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in group) <= budget for group in groups)
    # Two groups at most half full would have been one.
    assert sum(2 * sum(lengths[index] for index in group) <= budget for group in groups) <= 1


def test_first_fit_begins_with_the_longest():
    assert first_fit([3, 9, 5, 5, 1], 10) == [[1, 4], [2, 3], [0]]


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 200))
def test_sequences_to_be_padded_are_grouped_by_length_within_the_budget(lengths, budget):
    groups = alike(lengths, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(len(group) * max(lengths[index] for index in group) <= budget for group in groups)
    longest = [lengths[index] for group in groups for index in group]
    assert longest == sorted(lengths, reverse=True), "neighbours in length are padded to each other"


@pytest.mark.parametrize("fit", [first_fit, alike])
def test_a_sequence_over_the_budget_is_refused(fit):
    with pytest.raises(ValueError, match="51 tokens does not fit a budget of 50"):
        fit([4, 51], 50)


def test_only_models_that_pad_are_given_packs_to_pad(model):
    assert pads(model) == (type(model) is MistralForCausalLM)


def plain(model, trace):
    """(logprobs, entropies) of a completion from whole logits of the sequence alone."""
    ids = torch.tensor([trace.prompt_ids + trace.completion_ids])
    start = len(trace.prompt_ids)
    logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float() / TEMPERATURE
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, ids[0, start:, None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)


def gradients(model, logprobs, entropies):
    model.zero_grad()
    weights = torch.linspace(-1, 1, len(logprobs))
    ((logprobs * weights).sum() + 0.3 * (entropies * weights.flip(0)).sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_packed_equals_alone(model, traces):
    alone = [plain(model, trace) for trace in traces]
    logprobs, entropies = (torch.cat(parts) for parts in zip(*alone, strict=True))
    expected = gradients(model, logprobs, entropies)
    pack = make_pack(traces, [2, 0, 4, 1, 3])
    scored = packed_logprobs(model, pack, temperature=TEMPERATURE, entropy=True)
    back = [pack.rows.index(row) for row in range(len(traces))]
    found, heat = (torch.cat([pack.split(x)[i] for i in back]) for x in (scored.logprobs, scored.entropies))
    torch.testing.assert_close(found, logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(heat, entropies, rtol=1e-5, atol=1e-5)
    # Gradients add up over hundreds of tokens: rounding is a share of the largest.
    for name, gradient in gradients(model, found, heat).items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * scale + 1e-7, msg=name)


def test_packs_cover_the_batch(model, traces):
    packs = make_packs(traces, [4, 0, 2], 160)
    assert sorted(row for pack in packs for row in pack.rows) == [0, 2, 4]
    assert all(len(pack.ids) == sum(pack.lengths) <= 160 for pack in packs), "nothing but tokens of the sequences"
    for pack in packs:
        for row, targets in zip(pack.rows, pack.split(pack.targets), strict=True):
            assert targets.tolist() == traces[row].completion_ids


def test_rows_of_a_pack():
    pack = make_pack([Trace([1, 2], [3, 4, 5], [], [], "stop"), Trace([6], [7], [], [], "stop")], [0, 1])
    assert pack.to_rows(torch.tensor([1, 2, 3, 4])).tolist() == [[1, 2, 3], [4, 0, 0]]
    assert pack.mask().tolist() == [[1, 1, 1], [1, 0, 0]]


def test_hidden_states_are_those_the_logits_come_from(model, traces):
    pack = make_pack(traces, [0, 3])
    states = packed_logprobs(model, pack, hidden=True).hidden
    logits = model.get_output_embeddings()(states).log_softmax(-1).gather(-1, pack.targets[:, None]).squeeze(-1)
    torch.testing.assert_close(logits, packed_logprobs(model, pack).logprobs, rtol=1e-5, atol=1e-5)


def test_no_logits_are_kept_for_the_backward_pass(traces):
    """The largest tensor kept beside weights is far smaller than tokens x vocabulary."""
    torch.manual_seed(0)
    model = build_model("kda", "2m", vocab_size=8192)
    enable_scoring(model)
    pack, sizes = make_pack(traces, [1, 2, 4]), []
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        packed_logprobs(model, pack, entropy=True)
    assert max(sizes) < len(pack.targets) * 8192 / 4


def test_what_cannot_be_packed_is_said_and_padded(capsys):
    enable_scoring(MODELS["padded"]())
    assert "MistralForCausalLM cannot be packed exactly: its sequences are padded" in capsys.readouterr().err


def test_a_head_of_its_own_is_refused():
    class Doubled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 2 * out.logits
            return out

    with pytest.raises(UserError, match="in a way of its own"):
        enable_scoring(Doubled(LlamaConfig(**LLAMA)))


@pytest.mark.parametrize("what", ["all", ["linear", "ffn"]])
def test_checkpointed_activations_change_nothing(traces, what):
    torch.manual_seed(0)
    model = MODELS["kda"]().train()
    enable_scoring(model)
    pack = make_pack(traces, [1, 3])
    scored = packed_logprobs(model, pack, entropy=True)
    expected = gradients(model, scored.logprobs, scored.entropies)
    checkpoint_activations(model, what)
    scored = packed_logprobs(model, pack, entropy=True)
    torch.testing.assert_close(gradients(model, scored.logprobs, scored.entropies), expected, rtol=0, atol=0)


def test_parts_of_another_model_are_refused():
    with pytest.raises(UserError, match=r"rl\.gradient_checkpointing: mla are parts of a hybrid"):
        checkpoint_activations(MODELS["llama"](), ["mla"])
