"""vLLM's scheduler with a short way for what most steps of a rollout are: one more token for each running request.

At hundreds of sequences of a model whose step takes the GPU a few milliseconds, vLLM's Python for each of them is what
a step waits for. Room in the cache is asked for when a block is full instead of for every token, the next step is
written down without going through vLLM's cases for requests that begin, what was drawn stays here until its request
ends, and several such steps are scheduled at a time. Whatever is not such a step goes vLLM's way, request by request.
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

from deltarl.rollout.vllm_bursts import Burst

LONGEST_BURST = 8
TOKENS_A_STEP = 16
"""So many tokens must the running requests have drawn, in the mean, for each step of a burst."""

LET_IN_SHARE = 8
"""Requests that wait for a place are let in when this part of those that run has ended, or as many as wait."""


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

    launches_ahead = False
    """Whether the engine begins to draw a request's next tokens before it hands out those before."""
    longest_burst = 1
    """Steps that the model runner can take at a time."""
    full_at: int | None = None
    """So many requests ran when vLLM last had others wait for want of room."""

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
        for steps in sorted({self._steps(drawing), 1}, reverse=True) if drawing else ():
            if (blocks := self._new_blocks(drawing, steps)) is not None:
                return self._more_tokens(drawing, blocks, steps)
        step = super().schedule(*args, **kwargs)
        running, waiting = self.get_request_counts()
        let_in = step.scheduled_new_reqs or step.scheduled_cached_reqs.resumed_req_ids
        full = waiting and (running >= self.max_num_running_reqs or not let_in)
        self.full_at = running if full else None
        return step

    def _lets_in(self, running: int, waiting: int) -> bool:
        """Whether waiting requests are to be let in, for which vLLM goes through all that run.

        Of hundreds one ends at almost every step, so that its place stays free until it is worth while.
        """
        if not waiting or running >= self.max_num_running_reqs:
            return False
        return self.full_at is None or self.full_at - running >= min(waiting, max(1, self.full_at // LET_IN_SHARE))

    def _drawing(self) -> list[Request]:
        """The running requests that draw a token in the next step; none where that is not all that the step does."""
        running, waiting = self.get_request_counts()
        if self._lets_in(running, waiting) or running > self.max_num_scheduled_tokens or self.reset_preempted_req_ids:
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

    def _steps(self, drawing: list[Request]) -> int:
        """Steps to take at a time, so that none goes beyond its length.

        What a request draws after its end is thrown away: up to twice as many tokens as a burst has steps, where the
        next one begins before the end is seen. So requests that may end at any token are drawn in short bursts until
        they have become long.
        """
        if self.longest_burst == 1:
            return 1
        counts = [len(request.drawn.ids) + request.num_output_placeholders for request in drawing]
        left = min(request.drawn.most - count for request, count in zip(drawing, counts, strict=True))
        age = sum(counts) // (TOKENS_A_STEP * len(counts))
        may_end = any(request.drawn.ends for request in drawing)
        return max(1, min(self.longest_burst, left, age if may_end else left))

    def _new_blocks(self, drawing: Iterable[Request], steps: int) -> dict[str, KVCacheBlocks] | None:
        """Blocks for those without room for so many tokens; None when they might not be had, and nothing was allocated.

        A burst is no longer than a block, so that each of them needs one more of each kind at most.
        """
        full = [request for request in drawing if request.num_computed_tokens + steps > request.room]
        if len(full) * len(self._managers) > self.kv_cache_manager.block_pool.get_num_free_blocks():
            return None
        self.kv_cache_manager.new_step_starts()
        return {request.request_id: self.allocate_slots(request, steps) for request in full}

    def _more_tokens(self, drawing: list[Request], blocks: dict[str, KVCacheBlocks], steps: int) -> Burst:
        self.current_step += 1
        step = Burst.make_empty()
        step.length = steps
        step.num_scheduled_tokens = {request.request_id: steps for request in drawing}
        step.total_num_scheduled_tokens = steps * len(drawing)
        step.scheduled_cached_reqs = self._as_cached(drawing, step.num_scheduled_tokens, blocks)
        step.finished_req_ids = self.finished_req_ids
        step.preempted_req_ids = self.reset_preempted_req_ids
        step.new_block_ids_to_zero = self._get_new_block_ids_to_zero()
        step.num_common_prefix_blocks = [0] * len(self._managers)
        if self.connector is not None:
            step.kv_connector_metadata = self._build_kv_connector_meta(self.connector, step)
        self._update_after_schedule(step)
        if self.launches_ahead and steps > 1:  # vLLM has counted one token
            for request in drawing:
                request.num_output_placeholders += steps - 1
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
        steps = scheduler_output.length if isinstance(scheduler_output, Burst) else 1
        logprobs = model_runner_output.logprobs.logprobs[:, 0].reshape(-1, steps).tolist()
        rest: dict[str, int] = {}
        kept: list[tuple[Drawn, int, list[float]]] = []
        for name, count in scheduler_output.num_scheduled_tokens.items():
            request = self.requests.get(name)
            drawn = getattr(request, "drawn", None)
            if drawn is None:
                rest[name] = count
                continue
            place = model_runner_output.req_id_to_index[name]
            tokens = sampled[place]
            ends = len(tokens) != steps or not drawn.ends.isdisjoint(tokens) or len(drawn.ids) + steps >= drawn.most
            steady = self._may_be_steady and request.status == RequestStatus.RUNNING and not request.num_preemptions
            if ends or not steady:
                rest[name] = count
                kept.append((drawn, len(drawn.ids), logprobs[place]))
                continue
            request.num_in_flight_tokens -= count
            request.num_output_placeholders -= steps if self.launches_ahead else 0
            request.append_output_token_ids(tokens)
            drawn.logprobs += logprobs[place]
        outputs = super().update_from_output(replace(scheduler_output, num_scheduled_tokens=rest), model_runner_output)
        for drawn, before, found in kept:
            drawn.logprobs += found[: len(drawn.ids) - before]
        return outputs


class RolloutScheduler(SteadySteps, Scheduler):
    """For engines that wait for each step."""


class AsyncRolloutScheduler(SteadySteps, AsyncScheduler):
    """For engines that schedule a step while the GPU computes the one before."""

    launches_ahead = True
