"""Putting new weights into a running engine, and proving that they arrived.

The engine's own loader writes (`model.load_weights`); then every tensor is read back by its checkpoint name, through
`engine_tensors`, and its checksum compared with the one of the tensor that was sent.
"""

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from deltarl.rollout.types import WeightSyncError

DERIVED = ("W_UV", "W_UK_T")
"""What vLLM's latent attention derives from kv_b_proj after loading: not in any checkpoint, refreshed after a sync."""

PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers that vLLM stacks by rows, and the checkpoint's layers in that order."""

PLAIN_EXPERTS = ("TRITON", "BATCHED_TRITON")
"""vLLM's expert kernels that read weights as they are loaded; for others vLLM reorders them, once, when it starts."""

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: torch.Tensor, piece: int = 1 << 24) -> int:
    """Position-weighted sum of a tensor's raw words, Σ (2i+1)·word_i mod 2⁶⁴, computed on its device.

    Words are the elements' bits. A change of one element always changes the sum, for its weight is odd; so does
    an exchange of two different elements of up to 4 bytes each: |w_i - w_j|·2|i - j| stays under 2⁶⁴ to 2³¹ elements.
    """
    words = tensor.detach().contiguous().view(-1).view(WORDS[tensor.element_size()])
    total = 0
    for begin in range(0, words.numel(), piece):
        part = words[begin : begin + piece].long()
        weights = torch.arange(begin, begin + part.numel(), device=part.device).mul_(2).add_(1)
        total += int(part.mul_(weights).sum())
    return total % (1 << 64)


def engine_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every weight of a vLLM model by checkpoint name, as views into the engine's memory.

    Raises WeightSyncError for a layout that cannot be read back by name.
    """
    found: dict[str, torch.Tensor] = {}
    for name, param in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        parent, _, layer = path.rpartition(".")
        if leaf in DERIVED:
            continue
        if layer in PACKED:
            sizes = model.get_submodule(path).output_sizes
            for part, view in zip(PACKED[layer], param.data.split(sizes), strict=True):
                found[f"{parent}.{part}.{leaf}"] = view
        elif leaf in ("w13_weight", "w2_weight"):
            backend = model.get_submodule(path).quant_method.unquantized_backend.name
            if backend not in PLAIN_EXPERTS:
                raise WeightSyncError(f"the engine packs experts for {backend}; set moe_backend=triton to sync them")
            found.update(expert_tensors(path, leaf, param.data))
        elif param.numel() == 0:
            raise WeightSyncError(
                f"the engine holds {name} in a packed layout that cannot be read back: report this model"
            )
        else:
            rows = getattr(model.get_submodule(path), "org_vocab_size", None)  # vLLM pads vocabularies
            found[name] = param.data if rows is None else param.data[:rows]
    return found


def expert_tensors(path: str, leaf: str, stacked: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """vLLM's stacked experts [experts, rows, columns] by Moonshot's checkpoint names."""
    experts = path[: path.index("experts") + len("experts")]
    for index, expert in enumerate(stacked):
        if leaf == "w2_weight":
            yield f"{experts}.{index}.w2.weight", expert
        else:
            w1, w3 = expert.chunk(2)
            yield f"{experts}.{index}.w1.weight", w1
            yield f"{experts}.{index}.w3.weight", w3


def match(offered: dict[str, torch.Tensor], held: dict[str, torch.Tensor]) -> None:
    """Raise WeightSyncError unless the offered checkpoint has exactly the engine's names and shapes.

    Where the engine's output layer is its embedding, `lm_head.weight` may be offered if it equals the embedding.
    """
    extra = sorted(offered.keys() - held.keys())
    if "lm_head.weight" in extra and "model.embed_tokens.weight" in offered:
        if not torch.equal(offered["lm_head.weight"], offered["model.embed_tokens.weight"]):
            raise WeightSyncError(
                "lm_head.weight differs from the embedding, but the engine has them tied: tie the model"
            )
        extra.remove("lm_head.weight")
    missing = sorted(held.keys() - offered.keys())
    if missing or extra:
        raise WeightSyncError(
            f"weights do not fit the engine: {listed('missing', missing)}{listed('unknown', extra)}"
            "give the tensors of checkpoint_tensors(model) of the model that was served; old weights stay"
        )
    for name, view in held.items():
        given = offered[name].shape
        if given.numel() != view.numel() or [n for n in given if n > 1] != [n for n in view.shape if n > 1]:
            raise WeightSyncError(
                f"{name} has shape {tuple(given)}, the engine's is {tuple(view.shape)}: give weights of the model "
                "that was served; old weights stay"
            )


def listed(what: str, names: list[str], most: int = 5) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what} {', '.join(names[:most])}{more}; "


def load_in_place(model: nn.Module, offered: dict[str, torch.Tensor], held: dict[str, torch.Tensor]) -> None:
    """Write the offered tensors with the engine's own loader, and refresh what it derives from them.

    vLLM's latent attention keeps kv_b_proj in a second, absorbed form; recomputing it writes into the same memory,
    so CUDA graphs see it.
    """
    with torch.no_grad():
        model.load_weights((name, tensor.detach()) for name, tensor in offered.items() if name in held)
        for module in model.modules():
            if hasattr(module, DERIVED[0]):
                module.process_weights_after_loading(getattr(module, DERIVED[0]).dtype)


def prove(held: dict[str, torch.Tensor], offered: dict[str, torch.Tensor]) -> tuple[int, str]:
    """Read every engine tensor back; returns the bytes compared and a digest over names, dtypes, shapes and checksums.

    Raises WeightSyncError when one differs from what was sent, cast to the engine's dtype.
    """
    digest = hashlib.sha256()
    size = 0
    wrong = []
    for name in sorted(held):
        sent = offered[name].detach().to(held[name].dtype)
        expected, arrived = checksum(sent), checksum(held[name])
        if expected != arrived:
            wrong.append(name)
        digest.update(f"{name} {sent.dtype} {tuple(sent.shape)} {arrived:016x}\n".encode())
        size += sent.numel() * sent.element_size()
    if wrong:
        raise WeightSyncError(
            f"weights did not arrive in the engine: {listed('wrong', wrong)}sync again or restart the worker"
        )
    return size, digest.hexdigest()


def collect(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The offered tensors by name; WeightSyncError when a name comes twice."""
    offered: dict[str, torch.Tensor] = {}
    for name, tensor in named_tensors:
        if name in offered:
            raise WeightSyncError(f"{name} was given twice: give each tensor once; old weights stay")
        offered[name] = tensor
    return offered
