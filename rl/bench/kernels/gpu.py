"""How a call is measured on an NVIDIA GPU."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], Any]

REPEATS, SLOW_REPEATS = 20, 3
SLOW = 0.1  # seconds
FLUSH_BYTES = 256 * 2**20  # more than any L2 cache


def gpu_seconds(work: Work) -> float:
    """Median of 20 calls (3 of a slow one) between CUDA events, after a warm-up; the L2 cache is overwritten before."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    repeats = REPEATS if between_events(work, flush) < SLOW else SLOW_REPEATS
    return statistics.median(between_events(work, flush) for _ in range(repeats))


def between_events(work: Work, flush: Tensor) -> float:
    flush.zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_bytes(work: Work) -> int:
    """Most memory allocated during a call, inputs and results included."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def copy_rate() -> float:
    """Bytes per second, read and written, of a copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / gpu_seconds(lambda: target.copy_(source))


def in_a_graph(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`call` captured in a CUDA graph, its replay with the same tensor as result."""
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def triton_kernels(work: Work) -> list[str]:
    """Names of the Triton kernels that one call launches, in order."""
    from triton import knobs

    names: list[str] = []

    def note(metadata: Any) -> None:
        names.append(metadata.get()["name"])

    knobs.runtime.launch_enter_hook.add(note)
    try:
        work()
        torch.cuda.synchronize()
    finally:
        knobs.runtime.launch_enter_hook.remove(note)
    return names
