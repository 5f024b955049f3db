"""An engine in a process of its own: the same worker, whatever becomes of the process.

Seeds decide the tokens, so a completion that was drawn again after a loss must be the one that it would have been.
"""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import scramble
from test_parity import GREEDY, assert_same_function

from deltarl.channel import Channel
from deltarl.model import checkpoint_tensors
from deltarl.rollout import EngineError, Request, Sampling, WeightSyncError, make_worker, remote
from deltarl.rollout.engine_process import Server
from deltarl.rollout.remote import RemoteWorker

SAMPLED = Sampling(temperature=0.8, max_tokens=96, ignore_eos=True)
ENGINE = {"max_model_len": 384, "max_num_seqs": 4, "gpu_memory_utilization": 0.05}
HANG_SECONDS = 8.0  # a step of this model takes some 0.02 s


@pytest.fixture(scope="module")
def model(make_hybrid):
    return make_hybrid("kda")


@pytest.fixture(scope="module")
def folder(model, make_folder) -> Path:
    return make_folder(model)


@pytest.fixture(scope="module")
def module_worker(folder):
    worker = make_worker(folder, placement="process", hang_seconds=HANG_SECONDS, max_restarts=9, **ENGINE)
    yield worker
    worker.close()


@pytest.fixture
def worker(module_worker):
    module_worker.weights, module_worker.keep_weights, module_worker.on_restart = None, False, None
    return module_worker


def seeds(prompts) -> list[int]:
    return list(range(len(prompts)))


def tokens(traces) -> list[list[int]]:
    return [trace.completion_ids for trace in traces]


def once(number: int, worker):
    """A progress function that sends the engine a signal when it has drawn some tokens; and the process it hit."""
    hit: list[int] = []

    def act(done: int, total: int, count: int) -> None:
        if not hit and count:
            assert done < total
            hit.append(worker.pid)
            os.kill(worker.pid, number)

    return act, hit


def test_it_is_the_trainer_s_function_before_and_after_a_sync(worker, model, prompts) -> None:
    zeros = [0] * len(prompts)
    old = worker.generate(prompts, GREEDY, seeds=zeros)
    assert_same_function(model, old)
    assert {version for trace in old for version in trace.versions} == {0}
    scramble(model, seed=1)
    report = worker.sync_weights(checkpoint_tensors(model), 1)
    assert report.version == worker.version == 1
    assert report.tensors == len(dict(checkpoint_tensors(model)))
    assert report.bytes == sum(t.numel() * t.element_size() for _, t in checkpoint_tensors(model))
    new = worker.generate(prompts, GREEDY, seeds=zeros)
    assert_same_function(model, new)
    assert tokens(new) != tokens(old)
    assert {version for trace in new for version in trace.versions} == {1}
    again = worker.sync_weights(checkpoint_tensors(model), 2)
    assert again.checksum == report.checksum


def test_progress_counts_up_to_everything(worker, prompts) -> None:
    seen: list[tuple[int, int, int]] = []
    worker.generate(prompts, SAMPLED, seeds=seeds(prompts), progress=lambda *state: seen.append(state))
    assert seen == sorted(seen)
    assert seen[-1] == (len(prompts), len(prompts), SAMPLED.max_tokens * len(prompts))


def test_requests_are_suspended_and_gone_on_with(worker, prompts) -> None:
    """The first request is still being drawn when the first of the others, a third as long, ends."""
    lengths = {f"r{place}": 288 if place == 0 else SAMPLED.max_tokens for place in range(len(prompts))}
    sampling = {name: dataclasses.replace(SAMPLED, max_tokens=length) for name, length in lengths.items()}
    worker.add(Request(f"r{place}", prompt, sampling[f"r{place}"], place) for place, prompt in enumerate(prompts))
    ended: dict = {}
    while not ended:
        ended.update(worker.step())
    taken = dict(worker.suspend())
    assert worker.unfinished == 0
    assert taken.keys() | ended.keys() == lengths.keys()
    assert not taken.keys() & ended.keys()
    begun = {name: trace for name, trace in taken.items() if trace.finish_reason == "suspended"}
    assert begun["r0"].completion_ids
    worker.add(Request(name, trace.prompt_ids, sampling[name], 0, begun=trace) for name, trace in begun.items())
    rest: dict = {}
    while worker.unfinished:
        rest.update(worker.step())
    for name, trace in begun.items():
        drawn = len(trace.completion_ids)
        assert rest[name].completion_ids[:drawn] == trace.completion_ids
        assert len(rest[name].completion_ids) == lengths[name]


def test_refused_syncs_leave_the_old_weights(worker, model, make_hybrid, prompts) -> None:
    before, version = tokens(worker.generate(prompts, GREEDY, seeds=seeds(prompts))), worker.version
    other = make_hybrid("kda")
    scramble(other, seed=5)
    whole = dict(checkpoint_tensors(other))
    name = "model.layers.0.self_attn.q_conv1d.weight"
    for offered, message in [
        ({n: t for n, t in whole.items() if n != name}, f"missing {name}"),
        (whole | {"model.extra": whole[name]}, "unknown model.extra"),
        (whole | {"model.norm.weight": whole["model.norm.weight"].repeat(2)}, r"model\.norm\.weight has shape"),
    ]:
        with pytest.raises(WeightSyncError, match=message):
            worker.sync_weights(offered.items(), version + 1)
    assert worker.version == version
    assert tokens(worker.generate(prompts, GREEDY, seeds=seeds(prompts))) == before


def test_a_tensor_that_does_not_arrive_is_found(worker, model, prompts, monkeypatch) -> None:
    lost, pack = "model.layers.2.mlp.up_proj.weight", remote.pack

    def lose(bucket, memory, layout, offered) -> None:
        pack(bucket, memory, layout, offered | {lost: torch.zeros(layout[lost].shape)})

    scramble(model, seed=6)
    with monkeypatch.context() as patch:
        patch.setattr(remote, "pack", lose)
        with pytest.raises(WeightSyncError, match=f"wrong {lost}"):
            worker.sync_weights(checkpoint_tensors(model), 3)
    with pytest.raises(WeightSyncError, match="half-way"):
        worker.generate(prompts, GREEDY, seeds=seeds(prompts))
    worker.sync_weights(checkpoint_tensors(model), 4)
    assert_same_function(model, worker.generate(prompts, GREEDY, seeds=seeds(prompts)))


def test_weights_are_replaced_while_requests_run(worker, model, prompts) -> None:
    worker.sync_weights(checkpoint_tensors(model), 5)
    worker.add(Request(f"r{place}", prompt, SAMPLED, place) for place, prompt in enumerate(prompts[:4]))
    while not worker.running_tokens:
        assert worker.step() == []
    worker.sync_weights(checkpoint_tensors(model), 6)
    traces: dict = {}
    while worker.unfinished:
        traces.update(worker.step())
    for trace in traces.values():
        assert trace.versions == sorted(trace.versions)
        assert {trace.versions[0], trace.versions[-1]} == {5, 6}


def test_an_engine_killed_while_drawing_is_replaced(worker, model, prompts) -> None:
    lines: list[str] = []
    worker.keep_weights, worker.on_restart = True, lines.append
    scramble(model, seed=7)
    worker.sync_weights(checkpoint_tensors(model), 7)
    expected = worker.generate(prompts, SAMPLED, seeds=seeds(prompts))
    scramble(model, seed=70)  # the learner goes on
    kill, hit = once(signal.SIGKILL, worker)
    traces = worker.generate(prompts, SAMPLED, seeds=seeds(prompts), progress=kill)
    assert tokens(traces) == tokens(expected)
    assert all(trace.versions == [7] * SAMPLED.max_tokens for trace in traces)
    assert worker.pid != hit[0]
    assert len(lines) == 1
    assert "signal SIGKILL" in lines[0] and "weights of version 7" in lines[0]


def test_an_engine_that_hangs_is_replaced_and_asks_for_weights_that_nobody_has(worker, model, prompts) -> None:
    scramble(model, seed=8)
    worker.sync_weights(checkpoint_tensors(model), 8)
    expected = tokens(worker.generate(prompts, SAMPLED, seeds=seeds(prompts)))
    worker.add(Request(str(place), prompt, SAMPLED, place) for place, prompt in enumerate(prompts))
    traces: dict = {}
    while not worker.running_tokens:
        traces.update(worker.step())
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(WeightSyncError, match=f"said nothing for {HANG_SECONDS:g} s.*sync_weights"):
        while worker.unfinished:
            traces.update(worker.step())
    report = worker.sync_weights(checkpoint_tensors(model), 8)
    assert report.version == 8
    while worker.unfinished:
        for name, trace in worker.step():
            assert name not in traces
            traces[name] = trace
    assert [traces[str(place)].completion_ids for place in range(len(prompts))] == expected


def test_an_engine_killed_in_a_sync_is_replaced_and_synced(worker, model, prompts, monkeypatch) -> None:
    pack, killed = remote.pack, []

    def kill_first(*arguments) -> None:
        if not killed:
            killed.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)
        pack(*arguments)

    scramble(model, seed=9)
    with monkeypatch.context() as patch:
        patch.setattr(remote, "pack", kill_first)
        assert worker.sync_weights(checkpoint_tensors(model), 9).version == 9
    assert worker.pid != killed[0]
    assert_same_function(model, worker.generate(prompts, GREEDY, seeds=seeds(prompts)))


def test_an_engine_killed_while_idle_asks_for_the_weights(worker, model, prompts) -> None:
    worker.weights = lambda: (checkpoint_tensors(model), 90)
    losses = len(worker.engine.losses)
    os.kill(worker.pid, signal.SIGKILL)
    while len(worker.engine.losses) == losses:  # seen without a call
        time.sleep(0.02)
    traces = worker.generate(prompts, GREEDY, seeds=seeds(prompts))
    assert_same_function(model, traces)
    assert {version for trace in traces for version in trace.versions} == {90}


def test_an_engine_that_was_lost_too_often_is_given_up(worker, prompts) -> None:
    worker.engine.max_restarts = len(worker.engine.losses)
    kill, _ = once(signal.SIGKILL, worker)
    with pytest.raises(EngineError, match=r"lost \d+ times, more than max_restarts.*signal SIGKILL"):
        worker.generate(prompts, SAMPLED, seeds=seeds(prompts), progress=kill)
    with pytest.raises(EngineError, match="max_restarts"):
        worker.generate(prompts, SAMPLED, seeds=seeds(prompts))


def test_ranks_of_an_engine_share_the_weights(model, folder, prompts, closing) -> None:
    cores = sorted(os.sched_getaffinity(0))
    bind = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}  # else vLLM wants a NUMA node for each rank
    options = {"dtype": "float32", "seed": 0, "tensor_parallel_size": 2}
    worker = RemoteWorker(folder, environment=bind, **options, **ENGINE)
    closing.append(worker)
    scramble(model, seed=10)
    report = worker.sync_weights(checkpoint_tensors(model), 1)
    assert report.bytes == sum(t.numel() * t.element_size() for _, t in checkpoint_tensors(model))
    assert_same_function(model, worker.generate(prompts[:4], GREEDY, seeds=[0] * 4))


ORPHAN = """
import sys, time
import torch
from deltarl.model import checkpoint_tensors, load_model
from deltarl.rollout import Request, Sampling, make_worker

model, _ = load_model(sys.argv[1], torch.float32)
worker = make_worker(sys.argv[1], placement="process", max_model_len=384, max_num_seqs=2, gpu_memory_utilization=0.05)
worker.sync_weights(checkpoint_tensors(model), 1)
worker.add([Request("endless", [3, 4, 5], Sampling(temperature=1.0, max_tokens=380, ignore_eos=True), 0)])
print(worker.pid, flush=True)
time.sleep(600)
"""


def test_a_learner_killed_leaves_no_engine_and_no_shared_memory(folder) -> None:
    learner = subprocess.Popen([sys.executable, "-P", "-c", ORPHAN, str(folder)], stdout=subprocess.PIPE, text=True)
    engine = int(learner.stdout.readline())
    for pid in (learner.pid, engine):  # what has no name any more cannot stay
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        assert not [line for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")]
    learner.kill()
    learner.wait()
    learner.stdout.close()
    deadline = time.monotonic() + 20  # the kernel kills it at once; a zombie waits for its reaper
    while running(engine) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(engine)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_an_engine_cannot_do_is_said_before_it_starts(folder) -> None:
    with pytest.raises(EngineError, match="hf runs in this process"):
        make_worker(folder, engine="hf", placement="process")
    with pytest.raises(ValueError, match="unknown placement 'elsewhere': use colocated or process"):
        make_worker(folder, placement="elsewhere")
    with pytest.raises(EngineError, match="CPU engine cannot give its memory back"):
        make_worker(folder, placement="process", sleep=True)
    with pytest.raises(EngineError, match="tensor_parallel = 2 needs placement process"):
        make_worker(folder, tensor_parallel=2)
    with pytest.raises(EngineError, match="gpu is 3, but this process sees 0"):
        make_worker(folder, placement="process", gpu=3)


def test_an_engine_with_something_to_say_to_a_learner_that_is_gone_ends_as_when_it_listens() -> None:
    ours, learner = socket.socketpair()
    learner.close()
    with pytest.raises(EOFError, match="closed"):
        Server(Channel(ours), SimpleNamespace(on_ranks=lambda describe: [({}, "cpu")]))
