"""The engine and the trainer's model are one function: same greedy tokens, same log-probabilities, after every sync.

In fp32 the two differ by rounding only; 1e-4 is some thirty times what rounding gives at these sizes, and a wrong
epsilon, gate or state shows as 1e-2 and more.
"""

import pytest
import torch
from conftest import scramble

from deltarl.model import checkpoint_tensors
from deltarl.rollout import Sampling
from deltarl.rollout.worker import VllmWorker

GREEDY = Sampling(temperature=0, max_tokens=24, ignore_eos=True)
ENGINE = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 4, "gpu_memory_utilization": 0.05, "seed": 0}


def assert_same_function(model, traces) -> None:
    for trace in traces:
        begin = len(trace.prompt_ids)
        with torch.no_grad():
            logits = model(torch.tensor([trace.prompt_ids + trace.completion_ids])).logits[0, begin - 1 : -1]
        logprobs = logits.log_softmax(-1)
        assert logprobs.argmax(-1).tolist() == trace.completion_ids, f"prompt of {begin} tokens"
        expected = logprobs.gather(1, torch.tensor(trace.completion_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(trace.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arm", "chunked"),
    [("kda", False), ("kda", True), ("mla", False), ("mla", True), ("gdn", True), ("mla-rope", True)],
)
def test_engine_equals_trainer_before_and_after_three_syncs(
    arm, chunked, make_hybrid, make_folder, prompts, closing
) -> None:
    model = make_hybrid(arm)
    chunks = {"enable_chunked_prefill": True, "max_num_batched_tokens": 48} if chunked else {}
    worker = VllmWorker(make_folder(model), **ENGINE, **chunks)
    closing.append(worker)
    seeds = [0] * len(prompts)

    traces = worker.generate(prompts, GREEDY, seeds=seeds)
    assert_same_function(model, traces)
    for version in (1, 2, 3):
        old = [trace.completion_ids for trace in traces]
        scramble(model, seed=version)
        worker.sync_weights(checkpoint_tensors(model), version)
        traces = worker.generate(prompts, GREEDY, seeds=seeds)
        assert_same_function(model, traces)
        assert [trace.completion_ids for trace in traces] != old
        assert all(trace.versions == [version] * GREEDY.max_tokens for trace in traces)


def test_moe_hybrid_with_bounded_gate(make_hybrid, make_folder, prompts, closing) -> None:
    overrides = {
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "num_experts": 8,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 64,
        "gate_lower_bound": -5.0,
    }
    model = make_hybrid("kda", **overrides)
    worker = VllmWorker(make_folder(model), **ENGINE)
    closing.append(worker)
    assert_same_function(model, worker.generate(prompts, GREEDY, seeds=[0] * len(prompts)))
    scramble(model, seed=1)
    worker.sync_weights(checkpoint_tensors(model), 1)
    assert_same_function(model, worker.generate(prompts, GREEDY, seeds=[0] * len(prompts)))


def test_tied_llama_serves_new_weights(make_tied_llama, make_folder, prompts, closing) -> None:
    model = make_tied_llama()
    worker = VllmWorker(make_folder(model), **ENGINE)
    closing.append(worker)
    assert_same_function(model, worker.generate(prompts, GREEDY, seeds=[0] * len(prompts)))
    scramble(model, seed=1)
    report = worker.sync_weights(checkpoint_tensors(model), 1)
    assert report.tensors == len(dict(checkpoint_tensors(model)))
    assert_same_function(model, worker.generate(prompts, GREEDY, seeds=[0] * len(prompts)))
