"""The vLLM worker: generation, and weight sync into the engine that runs in this process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deltarl.rollout import engine, ranks, sync
from deltarl.rollout.engine import EngineError
from deltarl.rollout.refusals import check_routed, check_servable, explained
from deltarl.rollout.routing import RoutingRecorder
from deltarl.rollout.sync import HALF_WAY, NO_WEIGHTS, collect, compare, layout_of, match
from deltarl.rollout.types import CHECKED_EVERY, Request, RolloutWorker, SyncReport, Trace, WeightSyncError, goes_round

if TYPE_CHECKING:
    from vllm import SamplingParams

    from deltarl.rollout.vllm_scheduler import Drawn


@dataclass
class Run:
    """A request in the engine, which calls it `name`, and what it has drawn so far.

    versions: (from which token on, weight version), ascending. checked: tokens, also of earlier parts, up to which it
    was looked at for repetition. cut: those of this part that its trace is to have, None for all.
    """

    request: Request
    name: str
    drawn: Drawn
    versions: list[tuple[int, int]]
    checked: int = 0
    cut: int | None = None

    @property
    def ids(self) -> list[int]:
        """The tokens drawn so far; grows as the engine draws."""
        return self.drawn.ids

    def trace(self, finish_reason: str, routing: torch.Tensor | None = None) -> Trace:
        """The trace of the tokens drawn so far."""
        ids, logprobs = self.drawn.ids[: self.cut], self.drawn.logprobs[: self.cut]
        ends = [begin for begin, _ in self.versions[1:]] + [len(ids)]
        versions: list[int] = []
        for end, (_, version) in zip(ends, self.versions, strict=True):
            versions += [version] * (min(end, len(ids)) - len(versions))
        return self.request.trace(ids, logprobs, versions, finish_reason, routing)


class VllmWorker(RolloutWorker):
    """A `RolloutWorker` on vLLM, in this process; arguments are `make_worker`'s, `options` go to `vllm.LLM`."""

    def __init__(
        self,
        model_path: str | Path,
        *,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        gpu_memory_utilization: float,
        record_routing: bool = False,
        **options,
    ) -> None:
        engine.check_vllm_version()
        check_servable(model_path)
        if record_routing:
            check_routed(model_path)
            options["additional_config"] = {"record_routing": True}
        self.max_model_len = max_model_len
        self.end_tokens = engine.end_tokens(model_path)
        self.broken: str | None = None
        self.asleep: set[str] = set()
        self._running: dict[str, Run] = {}
        self._watched: dict[str, Run] = {}  # those of them that may be ended for repetition
        with explained(max_model_len, gpu_memory_utilization):
            self.llm = engine.start(
                model_path,
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                gpu_memory_utilization=gpu_memory_utilization,
                **options,
            )
        self.routing = RoutingRecorder(self._runner) if record_routing else None

    @property
    def running(self) -> Collection[str]:
        return self._running.keys()

    @property
    def running_tokens(self) -> int:
        return sum(run.request.drawn + len(run.ids) for run in self._running.values())

    def _add(self, requests: list[Request]) -> None:
        if self.broken:
            raise WeightSyncError(self.broken)
        from deltarl.rollout.vllm_scheduler import keep_drawn

        self.wake()
        for request in requests:
            name = self.llm.llm_engine.add_request(
                request.id, {"prompt_token_ids": request.read}, self._parameters(request)
            )
            run = Run(request, name, keep_drawn(self._scheduler, name), [(0, self.version)])
            self._running[request.id] = run
            if request.sampling.stop_repetition:
                self._watched[request.id] = run

    def _parameters(self, request: Request) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens - request.drawn,
            stop_token_ids=sorted({*sampling.stop_token_ids, *(() if sampling.ignore_eos else self.end_tokens)}),
            ignore_eos=True,
            seed=request.next_seed,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # nobody else has it
        )

    def step(self) -> list[tuple[str, Trace]]:
        if self.broken:
            raise WeightSyncError(self.broken)
        ended = []
        for output in self.llm.llm_engine.step() if self._running else ():
            run, reason = self._forget(output.request_id), output.outputs[0].finish_reason
            if self._goes_round(run) and run.cut < len(run.ids):
                reason = "repetition"
            ended.append((output.request_id, run.trace(reason, self._routing(run))))
        stuck = [name for name, run in self._watched.items() if self._goes_round(run)]
        if stuck:
            ended += [(name, replace(trace, finish_reason="repetition")) for name, trace in self.suspend(stuck)]
        return ended

    def _goes_round(self, run: Run) -> bool:
        """Whether a request goes round in circles; its trace is then cut where that was so first, as the engine may
        have gone on for some steps."""
        tail, begun = run.request.sampling.stop_repetition, run.request.begun
        if not tail:
            return False
        upto = (len(run.ids) + run.request.drawn) // CHECKED_EVERY * CHECKED_EVERY
        if upto <= max(run.checked, run.request.drawn):
            return False
        run.checked, cut = upto, upto - run.request.drawn
        if not goes_round([*(begun.completion_ids if begun else ()), *run.ids[:cut]], tail):
            return False
        run.cut = cut
        return True

    def suspend(self, ids: Iterable[str] | None = None) -> list[tuple[str, Trace]]:
        wanted = self._running.keys() if ids is None else set(ids)
        runs = [run for name, run in self._running.items() if name in wanted]
        traces = [(run.request.id, run.trace("suspended", self._routing(run))) for run in runs]
        self.llm.llm_engine.abort_request([run.name for run in runs], internal=True)
        for run in runs:
            self._forget(run.request.id)
        return traces

    def _forget(self, name: str) -> Run:
        self._watched.pop(name, None)
        return self._running.pop(name)

    def _routing(self, run: Run) -> torch.Tensor | None:
        """The experts of all tokens of a request that ends."""
        if self.routing is None:
            return None
        return self.routing.take(run.name, len(run.request.read) + len(run.ids))

    @property
    def _scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def sync_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncReport:
        began = time.perf_counter()
        offered = collect(named_tensors)
        held = self.tensors()
        layout = layout_of(held)
        match(offered, layout)
        self.begin_sync()
        sync.write(offered, held)
        size, digest = compare(offered, layout, self.on_ranks(ranks.arrived))
        self.end_sync(version)
        return SyncReport(version, len(held), size, time.perf_counter() - began, digest)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The memory of an engine of one rank by checkpoint name."""
        (held,) = self.on_ranks(lambda worker: ranks.rank_of(worker).held)
        return held

    def on_ranks(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What a function returns that is called in each of the engine's ranks with vLLM's worker and the arguments."""
        return self.llm.llm_engine.collective_rpc(function, args=arguments)

    def begin_sync(self) -> None:
        """From here on until `end_sync` the weights are of no version, and nothing can be drawn."""
        self._awake("weights")
        self.broken = HALF_WAY
        self.on_ranks(ranks.still)

    def end_sync(self, version: int) -> None:
        """Go on with the weights that were written, under their version."""
        self._drop_cached_prefixes()
        self.version, self.broken = version, None
        self._mark_version()

    def sleep(self, keep_weights: bool = False) -> None:
        if self._running:
            raise ValueError(f"{len(self._running)} requests are running: suspend or abort them before sleep")
        if not self.llm.llm_engine.vllm_config.model_config.enable_sleep_mode:
            raise EngineError("this engine keeps its memory: make the worker with sleep=True")
        if not self.asleep:
            self.llm.sleep(level=1 if keep_weights else 2)
            self.asleep = {"weights", "kv_cache"}
            if not keep_weights:
                self.broken = NO_WEIGHTS

    def wake(self) -> None:
        self._awake("weights", "kv_cache")

    def _awake(self, *parts: str) -> None:
        """Have these parts of the engine's memory back."""
        if gone := [part for part in parts if part in self.asleep]:
            self.llm.wake_up(gone)
            self.asleep -= set(gone)

    def _drop_cached_prefixes(self) -> None:
        """Forget prefixes that the old weights computed, where requests run by having them read again."""
        caching = self.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
        if caching or not self._running:
            self.llm.llm_engine.reset_prefix_cache(reset_running_requests=bool(self._running))

    def _mark_version(self) -> None:
        """Note for each running request at which token the new version begins: after those that the engine has
        launched already, one step ahead of what it has handed out."""
        scheduled = self._scheduler.requests
        for run in self._running.values():
            launched = scheduled[run.name].num_output_placeholders
            run.versions.append((len(run.ids) + launched, self.version))

    @property
    def model(self) -> torch.nn.Module:
        """The engine's model."""
        return self._runner.get_model()

    @property
    def _runner(self) -> Any:
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def make_worker(
    model_path: str | Path,
    *,
    engine: str = "vllm",
    dtype: str = "float32",
    max_model_len: int = 1024,
    max_num_seqs: int = 256,
    gpu_memory_utilization: float = 0.2,
    seed: int = 0,
    placement: str = "colocated",
    gpu: int | None = None,
    hang_seconds: float = 120.0,
    max_restarts: int = 3,
    sleep: bool = False,
    tensor_parallel: int = 1,
    record_routing: bool = False,
) -> RolloutWorker:
    """A worker that serves a model folder (any Hugging Face causal LM, or a Kimi Linear hybrid in Moonshot's layout).

    engine: "vllm", or "hf" (transformers' generate: slow, for debugging). dtype: "float32", "bfloat16" or "float16".
    max_model_len: prompt and completion tokens of a sequence. max_num_seqs: sequences that advance together.
    gpu_memory_utilization: share of the GPU's memory for weights and caches; on CPU, of the free RAM for caches.
    placement: "colocated", the engine in this process, or "process", in one of its own, on this process's card `gpu`
    (None: the current one), replaced up to max_restarts times when it dies or says nothing for hang_seconds.
    sleep: whether it can give its memory to others for a while; on a GPU.
    tensor_parallel: cards that share the engine's model, from `gpu` on; with placement "process".
    record_routing: traces say which experts their tokens went to; for a mixture of experts.
    Raises ValueError for an unknown engine or placement, and EngineError: vLLM missing or out of range, no model in
    the folder, one that the engine cannot serve, or something the engine cannot do.
    """
    if placement not in ("colocated", "process"):
        raise ValueError(f"unknown placement {placement!r}: use colocated or process")
    if engine == "hf":
        from deltarl.rollout.hf_worker import HfWorker

        if record_routing:
            raise EngineError("engine hf does not record the choice of experts: use engine vllm")
        if sleep or placement == "process":
            raise EngineError("engine hf runs in this process and keeps its memory: use engine vllm")
        return HfWorker(model_path, dtype=dtype, max_model_len=max_model_len)
    if engine != "vllm":
        raise ValueError(f"unknown rollout engine {engine!r}: use vllm or hf")
    if sleep and not torch.cuda.is_available():
        raise EngineError("vLLM's CPU engine cannot give its memory back: leave sleep off without a GPU")
    options = {
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "gpu_memory_utilization": gpu_memory_utilization,
        "seed": seed,
        "enable_sleep_mode": sleep,
        "tensor_parallel_size": tensor_parallel,
        "record_routing": record_routing,
    }
    if placement == "colocated":
        if tensor_parallel > 1:
            raise EngineError(f"tensor_parallel = {tensor_parallel} needs placement process: this one has one card")
        return VllmWorker(model_path, **options)
    from deltarl.rollout.remote import RemoteWorker, first_card

    environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": first_card(gpu)}
    return RemoteWorker(
        model_path, hang_seconds=hang_seconds, max_restarts=max_restarts, environment=environment, **options
    )
