"""A sequence's log-probabilities do not depend on what it is batched with; training and generation work."""

import pytest
import torch
from tiny_models import MOE, tiny_model, token_ids
from trl.trainer.utils import add_fused_lm_head

from deltarl.model.hybrid import rotate

LENGTHS = (21, 1, 5, 13, 40)
# Same operations on other shapes: fp32 rounding of a sum's order only.
SAME = {"rtol": 0, "atol": 1e-5}
KINDS = [("kda", {}), ("mla", {}), ("kda", MOE), ("kda", {"gate_lower_bound": -5.0}), ("mla", {"q_lora_rank": 16})]
KINDS += [("gdn", {}), ("mla-rope", {}), ("kda", {"mla_use_nope": False})]


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1)


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join([kind[0], *kind[1]]))
def model(request):
    return tiny_model(request.param[0], **request.param[1])


@torch.no_grad()
def test_padded_and_packed_equal_single(model):
    sequences = [token_ids(1, length) for length in LENGTHS]
    alone = [log_probs(model(ids).logits[0]) for ids in sequences]
    width = max(LENGTHS)
    for side in ("left", "right"):
        ids, mask = torch.zeros(len(LENGTHS), width, dtype=torch.long), torch.zeros(len(LENGTHS), width)
        for row, sequence in enumerate(sequences):
            length = sequence.shape[1]
            place = slice(width - length, width) if side == "left" else slice(0, length)
            ids[row, place], mask[row, place] = sequence[0], 1
        padded = log_probs(model(ids, attention_mask=mask.long()).logits)
        for row, expected in enumerate(alone):
            assert torch.allclose(padded[row, mask[row].bool()], expected, **SAME), (side, row)

    ids = torch.cat(sequences, 1)
    by_bounds = model(ids, cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0)).logits
    by_positions = model(ids, position_ids=torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)).logits
    assert torch.equal(by_bounds, by_positions)
    assert torch.allclose(log_probs(by_bounds[0]), torch.cat(alone), **SAME)


@torch.no_grad()
def test_generation_with_left_padding_equals_single_and_no_cache(model):
    ids, mask = token_ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[1, :4], mask[2, :8] = 0, 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batch = model.generate(ids, attention_mask=mask, **options)[:, 9:]
    for row in range(3):
        prompt = ids[row : row + 1, mask[row].bool()]
        assert torch.equal(model.generate(prompt, **options)[0, prompt.shape[1] :], batch[row])
        assert torch.equal(model.generate(prompt, use_cache=False, **options)[0, prompt.shape[1] :], batch[row])


@torch.no_grad()
def test_prompt_in_two_cached_pieces_equals_one(model):
    ids = token_ids(2, 50)
    whole = model(ids).logits
    first = model(ids[:, :37], use_cache=True)
    second = model(ids[:, 37:], past_key_values=first.past_key_values)
    assert torch.allclose(log_probs(torch.cat((first.logits, second.logits), 1)), log_probs(whole), **SAME)


def test_right_padding_with_a_cache_is_refused():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with pytest.raises(ValueError, match="padded on the left"):
        tiny_model()(token_ids(2, 3), attention_mask=mask, use_cache=True)


def test_hidden_states_of_padded_rows_keep_their_shape():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    states = tiny_model()(token_ids(2, 4), attention_mask=mask, output_hidden_states=True).hidden_states
    assert {tuple(h.shape) for h in states} == {(2, 4, 48)}


def gradients(model, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_nothing(model):
    ids, mask = token_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    model.train()
    plain = gradients(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing
    for name, gradient in gradients(model, **inputs).items():
        assert torch.allclose(gradient, plain[name], atol=1e-6), name


def test_every_parameter_of_a_dense_model_gets_a_gradient():
    model, ids = tiny_model().train(), token_ids(2, 40)
    found = gradients(model, input_ids=ids, labels=ids)
    assert {name for name, g in found.items() if g.any()} == {name for name, _ in model.named_parameters()}


def test_trl_fused_head_gives_the_log_probs_of_the_logits(model):
    ids, mask = token_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3], mask[1, 9:] = 0, 0
    expected = log_probs(model(ids, attention_mask=mask).logits)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    add_fused_lm_head(model)
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    scored = (labels[:, 1:] != -100) & (mask[:, :-1] == 1)
    assert torch.allclose(out.log_probs[scored], expected[scored], **SAME)


def test_gate_parameters_stay_fp32_when_the_model_is_cast():
    model = tiny_model()
    before = model.model.layers[0].self_attn.forget_gate.A_log.clone()
    model.to(torch.bfloat16)
    gate = model.model.layers[0].self_attn.forget_gate
    assert gate.A_log.dtype == gate.dt_bias.dtype == torch.float32
    assert gate.f_a_proj.weight.dtype == torch.bfloat16
    assert torch.equal(gate.A_log, before)
    assert model(token_ids(1, 5)).logits.dtype == torch.bfloat16


def test_norms_use_the_configured_epsilon():
    for model in (tiny_model("kda"), tiny_model("mla", q_lora_rank=16)):
        epsilons = {name: m.variance_epsilon for name, m in model.named_modules() if hasattr(m, "variance_epsilon")}
        assert any("kv_a_layernorm" in name for name in epsilons)
        assert set(epsilons.values()) == {1e-5}


@torch.no_grad()
def test_rotary_positions_count_by_their_differences_only():
    """Without positions, MLA sees the tokens before the last as a set; with them it does not."""
    ids = token_ids(1, 12)
    shuffled = ids[:, [*torch.randperm(11, generator=torch.Generator().manual_seed(0)).tolist(), 11]]
    for arm, ordered in (("mla", False), ("mla-rope", True)):
        model = tiny_model(arm, num_hidden_layers=1)
        last, other = (log_probs(model(x).logits[0, -1]) for x in (ids, shuffled))
        assert torch.allclose(last, other, **SAME) is not ordered
    x = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(1))
    near, far = (rotate(x, torch.arange(5) + begin, 10000.0) for begin in (0, 1000))
    # cos and sin of angles near 1000 in fp32.
    assert torch.allclose(near[0, 0] @ near[0, 3].T, far[0, 0] @ far[0, 3].T, atol=1e-3)


@torch.no_grad()
def test_gdn_is_kda_with_equal_decays_in_a_head():
    gdn, kda = tiny_model("gdn", intermediate_size=64), tiny_model("kda")
    weights = {name: x for name, x in gdn.state_dict().items() if "forget_gate" not in name}
    for index in range(3):
        ours = gdn.model.layers[index].self_attn.forget_gate
        theirs = kda.model.layers[index].self_attn.forget_gate
        name = f"model.layers.{index}.self_attn.forget_gate."
        into, out = torch.zeros_like(theirs.f_a_proj.weight), torch.zeros_like(theirs.f_b_proj.weight)
        into[: ours.a_proj.out_features] = ours.a_proj.weight
        for head, rows in enumerate(out.chunk(ours.a_proj.out_features)):
            rows[:, head] = 1
        weights |= {name + "f_a_proj.weight": into, name + "f_b_proj.weight": out, name + "A_log": ours.A_log}
        weights[name + "dt_bias"] = ours.dt_bias.repeat_interleave(16)
    kda.load_state_dict(weights)
    ids = token_ids(2, 40)
    assert torch.allclose(log_probs(gdn(ids).logits), log_probs(kda(ids).logits), **SAME)


@torch.no_grad()
def test_a_replayed_routing_undoes_another_choice_of_experts():
    model, other = tiny_model("kda", **MOE), tiny_model("kda", **MOE)
    ids, bounds = token_ids(1, 30), torch.tensor([0, 11, 30])
    chosen = []
    for layer in model.model.layers[1:]:
        layer.mlp.gate.register_forward_hook(lambda _, __, out: chosen.append(out[2]))
    expected = log_probs(model(ids, cu_seqlens=bounds).logits)
    routing = torch.stack(chosen, 1)
    for layer in other.model.layers[1:]:  # a bias steers the choice, not the weights
        layer.mlp.gate.e_score_correction_bias.copy_(torch.tensor([1.0, -1.0, 0.0, 0.5]))
    own = log_probs(other(ids, cu_seqlens=bounds).logits)
    assert (own - expected).abs().max() > 0.01
    assert torch.allclose(log_probs(other(ids, cu_seqlens=bounds, routing=routing).logits), expected, **SAME)
    assert torch.equal(log_probs(other(ids, cu_seqlens=bounds, routing=torch.full_like(routing, -1)).logits), own)


def test_the_router_learns_under_a_replayed_routing():
    model, ids = tiny_model("kda", **MOE).train(), token_ids(1, 12)
    model.recompute(["ffn"])
    routing = torch.tensor([0, 3]).expand(12, 3, 2)
    found = gradients(model, input_ids=ids, labels=ids, routing=routing)
    assert found["model.layers.1.mlp.gate.weight"][[0, 3]].abs().min() > 0
    assert not found["model.layers.1.mlp.gate.weight"][[1, 2]].any()
    assert not found["model.layers.1.mlp.experts.gate_up_proj"][[1, 2]].any()
