"""vLLM's scheduler with a short way for what most steps of a rollout are: one more token for each running request.

At hundreds of sequences of a model whose step takes the GPU a few milliseconds, vLLM's Python for each of them is what
a step waits for. Three of its parts are done here once a sequence instead of once a token: room in the cache is asked
for when a block is full, the next step is written down without going through vLLM's cases for requests that begin,
and what was drawn stays here until its request ends. Whatever is not such a step goes vLLM's way, request by request.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, MambaManager
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus


@dataclass
class Drawn:
    """What a running request has drawn, in the order in which it was.

    ids: vLLM's own list of the request's output tokens. ends: tokens that end it. most: tokens at which it ends.
    """

    ids: list[int]
    logprobs: list[float]
    ends: frozenset[int]
    most: int


def keep_drawn(scheduler: Any, name: str) -> Drawn:
    """Keep what a request draws that has just been added; the engine's outputs will miss tokens of it from now on.

    It must have been asked for with logprobs and `ignore_eos`, to end by its stop tokens or length and nothing else.
    """
    request = scheduler.requests[name]
    most = min(request.max_tokens, scheduler.max_model_len - request.num_prompt_tokens)
    ends = frozenset(request.sampling_params.stop_token_ids or ())
    request.drawn = Drawn(request._output_token_ids, [], ends, most)
    return request.drawn


class KnownRoom:
    """A scheduler's allocation of cache blocks, with the room that a request's blocks have kept on the request.

    Only where blocks are never given back while a request runs: full attention and one state per sequence, no prefix
    caching, no speculation. Elsewhere everything is as vLLM has it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        cache = self.kv_cache_manager
        self._managers = cache.coordinator.single_type_managers
        self.knows_room = (
            not cache.enable_caching and not self.num_lookahead_tokens and all(map(keeps_blocks, self._managers))
        )
        if self.knows_room:
            self._allocate, self._nothing = cache.allocate_slots, cache.empty_kv_cache_blocks
            cache.allocate_slots = self.allocate_slots

    def allocate_slots(self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        """Blocks for these tokens, none where there is room; None when the cache is full. As `KVCacheManager`'s."""
        running = request.status == RequestStatus.RUNNING
        if running and request.num_computed_tokens + num_new_tokens <= getattr(request, "room", 0):
            return self._nothing
        blocks = self._allocate(request, num_new_tokens, *args, **kwargs)
        if blocks is not None:
            name = request.request_id
            request.room = min(len(m.req_to_blocks[name]) * m.block_size for m in self._managers)
        return blocks


def keeps_blocks(manager: Any) -> bool:
    """Whether a running request keeps all blocks that this cache manager has given it."""
    return type(manager) is FullAttentionManager or (
        type(manager) is MambaManager and manager.mamba_cache_mode == "none"
    )


class SteadySteps(KnownRoom):
    """A scheduler's `schedule` and `update_from_output`, short for requests whose draws are kept (`keep_drawn`)."""

    launched = 0
    """Tokens of a request that the engine may have begun to draw when it hands out the one before."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._may_be_steady = (
            self.knows_room
            and self.parallel_config.pipeline_parallel_size == 1
            and not (self.num_spec_tokens or self.lora_config or self.ec_connector or self.defer_block_free)
            and (self.connector is None or getattr(self.connector, "only_admits", False))
        )

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """As `Scheduler.schedule`."""
        drawing = self._drawing() if self._may_be_steady else []
        if drawing and (blocks := self._new_blocks(drawing)) is not None:
            return self._one_more_token(drawing, blocks)
        return super().schedule(*args, **kwargs)

    def _drawing(self) -> list[Request]:
        """The running requests that draw a token in the next step; none where that is not all that the step does."""
        running, waiting = self.get_request_counts()
        admits = waiting and running < self.max_num_running_reqs
        if admits or running > self.max_num_scheduled_tokens or self.reset_preempted_req_ids:
            return []
        if self.pause_state != PauseState.UNPAUSED:
            return []
        drawing = []
        for request in self.running:
            drawn, launched = getattr(request, "drawn", None), request.num_output_placeholders
            if drawn is None or request.is_prefill_chunk:
                return []
            if len(request._all_token_ids) + launched - request.num_computed_tokens != 1:
                return []
            if len(drawn.ids) + launched < drawn.most:
                drawing.append(request)
        return drawing

    def _new_blocks(self, drawing: Iterable[Request]) -> dict[str, KVCacheBlocks] | None:
        """Blocks for those whose blocks are full; None when they might not be had, and nothing was allocated."""
        full = [request for request in drawing if request.num_computed_tokens >= request.room]
        if len(full) * len(self._managers) > self.kv_cache_manager.block_pool.get_num_free_blocks():
            return None
        self.kv_cache_manager.new_step_starts()
        return {request.request_id: self.allocate_slots(request, 1) for request in full}

    def _one_more_token(self, drawing: list[Request], blocks: dict[str, KVCacheBlocks]) -> SchedulerOutput:
        self.current_step += 1
        step = SchedulerOutput.make_empty()
        step.num_scheduled_tokens = {request.request_id: 1 for request in drawing}
        step.total_num_scheduled_tokens = len(drawing)
        step.scheduled_cached_reqs = self._as_cached(drawing, step.num_scheduled_tokens, blocks)
        step.finished_req_ids = self.finished_req_ids
        step.preempted_req_ids = self.reset_preempted_req_ids
        step.new_block_ids_to_zero = self._get_new_block_ids_to_zero()
        step.num_common_prefix_blocks = [0] * len(self._managers)
        if self.connector is not None:
            step.kv_connector_metadata = self._build_kv_connector_meta(self.connector, step)
        self._update_after_schedule(step)
        return step

    def _as_cached(
        self, drawing: list[Request], tokens: dict[str, int], blocks: dict[str, KVCacheBlocks]
    ) -> CachedRequestData:
        if not self.use_v2_model_runner:
            if not tokens.keys() <= self.prev_step_scheduled_req_ids:
                every = {request.request_id: blocks.get(request.request_id, self._nothing) for request in drawing}
                data = self._make_cached_request_data(drawing, [], tokens, {}, every)
                self.prev_step_scheduled_req_ids = set(tokens)
                return data
            self.prev_step_scheduled_req_ids = set(tokens)
        return CachedRequestData(
            req_ids=list(tokens),
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[blocks[name].get_block_ids(allow_none=True) if name in blocks else None for name in tokens],
            num_computed_tokens=[request.num_computed_tokens for request in drawing],
            num_output_tokens=[len(request._output_token_ids) + request.num_output_placeholders for request in drawing],
        )

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """As `Scheduler.update_from_output`; of requests whose draws are kept only what ends is among the outputs."""
        sampled = model_runner_output.sampled_token_ids
        if not sampled or model_runner_output.logprobs is None:  # no request has drawn a token to keep
            return super().update_from_output(scheduler_output, model_runner_output)
        logprobs = model_runner_output.logprobs.logprobs[:, 0].tolist()
        rest: dict[str, int] = {}
        kept: list[tuple[Drawn, int, float]] = []
        for name, count in scheduler_output.num_scheduled_tokens.items():
            request = self.requests.get(name)
            drawn = getattr(request, "drawn", None)
            if drawn is None:
                rest[name] = count
                continue
            place = model_runner_output.req_id_to_index[name]
            tokens = sampled[place]
            ends = len(tokens) != 1 or tokens[0] in drawn.ends or len(drawn.ids) + 1 >= drawn.most
            steady = self._may_be_steady and request.status == RequestStatus.RUNNING and not request.num_preemptions
            if ends or not steady:
                rest[name] = count
                kept.append((drawn, len(drawn.ids), logprobs[place]))
                continue
            request.num_in_flight_tokens -= count
            request.num_output_placeholders -= self.launched
            request.append_output_token_ids(tokens[0])
            drawn.logprobs.append(logprobs[place])
        outputs = super().update_from_output(replace(scheduler_output, num_scheduled_tokens=rest), model_runner_output)
        for drawn, before, logprob in kept:
            drawn.logprobs += [logprob] * (len(drawn.ids) - before)
        return outputs


class RolloutScheduler(SteadySteps, Scheduler):
    """For engines that wait for each step."""


class AsyncRolloutScheduler(SteadySteps, AsyncScheduler):
    """For engines that schedule a step while the GPU computes the one before."""

    launched = 1
