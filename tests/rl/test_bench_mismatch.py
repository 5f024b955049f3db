"""The bench of the engine's logprobs beside the learner's: a real CPU engine in fp32 and bf16, and its arithmetic."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from deltarl.model import build_model, save_checkpoint
from deltarl.rl.bench.mismatch_logprobs import compare
from deltarl.rl.cli import main

VOCAB = 320


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(2)
    words = {f"t{index}": index for index in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")))
    path = tmp_path_factory.mktemp("model") / "kda"
    save_checkpoint(build_model("kda", "2m", vocab_size=VOCAB), tokenizer, path)
    return path


def test_in_fp32_engine_and_learner_agree_at_every_position(folder, capsys) -> None:
    options = ["--traces", "3", "--tokens", "512", "--dtype", "float32", "--memory", "0.02", "--json"]
    assert main(["bench", "mismatch", str(folder), *options]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["gap"] == found["gap_exact"] <= 1e-4 and found["floor"] == 0 and found["ratio"] is None
    assert max(found["gap_by_position"]) <= 1e-4
    assert found["ess"] == pytest.approx(1, abs=1e-6)


def test_in_bf16_the_engine_adds_next_to_nothing_to_what_bf16_costs_the_learner(folder, capsys) -> None:
    """1.1 is the promise. Norms, convolutions, residual stream or logits rounded to bf16 would each add to it."""
    options = ["--traces", "3", "--tokens", "512", "--dtype", "bfloat16", "--memory", "0.02", "--json"]
    assert main(["bench", "mismatch", str(folder), *options]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["floor"] > 0 and found["ratio"] <= 1.1


def test_the_distances_are_told_apart() -> None:
    exact = torch.full((2, 16), -1.0, dtype=torch.float64)
    trained, engine = exact.clone(), exact.clone()
    trained[:, :8] += 0.02
    engine[:, 8:] += 0.03
    found = compare(engine, trained, exact)
    assert (found["floor"], found["gap_exact"], found["gap"]) == pytest.approx((0.01, 0.015, 0.025))
    assert found["ratio"] == pytest.approx(1.5) and found["gap_max"] == pytest.approx(0.03)
    assert found["gap_by_position"] == pytest.approx([0] * 4 + [0.03] * 4)
    assert found["floor_by_position"] == pytest.approx([0.02] * 4 + [0] * 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "nowhere is no model folder"),
        ([".", "--tokens", "3"], "8 for --tokens"),
        ([".", "--traces", "0"], "at least 1 for --traces"),
    ],
)
def test_unfit_input_is_named(options, message, capsys) -> None:
    assert main(["bench", "mismatch", *options]) == 2
    assert message in capsys.readouterr().err
