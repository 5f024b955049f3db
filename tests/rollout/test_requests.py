"""Requests one by one on a real engine: completions as they end, taken out and gone on with, under new weights."""

import pytest
import torch
from conftest import scramble

from deltarl.model import checkpoint_tensors
from deltarl.rollout import Request, Sampling, make_worker
from deltarl.rollout.types import goes_round

GREEDY = Sampling(temperature=0, max_tokens=24, ignore_eos=True)
SAMPLED = Sampling(temperature=0.8, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def model(make_hybrid):
    return make_hybrid("kda")


@pytest.fixture(scope="module", params=["vllm", "hf"])
def worker(request, model, make_folder):
    worker = make_worker(
        make_folder(model), engine=request.param, max_model_len=256, max_num_seqs=4, gpu_memory_utilization=0.05
    )
    yield worker
    worker.close()


half_way = pytest.mark.parametrize("worker", ["vllm"], indirect=True)
"""For tests of what is half-way between two steps: transformers' generate draws whole completions."""


def finished(worker) -> dict:
    traces = {}
    while worker.unfinished:
        for name, trace in worker.step():
            assert name not in traces
            traces[name] = trace
    return traces


def draw_at_least(worker, tokens: int) -> None:
    while worker.running_tokens < tokens:
        worker.step()


def requests(prompts, sampling) -> list[Request]:
    return [Request(f"r{index}", prompt, sampling, seed=index) for index, prompt in enumerate(prompts)]


def logprobs_by(model, trace) -> torch.Tensor:
    """The model's log-probability of each token of a trace."""
    begin = len(trace.prompt_ids)
    with torch.no_grad():
        logits = model(torch.tensor([trace.prompt_ids + trace.completion_ids])).logits[0, begin - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(trace.completion_ids)[:, None]).squeeze(1)


def test_completions_come_out_as_they_end_and_are_generates(worker, prompts) -> None:
    expected = worker.generate(prompts, SAMPLED, seeds=range(len(prompts)))
    short = Sampling(temperature=0.8, max_tokens=5, ignore_eos=True)
    worker.add(requests(prompts[:4], SAMPLED))
    worker.add([Request("late", prompts[4], short, seed=4)])
    assert list(worker.running) == ["r0", "r1", "r2", "r3", "late"]
    assert worker.step() is not None
    with pytest.raises(ValueError, match="requests are running: suspend or abort them before generate"):
        worker.generate(prompts, SAMPLED, seeds=range(len(prompts)))
    traces = finished(worker)
    assert traces["late"].completion_ids == expected[4].completion_ids[:5]
    for index in range(1, 4):
        assert traces[f"r{index}"].completion_ids == expected[index].completion_ids
        assert traces[f"r{index}"].finish_reason == "length"


@half_way
def test_a_suspended_greedy_completion_goes_on_to_the_same_end(worker, prompts) -> None:
    expected = worker.generate(prompts[:4], GREEDY, seeds=[0] * 4)
    worker.add(requests(prompts[:4], GREEDY))
    draw_at_least(worker, 20)
    tokens = worker.running_tokens
    taken = dict(worker.suspend(["r1", "r3", "unknown"]))
    assert list(worker.running) == ["r0", "r2"]
    assert worker.running_tokens + sum(len(trace.completion_ids) for trace in taken.values()) == tokens
    assert {name: trace.finish_reason for name, trace in taken.items()} == {"r1": "suspended", "r3": "suspended"}
    assert 0 < len(taken["r1"].completion_ids) < 24
    worker.add(Request(name, trace.prompt_ids, GREEDY, 0, begun=trace) for name, trace in taken.items())
    traces = finished(worker)
    for index in range(4):
        trace = traces[f"r{index}"]
        assert trace.completion_ids == expected[index].completion_ids
        assert trace.finish_reason == "length"
        torch.testing.assert_close(
            torch.tensor(trace.logprobs), torch.tensor(expected[index].logprobs), atol=1e-4, rtol=0
        )
    for name, begun in taken.items():
        assert traces[name].logprobs[: len(begun.logprobs)] == begun.logprobs, "what was drawn keeps its logprobs"


def test_what_is_drawn_next_depends_on_seed_and_place_only(worker, prompts) -> None:
    whole = worker.generate(prompts[:3], SAMPLED, seeds=[5, 6, 7])
    begun = [
        Request(str(index), trace.prompt_ids, SAMPLED, 5 + index).trace(
            trace.completion_ids[:10], trace.logprobs[:10], trace.versions[:10], "suspended"
        )
        for index, trace in enumerate(whole)
    ]

    def goes_on(order) -> dict:
        worker.add(Request(str(i), prompts[i], SAMPLED, 5 + i, begun=begun[i]) for i in order)
        return finished(worker)

    first = goes_on([0, 1, 2])
    for index in range(3):
        assert goes_on([index])[str(index)].completion_ids == first[str(index)].completion_ids
        assert first[str(index)].completion_ids[:10] == whole[index].completion_ids[:10]
        assert len(first[str(index)].completion_ids) == len(first[str(index)].versions) == 24
    other = Request("0", prompts[0], SAMPLED, 99, begun=begun[0])
    worker.add([other])
    assert finished(worker)["0"].completion_ids != first["0"].completion_ids


@half_way
def test_weights_replaced_in_flight_are_told_apart_by_version(worker, model, make_hybrid, prompts) -> None:
    new = make_hybrid("kda")
    scramble(new, seed=3)
    worker.sync_weights(checkpoint_tensors(model), 10)
    old = worker.generate(prompts, GREEDY, seeds=[0] * len(prompts))
    worker.add(requests(prompts, GREEDY))
    draw_at_least(worker, 30)
    worker.sync_weights(checkpoint_tensors(new), 11)
    traces = finished(worker)
    both = [set(trace.versions) for trace in traces.values()]
    assert {10, 11} in both, "some ran across the update"
    assert {11} in both, "some waited until after it"
    for index in range(len(prompts)):
        trace = traces[f"r{index}"]
        assert trace.versions == sorted(trace.versions)
        before = trace.versions.count(10)
        assert trace.completion_ids[:before] == old[index].completion_ids[:before]
        if before == 0:
            torch.testing.assert_close(torch.tensor(trace.logprobs), logprobs_by(new, trace), atol=1e-4, rtol=0)
        else:
            gap = (torch.tensor(trace.logprobs) - logprobs_by(model, trace)).abs()
            assert gap[:before].max() < 1e-4 < gap[before], "the first token of the new weights is theirs"
    worker.sync_weights(checkpoint_tensors(model), 12)


def test_aborted_requests_are_gone(worker, prompts) -> None:
    worker.add(requests(prompts[:3], GREEDY))
    worker.abort(["r0", "r2"])
    assert list(finished(worker)) == ["r1"]
    assert worker.step() == []


def test_requests_that_cannot_run_are_refused_and_none_is_added(worker, prompts) -> None:
    fine = Request("a", prompts[0], GREEDY, 0)
    full = fine.trace([1] * 24, [0.0] * 24, [0] * 24, "suspended")
    for bad, message in (
        (Request("b", [3] * 240, GREEDY, 0), "prompt b has 240 tokens"),
        (Request("a", prompts[1], GREEDY, 0), "request a is running already"),
        (Request("b", prompts[0], GREEDY, 0, begun=full), "request b goes on with 24 tokens, and max_tokens is 24"),
        (Request("b", prompts[0], Sampling(stop_repetition=8), 0), "stop_repetition is 8: set it to 16 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            worker.add([fine, bad])
        assert worker.unfinished == 0


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([7] * 40, True),
        ([9, 9] + [1, 2, 3, 4] * 8, True),
        ([1, 2, 3, 4] * 7 + [1, 2, 3], False),
        ([1, 2, 3, 4, 5] * 20, False),
        ([7] * 31, False),
        ([7] * 40 + [8], False),
    ],
    ids=["one", "four", "too short", "block over an eighth", "short", "left"],
)
def test_going_round_is_a_block_of_an_eighth(ids, expected) -> None:
    assert goes_round(ids, 32) is expected


def test_a_completion_that_goes_round_is_ended(worker, model, make_hybrid, prompts) -> None:
    """After token 1 comes 2, then 3, 4 and 1 again: 32 tokens of that are found where 16 divides the length."""
    circling = make_hybrid("kda")
    with torch.no_grad():
        embedding, output = circling.get_input_embeddings().weight, circling.get_output_embeddings().weight
        embedding.mul_(100)
        output.zero_()
        for token in range(1, 5):
            output[token % 4 + 1] = embedding[token]
    worker.sync_weights(checkpoint_tensors(circling), 20)
    whole = worker.generate(prompts[:4], Sampling(temperature=0, max_tokens=60, ignore_eos=True), seeds=[0] * 4)
    bound = Sampling(temperature=0, max_tokens=60, ignore_eos=True, stop_repetition=32)
    ended = worker.generate(prompts[:4], bound, seeds=[0] * 4)
    assert {(trace.finish_reason, len(trace.completion_ids)) for trace in ended} <= {
        ("repetition", 32),
        ("repetition", 48),
    }
    for free, trace in zip(whole, ended, strict=True):
        assert free.finish_reason == "length"
        assert trace.completion_ids == free.completion_ids[: len(trace.completion_ids)]
    full = Sampling(temperature=0, max_tokens=32, ignore_eos=True, stop_repetition=32)
    assert {t.finish_reason for t in worker.generate(prompts[:4], full, seeds=[0] * 4)} == {"length"}

    begun = [
        Request("0", t.prompt_ids, bound, 0).trace(t.completion_ids[:30], t.logprobs[:30], [20] * 30, "suspended")
        for t in ended
    ]
    worker.add(Request(str(i), prompts[i], bound, 0, begun=begun[i]) for i in range(4))
    assert {name: trace.completion_ids for name, trace in finished(worker).items()} == {
        str(index): trace.completion_ids for index, trace in enumerate(ended)
    }, "what was drawn before counts"
    worker.sync_weights(checkpoint_tensors(model), 21)
