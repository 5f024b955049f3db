"""The collector on a real engine and real verifier processes: what every mode gives the learner, and what it keeps.

The model draws each token from one fixed distribution, whatever came before, so that lengths and rewards vary as the
tests need it: one token in ten ends a completion, the others are digits.
"""

import json
import math
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deltarl.model import checkpoint_tensors, save_checkpoint
from deltarl.rewards import VerifierHost, VerifierSpec
from deltarl.rl.collect import Collector
from deltarl.rl.curriculum import InTurn
from deltarl.rl.errors import UserError
from deltarl.rl.groups import Group
from deltarl.rl.interrupt import Interrupted, StopRequest
from deltarl.rl.jobs import Job
from deltarl.rl.problems import Problem
from deltarl.rl.recording import Recorded
from deltarl.rl.runfolder import RunFolder
from deltarl.rl.tokenizer import build_tokenizer
from deltarl.rollout import Sampling, Trace, make_worker

GROUP, PROMPTS, STEPS, LONGEST = 3, 4, 6, 24
VERIFIER = '''
from deltarl.rewards import Verdict

class Remainder:
    """Right where the digits add up to a multiple of three; a gold of 13 is unusable, and at "one" all are right."""
    name, version = "remainder", "1"

    def __init__(self, one=False, grouped=False):
        self.one, self.grouped = one, grouped

    def verify(self, response, gold, *, meta):
        if gold == "13":
            return Verdict(None, "gold_error")
        right = self.one or sum(map(int, filter(str.isdigit, response))) % 3 == 0
        info = {"lengths": meta.get("group_lengths")}
        return Verdict(float(right), "correct" if right else "incorrect", response, info)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collect")
    (folder / "remainder.py").write_text(VERIFIER)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["What is 1 + 1?", "Solve x + 3 = 5."], 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    """Next-token probabilities that depend on nothing: the first unit of every embedding outweighs all else."""
    torch.manual_seed(0)
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    logits = torch.full((size,), -30.0)
    logits[tokenizer.convert_tokens_to_ids([str(digit) for digit in range(10)])] = math.log(0.09)
    logits[tokenizer.eos_token_id] = math.log(0.1)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 50.0
        model.get_output_embeddings().weight.zero_()
        model.get_output_embeddings().weight[:, 0] = logits / math.sqrt(config.hidden_size)
    return model


@pytest.fixture(scope="module")
def worker(folder, model, tokenizer):
    save_checkpoint(model, tokenizer, folder / "model")
    worker = make_worker(folder / "model", max_model_len=64, max_num_seqs=8, gpu_memory_utilization=0.03)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def host(folder):
    with VerifierHost(VerifierSpec(f"{folder}/remainder.py:Remainder")) as host:
        yield host


@pytest.fixture
def make(folder, tokenizer, worker, host, model):
    """A collector of a job with these `rollout` keys; the engine is at version 0."""
    made = []

    def make(*, host=host, seed=3, bad=(), run=None, **rollout) -> Collector:
        worker.sync_weights(checkpoint_tensors(model), 0)
        collector = Collector(
            job=job(seed=seed, **rollout), source=InTurn(problems(bad), seed=seed), tokenizer=tokenizer, worker=worker,
            host=host, stop=StopRequest(), run=run,
        )  # fmt: skip
        made.append(collector)
        return collector

    yield make
    for collector in made:
        leave(collector)


def leave(collector) -> None:
    """End a collector and have the engine idle."""
    collector.close()
    collector.worker.abort(list(collector.worker.running))


def job(seed=3, **rollout) -> Job:
    rl = {
        "steps": STEPS, "prompts_per_step": PROMPTS, "num_generations": GROUP, "max_completion_length": LONGEST,
        "token_budget": 1024,
    }  # fmt: skip
    return Job(name="collect", seed=seed, rl=rl, rollout={"max_model_len": 64, **rollout})


def problems(bad=()) -> list[Problem]:
    return [Problem(f"p{index}", f"What is {index}?", "13" if index in bad else "0") for index in range(40)]


def run_steps(collector, model, steps=STEPS) -> list:
    """The batches of some steps, the weights synced before each as the learner does."""
    batches = []
    for step in range(steps):
        collector.sync(checkpoint_tensors(model), step)
        batches.append(collector.collect(step))
    return batches


def drawn(batch) -> list:
    return [(sample.problem.id, sample.trace.completion_ids, sample.verdict.score) for sample in batch.samples]


def order(batches) -> list[str]:
    """Problems in the order in which the learner sees them."""
    return [sample.problem.id for batch in batches for sample in batch.samples[::GROUP]]


def groups(batch) -> list[list]:
    return [batch.samples[first : first + GROUP] for first in range(0, len(batch.samples), GROUP)]


def test_in_turn_a_batch_is_whole_groups_drawn_by_one_version(make, model, host) -> None:
    collector = make()
    batches = run_steps(collector, model, 3)
    for step, batch in enumerate(batches):
        assert len(batch.samples) == PROMPTS * GROUP
        assert all(len({sample.problem.id for sample in group}) == 1 for group in groups(batch))
        assert {version for sample in batch.samples for version in sample.trace.versions} == {step}
        assert {sample.trace.finish_reason for sample in batch.samples} <= {"stop", "length"}
        assert batch.metrics["tokens_drawn"] == sum(len(sample.trace.completion_ids) for sample in batch.samples)
        again = host.verify([(sample.text, sample.problem.gold, None) for sample in batch.samples])
        assert [verdict.score for verdict in again] == [sample.verdict.score for sample in batch.samples]
    assert len(set(order(batches))) == 3 * PROMPTS, "no problem twice within a pass"
    assert collector.worker.unfinished == 0
    assert collector.seconds["generate"] >= collector.stream.busy > 0, "the reading of prompts is generation"
    assert [drawn(batch) for batch in run_steps(make(), model, 3)] == [drawn(batch) for batch in batches]
    assert drawn(make(seed=4).collect(0)) != drawn(batches[0])


def test_a_stopped_collection_can_be_asked_again(make, model) -> None:
    expected = [drawn(batch) for batch in run_steps(make(dynamic_sampling=True), model, 2)]
    collector = make(dynamic_sampling=True)
    assert drawn(collector.collect(0)) == expected[0]
    looks = iter([False] * 7 + [True])

    def check() -> None:
        if next(looks):
            raise Interrupted

    collector.stop.check = check
    collector.sync(checkpoint_tensors(model), 1)
    with pytest.raises(Interrupted):
        collector.collect(1)
    assert collector.worker.unfinished == 0
    collector.stop.check = lambda: None
    assert drawn(collector.collect(1)) == expected[1]


def test_a_completion_is_graded_while_the_rest_of_its_group_is_drawn(make) -> None:
    collector = make()
    stream, line = collector.stream, collector.line
    while not stream.awaiting:
        line.tick()
    (group,) = stream._graded(10.0)[:1]
    assert None in group.traces, "the engine has not been stepped since, and has work left on this very group"
    assert not group.complete


def test_a_verifier_of_groups_is_given_their_lengths(make, folder) -> None:
    spec = VerifierSpec(f"{folder}/remainder.py:Remainder", {"grouped": True})
    with VerifierHost(spec) as grouped:
        for group in groups(make(host=grouped).collect(0)):
            lengths = [len(sample.trace.completion_ids) for sample in group]
            assert all(sample.verdict.info["lengths"] == lengths for sample in group)


@pytest.mark.parametrize("oversample", [1.0, 1.75])
def test_groups_of_equal_rewards_are_dropped_and_the_batch_refilled(make, model, oversample) -> None:
    """The batches are what one gets by striking such groups, and those of unusable golds, off the endless line."""
    bad = (0, 3, 11, 17, 29)
    collector = make(dynamic_sampling=True, oversample=oversample, bad=bad)
    batches = run_steps(collector, model, 2)
    everything = [group for batch in run_steps(make(bad=bad), model) for group in groups(batch)]
    varied = [group for group in everything if len({sample.verdict.score for sample in group}) == 2]
    assert 2 * PROMPTS <= len(varied) < len(everything)
    expected = [[(s.problem.id, s.trace.completion_ids, s.verdict.score) for s in group] for group in varied]
    given = [drawn(batch)[first : first + GROUP] for batch in batches for first in range(0, PROMPTS * GROUP, GROUP)]
    assert all(len(batch.samples) == PROMPTS * GROUP for batch in batches)
    assert given == expected[: len(given)]
    last = next(i for i, group in enumerate(everything) if group[0].problem.id == order(batches)[-1])
    assert sum(batch.metrics["groups_dropped"] for batch in batches) == last + 1 - 2 * PROMPTS
    assert collector.worker.unfinished == 0


def test_a_group_whose_gold_is_unusable_is_not_drawn_to_its_end(make) -> None:
    collector = make(dynamic_sampling=True, bad=range(0, 40, 2))
    seen = {}
    while not collector.line.ready():
        collector.line.tick()
        for group in collector.line.groups:
            if group.dropped == "gold_error" and group.number not in seen:
                seen[group.number] = group
    assert seen
    running = {int(name.split(".")[0]) for name in collector.worker.running}
    assert running.isdisjoint(seen)
    cut = [trace for group in seen.values() for trace in group.traces if trace and trace.finish_reason == "suspended"]
    assert cut, "some completions were cut short"
    batch, _ = collector.line.take()
    assert all(group.problem.gold == "0" for group in batch)


def test_sampling_that_finds_no_group_that_varies_says_so(make, folder) -> None:
    with VerifierHost(VerifierSpec(f"{folder}/remainder.py:Remainder", {"one": True})) as one:
        collector = make(dynamic_sampling=True, max_oversampling=2, host=one)
        with pytest.raises(UserError, match=r"none of 8 groups of 3 samples .* \(8 all correct, 0 none correct\)"):
            collector.collect(0)


def test_unfinished_completions_go_on_in_the_next_step(make, model) -> None:
    budget = 5
    collector = make(partial_tokens=budget)
    batches, states = [], []
    for step in range(STEPS):
        collector.sync(checkpoint_tensors(model), step)
        states.append(collector.state_dict())
        batches.append(collector.collect(step))
        assert collector.worker.unfinished == 0
    traces = [sample.trace for batch in batches for sample in batch.samples]
    assert any(len(set(trace.versions)) > 2 for trace in traces)
    for trace in traces:
        assert trace.finish_reason in ("stop", "length")
        assert len(trace.logprobs) == len(trace.versions) == len(trace.completion_ids)
        assert trace.versions == sorted(trace.versions)
        *before, _ = sorted(Counter(trace.versions).items())
        assert all(count % budget == 0 for _, count in before), "suspended where the budget of the step ended"
    delivered = order(batches)
    left = [group.problem.id for group in collector.line.groups]
    assert len(delivered) == len(set(delivered)), "nothing twice"
    assert sorted(delivered + left) == sorted(order(run_steps(make(), model))), "nothing lost"
    assert batches[-1].metrics["groups_carried"] == len(left) > 0
    assert any(batch.metrics["staleness_max"] > 1 for batch in batches)

    resumed = make(partial_tokens=budget)
    resumed.load_state_dict(states[3])
    resumed.sync(checkpoint_tensors(model), 3)
    assert drawn(resumed.collect(3)) == drawn(batches[3]), "begun traces are part of the state"


def test_partial_and_dynamic_sampling_go_together(make, model) -> None:
    batches = run_steps(make(partial_tokens=8, dynamic_sampling=True, max_oversampling=8), model)
    assert [drawn(b) for b in batches] == [
        drawn(b) for b in run_steps(make(partial_tokens=8, dynamic_sampling=True, max_oversampling=8), model)
    ]
    for batch in batches:
        assert all(len({sample.verdict.score for sample in group}) == 2 for group in groups(batch))


@pytest.mark.parametrize("staleness", [1, 2])
def test_generation_runs_ahead_by_so_many_versions(make, model, staleness) -> None:
    collector = make(max_staleness=staleness)
    batches = []
    for step in range(STEPS):
        collector.sync(checkpoint_tensors(model), step)
        batches.append(collector.collect(step))
        versions = [version for sample in batches[-1].samples for version in sample.trace.versions]
        assert step - staleness <= min(versions) <= max(versions) <= step
        assert len(batches[-1].samples) == PROMPTS * GROUP
        if step == 3:
            with collector.idle() as worker:
                (trace,) = worker.generate([[5, 6, 7]], Sampling(max_tokens=4, ignore_eos=True), seeds=[1])
                assert len(trace.completion_ids) == 4
    assert any(batch.metrics["staleness_max"] > 0 for batch in batches)
    collector.close()
    assert collector.worker.unfinished == 0, "nothing is drawn beyond the last step"
    assert order(batches) == order(run_steps(make(), model)), "the order of the problems does not depend on the mode"


def test_what_fails_or_is_stopped_ahead_reaches_the_learner(make, folder) -> None:
    with VerifierHost(VerifierSpec(f"{folder}/remainder.py:Remainder", {"one": True})) as one:
        collector = make(max_staleness=1, dynamic_sampling=True, max_oversampling=2, host=one)
        with pytest.raises(UserError, match="none of"):
            collector.collect(0)
        with pytest.raises(UserError, match="none of"):
            collector.state_dict()
        collector.close()
    collector = make(max_staleness=1)
    with collector.idle():
        collector.stop.requested = True
        with pytest.raises(Interrupted):
            collector.collect(0)


def test_an_asynchronous_run_goes_on_with_the_groups_that_were_in_flight(make, model) -> None:
    collector = make(max_staleness=2)
    before = run_steps(collector, model, 2)
    state = collector.state_dict()
    leave(collector)
    resumed = make(max_staleness=2)
    resumed.sync(checkpoint_tensors(model), 2)
    resumed.load_state_dict(state)
    after = resumed.collect(2)
    leave(resumed)
    assert order([*before, after]) == order(run_steps(make(), model, 3))


def test_a_group_keeps_the_experts_of_its_tokens_in_its_state() -> None:
    (problem,) = problems()[:1]
    routing = torch.tensor([[[1, 3]], [[0, 2]], [[-1, -1]]], dtype=torch.int16)
    traces = [Trace([4], [5, 6], [-0.1, -0.2], [0, 1], "suspended", routing), None]
    group = Group(7, problem, 2, traces, [None, None], [None, None])
    state = json.loads(json.dumps(group.state_dict(drawn=True)))
    again = Group.from_state(state, {problem.id: problem}, 2)
    assert again == group
    assert torch.equal(again.traces[0].routing, routing) and again.traces[0].routing.dtype == torch.int16


def test_a_recorded_stream_comes_again_without_an_engine(make, model, tmp_path) -> None:
    run = RunFolder.create(job().model_copy(update={"runs_dir": str(tmp_path)}))
    batches = run_steps(make(record=True, run=run, dynamic_sampling=True), model)
    again = Recorded(job=job(replay=str(run.path)), problems=problems(), stop=StopRequest())
    for step, batch in enumerate(batches):
        replayed = again.collect(step)
        assert replayed.samples == batch.samples, "tokens, logprobs, versions, texts, verdicts"
        assert replayed.metrics == batch.metrics
    with pytest.raises(UserError, match=r"needs p\d+, which the job's data lacks"):
        Recorded(job=job(replay=str(run.path)), problems=problems()[:1], stop=StopRequest()).collect(0)
    (run.path / "rollouts" / f"step_{STEPS:05d}.jsonl").unlink()
    with pytest.raises(UserError, match=f"holds no record of step {STEPS}: "):
        Recorded(job=job(replay=str(run.path)), problems=problems(), stop=StopRequest())
