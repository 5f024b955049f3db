"""The bench beside TRL's own trainer, with both sides really trained on a CPU at a tiny size, and what it refuses."""

import json

import pytest
import yaml

from deltarl.model import save_checkpoint
from deltarl.rl.bench.stock import last_line, summary
from deltarl.rl.cli import main
from deltarl.rl.jobs import load_job
from deltarl.rl.tokenizer import build_tokenizer

JOB = {
    "name": "tiny",
    "data": {"train_size": 16, "heldout_size": 2},
    "rollout": {"engine": "hf", "max_model_len": 96},
    "rl": {"prompts_per_step": 2, "num_generations": 2, "max_completion_length": 8, "token_budget": 1024},
}


@pytest.fixture
def job(tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = build_tokenizer(["What is 1 + 2? Solve 3 x = 12. The answer is 4."] * 4, 300)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    save_checkpoint(LlamaForCausalLM(config), tokenizer, tmp_path / "model")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB | {"model": {"path": str(tmp_path / "model")}}))
    return str(tmp_path / "job.yaml")


def test_both_sides_train_and_are_timed(job, capsys) -> None:
    options = ["--steps", "2", "--micro-batch", "4", "--trl-engine", "transformers", "--json"]
    assert main(["bench", "trl", job, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"trl", "deltarl"}
    for side in found.values():
        assert len(side["steps"]) == 2 and all(0 < row["tokens"] <= 2 * 2 * 8 for row in side["steps"])
        assert side["seconds"] == side["steps"][1]["seconds"] > 0


def test_a_late_side_is_said(job, capsys) -> None:
    assert main(["bench", "trl", job, "--steps", "2", "--micro-batch", "4", "--limit", "1"]) == 1
    trl, ours = capsys.readouterr().out.splitlines()
    assert trl.startswith("trl      not done after 1 s") and ours.startswith("deltarl  not done after 1 s")


def test_what_was_said_last() -> None:
    assert last_line("Loading\nRL:  0%\rRL: 50%\r  \n\n") == "RL: 50%"
    assert last_line(" \n") == ""


def test_trl_generates_with_vllm_where_there_is_a_gpu_or_as_it_is_told(job, tmp_path) -> None:
    import torch

    from deltarl.rl.bench.stock_steps import trl_settings

    found = [
        trl_settings(load_job(job), str(tmp_path), 4, engine).use_vllm for engine in (None, "transformers", "vllm")
    ]
    assert found == [torch.cuda.is_available(), False, True]


def test_the_first_step_is_not_counted() -> None:
    rows = [{"seconds": 9.0, "tokens": 1}, {"seconds": 1.0, "tokens": 10}, {"seconds": 2.0, "tokens": 40}]
    assert {key: summary(rows)[key] for key in ("seconds", "tokens")} == {"seconds": 1.5, "tokens": 25}
    assert summary(rows)["tokens_per_second"] == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "1"], "give 2 or more"),
        (["--micro-batch", "3"], "--micro-batch 3 does not divide"),
        (["--set", "model.path=null"], "has no model.path"),
        (["--set", "rl.minibatches=2"], "one optimizer step per batch"),
    ],
)
def test_unfit_options_are_named(job, options, message, capsys) -> None:
    assert main(["bench", "trl", job, "--micro-batch", "4", *options]) == 2
    assert message in capsys.readouterr().err
