"""The learner on several processes: weights, gradients and optimizer state sharded over them with torch's FSDP2.

Launched by `torchrun` or `accelerate launch`, one process a device; accelerate opens the process group. The model is
sharded here and not by accelerate, which knows FSDP on accelerators only (a test on CPUs would not run what GPUs run)
and puts the head into a group of its own, where the fused head of rl/forward.py does not find its weight.

Rank 0 is the only one with an engine, verifiers and a run folder: it collects a batch of traces and hands it to all;
each computes its share of the packs. Functions named so are collective: every process calls them, in the same order.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

Item = TypeVar("Item")
PATIENCE = timedelta(days=30)
"""How long a process waits for the others: a batch of long traces takes hours."""


def open_processes() -> None:
    """Join the other processes, if torchrun or `accelerate launch` started several. Main may be waited for for long.

    What is sent from process to process goes over gloo, so that no GPU is kept busy by waiting; gradients over NCCL.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(local_device())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)


def leave_together() -> None:
    """End this process with exit code 0, once all that train together are as far; without others, do nothing.

    Python is not taken apart first. A thread of gloo's lets go of a collective's tensors some time after the call has
    returned, for which it needs the interpreter; where that is being taken apart it aborts the process.
    """
    if processes() > 1:
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def local_device() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def processes() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that collects, evaluates and writes."""
    return rank() == 0


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Shard a causal LM in place over all processes: each layer a unit, everything else (embedding, norm, head) one.

    Every process gives the same weights. Gradients are summed, not averaged: the shares of a loss add up to it.
    """
    model.to(device)
    mesh = init_device_mesh(device.type, (processes(),))
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    for module in (*layers, model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    model._is_accelerate_prepared = True
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was here."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state_dict with sharded tensors whole. Collective."""
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def whole(value: Any) -> Any:
    """A sharded tensor whole (collective), anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shares(items: Sequence[Item]) -> list[tuple[Item, bool]]:
    """This process's part of `items`, each with whether it counts.

    All processes get equally many, since every forward and backward pass is collective; where the items do not suffice
    the last ones get one that another process has, which does not count.
    """
    count, me, rounds = processes(), rank(), -(-len(items) // processes())
    places = range(me, rounds * count, count)
    return [(items[min(place, len(items) - 1)], place < len(items)) for place in places]


def gathered(value: Item) -> list[Item]:
    """The picklable `value` of every process, by rank. Collective."""
    if processes() == 1:
        return [value]
    found: list[Any] = [None] * processes()
    dist.all_gather_object(found, value)
    return found


def summed(tensor: Tensor) -> Tensor:
    """The sum of the tensors that the processes give. Collective."""
    if processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_main(produce: Callable[[], Item]) -> Item:
    """What `produce` gives in the main process, in every process; what it raises there is raised in all. Collective."""
    if processes() == 1:
        return produce()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = produce()
        except BaseException as error:
            outcome[1] = error
            dist.broadcast_object_list(outcome, src=0)
            raise
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
