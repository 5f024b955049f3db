"""The weights of an engine where they lie: in each of its ranks, one process with tensor parallelism of one.

The functions run in a rank, called by vLLM's `collective_rpc` with vLLM's worker as their first argument.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from deltarl.rollout.sync import Layout, Place, checksums_in, engine_tensors, loaded_parameters, refresh, settle
from deltarl.rollout.transfer import SharedMemory, attach, plan_buckets, unpack
from deltarl.rollout.types import WeightSyncError


class Rank:
    """A rank's part of the weights: `held` by checkpoint name, and `layout`, which describes the whole of them."""

    def __init__(self, model: nn.Module) -> None:
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        self.model = model
        self.held = engine_tensors(model)
        self.number, self.parts = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.layout = whole_layout(model, self.held, self.parts)
        self.plan = plan_buckets(self.layout)
        self.memory: SharedMemory | None = None
        self.handle: Any = None

    def attach(self, handle: Any) -> None:
        if handle != self.handle:
            self.memory, self.handle = attach(handle, 2 * self.plan.bytes), handle

    def read(self, index: int) -> None:
        """Even buckets lie in the first half of the memory, odd ones in the second."""
        begin = index % 2 * self.plan.bytes
        memory = self.memory.tensor[begin : begin + self.plan.bytes]
        unpack(self.plan.buckets[index], memory, self.layout, self.held, self.number)


def whole_layout(model: nn.Module, held: Mapping[str, torch.Tensor], parts: int) -> Layout:
    """Shapes and dtypes of the tensors that the ranks hold parts of, and how they share them.

    Raises WeightSyncError for a model that does not say how.
    """
    if parts == 1:
        return {name: Place(view.shape, view.dtype) for name, view in held.items()}
    layout = {}
    for name, parameter in loaded_parameters(model):
        if not hasattr(parameter, "cut"):
            raise WeightSyncError(f"the engine's model does not say how ranks share {name}: set tensor_parallel to 1")
        shape, cut = list(parameter.shape), parameter.cut
        if cut is not None:
            shape[cut] *= parts
        layout[name] = Place(torch.Size(shape), parameter.dtype, cut, 1 if cut is None else parts)
    return layout


def rank_of(worker: Any) -> Rank:
    inner = getattr(worker, "worker", worker)
    if not hasattr(inner, "deltarl_rank"):
        inner.deltarl_rank = Rank(inner.model_runner.get_model())
    return inner.deltarl_rank


def describe(worker: Any) -> tuple[Layout, str]:
    """The layout of the whole weights, and the type of device that holds them."""
    rank = rank_of(worker)
    return rank.layout, next(iter(rank.held.values())).device.type


def still(worker: Any) -> None:
    """Wait for what the rank's device has to do."""
    settle(rank_of(worker).held)


def attach_memory(worker: Any, handle: Any) -> None:
    rank_of(worker).attach(handle)


def read_bucket(worker: Any, index: int) -> None:
    rank_of(worker).read(index)


def arrived(worker: Any) -> dict[str, int]:
    """Derive again what is derived from the weights; the checksums of the rank's part of them."""
    rank = rank_of(worker)
    refresh(rank.model)
    settle(rank.held)
    return checksums_in(rank.held)
