"""Weights on their way from the learner's process to the engine's: in buckets, through memory that both map.

On CPU that is a file of memory that has no name and is gone with the processes, however they end. On a GPU it is device
memory of the learner that the engine opens by its CUDA IPC handle: same card, or another card of the same host. It
holds two buckets, so that one is filled while the other is read, and neither side needs a second whole copy of the
weights.
"""

import mmap
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch

from deltarl.rollout.sync import Layout, Place
from deltarl.rollout.types import WeightSyncError

BUCKET_BYTES = 64 << 20


class Piece(NamedTuple):
    """Rows [begin, end) of a tensor of the engine's layout; a scalar has one row."""

    name: str
    begin: int
    end: int


class Bucket(NamedTuple):
    """Pieces of tensors of one dtype that travel together, one behind the other."""

    dtype: torch.dtype
    pieces: list[Piece]


class Plan(NamedTuple):
    """The buckets of a layout, in order, and the bytes of the longest, rounded up to a multiple of 256."""

    buckets: list[Bucket]
    bytes: int


def plan_buckets(layout: Layout, most: int = BUCKET_BYTES) -> Plan:
    """Cuts all tensors of a layout into buckets of at most `most` bytes, or one row where a row is longer.

    Both sides make the same plan from the same layout.
    """
    buckets: list[Bucket] = []
    longest = 0
    for dtype in dict.fromkeys(place.dtype for place in layout.values()):
        filled = most
        for name, place in layout.items():
            if place.dtype != dtype:
                continue
            rows, row = rows_of(place)
            begin = 0
            while begin < rows:
                if filled + row > most:
                    buckets.append(Bucket(dtype, []))
                    filled = 0
                count = max(1, min(rows - begin, (most - filled) // max(row, 1)))
                buckets[-1].pieces.append(Piece(name, begin, begin + count))
                begin, filled = begin + count, filled + count * row
                longest = max(longest, filled)
    return Plan(buckets, -(-longest // 256) * 256)


def rows_of(place: Place) -> tuple[int, int]:
    """Rows of a tensor and bytes of a row."""
    rows = place.shape[0] if place.shape else 1
    return rows, place.shape.numel() // max(rows, 1) * place.dtype.itemsize


def cut(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    return (tensor if tensor.dim() else tensor.view(1))[piece.begin : piece.end]


def lay_out(bucket: Bucket, memory: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """The bucket's pieces as views into `memory`, bytes."""
    views, begin = [], 0
    for piece in bucket.pieces:
        shape = (piece.end - piece.begin, *layout[piece.name].shape[1:])
        end = begin + torch.Size(shape).numel() * bucket.dtype.itemsize
        views.append(memory[begin:end].view(bucket.dtype).view(shape))
        begin = end
    return views


@torch.no_grad()
def pack(bucket: Bucket, memory: torch.Tensor, layout: Layout, offered: Mapping[str, torch.Tensor]) -> None:
    """Fills `memory` with the bucket, cast to the engine's dtype; returns when it is there."""
    sources = [cut(offered[piece.name].reshape(layout[piece.name].shape), piece) for piece in bucket.pieces]
    torch._foreach_copy_(lay_out(bucket, memory, layout), sources)
    if memory.is_cuda:
        torch.cuda.synchronize(memory.device)


@torch.no_grad()
def unpack(
    bucket: Bucket, memory: torch.Tensor, layout: Layout, held: Mapping[str, torch.Tensor], rank: int = 0
) -> None:
    """Copies what a rank holds of the bucket out of `memory` into its tensors; returns when it is there."""
    targets, sources = [], []
    for piece, source in zip(bucket.pieces, lay_out(bucket, memory, layout), strict=True):
        place, target = layout[piece.name], held[piece.name]
        if place.cut == 0:
            first = rank * len(target)
            begin, end = max(piece.begin, first), min(piece.end, first + len(target))
            if begin >= end:
                continue
            source = source[begin - piece.begin : end - piece.begin]
            piece = Piece(piece.name, begin - first, end - first)
        elif place.cut is not None:
            source = source.chunk(place.parts, place.cut)[rank]
        targets.append(cut(target, piece))
        sources.append(source)
    if targets:
        torch._foreach_copy_(targets, sources)
    if memory.is_cuda:
        torch.cuda.synchronize()


class SharedMemory(Protocol):
    """Bytes that processes map: `tensor` is this process's view, `handle` what the others attach by."""

    tensor: torch.Tensor
    handle: Any

    def release(self) -> None: ...


class FileMemory:
    """Memory of the host behind a file without a name, which other processes of this user open through ours."""

    def __init__(self, handle: str | None, size: int) -> None:
        if handle is None:
            file = os.memfd_create("deltarl weights")
            os.ftruncate(file, size)
            self.handle = f"/proc/{os.getpid()}/fd/{file}"
        else:
            file, self.handle = os.open(handle, os.O_RDWR), handle
        self.file = file
        self.tensor = torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)

    def release(self) -> None:
        """The memory goes with the last process that maps it."""
        del self.tensor
        os.close(self.file)


class DeviceMemory:
    """Memory of the current CUDA device, or that which another process exported as `handle`; freed with its process.

    Allocated and opened by the CUDA runtime itself: what torch shares between processes needs a file in /dev/shm, which
    stays when a process is killed. A handle names the card too: it is opened there, whatever number that card has.
    """

    def __init__(self, handle: tuple[bytes, str] | None, size: int) -> None:
        from vllm.distributed.device_communicators.cuda_wrapper import CudaRTLibrary, cudaIpcMemHandle_t

        device = torch.cuda.current_device() if handle is None else card_of(handle[1])
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # the device's context must be there
            runtime = CudaRTLibrary()
            if handle is None:
                pointer = runtime.cudaMalloc(size)
                self.release = lambda: runtime.cudaFree(pointer)
                handle = bytes(runtime.cudaIpcGetMemHandle(pointer)), str(torch.cuda.get_device_properties(device).uuid)
            else:
                pointer = runtime.cudaIpcOpenMemHandle(cudaIpcMemHandle_t.from_buffer_copy(handle[0]))
            self.handle = handle
            self.__cuda_array_interface__ = {
                "shape": (size,),
                "typestr": "|u1",
                "data": (pointer.value, False),
                "version": 3,
            }
            self.tensor = torch.as_tensor(self, device=torch.device("cuda", device))


def card_of(uuid: str) -> int:
    """The number that the card of this UUID has in this process."""
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == uuid:
            return index
    raise WeightSyncError(f"the engine does not see the learner's card {uuid}: put it behind its own in its GPUs")


def attach(handle: Any, size: int) -> SharedMemory:
    """What another process shares by `handle`."""
    return FileMemory(handle, size) if isinstance(handle, str) else DeviceMemory(handle, size)
