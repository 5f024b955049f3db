"""Named architectures: an arm is a plan of layers, a size is a set of dimensions.

An arm's plan repeats over the depth, and the last layer is of its last kind, as in Kimi-Linear-48B. All arms of a size
share every dimension but the width of the FFNs (of the experts, where a size has experts), which is chosen so that the
parameters equal those of the `kda` arm as nearly as a multiple of 8 can.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from deltarl.model.config import LINEAR, MLA, HybridConfig
from deltarl.model.hybrid import HybridForCausalLM


@dataclass(frozen=True)
class Arm:
    """plan: kinds of layers; fields: what of `HybridConfig` makes the arm besides."""

    plan: tuple[str, ...]
    fields: dict[str, Any] = field(default_factory=dict)

    def layers(self, depth: int) -> list[str]:
        return [self.plan[i % len(self.plan)] for i in range(depth - 1)] + [self.plan[-1]]


def one_mla_after(linear: int) -> tuple[str, ...]:
    return (LINEAR,) * linear + (MLA,)


ARMS: dict[str, Arm] = {
    "kda": Arm(one_mla_after(3)),
    "kda-1:1": Arm(one_mla_after(1)),
    "kda-7:1": Arm(one_mla_after(7)),
    "gdn": Arm(one_mla_after(3), {"linear_attn_kind": "gdn"}),
    "mla": Arm((MLA,)),
    "mla-rope": Arm((MLA,), {"mla_use_nope": False}),
}
SIZES: dict[str, dict[str, Any]] = {
    # Attention heads of 32 suit vLLM on CPUs.
    "2m": {
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "intermediate_size": 576,
        "linear_num_heads": 4,
        "linear_head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "initializer_range": 0.04,
        "max_position_embeddings": 4096,
    },
    # These MLA dimensions suit vLLM's prefill and decode kernels on Hopper.
    "30m": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "intermediate_size": 1408,
        "linear_num_heads": 4,
        "linear_head_dim": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
    },
    "300m": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "intermediate_size": 2304,
        "linear_num_heads": 8,
        "linear_head_dim": 128,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "initializer_range": 0.02,
        "max_position_embeddings": 131072,
    },
    # moonshotai/Kimi-Linear-48B-A3B.
    "48b-a3b": {
        "hidden_size": 2304,
        "num_hidden_layers": 27,
        "intermediate_size": 9216,
        "linear_num_heads": 32,
        "linear_head_dim": 128,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "mlp_layer_types": ["dense"] + ["sparse"] * 26,
        "moe_intermediate_size": 1024,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 2.446,
        "initializer_range": 0.02,
        "max_position_embeddings": 1048576,
    },
}
# A mixture of experts with the dimensions of another size.
SIZES["4m-a2m"] = SIZES["2m"] | {
    "mlp_layer_types": ["dense"] + ["sparse"] * 3,
    "moe_intermediate_size": 192,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
}
REFERENCE_ARM = "kda"
WIDTH_STEP = 8


class UnknownArm(ValueError):
    """No such arm; the message names the known ones."""

    def __init__(self, arm: str):
        super().__init__(f"unknown arm {arm!r}: known arms are {', '.join(sorted(ARMS))}")


class UnknownSize(ValueError):
    """No such size; the message names the known ones."""

    def __init__(self, size: str):
        super().__init__(f"unknown size {size!r}: known sizes are {', '.join(sorted(SIZES))}")


def build_model(arm: str, size: str, *, vocab_size: int, **overrides: Any) -> HybridForCausalLM:
    """A freshly initialised fp32 model; seed torch before for a reproducible one.

    `overrides` are `HybridConfig` fields, such as pad_token_id, bos_token_id, eos_token_id; an `intermediate_size`
    among them is taken as it is, without matching parameters. Raises UnknownArm, UnknownSize.
    """
    return HybridForCausalLM(hybrid_config(arm, size, vocab_size=vocab_size, **overrides))


def hybrid_config(arm: str, size: str, *, vocab_size: int, **overrides: Any) -> HybridConfig:
    """The configuration `build_model` builds; same arguments and errors."""
    if arm not in ARMS:
        raise UnknownArm(arm)
    if size not in SIZES:
        raise UnknownSize(size)
    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    fields = {**SIZES[size], **special, "vocab_size": vocab_size, **overrides}
    if arm != REFERENCE_ARM and "intermediate_size" not in overrides:
        fields |= _matched_width(arm, fields)
    return _config(arm, fields)


def _config(arm: str, fields: dict[str, Any]) -> HybridConfig:
    depth = fields["num_hidden_layers"]
    plan = {"mlp_layer_types": ["dense"] * depth, "layer_types": ARMS[arm].layers(depth)}
    return HybridConfig(**plan | ARMS[arm].fields | fields)


def _matched_width(arm: str, fields: dict[str, Any]) -> dict[str, int]:
    """The width of this arm's FFNs with which it has as many parameters as the reference arm, by its field's name."""
    name = "moe_intermediate_size" if "sparse" in fields.get("mlp_layer_types", ()) else "intermediate_size"
    ours = _parameter_count(_config(arm, fields))
    per_step = _parameter_count(_config(arm, fields | {name: fields[name] + WIDTH_STEP})) - ours
    missing = _parameter_count(_config(REFERENCE_ARM, fields)) - ours
    return {name: fields[name] + WIDTH_STEP * round(missing / per_step)}


def _parameter_count(config: HybridConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in HybridForCausalLM(config).parameters())
