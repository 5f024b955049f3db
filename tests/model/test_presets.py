"""Arms of a size have the same parameters; unknown names are told apart from known ones."""

import pytest
import torch

from deltarl.model import ARMS, SIZES, HybridForCausalLM, UnknownArm, UnknownSize, build_model, hybrid_config


def parameters(arm: str, size: str, vocab: int, **overrides) -> int:
    with torch.device("meta"):
        model = HybridForCausalLM(hybrid_config(arm, size, vocab_size=vocab, **overrides))
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("size", "overrides"),
    [(size, {}) for size in SIZES] + [(size, {"num_hidden_layers": 8, "hidden_size": 256}) for size in ("2m", "30m")],
)
@pytest.mark.parametrize("vocab", [512, 4096])
def test_arms_are_matched_within_two_percent(size, vocab, overrides):
    counts = {arm: parameters(arm, size, vocab, **overrides) for arm in ARMS}
    assert max(counts.values()) <= 1.02 * min(counts.values()), counts


def test_sizes_are_what_their_names_say():
    assert 1.8e6 < parameters("kda", "2m", 512) < 2.2e6
    assert 27e6 < parameters("kda", "30m", 2048) < 33e6
    assert 285e6 < parameters("kda", "300m", 2048) < 315e6
    assert 3.6e6 < parameters("kda", "4m-a2m", 512) < 4.4e6
    assert 47.5e9 < parameters("kda", "48b-a3b", 163840) < 49.5e9


def test_layer_plans():
    kda, mla = (hybrid_config(arm, "30m", vocab_size=64) for arm in ("kda", "mla"))
    assert kda.layer_types == (["linear_attention"] * 3 + ["full_attention"]) * 2
    assert mla.layer_types == ["full_attention"] * 8
    assert hybrid_config("kda-1:1", "30m", vocab_size=64).layer_types == ["linear_attention", "full_attention"] * 4
    assert hybrid_config("kda-7:1", "30m", vocab_size=64).layer_types.count("full_attention") == 1
    assert hybrid_config("gdn", "30m", vocab_size=64).layer_types == kda.layer_types
    large = hybrid_config("kda", "48b-a3b", vocab_size=64).to_moonshot()["linear_attn_config"]
    assert large["full_attn_layers"] == [4, 8, 12, 16, 20, 24, 27]
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "kv_lora_rank", "v_head_dim")
    assert all(getattr(kda, name) == getattr(mla, name) for name in same)


def test_overrides_reach_the_configuration():
    config = build_model("kda", "2m", vocab_size=64, pad_token_id=5, eos_token_id=7, num_hidden_layers=4).config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (5, None, 7)
    assert hybrid_config("mla", "2m", vocab_size=64, intermediate_size=100).intermediate_size == 100


def test_same_seed_builds_the_same_model():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(build_model("kda", "2m", vocab_size=64).state_dict())
    assert all(torch.equal(x, models[1][name]) for name, x in models[0].items())


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(UnknownArm, match=r"'kdaa'.*gdn, kda, .*, mla"):
        build_model("kdaa", "2m", vocab_size=64)
    with pytest.raises(UnknownSize, match=r"'3m'.*2m, .*30m"):
        build_model("kda", "3m", vocab_size=64)
