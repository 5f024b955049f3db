"""The scheduler's short way draws what vLLM's own way draws, and is the way that is taken."""

import dataclasses

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.scheduler import Scheduler

from deltarl.rollout import Sampling, vllm_scheduler
from deltarl.rollout.vllm_scheduler import keep_drawn
from deltarl.rollout.worker import VllmWorker

SAMPLED = Sampling(temperature=0.9, top_k=8, max_tokens=40, stop_token_ids=tuple(range(1, 320, 16)), ignore_eos=True)


@pytest.fixture(scope="module")
def worker(make_hybrid, make_folder):
    worker = VllmWorker(
        make_folder(make_hybrid("kda")),
        dtype="float32",
        max_model_len=230,
        max_num_seqs=4,
        gpu_memory_utilization=0.02,
        seed=0,
    )
    yield worker
    worker.close()


def draw(worker, prompts, samplings, kept) -> list[tuple[list[int], list[float], str]]:
    """(tokens, logprobs, finish reason) of each. Of the places in `kept` the draws are kept, others vLLM hands out."""
    engine, found, drawn = worker.llm.llm_engine, {}, {}
    for place, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        params = SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            ignore_eos=True,
            seed=place,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        name = engine.add_request(str(place), {"prompt_token_ids": prompt}, params)
        if place in kept:
            drawn[str(place)] = keep_drawn(worker._scheduler, name)
    while engine.has_unfinished_requests():
        for output in engine.step():
            done, name = output.outputs[0], output.request_id
            ids = list(done.token_ids)
            logprobs = [entry[token].logprob for token, entry in zip(ids, done.logprobs, strict=True)]
            if name in drawn:
                ids, logprobs = drawn[name].ids, drawn[name].logprobs
            found[name] = (ids, logprobs, done.finish_reason)
    return [found[str(place)] for place in range(len(prompts))]


def samplings_of(prompts) -> list[Sampling]:
    """Some end by a stop token, some by their own length, the longest prompt by the model's."""
    return [dataclasses.replace(SAMPLED, max_tokens=10 + 9 * place % 31) for place, _ in enumerate(prompts)]


@pytest.mark.parametrize("tokens_a_step", [1, 4, 1000], ids=["long bursts", "growing bursts", "single steps"])
@pytest.mark.parametrize("kept", [range(9), range(0, 9, 2)], ids=["all", "some"])
def test_it_draws_what_vllm_s_own_way_draws(worker, prompts, monkeypatch, kept, tokens_a_step) -> None:
    monkeypatch.setattr(vllm_scheduler, "TOKENS_A_STEP", tokens_a_step)
    samplings = samplings_of(prompts)
    ours, theirs = draw(worker, prompts, samplings, kept), draw(worker, prompts, samplings, ())
    assert [trace[0] for trace in ours] == [trace[0] for trace in theirs]
    assert [trace[2] for trace in ours] == [trace[2] for trace in theirs]
    assert {trace[2] for trace in ours} == {"stop", "length"}
    # After a burst the next prompt is read later, and batches of other sizes are summed in another order.
    near = 0.0 if tokens_a_step == 1000 else 1e-5
    for (_, of_ours, _), (_, of_theirs, _) in zip(ours, theirs, strict=True):
        assert of_ours == pytest.approx(of_theirs, rel=0, abs=near)


def test_most_steps_are_not_vllm_s(worker, prompts, monkeypatch) -> None:
    """vLLM schedules the steps in which a request begins, and those that follow an end while others wait."""
    asked, whole = [], Scheduler.schedule
    monkeypatch.setattr(
        Scheduler, "schedule", lambda self, *args: asked.append(self.current_step) or whole(self, *args)
    )
    scheduler = worker._scheduler
    began = scheduler.current_step
    sampling = dataclasses.replace(SAMPLED, stop_token_ids=(), max_tokens=30)
    traces = worker.generate(prompts[:4], sampling, seeds=[0, 1, 2, 3])
    assert [len(trace.completion_ids) for trace in traces] == [30] * 4
    assert scheduler.current_step - began == 5  # the four prompts, and 29 tokens in bursts of 8, 8, 8 and 5
    assert len(asked) <= 3


def test_waiting_requests_are_let_in_when_a_part_of_the_places_is_free(worker, prompts, monkeypatch) -> None:
    """Which spares going through all that run at every end, and changes no token."""
    whole, found = Scheduler.schedule, {}
    samplings = [dataclasses.replace(SAMPLED, stop_token_ids=(), max_tokens=10 + 3 * place) for place in range(9)]
    for share in (4, 2, 1):
        asked = []
        monkeypatch.setattr(vllm_scheduler, "LET_IN_SHARE", share)
        monkeypatch.setattr(Scheduler, "schedule", lambda self, *args, to=asked: to.append(self) or whole(self, *args))
        traces = draw(worker, prompts, samplings, range(9))
        assert worker._scheduler.get_request_counts() == (0, 0)
        found[share] = (len(asked), [tokens for tokens, _, _ in traces])
    assert found[4][0] > found[2][0] > found[1][0]
    assert found[4][1] == found[2][1] == found[1][1]
