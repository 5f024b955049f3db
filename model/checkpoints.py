"""Reading and writing model folders: Moonshot's layout for hybrids, transformers' own for everything else."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming, revert_weight_conversion

from deltarl.model.config import HybridConfig
from deltarl.model.hybrid import HybridForCausalLM

# transformers renames checkpoint tensors by model class; ours are renamed as its own Kimi Linear's are, and GDN's gate.
register_checkpoint_conversion_mapping(
    HybridForCausalLM.__name__,
    [
        WeightRenaming(source_patterns=r"self_attn\.a_proj\.", target_patterns=r"self_attn.forget_gate.a_proj."),
        *get_checkpoint_conversion_mapping(HybridConfig.model_type),
    ],
    overwrite=True,
)

WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


class CheckpointError(ValueError):
    """A model folder that cannot be loaded; the message says what is missing and where."""


def load_model(
    path: str | os.PathLike, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer in a folder, in `dtype` (`A_log` and `dt_bias` of a hybrid stay fp32).

    A Kimi Linear folder becomes a `HybridForCausalLM`, any other what AutoModelForCausalLM makes of it. Raises
    CheckpointError if the folder, its config.json, its weights (or some of them) or its tokenizer are missing.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"no model folder at {folder}: give the path of a folder with config.json and weights")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"no config.json in {folder}: give the path of a Hugging Face model folder")
    if not any(any(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS):
        raise CheckpointError(f"no weights in {folder}: it needs model.safetensors")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"no tokenizer in {folder}: it needs tokenizer.json and tokenizer_config.json")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if json.loads((folder / "config.json").read_text()).get("model_type") == HybridConfig.model_type:
        model, report = HybridForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    else:
        model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(f"{len(missing)} tensors are missing from the weights in {folder}, such as {missing[0]}")
    return model, tokenizer


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Writes model and tokenizer to `folder`, which appears complete or not at all; one that was there is replaced.

    `state` stands in for the model's own state_dict: sharded weights gathered, adapters merged.
    """
    target = Path(folder).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        write_model(model, tokenizer, partial, state)
        partial.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Writes the files of `save_checkpoint` into a folder that is there, one after the other."""
    if isinstance(model, HybridForCausalLM):
        _write_hybrid(model, Path(folder), state)
    else:
        model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def checkpoint_tensors(model: PreTrainedModel, state: dict[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors by the names a saved checkpoint gives them; detached views wherever the layout allows it.

    Tensors that a checkpoint leaves out because they are tied to another are left out. `state` as in `save_checkpoint`.
    """
    state = model.state_dict() if state is None else state
    if isinstance(model, HybridForCausalLM):
        for name, tensor in state.items():
            yield from _moonshot(name, tensor, model.config)
    else:
        tied = set(getattr(model, "all_tied_weights_keys", {}))
        untied = {name: tensor for name, tensor in state.items() if name not in tied}
        yield from revert_weight_conversion(model, untied).items()


def _write_hybrid(model: HybridForCausalLM, folder: Path, state: dict[str, Tensor] | None) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint_tensors(model, state)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_moonshot(), "dtype": str(model.dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model.generation_config.save_pretrained(folder)


def _moonshot(name: str, tensor: Tensor, config: HybridConfig) -> Iterator[tuple[str, Tensor]]:
    """One tensor of the model -> the checkpoint's tensors that hold it."""
    name = name.replace(".self_attn.forget_gate.", ".self_attn.")
    prefix, conv, suffix = name.partition(".self_attn.conv1d.")
    if conv:
        for letter, part in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{prefix}.self_attn.{letter}_conv1d.{suffix}", part
        return
    before, mlp, inside = name.partition(".mlp.")
    if not mlp or config.mlp_layer_types[int(before.rpartition(".")[2])] == "dense":
        yield name, tensor
    elif inside == "experts.gate_up_proj":
        for expert, weight in enumerate(tensor):
            gate, up = weight.chunk(2)
            yield f"{before}.block_sparse_moe.experts.{expert}.w1.weight", gate
            yield f"{before}.block_sparse_moe.experts.{expert}.w3.weight", up
    elif inside == "experts.down_proj":
        for expert, weight in enumerate(tensor):
            yield f"{before}.block_sparse_moe.experts.{expert}.w2.weight", weight
    else:
        yield f"{before}.block_sparse_moe.{inside}", tensor
