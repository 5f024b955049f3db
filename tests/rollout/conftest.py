"""Tiny real models for a real engine. One engine at a time: vLLM plans its memory for the whole process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from deltarl.model import build_model, save_checkpoint

VOCAB = 320


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"t{index}": index for index in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")), pad_token="t0")


@pytest.fixture(scope="session")
def make_folder(tokenizer, tmp_path_factory) -> Callable[[PreTrainedModel], Path]:
    def make(model: PreTrainedModel) -> Path:
        folder = tmp_path_factory.mktemp("model") / "checkpoint"
        save_checkpoint(model, tokenizer, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def make_hybrid() -> Callable[[str], PreTrainedModel]:
    def make(arm: str, **overrides) -> PreTrainedModel:
        torch.manual_seed(1)
        model = build_model(arm, "2m", vocab_size=VOCAB, **overrides).eval()
        scramble(model, seed=0)
        return model

    return make


@pytest.fixture(scope="session")
def make_tied_llama() -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            initializer_range=0.08,
            eos_token_id=None,
        )
        return LlamaForCausalLM(config).eval()

    return make


def scramble(model: PreTrainedModel, seed: int) -> None:
    """Move every parameter, norms and gates included, so that no tensor keeps a value another tensor could have."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    lengths = (2, 3, 5, 16, 63, 64, 65, 130, 200)
    return [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def closing() -> Iterator[list]:
    """Workers put into this list are closed when the test ends."""
    workers: list = []
    yield workers
    for worker in workers:
        worker.close()
