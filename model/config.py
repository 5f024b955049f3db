"""The hybrid's configuration: transformers' Kimi Linear plus what that one leaves out, and Moonshot's layout of it."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import KimiLinearConfig

LINEAR, MLA = "linear_attention", "full_attention"


@strict
class HybridConfig(KimiLinearConfig):
    """Configuration of a hybrid of linear attention and MLA.

    Takes transformers' field names and Moonshot's (`linear_attn_config`, `first_k_dense_replace` ...), and of its own:

    linear_attn_kind: what its linear attention layers are, "kda" or "gdn" (one decay a head in place of one a channel).
    gate_lower_bound: negative; None for the softplus gate. The bounded gate of `deltarl.kernels`.
    mla_use_nope: False gives MLA rotary positions of base `rope_theta` over its last `qk_rope_head_dim` channels.
    """

    linear_attn_kind: Literal["kda", "gdn"] = "kda"
    gate_lower_bound: float | None = None
    mla_use_nope: bool = True
    rope_theta: float = 10000.0

    def __post_init__(self, **kwargs):
        if kwargs.get("linear_attn_config", {}).get("gdn_layers"):
            self.linear_attn_kind = "gdn"
        super().__post_init__(**kwargs)

    def to_moonshot(self) -> dict[str, Any]:
        """The content of config.json as Moonshot's checkpoints have it, which vLLM and transformers both read.

        What that layout does not know, only this package reads: `linear_attn_config.gdn_layers` (those of `kda_layers`
        that are GDN: all or none), `gate_lower_bound`, rotary positions. Raises ValueError for what it cannot say: a
        dense MLP after the first MoE layer.
        """
        places: dict[str, list[int]] = {LINEAR: [], MLA: []}
        for number, kind in enumerate(self.layer_types, start=1):
            places[kind].append(number)
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
                "kda_layers": places[LINEAR],
                "full_attn_layers": places[MLA],
                "num_heads": self.linear_num_heads,
                "head_dim": self.linear_head_dim,
                "short_conv_kernel_size": self.linear_conv_kernel_dim,
            },
            "first_k_dense_replace": dense,
            "moe_layer_freq": 1,
        }
        if self.linear_attn_kind == "gdn":
            written["linear_attn_config"]["gdn_layers"] = places[LINEAR]
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
    "rope_theta",
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
