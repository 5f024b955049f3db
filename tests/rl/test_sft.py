"""SFT learns the chosen turns and nothing else, stage after stage, in packs that give the loss of the rows alone."""

import json

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from deltarl.model import build_model
from deltarl.rl.errors import UserError
from deltarl.rl.interrupt import StopRequest
from deltarl.rl.jobs import Job
from deltarl.rl.jobsections import DataConfig
from deltarl.rl.problems import load_problems
from deltarl.rl.recipes import build_mix
from deltarl.rl.runfolder import RunFolder
from deltarl.rl.sft import rate_at, warm_up
from deltarl.rl.supervised import encode
from deltarl.rl.tokenizer import build_tokenizer

CHAT = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "That is 6."},
]


@pytest.fixture(scope="module")
def problems():
    return load_problems(DataConfig(train_size=40, heldout_size=1), 0).train


@pytest.fixture(scope="module")
def tokenizer(problems):
    return build_tokenizer((f"{problem.question} {problem.solution}" for problem in problems), 320)


@pytest.fixture
def job(tmp_path):
    sft = {
        "batch_size": 4,
        "learning_rate": 2e-3,
        "warmup_steps": 1,
        "weight_decay": 0.0,
        "token_budget": 300,
        "max_length": 200,
        "stages": [
            {"steps": 3, "sources": [{"name": "solutions"}]},
            {"steps": 2, "learning_rate": 1e-3, "sources": [{"name": "chat"}]},
        ],
    }
    return Job.model_validate({"name": "sft", "runs_dir": str(tmp_path), "model": {"vocab_size": 320}, "sft": sft})


def conversation(learned):
    return {"prompt": CHAT[:-1], "completion": CHAT[-1:], "learned": learned}


def test_learned_tokens_are_those_of_the_turns(tokenizer):
    last, both = encode(tokenizer, [conversation([3]), conversation([1, 3])], 10**6)
    end = tokenizer.eos_token

    def learned(sequence):
        return tokenizer.decode([sequence.ids[place] for place in sequence.places])

    assert learned(last).startswith(f"That is 6.{end}") and "4" not in learned(last)
    assert learned(both).startswith(f"It is 4.{end}") and f"That is 6.{end}" in learned(both)
    assert "+" not in learned(both), "nothing of the user's"
    assert last.ids == both.ids


def test_rows_are_cut_and_left_out_where_nothing_is_left(tokenizer):
    whole = encode(tokenizer, [conversation([1, 3])], 10**6)[0]
    first = whole.places[0]
    cut = encode(tokenizer, [conversation([1, 3])], first + 2)[0]
    assert (cut.ids, cut.places) == (whole.ids[: first + 2], [first, first + 1])
    assert encode(tokenizer, [conversation([1, 3])], first) == []


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    import copy

    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    encode(forgetful, [conversation([3])], 100)
    with pytest.raises(UserError, match=r"sft\.turns: last"):
        encode(forgetful, [conversation([1, 3])], 100)


def test_rates_of_one_stage_are_transformers_cosine(job):
    stages = job.sft.model_copy(update={"stages": None, "steps": 12, "warmup_steps": 3}).schedule
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    peer = get_cosine_schedule_with_warmup(optimizer, 3, 12)
    for step in range(12):
        assert rate_at(stages, step) == pytest.approx(peer.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        peer.step()


def test_stages_begin_anew_with_their_own_rate(job):
    rates = [rate_at(job.sft.schedule, step) for step in range(6)]
    assert rates == pytest.approx([0, 2e-3, 1e-3, 0, 1e-3, 0])


def test_stages_learn_their_sources_with_the_loss_of_the_rows_alone(job, problems, tokenizer):
    torch.manual_seed(0)
    model = build_model("kda", "2m", vocab_size=320)
    expected = first_loss(model, job, problems, tokenizer)
    run = RunFolder.create(job)
    warm_up(model, tokenizer, job, problems, run, StopRequest(), None)
    run.metrics.close()
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert rows[2]["loss"] < rows[0]["loss"]
    assert rows[2]["tokens"] > rows[3]["tokens"], "worked solutions are longer than bare answers"


def first_loss(model, job, problems, tokenizer):
    """Mean cross-entropy of the learned tokens of the first four rows, one row at a time."""
    stage = job.sft.schedule[0]
    mix = build_mix(stage.sources, problems, seed=job.seed, n=3 * 4, instruction=job.data.instruction)
    total, count = 0.0, 0
    for ids, places in encode(tokenizer, list(mix)[:4], job.sft.max_length):
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(logprobs[place - 1, ids[place]].item() for place in places)
        count += len(places)
    return total / count


def test_a_length_that_cuts_everything_is_refused(job, problems, tokenizer):
    job = job.model_copy(update={"sft": job.sft.model_copy(update={"max_length": 8})})
    run = RunFolder.create(job)
    with pytest.raises(UserError, match=r"sft\.max_length = 8 cuts off the answers of all 4 rows of step 1"):
        warm_up(build_model("kda", "2m", vocab_size=320), tokenizer, job, problems, run, StopRequest(), None)
    run.metrics.close()
