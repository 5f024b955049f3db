"""How a call is measured on an NVIDIA GPU."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], Any]

REPEATS, SLOW_REPEATS = 20, 3
SLOW = 0.1  # seconds
FLUSH_BYTES = 256 * 2**20  # more than any L2 cache
BUSY = 20  # flushes, about 2 ms


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


def kernel_seconds(work: Work, repeats: int = 10) -> dict[str, float]:
    """Seconds of each Triton kernel in one call, all its launches together, in the order of their first: medians.

    The device is kept busy before each call, so that no kernel waits for the host between its two events.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    work()
    calls = []
    for _ in range(repeats):
        for _ in range(BUSY):
            flush.zero_()
        with launch_events() as launches:
            work()
        torch.cuda.synchronize()
        seconds: dict[str, float] = {}
        for name, start, end in launches:
            seconds[name] = seconds.get(name, 0.0) + start.elapsed_time(end) / 1e3
        calls.append(seconds)
    return {name: statistics.median(call[name] for call in calls) for name in calls[0]}


@contextmanager
def launch_events() -> Iterator[list[tuple[str, torch.cuda.Event, torch.cuda.Event]]]:
    """The name, and events before and after, of each Triton kernel launched inside, in order."""
    from triton import knobs

    launches: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def enter(metadata: Any) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        launches.append((metadata.get()["name"], start, end))
        start.record()

    def leave(metadata: Any) -> None:
        launches[-1][2].record()

    knobs.runtime.launch_enter_hook.add(enter)
    knobs.runtime.launch_exit_hook.add(leave)
    try:
        yield launches
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
        knobs.runtime.launch_exit_hook.remove(leave)
