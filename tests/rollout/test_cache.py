"""The engine's cache: blocks for running sequences, sequences that lose theirs, and what is refused."""

import pytest
import torch

from deltarl.rollout import Sampling
from deltarl.rollout.worker import VllmWorker


@pytest.fixture(scope="module")
def folder(make_hybrid, make_folder):
    return make_folder(make_hybrid("kda"))


def start(folder, **options) -> VllmWorker:
    return VllmWorker(
        folder, dtype="float32", max_model_len=320, max_num_seqs=8, gpu_memory_utilization=0.02, seed=0, **options
    )


def scheduler_of(worker: VllmWorker):
    return worker.llm.llm_engine.engine_core.engine_core.scheduler


def test_blocks_are_asked_for_when_full_and_lost_ones_computed_again(folder, closing) -> None:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(1, 320, (length,), generator=generator).tolist() for length in (90, 91, 92, 93)]
    sampling = Sampling(temperature=0, max_tokens=60, ignore_eos=True)

    worker = start(folder)
    closing.append(worker)
    scheduler, asked = scheduler_of(worker), []
    allocate = scheduler._allocate
    scheduler._allocate = lambda request, *args, **kwargs: asked.append(request) or allocate(request, *args, **kwargs)
    ample = worker.generate(prompts, sampling, seeds=[0] * 4)
    assert len(asked) == 8  # a prompt's blocks, and another one when the sequence passes the 128 tokens of a block
    closing.pop().close()

    worker = start(folder, num_gpu_blocks_override=10)  # the empty one, four of states, and attention's first of each
    closing.append(worker)
    scheduler, preempted = scheduler_of(worker), []
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda request, *args, **kwargs: (
        preempted.append(request) or preempt(request, *args, **kwargs)
    )
    tight = worker.generate(prompts, sampling, seeds=[0] * 4)
    assert preempted
    assert [trace.completion_ids for trace in tight] == [trace.completion_ids for trace in ample]
    logprobs = [torch.tensor([trace.logprobs for trace in traces]) for traces in (tight, ample)]
    torch.testing.assert_close(*logprobs, rtol=0, atol=1e-4)  # decoded, and read again in one pass


def test_prefix_caching_is_refused(folder) -> None:
    with pytest.raises(ValueError, match="leave prefix caching off"):
        start(folder, enable_prefix_caching=True, enable_chunked_prefill=True)
