"""Which parameters are trained how: groups by rule, and AdamW, 8-bit AdamW or Muon over them as one optimizer.

| group        | parameters                                                   | decay | adamw | adamw_8bit | muon  |
|--------------|--------------------------------------------------------------|-------|-------|------------|-------|
| matrices     | weights of linear layers, stacks of experts, adapters        | yes   | AdamW | 8-bit      | Muon  |
| embeddings   | embeddings, lm_head                                          | yes   | AdamW | AdamW      | AdamW |
| convolutions | short convolutions                                           | yes   | AdamW | AdamW      | AdamW |
| vectors      | norms, biases, A_log, dt_bias, whatever else is one-dimensional | no | AdamW | AdamW      | AdamW |
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from deltarl.rl.errors import UserError

OptimizerName = Literal["adamw", "adamw_8bit", "muon"]
ALGORITHMS = {"adamw": "AdamW", "adamw_8bit": "8-bit AdamW", "muon": "Muon"}
UNDECAYED = ("A_log", "dt_bias", "bias")
BETAS, EPSILON = (0.9, 0.999), 1e-8


class OptimizerSettings(Protocol):
    """What a job's `rl` and `sft` sections say about their optimizer."""

    optimizer: OptimizerName
    learning_rate: float
    weight_decay: float


@dataclass
class Group:
    """Parameters that are trained alike, with their names in the model."""

    name: Literal["matrices", "embeddings", "convolutions", "vectors"]
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def decayed(self) -> bool:
        return self.name != "vectors"

    def algorithm(self, optimizer: OptimizerName) -> str:
        """The name of what trains this group under `rl.optimizer`."""
        return ALGORITHMS[optimizer if self.name == "matrices" else "adamw"]

    def settings(self, weight_decay: float) -> dict[str, Any]:
        """The group as torch's optimizers take it."""
        return {"params": list(self.parameters.values()), "weight_decay": weight_decay if self.decayed else 0.0}


def parameter_groups(model: nn.Module) -> list[Group]:
    """The model's trainable parameters, each in one group; groups without any are left out."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if head is not None:
        embeddings.add(id(head.weight))
    convolutions = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv1d)}
    groups = {name: Group(name) for name in ("matrices", "embeddings", "convolutions", "vectors")}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in embeddings:
            kind = "embeddings"
        elif id(parameter) in convolutions:
            kind = "convolutions"
        elif parameter.ndim < 2 or name.rpartition(".")[2] in UNDECAYED:
            kind = "vectors"
        else:
            kind = "matrices"
        groups[kind].parameters[name] = parameter
    return [group for group in groups.values() if group.parameters]


def group_table(groups: list[Group], settings: OptimizerSettings) -> str:
    """What trains which parameters, one group a line, for people."""
    rows = [("group", "tensors", "parameters", "optimizer", "weight decay", "such as")]
    for group in groups:
        size = sum(parameter.numel() for parameter in group.parameters.values())
        decay = f"{settings.weight_decay:g}" if group.decayed else "never"
        example = next(iter(group.parameters))
        algorithm = group.algorithm(settings.optimizer)
        rows.append((group.name, str(len(group.parameters)), f"{size:,}", algorithm, decay, example))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> GroupedOptimizer:
    """The optimizer that a job's section names, over all trainable parameters of `model`.

    Muon's updates are scaled to the size of AdamW's ("Muon is Scalable for LLM Training", arXiv:2502.16982, eq. 4), so
    that one learning rate serves both.

    Raises UserError: adamw_8bit without bitsandbytes.
    """
    groups, rate, decay = parameter_groups(model), settings.learning_rate, settings.weight_decay
    plain = [group.settings(decay) for group in groups if group.algorithm(settings.optimizer) == "AdamW"]
    matrices = [group.settings(decay) for group in groups if group.algorithm(settings.optimizer) != "AdamW"]
    parts: list[torch.optim.Optimizer] = []
    if matrices and settings.optimizer == "muon":
        parts.append(Muon(matrices, lr=rate, adjust_lr_fn="match_rms_adamw"))
    elif matrices:
        parts.append(_eight_bit()(matrices, lr=rate, betas=BETAS, eps=EPSILON))
    if plain:
        parts.append(torch.optim.AdamW(plain, lr=rate, betas=BETAS, eps=EPSILON, fused=True))
    return GroupedOptimizer(parts)


def check_optimizer(settings: OptimizerSettings) -> None:
    """Raise UserError where the section's optimizer is not installed."""
    if settings.optimizer == "adamw_8bit":
        _eight_bit()


class Muon(torch.optim.Muon):
    """torch's Muon, which takes single matrices, for stacks of experts [experts, rows, columns] too: each its own."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        flat = [{**group, "params": [p for p in group["params"] if p.ndim == 2]} for group in groups]
        super().__init__(flat, **settings)
        for group, given in zip(self.param_groups, groups, strict=True):
            group["params"] = given["params"]

    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], momenta: list[Tensor]
    ) -> bool:
        has_complex = super()._init_group(group, params, grads, momenta)
        for tensors in (params, grads, momenta):
            tensors[:] = [matrix for tensor in tensors for matrix in _matrices(tensor)]
        return has_complex


def _matrices(tensor: Tensor) -> Iterator[Tensor]:
    """The matrices of a stack [n, rows, columns] as views, of a sharded stack those of this process; or the matrix."""
    if tensor.ndim == 2:
        yield tensor
    else:
        yield from (tensor.to_local() if isinstance(tensor, DTensor) else tensor).unbind(0)


class GroupedOptimizer(torch.optim.Optimizer):
    """Several optimizers, each over groups of its own, as one: one list of groups, one state, one state_dict.

    The state keeps the dtypes it was saved with, whatever the parameters'.
    """

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.state = defaultdict(dict)
        for part in parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of every part; parameters without a gradient stay as they are."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Groups and state by parameter index, sharded tensors whole (a collective call); on every process alike."""
        packed = super().state_dict()
        packed["state"] = {index: {key: _whole(v) for key, v in s.items()} for index, s in packed["state"].items()}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of an optimizer over the same groups. Raises ValueError for other groups."""
        saved_groups = state_dict["param_groups"]
        sizes = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in saved_groups] != sizes:
            raise ValueError(
                "the saved optimizer has other parameter groups: resume with the optimizer it was saved by"
            )
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.state.clear()
        for index, state in state_dict["state"].items():
            parameter = parameters[index]
            self.state[parameter] = {key: _placed(value, parameter) for key, value in state.items()}


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _placed(value: Any, parameter: Tensor) -> Any:
    """A saved entry of the state beside its parameter: on its device, and sharded as it is."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def _eight_bit() -> type[torch.optim.Optimizer]:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "optimizer adamw_8bit needs bitsandbytes, which is not installed: pip install 'deltarl[8bit]'"
        ) from error
    return AdamW8bit
