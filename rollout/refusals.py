"""Why an engine does not start, in one line that names the fix: what config.json lacks, and what vLLM's errors mean."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deltarl.rollout.engine import HYBRID, EngineError, prepare_environment, read_config
from deltarl.rollout.plugin import serves_our_class

NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NEEDED_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
NEEDED_LINEAR = ("num_heads", "head_dim", "short_conv_kernel_size")
NEEDED_EXPERTS = ("moe_intermediate_size", "num_experts_per_token")
SERVED = {
    "hidden_act": ("silu",),
    "q_lora_rank": (None,),
    "tie_word_embeddings": (False,),
    "moe_router_activation_func": ("sigmoid",),
    "num_expert_group": (None, 0, 1),
    "quantization_config": (None,),
}
"""Values that our class serves, of keys that may be left out."""

LONGEST = 300


def check_servable(folder: str | Path) -> None:
    """Raise EngineError when a Kimi Linear folder has a config.json that the engine cannot serve; names the key."""
    config = read_config(folder)
    if HYBRID not in (config.get("architectures") or ()):
        return
    where = f"{Path(folder) / 'config.json'}:"
    linear = config.get("linear_attn_config") or {}
    _need(config, NEEDED, where)
    plan = _plan(linear, config["num_hidden_layers"], where)
    if "linear" in plan:
        _need(linear, NEEDED_LINEAR, where, "linear_attn_config.")
    if "full" in plan:
        _need(config, NEEDED_LATENT, where)
    if config.get("num_experts"):
        _need(config, NEEDED_EXPERTS, where)
    prepare_environment()
    for key, values in SERVED.items() if serves_our_class() else ():
        if key in config and config[key] not in values:
            served = " or ".join(repr(value) for value in values)
            raise EngineError(f"{where} {key} is {config[key]!r}, and the engine serves {served} only")


def check_routed(folder: str | Path) -> None:
    """Raise EngineError for a folder whose model is no mixture of experts that our class serves."""
    config = read_config(folder)
    if HYBRID not in (config.get("architectures") or ()) or not config.get("num_experts"):
        raise EngineError(f"{folder} is no Kimi Linear mixture of experts: leave rollout.replay_routing off")


def _need(config: dict[str, Any], keys: tuple[str, ...], where: str, section: str = "") -> None:
    for key in keys:
        if config.get(key) is None:
            raise EngineError(f"{where} {section}{key} is missing: write the folder with save_checkpoint")
        if not isinstance(config[key], int) or config[key] < 1:
            raise EngineError(f"{where} {section}{key} is {config[key]!r}: it must be a whole number above 0")


def _plan(linear: dict[str, Any], layers: int, where: str) -> set[str]:
    """The kinds of layers that linear_attn_config names, each of layers 1 to `layers` once; without it all are full."""
    if not linear:
        return {"full"}
    kinds = {"linear": linear.get("kda_layers") or [], "full": linear.get("full_attn_layers") or []}
    named = sorted(kinds["linear"] + kinds["full"])
    if named != list(range(1, layers + 1)):
        raise EngineError(
            f"{where} linear_attn_config.kda_layers and full_attn_layers name layers {named}: they must name each of "
            f"1 to {layers} (num_hidden_layers) once"
        )
    return {kind for kind, numbers in kinds.items() if numbers}


@contextmanager
def explained(max_model_len: int, gpu_memory_utilization: float) -> Iterator[None]:
    """Raise what goes wrong while an engine starts as an EngineError of one line, where the user can mend it."""
    try:
        yield
    except EngineError:
        raise
    except torch.OutOfMemoryError as error:
        raise EngineError(
            f"the engine ran out of the GPU's memory as it started: lower max_num_seqs, or raise or lower "
            f"gpu_memory_utilization = {gpu_memory_utilization:g}, of which others may hold a part"
        ) from error
    except torch.distributed.DistNetworkError as error:
        raise EngineError("another program took the port that vLLM had found free for itself: start again") from error
    except ValueError as error:
        raise EngineError(_explain(str(error), max_model_len, gpu_memory_utilization)) from error


def _explain(text: str, max_model_len: int, share: float) -> str:
    if "larger than the available KV cache memory" in text or "No available memory for the cache" in text:
        fits = re.search(r"estimated maximum model length is (\d+)", text)
        lower = f"lower max_model_len to {fits[1]}, which fits, or" if fits else "not even a short one does:"
        return (
            f"max_model_len = {max_model_len} does not fit the memory that gpu_memory_utilization = {share:g} leaves "
            f"for caches: {lower} raise gpu_memory_utilization"
        )
    if longest := re.search(r"greater than the derived max_model_len \((\w+)=(\d+)", text):
        return (
            f"max_model_len = {max_model_len} is over the model's context of {longest[2]} tokens ({longest[1]} in its "
            f"config.json): lower max_model_len"
        )
    if unknown := re.search(r"Model architectures (\[.*?\]) are not supported", text):
        return f"vLLM serves no model with architectures = {unknown[1]}, as the folder's config.json has it"
    if taken := re.search(r"Free memory on device.*?\(([\d.]+)/([\d.]+) GiB\)", text):
        return (
            f"gpu_memory_utilization = {share:g} wants more than is free on the GPU, {taken[1]} of {taken[2]} GiB: "
            "lower it, or end what holds the rest"
        )
    lines = [line.strip().removeprefix("Value error, ") for line in text.splitlines()]
    line = next((line for line in lines if line and "validation error" not in line), "no reason given")
    return f"the engine does not start: {line.partition(' [type=')[0][:LONGEST]}"
