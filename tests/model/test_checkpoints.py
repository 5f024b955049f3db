"""What is saved loads again bit for bit, here and in transformers, under Moonshot's names."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from tiny_models import MOE, tiny_model, tiny_tokenizer, token_ids
from transformers import KimiLinearForCausalLM, LlamaConfig, LlamaForCausalLM

from deltarl.model import CheckpointError, HybridForCausalLM, checkpoint_tensors, load_model, save_checkpoint

KINDS = [("kda", {}), ("mla", {}), ("kda", MOE), ("mla", MOE)]


OUR_OWN = [("gdn", {}), ("mla-rope", {}), ("gdn", MOE), ("kda", {"mla_use_nope": False, "rope_theta": 500.0})]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join([kind[0], *kind[1]][:2]))
def saved(request, tmp_path):
    model = tiny_model(request.param[0], **request.param[1])
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "model")
    return model, tmp_path / "model"


@torch.no_grad()
@pytest.mark.parametrize(("arm", "overrides"), OUR_OWN, ids=str)
def test_what_transformers_does_not_know_makes_the_round_trip(tmp_path, arm, overrides):
    model = tiny_model(arm, **overrides)
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "model")
    loaded, _ = load_model(tmp_path / "model", torch.float32)
    assert loaded.config.layer_types == model.config.layer_types
    for name in ("linear_attn_kind", "mla_use_nope", "rope_theta"):
        assert getattr(loaded.config, name) == getattr(model.config, name)
    ids = token_ids(2, 20)
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    assert dict(checkpoint_tensors(model)).keys() == stored(tmp_path / "model").keys()


def stored(folder) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)


@torch.no_grad()
def test_round_trip_is_exact(saved):
    model, folder = saved
    loaded, tokenizer = load_model(folder, torch.float32)
    assert isinstance(loaded, HybridForCausalLM)
    assert tokenizer.eos_token_id == loaded.config.eos_token_id == 2
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(x, expected[name]) for name, x in loaded.state_dict().items())
    ids = token_ids(2, 20)
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


@torch.no_grad()
def test_transformers_loads_it_and_agrees(saved):
    model, folder = saved
    theirs, report = KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for name, module in theirs.named_modules():
        if name.endswith("kv_a_layernorm"):
            module.variance_epsilon = 1e-5  # transformers fixes 1e-6; ours and vLLM's follow the configuration
    ids = token_ids(2, 40)
    # Two orders of summation through four layers of random weights.
    assert torch.allclose(theirs.eval()(ids).logits, model(ids).logits, atol=1e-4)


def test_tensor_names_are_moonshots(saved):
    model, folder = saved
    tensors = stored(folder)
    names = {re.sub(r"layers\.\d+|experts\.\d+", "*", name) for name in tensors}
    allowed = {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
        "model.*.input_layernorm.weight", "model.*.post_attention_layernorm.weight",
    }  # fmt: skip
    mlp = ("gate_proj", "up_proj", "down_proj")
    allowed |= {f"model.*.mlp.{part}.weight" for part in mlp}
    allowed |= {f"model.*.block_sparse_moe.shared_experts.{part}.weight" for part in mlp}
    allowed |= {f"model.*.block_sparse_moe.*.{part}.weight" for part in ("w1", "w2", "w3")}
    allowed |= {f"model.*.block_sparse_moe.gate.{part}" for part in ("weight", "e_score_correction_bias")}
    attention = [f"{x}_proj" for x in ("q", "k", "v", "o", "b", "f_a", "f_b", "g_a", "g_b")]
    attention += ["q_conv1d", "k_conv1d", "v_conv1d", "o_norm"]
    attention += ["kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj"]
    allowed |= {f"model.*.self_attn.{part}.weight" for part in attention}
    allowed |= {"model.*.self_attn.A_log", "model.*.self_attn.dt_bias"}
    assert names <= allowed, names - allowed
    dense = {int(n.split(".")[2]) for n in tensors if ".mlp." in n}
    assert dense == {i for i, kind in enumerate(model.config.mlp_layer_types) if kind == "dense"}


def test_config_is_in_moonshots_layout(saved):
    model, folder = saved
    config = json.loads((folder / "config.json").read_text())
    kinds = model.config.layer_types
    assert config["architectures"] == ["KimiLinearForCausalLM"] and config["model_type"] == "kimi_linear"
    assert config["mla_use_nope"] is True and config["rms_norm_eps"] == 1e-5
    linear = config["linear_attn_config"]
    assert linear["kda_layers"] == [i + 1 for i, kind in enumerate(kinds) if kind == "linear_attention"]
    assert linear["full_attn_layers"] == [i + 1 for i, kind in enumerate(kinds) if kind == "full_attention"]
    assert (linear["num_heads"], linear["head_dim"], linear["short_conv_kernel_size"]) == (2, 16, 4)
    is_moe = "sparse" in model.config.mlp_layer_types
    assert ("num_experts" in config) == is_moe  # vLLM takes a model with this key for a mixture of experts
    assert config["first_k_dense_replace"] == (1 if is_moe else 4)


def test_tensors_for_weight_sync_are_those_stored_and_share_memory(saved):
    model, folder = saved
    synced, tensors = dict(checkpoint_tensors(model)), stored(folder)
    assert synced.keys() == tensors.keys()
    assert all(torch.equal(x, tensors[name]) for name, x in synced.items())
    owned = {p.untyped_storage().data_ptr() for p in model.state_dict().values()}
    assert all(x.untyped_storage().data_ptr() in owned and not x.requires_grad for x in synced.values())


def test_gate_parameters_are_fp32_in_a_bf16_model(tmp_path):
    save_checkpoint(tiny_model(), tiny_tokenizer(), tmp_path / "m")
    model, _ = load_model(tmp_path / "m", torch.bfloat16)
    gate = model.model.layers[0].self_attn.forget_gate
    assert gate.A_log.dtype == gate.dt_bias.dtype == torch.float32 and model.dtype == torch.bfloat16
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "again")
    assert stored(tmp_path / "again")["model.layers.0.self_attn.A_log"].dtype == torch.float32
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("tied", [True, False])
def test_other_models_keep_their_own_layout(tmp_path, tied):
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "llama")
    synced = dict(checkpoint_tensors(model))
    assert synced.keys() == stored(tmp_path / "llama").keys()
    assert ("lm_head.weight" in synced) is not tied
    loaded, _ = load_model(tmp_path / "llama", torch.float32)
    assert type(loaded) is LlamaForCausalLM
    ids = token_ids(1, 7)
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_saving_replaces_a_whole_folder_and_leaves_nothing_else(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "stale.txt").write_text("old")
    save_checkpoint(tiny_model(), tiny_tokenizer(), folder)
    assert not (folder / "stale.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_old_folder(tmp_path):
    save_checkpoint(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    before = stored(tmp_path / "model")
    with pytest.raises(ValueError, match="dense layers must come before"):
        late_dense = ["sparse", "dense", "dense", "dense"]
        save_checkpoint(tiny_model(**{**MOE, "mlp_layer_types": late_dense}), tiny_tokenizer(), tmp_path / "model")
    assert stored(tmp_path / "model").keys() == before.keys()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ((), "tensors are missing"),
        (("model.safetensors",), "no weights in"),
        (("tokenizer.json", "tokenizer_config.json"), "no tokenizer in"),
        (("config.json",), "no config.json in"),
        (None, "no model folder at"),
    ],
)
def test_incomplete_folders_are_refused_in_one_line(tmp_path, remove, message):
    folder = tmp_path / "model"
    if remove is not None:
        save_checkpoint(tiny_model(num_hidden_layers=3 if remove == () else 4), tiny_tokenizer(), folder)
        for name in remove:
            (folder / name).unlink()
        if remove == ():
            config = json.loads((folder / "config.json").read_text())
            config["num_hidden_layers"] = 4
            config["linear_attn_config"]["full_attn_layers"] = [3, 4]
            (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(folder, torch.float32)
    assert "\n" not in str(error.value)
