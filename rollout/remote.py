"""A worker whose engine runs in a process of its own: beside the learner instead of in it, and replaceable."""

import os
import time
from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from deltarl.rollout.engine import EngineError, check_vllm_version, end_tokens, read_config
from deltarl.rollout.supervisor import EngineLost, Supervisor
from deltarl.rollout.sync import HALF_WAY, NO_WEIGHTS, collect, compare, match
from deltarl.rollout.transfer import DeviceMemory, FileMemory, SharedMemory, pack, plan_buckets
from deltarl.rollout.types import Request, RolloutWorker, SyncReport, Trace, WeightSyncError

LOOK_SECONDS = 1.0


class RemoteWorker(RolloutWorker):
    """A `RolloutWorker` whose engine is a process; arguments are `make_worker`'s, `options` go to VllmWorker there.

    The engine advances by itself whenever it has requests; `step` waits for what it says, at most LOOK_SECONDS. A
    process that ends or hangs is replaced: it is given the current weights and all requests that have not ended, which
    are drawn again from their start, or from where their `begun` trace ends. So nothing is lost, and nothing counted
    twice, for of a request that has not ended nobody has seen a token. Equal seeds give equal tokens: as long as the
    weights are the same, a completion is the one that it would have been (on a GPU up to rounding, which depends on
    what else is drawn).

    A new process gets its weights from the copy that `keep_weights` has made, or else from `weights`. Without either,
    `sync_weights` must be called after a loss, and calls before it raise WeightSyncError, unless no weights were synced
    before: then they are the folder's.

    While the engine sleeps, one that was lost is replaced only when it is wanted, so as not to take memory.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        max_model_len: int,
        hang_seconds: float = 120.0,
        max_restarts: int = 3,
        environment: dict[str, str] | None = None,
        **options,
    ) -> None:
        check_vllm_version()
        read_config(model_path)
        self.max_model_len = max_model_len
        self.end_tokens = end_tokens(model_path)
        self.broken: str | None = None
        self.asleep = False
        self.synced = False
        self.memory: SharedMemory | None = None
        self._kept: dict[str, torch.Tensor] = {}
        arguments = {"model_path": str(model_path), "max_model_len": max_model_len, **options}
        self.engine = Supervisor(arguments, environment or {}, hang_seconds, max_restarts)
        try:
            self.engine.wait_up()
        except BaseException:
            self.engine.close()
            raise
        self.layout, self.device = self.engine.ready
        self.plan = plan_buckets(self.layout)

    @property
    def running(self) -> Collection[str]:
        return self.engine.requests.keys()

    @property
    def running_tokens(self) -> int:
        """As of the last time that the engine spoke."""
        return self.engine.tokens

    def _add(self, requests: list[Request]) -> None:
        self._restore()
        self.engine.submit(requests)

    def step(self) -> list[tuple[str, Trace]]:
        """Wait for what has ended, at most LOOK_SECONDS: the engine advances by itself."""
        if not self.running:
            return []
        if self.engine.wait_up(LOOK_SECONDS):
            self._restore()
        return self.engine.take(LOOK_SECONDS)

    def nudge(self) -> None:
        with self.engine.changed:
            self.engine.changed.notify_all()

    def suspend(self, ids: Iterable[str] | None = None) -> list[tuple[str, Trace]]:
        wanted = set(self.running if ids is None else ids)
        requests = {name: request for name, request in self.engine.requests.items() if name in wanted}
        taken: dict[str, Trace] = {}
        try:
            if requests and not self.engine.fresh:
                taken = dict(self.engine.ask("suspend", list(requests)))
        except EngineLost:  # what it had drawn is gone with it
            pass
        ended = self.engine.ended
        found = [
            (name, ended.get(name) or taken.get(name) or request.trace([], [], [], "suspended"))
            for name, request in requests.items()
        ]
        self.engine.drop(wanted)
        return found

    def sync_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncReport:
        began = time.perf_counter()
        offered = collect(named_tensors)
        match(offered, self.layout)
        while True:
            self._want()
            generation, fresh = self.engine.generation, self.engine.fresh
            try:
                size, digest = self._transfer(offered, version)
                if fresh:
                    self._resubmit(generation)
                break
            except EngineLost:
                continue
        if self.keep_weights:
            self._keep(offered)
        return SyncReport(version, len(self.layout), size, time.perf_counter() - began, digest)

    def _transfer(self, offered: dict[str, torch.Tensor], version: int) -> tuple[int, str]:
        """One bucket is filled while the engine reads the other. Raises EngineLost, WeightSyncError."""
        if self.memory is None:
            size = 2 * self.plan.bytes
            self.memory = DeviceMemory(None, size) if self.device == "cuda" else FileMemory(None, size)
        self.broken = HALF_WAY
        self.engine.ask("begin_sync", self.memory.handle)
        read: list[int] = []
        for index, bucket in enumerate(self.plan.buckets):
            if index >= 2:
                self.engine.answer(read[index - 2])
            begin = index % 2 * self.plan.bytes
            pack(bucket, self.memory.tensor[begin : begin + self.plan.bytes], self.layout, offered)
            read.append(self.engine.post("bucket", index))
        for number in read[-2:]:
            self.engine.answer(number)
        size, digest = compare(offered, self.layout, self.engine.ask("arrived"))
        self.engine.ask("end_sync", version)
        self.version, self.broken, self.synced = version, None, True
        return size, digest

    def _keep(self, offered: dict[str, torch.Tensor]) -> None:
        for name, place in self.layout.items():
            if name not in self._kept:
                self._kept[name] = torch.empty(place.shape, dtype=place.dtype)
            self._kept[name].copy_(offered[name].detach().reshape(place.shape))

    def _restore(self) -> None:
        """Have an engine with the current weights, and with all requests that run."""
        while True:
            self._want()
            kept = self.keep_weights and self._kept
            source = (lambda: (self._kept.items(), self.version)) if kept else self.weights
            if self.broken and not (self.engine.fresh and source):
                raise WeightSyncError(self.broken)
            if not self.engine.fresh:
                return
            generation = self.engine.generation
            try:
                if source is not None:
                    named, version = source()
                    offered = collect(named)
                    match(offered, self.layout)
                    self._transfer(offered, version)
                elif self.synced:
                    raise WeightSyncError(
                        f"the engine was lost ({self.engine.losses[-1]}) and started again: sync_weights, "
                        f"then its {self.unfinished} requests go on"
                    )
                self._resubmit(generation)
                return
            except EngineLost:
                continue

    def _resubmit(self, generation: int) -> None:
        count = self.unfinished - len(self.engine.ended)
        self.engine.resubmit(generation)
        if self.on_restart is not None:
            self.on_restart(
                f"engine lost ({self.engine.losses[-1]}) and started again with the weights of version {self.version}; "
                f"{count} requests drawn again"
            )

    def _want(self) -> None:
        """Wait for an engine; one that was lost in its sleep is replaced now."""
        self.asleep = False
        self.engine.pause(False)
        self.engine.wait_up()

    def sleep(self, keep_weights: bool = False) -> None:
        if self.unfinished:
            raise ValueError(f"{self.unfinished} requests are running: suspend or abort them before sleep")
        if self.asleep:
            return
        self._restore()
        self.engine.pause(True)
        try:
            self.engine.ask("sleep", keep_weights)
        except EngineLost:  # gone, it holds no memory
            pass
        except ValueError:
            self.engine.pause(False)
            raise
        self.asleep = True
        if not keep_weights:
            self.broken = NO_WEIGHTS

    def wake(self) -> None:
        self._want()
        try:
            self.engine.ask("wake")
        except EngineLost:  # its successor is awake
            self._want()

    @property
    def pid(self) -> int | None:
        """The engine's process, None while there is none."""
        return self.engine.pid

    def close(self) -> None:
        self.engine.close()
        if self.memory is not None:
            self.memory.release()


def first_card(gpu: int) -> str:
    """CUDA_VISIBLE_DEVICES for a process that works on this process's card `gpu`, and sees the others behind it.

    It must see the card whose memory it is to open.
    """
    count = torch.cuda.device_count()
    if not 0 <= gpu < count:
        raise EngineError(f"gpu is {gpu}, but this process sees {count}: give one of 0 to {count - 1}, or none")
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = listed.split(",") if listed else [str(index) for index in range(count)]
    return ",".join([cards[gpu], *(card for index, card in enumerate(cards) if index != gpu)])
