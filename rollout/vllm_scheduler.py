"""vLLM's scheduler, which asks its cache manager for blocks only when a running sequence has filled those it has.

vLLM asks for every sequence in every step, once for each group of layers: at hundreds of sequences of a model whose
step takes the GPU a few milliseconds, most of what the host does.
"""

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, MambaManager
from vllm.v1.request import Request, RequestStatus


class KnownRoom:
    """A scheduler's allocation of cache blocks, with the room that a request's blocks have kept on the request.

    Only where blocks are never given back while a request runs: full attention and one state per sequence, no prefix
    caching, no speculation. Elsewhere everything is as vLLM has it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        cache = self.kv_cache_manager
        self._managers = cache.coordinator.single_type_managers
        if not cache.enable_caching and not self.num_lookahead_tokens and all(map(keeps_blocks, self._managers)):
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


class RolloutScheduler(KnownRoom, Scheduler):
    """For engines that wait for each step."""


class AsyncRolloutScheduler(KnownRoom, AsyncScheduler):
    """For engines that schedule a step while the GPU computes the one before."""
