"""LoRA adapters in the learner: put into the model in place, merged wherever its weights leave it, saved and resumed.

The base is never changed: what the engine, evaluations and checkpoints get is base + B·A·alpha/rank by its plain names
(Hu et al. 2021, "LoRA", arXiv:2106.09685, eq. 3). A checkpoint also holds the adapters alone, as peft reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deltarl.model import checkpoint_tensors
from deltarl.rl.errors import UserError
from deltarl.rl.sharding import whole_state

if TYPE_CHECKING:
    from deltarl.rl.jobs import LoraConfig

ADAPTER_FOLDER = "adapter"
NAME = "default"
PREFIX = "base_model.model."
"""What peft puts before the names of a model's modules in its files."""


def check_adapters() -> None:
    """Raise UserError where peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError("model.lora needs peft, which is not installed: pip install 'deltarl[lora]'") from error


def add_adapters(model: nn.Module, lora: LoraConfig) -> None:
    """Freeze `model` and put float32 adapters beside the linear layers that `lora.targets` names, all but the head
    where it names none. They start as no change at all.

    Raises UserError: no layer of that name.
    """
    check_adapters()
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    known = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    unknown = sorted(set(lora.targets or []) - set(known))
    if unknown:
        raise UserError(f"model.lora.targets: no linear layer is called {unknown[0]}; there are: {', '.join(known)}")
    head = model.get_output_embeddings()
    targets = lora.targets or [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    settings = PeftConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0)
    inject_adapter_in_model(settings, model, adapter_name=NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_adapter(name))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_adapters` was here."""
    return any(_is_adapter(name) for name, _ in model.named_parameters())


def merged_state(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of a model with adapters as that of the same model without: adapters added to their layers.

    The tensors of layers that have adapters are new, in the base's dtype; all others are those of `state`.
    """
    merged = {}
    for name, tensor in state.items():
        if _is_adapter(name):
            continue
        layer, base, _ = name.partition(".base_layer.")
        if base and name.endswith(".weight"):
            down, up = (state[f"{layer}.lora_{letter}.{NAME}.weight"] for letter in "AB")
            scale = model.get_submodule(layer).scaling[NAME]
            tensor = (tensor.float() + (up.float() @ down.float()) * scale).to(tensor.dtype)
        merged[name.replace(".base_layer.", ".")] = tensor
    return merged


def policy_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The policy by checkpoint names, as engines take it: sharded weights whole, adapters merged. Collective."""
    state = whole_state(model)
    return checkpoint_tensors(model, merged_state(model, state) if has_adapters(model) else state)


def save_adapters(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Write the adapters of `state` to `folder`, as `peft.PeftModel.from_pretrained(base, folder)` reads them."""
    folder.mkdir()
    tensors = {
        PREFIX + name.replace(f".{NAME}.", "."): t.contiguous() for name, t in state.items() if _is_adapter(name)
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config[NAME].save_pretrained(folder)


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Put saved adapters into a model that has adapters of the same shape.

    Raises UserError: other layers or another rank than the job's `model.lora`.
    """
    held: dict[str, Any] = {name: p for name, p in model.named_parameters() if _is_adapter(name)}
    saved = load_file(folder / "adapter_model.safetensors")
    names = {PREFIX + name.replace(f".{NAME}.", "."): parameter for name, parameter in held.items()}
    if {name: p.shape for name, p in names.items()} != {name: t.shape for name, t in saved.items()}:
        raise UserError(f"the adapters in {folder} have other layers or another rank: set model.lora as it was there")
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(saved[name])


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
