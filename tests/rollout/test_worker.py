"""Sampling and syncing on one real engine: what repeats, what is refused, and that a refused sync changes nothing."""

import pytest
import torch
from conftest import VOCAB, scramble

from deltarl.model import checkpoint_tensors
from deltarl.rollout import Sampling, WeightSyncError, make_worker, sync

SAMPLED = Sampling(temperature=0.8, max_tokens=16, ignore_eos=True)
GREEDY = Sampling(temperature=0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def model(make_hybrid):
    return make_hybrid("kda", eos_token_id=5)


@pytest.fixture(scope="module")
def worker(model, make_folder):
    worker = make_worker(make_folder(model), max_model_len=256, max_num_seqs=4, gpu_memory_utilization=0.05)
    yield worker
    worker.close()


def tokens(traces) -> list[list[int]]:
    return [trace.completion_ids for trace in traces]


def test_seeds_alone_decide_the_tokens(worker, prompts) -> None:
    seeds = list(range(len(prompts)))
    first = worker.generate(prompts, SAMPLED, seeds=seeds)
    worker.generate(prompts[:3], SAMPLED, seeds=[9, 9, 9])
    again = worker.generate(prompts, SAMPLED, seeds=seeds)
    assert tokens(first) == tokens(again)
    assert tokens(first) != tokens(worker.generate(prompts, SAMPLED, seeds=[seed + 100 for seed in seeds]))
    assert [trace.prompt_ids for trace in first] == prompts


def test_logprobs_are_those_of_the_tempered_distribution(worker, model, prompts) -> None:
    for trace in worker.generate(prompts, SAMPLED, seeds=list(range(len(prompts)))):
        begin = len(trace.prompt_ids)
        with torch.no_grad():
            logits = model(torch.tensor([trace.prompt_ids + trace.completion_ids])).logits[0, begin - 1 : -1]
        expected = (logits / SAMPLED.temperature).log_softmax(-1)
        expected = expected.gather(1, torch.tensor(trace.completion_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(trace.logprobs), expected, atol=1e-4, rtol=0)


def test_samples_follow_the_distribution(worker, model) -> None:
    """400 draws of one next token: each of the 5 likeliest tokens is drawn within 4 standard deviations of its due."""
    prompt, draws = [3, 4, 5], 400
    traces = worker.generate(
        [prompt] * draws, Sampling(temperature=0.5, max_tokens=1, ignore_eos=True), seeds=list(range(draws))
    )
    drawn = torch.bincount(torch.tensor([trace.completion_ids[0] for trace in traces]), minlength=VOCAB)
    with torch.no_grad():
        due = (model(torch.tensor([prompt])).logits[0, -1] / 0.5).softmax(-1)
    for token in due.topk(5).indices.tolist():
        p = due[token].item()
        assert abs(drawn[token].item() - draws * p) <= 4 * (draws * p * (1 - p)) ** 0.5 + 1


def test_end_tokens_stop_and_are_kept(worker, prompts) -> None:
    first = worker.generate(prompts, GREEDY, seeds=[0] * len(prompts))
    stop = first[0].completion_ids[3]
    where = first[0].completion_ids.index(stop)
    trace = worker.generate(prompts[:1], Sampling(temperature=0, max_tokens=16, stop_token_ids=(stop,)), seeds=[0])[0]
    assert trace.completion_ids == first[0].completion_ids[: where + 1]
    assert trace.finish_reason == "stop"
    assert len(trace.logprobs) == len(trace.versions) == where + 1
    assert first[0].finish_reason == "length"
    assert worker.end_tokens == (5,)


def test_progress_counts_up_to_everything(worker, prompts) -> None:
    seen: list[tuple[int, int, int]] = []
    worker.generate(prompts, GREEDY, seeds=[0] * len(prompts), progress=lambda *state: seen.append(state))
    assert seen == sorted(seen)
    assert seen[0][2] < seen[-1][2] == 16 * len(prompts)
    assert seen[-1][:2] == (len(prompts), len(prompts))


def test_an_interrupted_batch_leaves_an_idle_engine(worker, prompts) -> None:
    expected = tokens(worker.generate(prompts, GREEDY, seeds=[0] * len(prompts)))

    def interrupt(done: int, total: int, count: int) -> None:
        if count > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker.generate(prompts, GREEDY, seeds=[0] * len(prompts), progress=interrupt)
    assert tokens(worker.generate(prompts, GREEDY, seeds=[0] * len(prompts))) == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([3] * 241, "prompt 1 has 241 tokens.*context of 256"), ([3], "prompt 1 has 1 token"), ([], "prompt 1 has 0 tok")],
)
def test_unfit_prompts_are_named(worker, prompt, message) -> None:
    with pytest.raises(ValueError, match=message):
        worker.generate([[3, 4], prompt], GREEDY, seeds=[0, 0])


def test_seeds_must_match_prompts(worker) -> None:
    with pytest.raises(ValueError, match="2 prompts need 2 seeds, got 1"):
        worker.generate([[3, 4], [3, 4]], GREEDY, seeds=[0])


def refused(worker, prompts, tensors: dict, message: str) -> None:
    before, version = tokens(worker.generate(prompts, GREEDY, seeds=[0] * len(prompts))), worker.version
    with pytest.raises(WeightSyncError, match=message):
        worker.sync_weights(tensors.items(), version + 1)
    assert worker.version == version
    assert tokens(worker.generate(prompts, GREEDY, seeds=[0] * len(prompts))) == before


def test_refused_syncs_leave_the_old_weights(worker, make_hybrid, prompts) -> None:
    other = make_hybrid("kda")
    scramble(other, seed=5)
    tensors = dict(checkpoint_tensors(other))
    name = "model.layers.0.self_attn.q_conv1d.weight"
    refused(worker, prompts, {n: t for n, t in tensors.items() if n != name}, f"missing {name}")
    refused(worker, prompts, tensors | {"model.extra": tensors[name]}, "unknown model.extra")
    for name, wrong in {
        "lm_head.weight": tensors["lm_head.weight"][:7],
        "model.layers.1.mlp.down_proj.weight": tensors["model.layers.1.mlp.down_proj.weight"].t(),
        "model.norm.weight": tensors["model.norm.weight"].repeat(2),
    }.items():
        refused(worker, prompts, tensors | {name: wrong}, f"{name} has shape")


def test_a_tensor_that_does_not_arrive_is_found(worker, model, prompts, monkeypatch) -> None:
    lost, write = "model.layers.2.mlp.up_proj.weight", sync.write
    scramble(model, seed=6)
    with monkeypatch.context() as patch:
        patch.setattr(sync, "write", lambda offered, held: write(offered, {n: v for n, v in held.items() if n != lost}))
        with pytest.raises(WeightSyncError, match=f"wrong {lost}"):
            worker.sync_weights(checkpoint_tensors(model), 1)
    with pytest.raises(WeightSyncError, match="half-way"):
        worker.generate(prompts, GREEDY, seeds=[0] * len(prompts))
    report = worker.sync_weights(checkpoint_tensors(model), 2)
    assert worker.version == report.version == 2
    assert report.bytes == sum(t.numel() * t.element_size() for _, t in checkpoint_tensors(model))
    assert worker.generate(prompts[:1], GREEDY, seeds=[0])[0].versions == [2] * 16


def test_torch_keeps_its_threads(worker) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


def test_hf_worker_is_the_same_function(worker, model, make_folder, prompts) -> None:
    other = make_worker(make_folder(model), engine="hf", max_model_len=256)
    worker.sync_weights(checkpoint_tensors(model), 3)
    seeds = [0] * len(prompts)
    ours, theirs = worker.generate(prompts, GREEDY, seeds=seeds), other.generate(prompts, GREEDY, seeds=seeds)
    assert tokens(ours) == tokens(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4, rtol=0)

    scramble(model, seed=8)
    reports = [w.sync_weights(checkpoint_tensors(model), 4) for w in (worker, other)]
    assert reports[0].checksum == reports[1].checksum
    new = other.generate(prompts[:3], GREEDY, seeds=seeds[:3])
    assert tokens(worker.generate(prompts[:3], GREEDY, seeds=seeds[:3])) == tokens(new)
    sampled = other.generate(prompts[:2], SAMPLED, seeds=[1, 2])
    assert tokens(sampled) == tokens(other.generate(prompts[:2], SAMPLED, seeds=[1, 2]))
    other.close()
