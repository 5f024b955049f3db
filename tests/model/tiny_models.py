"""Small hybrids of each kind, and a tokenizer to save with them."""

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from deltarl.model import HybridForCausalLM, build_model

VOCAB = 96
TINY = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def tiny_model(arm: str = "kda", **overrides) -> HybridForCausalLM:
    torch.manual_seed(0)
    return build_model(arm, "2m", vocab_size=VOCAB, **{**TINY, **overrides}).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "w0")), pad_token="w0", bos_token="w1", eos_token="w2"
    )


def token_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(1))
