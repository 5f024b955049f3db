"""LoRA on every arm: starts as nothing, trains alone, leaves the base as it is, arrives merged, saved, resumed."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_models import MOE, tiny_model, tiny_tokenizer, token_ids
from transformers import LlamaConfig, LlamaForCausalLM

from deltarl.model import ARMS, checkpoint_tensors, load_model, save_checkpoint
from deltarl.rl.adapters import add_adapters, check_adapters, has_adapters, load_adapters, merged_state, save_adapters
from deltarl.rl.cli import main
from deltarl.rl.errors import UserError
from deltarl.rl.optimizers import make_optimizer
from deltarl.rl.precision import check_precision


def lora(rank: int = 4, alpha: float = 8, targets: list[str] | None = None) -> SimpleNamespace:
    return SimpleNamespace(rank=rank, alpha=alpha, targets=targets)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


MODELS = {
    **{arm: partial(tiny_model, arm) for arm in ARMS},
    "moe": lambda: tiny_model("kda", **MOE),
    "llama": tiny_llama,
}


def train(model: torch.nn.Module, steps: int = 4) -> None:
    settings = SimpleNamespace(optimizer="adamw", learning_rate=1e-2, weight_decay=0.0)
    optimizer, ids = make_optimizer(model, settings), token_ids(2, 9)
    for _ in range(steps):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(2, 9)).logits


@pytest.mark.parametrize("arm", MODELS)
def test_adapters_start_as_nothing_and_train_alone(arm):
    model = MODELS[arm]()
    before, base = logits(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    add_adapters(model, lora())
    assert has_adapters(model)
    assert torch.equal(logits(model), before)
    train(model)
    check_precision(model)
    assert not torch.allclose(logits(model), before)
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        assert plain not in base or torch.equal(parameter, base[plain]), f"{name} of the base was changed"


@pytest.mark.parametrize("arm", MODELS)
def test_merged_tensors_are_a_checkpoint_of_the_adapted_model(arm, tmp_path):
    plain, model = MODELS[arm](), MODELS[arm]()
    add_adapters(model, lora())
    train(model)
    state = merged_state(model, model.state_dict())
    names = {name: tensor.shape for name, tensor in checkpoint_tensors(plain)}
    assert {name: tensor.shape for name, tensor in checkpoint_tensors(model, state)} == names
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "merged", state)
    merged, _ = load_model(tmp_path / "merged")
    torch.testing.assert_close(logits(merged.eval()), logits(model), rtol=1e-4, atol=1e-5)


def test_saved_adapters_resume_and_open_in_peft(tmp_path):
    from peft import PeftModel

    model = tiny_model()
    add_adapters(model, lora())
    train(model)
    save_adapters(model, model.state_dict(), tmp_path / "adapter")
    resumed = tiny_model()
    add_adapters(resumed, lora())
    load_adapters(resumed, tmp_path / "adapter")
    assert torch.equal(logits(resumed), logits(model))
    opened = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(opened), logits(model), rtol=1e-6, atol=1e-6)


def test_adapters_of_another_rank_are_refused(tmp_path):
    model, other = tiny_model(), tiny_model()
    add_adapters(model, lora(rank=4))
    add_adapters(other, lora(rank=8))
    save_adapters(model, model.state_dict(), tmp_path / "adapter")
    with pytest.raises(UserError, match="rank"):
        load_adapters(other, tmp_path / "adapter")


def test_targets_choose_layers():
    model = tiny_model()
    add_adapters(model, lora(targets=["q_proj", "o_proj"]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".q_proj.lora_" in name or ".o_proj.lora_" in name for name in trained)


def test_unknown_target_names_those_there_are():
    with pytest.raises(UserError, match=r"no linear layer is called qproj; there are: .*q_proj"):
        add_adapters(tiny_model(), lora(targets=["qproj"]))


def test_adapters_of_a_bf16_base_are_float32():
    model = tiny_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(torch.bfloat16)
    add_adapters(model, lora())
    check_precision(model)


def test_missing_peft_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'deltarl\[lora\]'"):
        check_adapters()


def test_a_model_without_adapters_has_none():
    assert not has_adapters(tiny_model())


JOB = {
    "seed": 3,
    "model": {"vocab_size": 300, "lora": {"rank": 2, "alpha": 4}},
    "data": {"train_size": 8, "heldout_size": 2},
    "rollout": {"engine": "hf", "max_model_len": 96, "max_num_seqs": 8},
    "rl": {
        "steps": 2,
        "prompts_per_step": 2,
        "num_generations": 2,
        "scale_rewards": "none",
        "baseline": "none",
        "learning_rate": 1e-2,
        "max_completion_length": 4,
        "checkpoint_every": 1,
    },
    "rewards": {"verifier": "length", "options": {"shape": "target", "target": 4}},
    "eval": {"every": 0},
}


def test_a_run_trains_adapters_and_resumes_them(tmp_path):
    job = {**JOB, "name": "run", "runs_dir": str(tmp_path)}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    assert main(["train", str(tmp_path / "job.yaml")]) == 0
    run = tmp_path / "run"
    rows = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "rl"]
    assert all(row["logp_gap_max"] < 1e-4 for row in rows), "the engine has base and adapters, merged"

    base, merged = (load_file(run / "checkpoints" / step / "model.safetensors") for step in ("0", "2"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed and all(".self_attn." in name or ".mlp." in name for name in changed)
    assert not any("embed" in name or "norm" in name or "A_log" in name for name in changed)

    last = run / "checkpoints" / "2"
    files = [last / "model.safetensors", last / "adapter" / "adapter_model.safetensors", last / "optimizer.pt"]
    before = [file.read_bytes() for file in files]
    last.rename(run / "checkpoints" / "2.aside")
    assert main(["train", "--resume", str(run)]) == 0
    assert [file.read_bytes() for file in files] == before, "the step from checkpoint 1 was repeated exactly"
