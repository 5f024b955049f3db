"""What must be float32 in a learner, whatever the rest is: checked when a run starts and whenever it has loaded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from deltarl.rl.errors import UserError

EXACT = ("A_log", "dt_bias", "e_score_correction_bias")
SCALED_INTEGERS = (torch.uint8, torch.int8)
"""The dtypes of an 8-bit optimizer's states, whose scales are float32."""


def exact_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Gates' `A_log` and `dt_bias`, routers' correction biases and norms of any causal LM, by name."""
    norms = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        module, _, leaf = name.rpartition(".")
        if leaf in EXACT or module in norms:
            yield name, tensor


def check_precision(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Raise UserError unless gates, router biases, norms, trained weights and the optimizer's state are float32.

    Weights that are not trained (the base of adapters) may have any dtype. An 8-bit optimizer's states count as
    float32 for their scales.
    """
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    for name, tensor in (*exact_tensors(model), *trained):
        if tensor.dtype != torch.float32:
            raise UserError(
                f"{name} is {_short(tensor.dtype)} in the learner, where it must be float32: load the model with "
                "dtype float32; model.dtype sets the dtype of the computation only"
            )
    if optimizer is None:
        return
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dtype not in (torch.float32, *SCALED_INTEGERS):
                raise UserError(
                    f"the optimizer's {key} of {names.get(id(parameter), 'a parameter')} is {_short(value.dtype)}, "
                    "where it must be float32: resume from a checkpoint that was written with float32 state"
                )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
