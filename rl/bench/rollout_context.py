"""A vLLM KV connector for measurements: a prompt counts as read, all but its last token, once its cache is allocated.

So a batch stands at a context of 128k tokens after one step. The scheduler allocates what real prompts would take;
what lies in it is the bench's business (`rollout_engine.fill_caches`).
"""

from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, SupportsHMA


class PresentContext(KVConnectorBase_V1, SupportsHMA):
    present = True
    """False: prompts are read."""
    only_admits = True
    """Nothing is asked of it about requests that run."""

    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int, bool]:
        return max(0, request.num_tokens - num_computed_tokens - 1) if self.present else 0, False

    def build_connector_meta(self, scheduler_output) -> KVConnectorMetadata:
        return KVConnectorMetadata()

    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        return

    def request_finished_all_groups(self, request, block_ids) -> tuple[bool, dict[str, Any] | None]:
        return False, None

    def start_load_kv(self, forward_context, **kwargs: Any) -> None:
        return

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return
