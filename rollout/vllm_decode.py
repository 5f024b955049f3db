"""The later steps of a burst on vLLM's second model runner, with what such a step changes and nothing else.

The runner's own way to a step goes through the requests one by one. From one step of a burst to the next only input
tokens, positions and lengths move on, all of which the GPU has.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.outputs import AsyncModelRunnerOutput, LogprobsLists, ModelRunnerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch, combine_sampled_and_draft_tokens, prepare_pos_seq_lens

from deltarl.rollout.vllm_bursts import PendingTokens

RUNNERS = "vllm.v1.worker.gpu."


class BurstTokens(AsyncModelRunnerOutput):
    """What a burst gives, once it is asked for.

    first: the output of its first step. drawn: tokens, logprobs and ranks of the later ones on the GPU, each
    [sequences, steps]; begins to copy them to the host.
    """

    def __init__(self, first: AsyncModelRunnerOutput, drawn: tuple[torch.Tensor, ...], runner: Any) -> None:
        self.first, self.drawn = first, drawn
        self.there = torch.cuda.Event(blocking=True)
        runner.output_copy_stream.wait_stream(runner.main_stream)
        with torch.cuda.stream(runner.output_copy_stream):
            self.copies = [part.to("cpu", non_blocking=True) for part in drawn]
            self.there.record()

    def get_output(self) -> ModelRunnerOutput:
        first = self.first.get_output()
        self.there.synchronize()
        return joined(first, *(part.numpy() for part in self.copies))


def joined(first: ModelRunnerOutput, tokens: np.ndarray, logprobs: np.ndarray, ranks: np.ndarray) -> ModelRunnerOutput:
    """The output of a burst's first step with what the later ones drew, [sequences, steps], behind it."""
    begun = first.logprobs
    tokens = np.concatenate([np.array(first.sampled_token_ids), tokens], 1)
    logprobs = np.concatenate([begun.logprobs[:, :1], logprobs], 1)
    ranks = np.concatenate([begun.sampled_token_ranks[:, None], ranks], 1)
    begins = list(range(0, tokens.size + 1, tokens.shape[1]))
    found = LogprobsLists(tokens.reshape(-1, 1), logprobs.reshape(-1, 1), ranks.reshape(-1), begins)
    return replace(first, sampled_token_ids=tokens.tolist(), logprobs=found)


class DecodeSteps:
    """Takes the steps of a burst that follow its first. The states take in all its tokens with the last one."""

    def __init__(self, runner: Any, pending: PendingTokens) -> None:
        self.runner, self.pending = runner, pending
        self.length_dependent = [
            [group for group in groups if not getattr(group.get_metadata_builder(0), "holds_for_bursts", False)]
            for groups in runner.attn_groups
        ]

    @staticmethod
    def fit(runner: Any) -> bool:
        """Whether nothing but what is done here happens in a decode step of this model runner."""
        if not type(runner).__module__.startswith(RUNNERS):
            return False
        parallel = runner.vllm_config.parallel_config
        alone = parallel.pipeline_parallel_size == parallel.data_parallel_size == 1 and not parallel.enable_eplb
        plain = runner.speculator is None and runner.pcp_manager is None
        plain = plain and not (runner.lora_config or runner.supports_mm_inputs)
        return alone and plain and getattr(runner.model_state, "rope_state", None) is None

    def graph(self, count: int) -> Any:
        """The CUDA graph that takes the decode steps of so many sequences; None where there is none."""
        found = self.runner.cudagraph_manager.dispatch(count, count, 1, num_active_loras=0)
        return found if found.cg_mode == CUDAGraphMode.FULL else None

    @torch.inference_mode()
    def take(self, first: AsyncModelRunnerOutput, batch: InputBatch, graph: Any, steps: int) -> BurstTokens:
        """Draw so many tokens after the first for each sequence of a batch, whose blocks have room for them."""
        drawn = [self._step(batch, graph, count, count < steps) for count in range(1, steps + 1)]
        tokens = torch.cat([output.sampled_token_ids for output in drawn], 1)
        logprobs = torch.cat([output.logprobs_tensors.logprobs[:, :1] for output in drawn], 1)
        ranks = torch.stack([output.logprobs_tensors.selected_token_ranks for output in drawn], 1)
        return BurstTokens(first, (tokens, logprobs, ranks), self.runner)

    def _step(self, batch: InputBatch, graph: Any, count: int, stays: bool) -> Any:
        """One token for each sequence, all of it on the GPU: what vLLM's sampler gives. count, stays: see `Pending`."""
        runner, states, buffers = self.runner, self.runner.req_states, self.runner.input_buffers
        rows = batch.idx_mapping, batch.query_start_loc
        prepare_pos_seq_lens(*rows, states.num_computed_tokens.gpu, buffers.positions, buffers.seq_lens)
        combine_sampled_and_draft_tokens(
            buffers.input_ids,
            batch.idx_mapping,
            states.last_sampled_tokens,
            batch.query_start_loc,
            batch.seq_lens,
            states.prefill_len.gpu,
            states.draft_tokens,
            batch.cu_num_logits,
            batch.num_reqs,
        )
        batch.seq_lens_cpu_upper_bound[: batch.num_reqs] += 1
        blocks, slots = runner.prepare_attn(batch)
        runner.model_state.prepare_attn(
            batch, CUDAGraphMode.FULL, blocks, slots, self.length_dependent, runner.kv_cache_config
        )
        self.pending.come(count, stays)
        hidden = runner.cudagraph_manager.run_fullgraph(graph)
        output, sampled, rejected = runner.sample(hidden, batch, None)
        runner.postprocess_sampled(
            batch.idx_mapping, output.sampled_token_ids, sampled, rejected, batch.query_start_loc
        )
        return output
