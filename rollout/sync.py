"""Putting new weights into a running engine, and proving that they arrived.

Two tables say what is where: `checkpoint_tensors` of the model, which also writes checkpoints, gives the learner's
tensors by checkpoint name, and `engine_tensors` the engine's memory by the same names. A sync checks that both have the
same names and shapes, copies, has the engine refresh what it derives, and compares checksums name by name.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from deltarl.rollout.checksum import checksums, digest
from deltarl.rollout.types import WeightSyncError

DERIVED = ("W_UV", "W_UK_T")
"""What vLLM's latent attention derives from kv_b_proj after loading: not in any checkpoint, refreshed after a sync."""

PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers that vLLM stacks by rows, and the checkpoint's layers in that order."""

PLAIN_EXPERTS = ("TRITON", "BATCHED_TRITON")
"""vLLM's expert kernels that read weights as they are loaded; for others vLLM reorders them, once, when it starts."""

HALF_WAY = "the last weight sync broke off half-way: sync again, or restart the worker"
NO_WEIGHTS = "the engine slept and its weights were given up: sync_weights before drawing"


class Place(NamedTuple):
    """How an engine keeps a tensor of the checkpoint: its whole shape and dtype there, and the dimension along which
    its ranks share it in equal parts."""

    shape: torch.Size
    dtype: torch.dtype
    cut: int | None = None
    parts: int = 1


Layout = dict[str, Place]
"""The tensors of an engine by checkpoint name, in a fixed order."""


def layout_of(held: Mapping[str, torch.Tensor]) -> Layout:
    return {name: Place(view.shape, view.dtype) for name, view in held.items()}


def part_of(tensor: torch.Tensor, place: Place, rank: int) -> torch.Tensor:
    """What a rank holds of a whole tensor."""
    whole = tensor.reshape(place.shape)
    return whole if place.cut is None else whole.chunk(place.parts, place.cut)[rank]


def engine_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every weight of a vLLM model by checkpoint name, as views into the engine's memory.

    Raises WeightSyncError for a layout that cannot be read back by name.
    """
    found: dict[str, torch.Tensor] = {}
    for name, param in loaded_parameters(model):
        path, _, leaf = name.rpartition(".")
        parent, _, layer = path.rpartition(".")
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


def loaded_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a vLLM model that checkpoints hold, by the model's own names."""
    return (named for named in model.named_parameters() if named[0].rpartition(".")[2] not in DERIVED)


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


def match(offered: Mapping[str, torch.Tensor], layout: Layout) -> None:
    """Raise WeightSyncError unless the offered checkpoint has exactly the engine's names and shapes, give or take ones.

    Where the engine's output layer is its embedding, `lm_head.weight` may be offered if it equals the embedding.
    """
    extra = sorted(offered.keys() - layout.keys())
    if "lm_head.weight" in extra and "model.embed_tokens.weight" in offered:
        if not torch.equal(offered["lm_head.weight"], offered["model.embed_tokens.weight"]):
            raise WeightSyncError(
                "lm_head.weight differs from the embedding, but the engine has them tied: tie the model"
            )
        extra.remove("lm_head.weight")
    missing = sorted(layout.keys() - offered.keys())
    if missing or extra:
        raise WeightSyncError(
            f"weights do not fit the engine: {listed('missing', missing)}{listed('unknown', extra)}"
            "give the tensors of checkpoint_tensors(model) of the model that was served; old weights stay"
        )
    for name, place in layout.items():
        given = offered[name].shape
        if given.numel() != place.shape.numel() or [n for n in given if n > 1] != [n for n in place.shape if n > 1]:
            raise WeightSyncError(
                f"{name} has shape {tuple(given)}, the engine's is {tuple(place.shape)}: give weights of the model "
                "that was served; old weights stay"
            )


def listed(what: str, names: list[str], most: int = 5) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{what} {', '.join(names[:most])}{more}; "


@torch.no_grad()
def write(offered: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]) -> None:
    """Copy the offered tensors into the engine's memory, cast to its dtypes, in one call."""
    torch._foreach_copy_(list(held.values()), [offered[name].reshape(view.shape) for name, view in held.items()])


@torch.no_grad()
def refresh(model: nn.Module) -> None:
    """Have the engine's model derive again what it derives from its weights, in the same memory, so that CUDA graphs
    see it: vLLM's latent attention keeps kv_b_proj in a second, absorbed form."""
    for module in model.modules():
        if hasattr(module, DERIVED[0]):
            module.process_weights_after_loading(getattr(module, DERIVED[0]).dtype)


def prove(held: Mapping[str, torch.Tensor], offered: Mapping[str, torch.Tensor]) -> tuple[int, str]:
    """`compare` with what the engine holds, read back."""
    return compare(offered, layout_of(held), [checksums_in(held)])


def compare(
    offered: Mapping[str, torch.Tensor], layout: Layout, arrived: Sequence[Mapping[str, int]]
) -> tuple[int, str]:
    """Compare the checksums that the engine's ranks found with those of what was sent, cast to the engine's dtypes.

    Returns the bytes compared and a digest over names, dtypes, shapes and checksums of the whole tensors. Raises
    WeightSyncError for tensors that differ.
    """
    dtypes = {name: place.dtype for name, place in layout.items()}
    sent = checksums(offered, dtypes)
    wrong = set()
    for rank, found in enumerate(arrived):
        shared = {name: part_of(offered[name], place, rank) for name, place in layout.items() if place.cut is not None}
        expected = sent | checksums(shared, {name: dtypes[name] for name in shared})
        wrong |= {name for name in layout if expected[name] != found[name]}
    if wrong:
        raise WeightSyncError(
            f"weights did not arrive in the engine: {listed('wrong', sorted(wrong))}sync again or restart the worker"
        )
    size = sum(place.shape.numel() * place.dtype.itemsize for place in layout.values())
    return size, digest((name, dtypes[name], tuple(offered[name].shape), sent[name]) for name in layout)


def settle(held: Mapping[str, torch.Tensor]) -> None:
    """Wait for all streams of the engine's device, so that no forward pass sees weights of two versions."""
    if any(view.is_cuda for view in held.values()):
        torch.cuda.synchronize()


def checksums_in(held: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """The checksum of each tensor that the engine holds."""
    return checksums(held, {name: view.dtype for name, view in held.items()})


def collect(named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The offered tensors by name; WeightSyncError when a name comes twice."""
    offered: dict[str, torch.Tensor] = {}
    for name, tensor in named_tensors:
        if name in offered:
            raise WeightSyncError(f"{name} was given twice: give each tensor once; old weights stay")
        offered[name] = tensor
    return offered
