"""Named architectures: an arm is a layer plan, a size is a set of dimensions.

An arm's plan repeats over the depth. All arms of a size share every dimension but the MLP width (`intermediate_size`),
which is chosen so that the parameters equal those of the `kda` arm as nearly as a multiple of 8 can.
"""

from typing import Any

import torch

from deltarl.model.config import KDA, MLA, HybridConfig
from deltarl.model.hybrid import HybridForCausalLM

ARMS: dict[str, tuple[str, ...]] = {
    "kda": (KDA, KDA, KDA, MLA),
    "mla": (MLA,),
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
        fields["intermediate_size"] += _extra_width(arm, fields)
    return _config(arm, fields)


def _config(arm: str, fields: dict[str, Any]) -> HybridConfig:
    plan, depth = ARMS[arm], fields["num_hidden_layers"]
    dense = ["dense"] * depth
    return HybridConfig(
        **{"mlp_layer_types": dense, "layer_types": [plan[i % len(plan)] for i in range(depth)], **fields}
    )


def _extra_width(arm: str, fields: dict[str, Any]) -> int:
    """How much wider this arm's MLPs must be than the reference arm's to have as many parameters."""
    wider = {**fields, "intermediate_size": fields["intermediate_size"] + WIDTH_STEP}
    ours = _parameter_count(_config(arm, fields))
    per_step = _parameter_count(_config(arm, wider)) - ours
    if per_step == 0:
        return 0
    missing = _parameter_count(_config(REFERENCE_ARM, fields)) - ours
    return WIDTH_STEP * round(missing / per_step)


def _parameter_count(config: HybridConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in HybridForCausalLM(config).parameters())
