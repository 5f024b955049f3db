"""The supervised stream of `rl.ptx` is cross-entropy on rows of its own for every update."""

import pytest
import torch
from accelerate import Accelerator

from deltarl.model import build_model
from deltarl.rl.forward import enable_scoring
from deltarl.rl.jobs import Job
from deltarl.rl.jobsections import DataConfig
from deltarl.rl.objective import Tally
from deltarl.rl.problems import load_problems
from deltarl.rl.ptx import PTXStream
from deltarl.rl.supervised import encode
from deltarl.rl.tokenizer import build_tokenizer


def test_updates_learn_their_own_rows():
    problems = load_problems(DataConfig(train_size=40, heldout_size=1), 0).train
    tokenizer = build_tokenizer((f"{problem.question} {problem.solution}" for problem in problems), 320)
    ptx = {"weight": 0.3, "batch_size": 12, "max_length": 200, "sources": [{"name": "solutions"}]}
    job = Job.model_validate({"name": "x", "rl": {"steps": 2, "token_budget": 300, "ptx": ptx}})
    torch.manual_seed(0)
    model = build_model("kda", "2m", vocab_size=320)
    enable_scoring(model)
    stream, tally = PTXStream(job, problems, tokenizer), Tally()
    for update in (0, 1):
        rows = list(stream.rows)[12 * update : 12 * update + 12]
        nats, count = 0.0, 0
        for ids, places in encode(tokenizer, rows, 200):
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            nats -= sum(logprobs[place - 1, ids[place]].item() for place in places)
            count += len(places)
        losses = stream.losses(model, update, Accelerator(cpu=True), tally)
        assert len(losses) > 1, "several packs"
        assert sum(loss().item() for loss in losses) == pytest.approx(0.3 * nats / count, rel=1e-5)
        assert tally.take()["ptx_loss"] == pytest.approx(nats / count, rel=1e-5)
