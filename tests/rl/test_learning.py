"""Each algorithm learns a contextual bandit to a stated level, on the real trainer and engine, over three seeds.

Four questions, four answers. The policy was taught to answer every question with any of the four digits, the right one
twice as often as another: it is right in 40 % of its answers, and can only find out by trying which those are.
"""

import json
from contextlib import contextmanager

import pytest
import yaml
from safetensors import safe_open
from test_train import MEASURED_TIME

from deltarl.rl.collect import Collector
from deltarl.rl.interrupt import StopRequest
from deltarl.rl.jobs import load_job
from deltarl.rl.metrics import read_metrics
from deltarl.rl.parts import load_data, open_algorithm, open_engine, open_host, open_model, open_source
from deltarl.rl.ptx import PTXStream
from deltarl.rl.runfolder import RunFolder
from deltarl.rl.train import train
from deltarl.rl.trainer import RLTrainer, updates_per_step

ANSWERS = {"a?": "0", "b?": "3", "c?": "2", "d?": "1"}
STEPS = 24
LEVEL = 0.9
JOB = {
    "name": "bandit",
    "data": {"source": "questions.jsonl", "heldout": "heldout.jsonl", "heldout_size": 1},
    "rewards": {"verifier": "exact"},
    "sft": {
        "steps": 60, "batch_size": 60, "learning_rate": 3.0e-3, "max_length": 32, "warmup_steps": 5,
        "sources": [{"name": "digits.jsonl"}],
    },
    "model": {"arm": "mla", "vocab_size": 280},
    "rollout": {"max_model_len": 32, "max_num_seqs": 128},
    "rl": {
        "steps": STEPS, "prompts_per_step": 4, "num_generations": 32, "minibatches": 2,
        "learning_rate": 3.0e-4, "max_completion_length": 3,
    },
}  # fmt: skip
ALGORITHMS = {
    "grpo": {"algorithm": "grpo"},
    "ppo": {"algorithm": "ppo", "critic": {"kind": "head", "warmup_steps": 1}},
    "kimi": {"algorithm": "kimi", "kimi": {"tau": 0.5, "target_kl": 0.02, "adapt_minibatches": True}},
}


@pytest.fixture(scope="module")
def bandit(tmp_path_factory):
    """The folder of the bandit's files, with the policy that RL starts from, and an engine that holds it."""
    folder = tmp_path_factory.mktemp("bandit")
    write(folder / "questions.jsonl", [{"question": q, "answer": a} for q, a in ANSWERS.items()])
    write(folder / "heldout.jsonl", [{"question": "e?", "answer": "0"}])
    rows = [{"prompt": q, "response": digit} for q, a in ANSWERS.items() for digit in ("0", "1", "2", "3", a)]
    write(folder / "digits.jsonl", rows)
    (folder / "job.yaml").write_text(yaml.safe_dump(JOB))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = train(load_job("job.yaml"), sft_only=True)
        policy = folder / run / "checkpoints" / "0"
        worker = open_engine(load_job("job.yaml"), str(policy))
        yield policy, worker
        worker.close()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def trainer_of(policy, worker, overrides, checkpoint=None):
    """The trainer of the bandit's job with those overrides, where RL starts or as it was in a checkpoint."""
    job = load_job("job.yaml", [f"model.path={policy}", "sft.steps=0", *overrides])
    with StopRequest() as stop, open_host(job) as host:
        data = load_data(job, host)
        model, tokenizer = open_model(str(checkpoint or policy))
        source = open_source(job, data)
        collector = Collector(job=job, source=source, tokenizer=tokenizer, worker=worker, host=host, stop=stop)
        trainer = RLTrainer(
            model=model,
            tokenizer=tokenizer,
            job=job,
            collector=collector,
            run=RunFolder.create(job),
            algorithm=open_algorithm(job, model, str(policy)),
            ptx=PTXStream(job, data.train, tokenizer) if job.rl.ptx is not None else None,
        )
        yield trainer
        trainer.run.metrics.close()


def rl_rows(trainer):
    """What was measured in each step, without what measures time."""
    rows = [row for row in read_metrics(trainer.run.metrics.path) if row["kind"] == "rl"]
    return [{key: value for key, value in row.items() if key not in MEASURED_TIME} for row in rows]


def options(settings):
    return [f"rl.{key}={json.dumps(value)}" for key, value in settings.items()]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_learns_the_bandit(bandit, algorithm, seed):
    with trainer_of(*bandit, [f"seed={seed}", *options(ALGORITHMS[algorithm])]) as trainer:
        trainer.train()
    rows = rl_rows(trainer)
    accuracy = [row["accuracy"] for row in rows]
    assert len(rows) == STEPS
    assert accuracy[0] < 0.6, "0.4, give or take four standard errors of 128 samples"
    assert sum(accuracy[-4:]) / 4 >= LEVEL, accuracy


WHOLE = {
    "ppo": {**ALGORITHMS["ppo"], "num_iterations": 2, "curriculum": {"prioritised": True}, "prompts_per_step": 2},
    "ppo with a model": {"algorithm": "ppo", "critic": {"kind": "model"}, "num_generations": 1, "prompts_per_step": 16},
    "kimi": {
        **ALGORITHMS["kimi"],
        "ptx": {"batch_size": 4, "max_length": 32, "sources": [{"name": "digits.jsonl"}]},
        "curriculum": {"prioritised": True},
        "prompts_per_step": 2,
    },
}


@pytest.mark.parametrize("case", WHOLE)
def test_goes_on_from_a_checkpoint_as_if_it_had_not_been_stopped(bandit, tmp_path, case):
    """And the policy's files in that checkpoint have the policy's tensors, no critic's."""
    policy, worker = bandit
    overrides = ["rl.steps=4", *options(WHOLE[case])]
    with trainer_of(policy, worker, overrides) as whole:

        def after_step(step):
            if step == 2:
                whole.write_checkpoint(tmp_path / "2")
            return False

        whole.after_step = after_step
        whole.train()
    with trainer_of(policy, worker, overrides, tmp_path / "2") as second:
        second.state.global_step = 2 * updates_per_step(second.job)
        second.load_parts(tmp_path / "2")
        second.train(resume_from_checkpoint=str(tmp_path / "2"))
    assert [row["step"] for row in rl_rows(second)] == [3, 4]
    assert rl_rows(second) == rl_rows(whole)[2:]
    assert tensor_names(tmp_path / "2") == tensor_names(policy)


def tensor_names(folder):
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        return set(tensors.keys())
