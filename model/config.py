"""The hybrid's configuration: transformers' Kimi Linear plus what that one leaves out, and Moonshot's layout of it."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import KimiLinearConfig

KDA, MLA = "linear_attention", "full_attention"


@strict
class HybridConfig(KimiLinearConfig):
    """Configuration of a KDA/MLA hybrid.

    Takes transformers' field names and Moonshot's (`linear_attn_config`, `first_k_dense_replace` ...).
    `gate_lower_bound` (negative; None for the softplus gate) selects the bounded gate of `deltarl.kernels`.
    Raises ValueError for settings that the model does not implement.
    """

    mla_use_nope: bool = True
    gate_lower_bound: float | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if not self.mla_use_nope:
            raise ValueError("MLA with rotary positions is not implemented: set mla_use_nope to true")

    def to_moonshot(self) -> dict[str, Any]:
        """The content of config.json as Moonshot's checkpoints have it, which vLLM and transformers both read.

        Raises ValueError for what that layout cannot say: a dense MLP after the first MoE layer.
        """
        numbered = list(enumerate(self.layer_types, start=1))
        dense = self.mlp_layer_types.count("dense")
        if "dense" in self.mlp_layer_types[dense:]:
            raise ValueError(
                f"dense layers must come before all MoE layers, got mlp_layer_types {self.mlp_layer_types}"
            )
        written = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        written |= {
            "architectures": ["KimiLinearForCausalLM"],
            "model_type": "kimi_linear",
            "head_dim": self.qk_nope_head_dim + self.qk_rope_head_dim,
            "linear_attn_config": {
                "kda_layers": [n for n, kind in numbered if kind == KDA],
                "full_attn_layers": [n for n, kind in numbered if kind == MLA],
                "num_heads": self.linear_num_heads,
                "head_dim": self.linear_head_dim,
                "short_conv_kernel_size": self.linear_conv_kernel_dim,
            },
            "first_k_dense_replace": dense,
            "moe_layer_freq": 1,
        }
        if self.gate_lower_bound is not None:
            written["gate_lower_bound"] = self.gate_lower_bound
        if dense < self.num_hidden_layers:
            written |= {name: getattr(self, name) for name in _MOE_FIELDS}
            written |= {"moe_router_activation_func": "sigmoid", "use_grouped_topk": True}
        return written


_PLAIN_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "kv_lora_rank",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "mla_use_nope",
    "hidden_act",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "use_cache",
    "model_max_length",
    "max_position_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_MOE_FIELDS = (
    "num_experts",
    "num_experts_per_token",
    "num_experts_per_tok",
    "num_shared_experts",
    "num_expert_group",
    "topk_group",
    "moe_intermediate_size",
    "moe_renormalize",
    "routed_scaling_factor",
)
