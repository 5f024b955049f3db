"""Launching kernels. A set of kernels that is needed for the first time is compiled side by side, not one by one."""

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
_awaited: ContextVar[list[Callable[[], Any]] | None] = ContextVar("awaited", default=None)
_compiled: set[Hashable] = set()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`."""
    awaited = _awaited.get()
    if awaited is None:
        kernel[grid](*args, **options)
    else:
        awaited.append(partial(kernel.warmup, *args, grid=grid, **options))


def compiled_together(key: Hashable, device: torch.device, work: Callable[[], Result]) -> Result:
    """work(). The first time for a key it is gone through once before without launching anything, to compile all that
    it launches at once. `work` must not read on the host what its kernels write."""
    if (key, device) not in _compiled:
        awaited: list[Callable[[], Any]] = []
        token = _awaited.set(awaited)
        try:
            work()
        finally:
            _awaited.reset(token)
        with ThreadPoolExecutor(len(awaited)) as pool:
            for compiled in [pool.submit(_on, device, compile_one) for compile_one in awaited]:
                compiled.result()
        _compiled.add((key, device))
    return work()


def _on(device: torch.device, compile_one: Callable[[], Any]) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a new thread starts on device 0
    compile_one()
