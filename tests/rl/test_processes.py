"""The learner on two processes (FSDP2 over gloo) learns what one process learns, and their checkpoints are the same."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from test_exact_resume import JOB, VERIFIER

from deltarl.rl import train
from deltarl.rl.errors import UserError
from deltarl.rl.jobs import Job
from deltarl.rl.train import check_learner

STEPS = 3
# float32 sums in another order: relative 1e-5 for what is a sum of many values of both signs.
CLOSE = 1e-5
MEASURED = ("loss", "grad_norm", "entropy", "kl", "update_kl", "clip_ratio", "is_ratio_mean", "learning_rate")


def start(folder: Path, *arguments: str, processes: int = 1) -> str:
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    )
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    environment["PYTHONFAULTHANDLER"] = "1"  # an abort says where each process was
    finished = subprocess.run(
        [sys.executable, *launcher, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-9000:]
    return finished.stdout


def rl_rows(run: Path) -> list[dict]:
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if row["kind"] == "rl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With the runs one, of one process, and two, of two."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "digits.py").write_text(VERIFIER)
    job = {**JOB, "sft": {"steps": 0}, "rl": {**JOB["rl"], "steps": STEPS, "token_budget": 96}}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    start(folder, "-m", "deltarl", "train", "job.yaml", "--set", "name=one")
    start(folder, "-m", "deltarl", "train", "job.yaml", "--set", "name=two", processes=2)
    return folder


def test_two_processes_learn_what_one_learns(folder):
    one, two = rl_rows(folder / "runs" / "one"), rl_rows(folder / "runs" / "two")
    assert len(one) == len(two) == STEPS
    for a, b in zip(one, two, strict=True):
        assert a["verdicts"] == b["verdicts"] and a["tokens_generated"] == b["tokens_generated"]
        for name in MEASURED:
            assert b[name] == pytest.approx(a[name], rel=CLOSE, abs=1e-6), f"{name} of step {a['step']}"


def test_a_run_of_two_processes_goes_on_in_one(folder):
    """Its last checkpoint is set back by one; the step that one process repeats is the one that two took."""
    run = folder / "runs" / "two"
    expected = rl_rows(run)[-1]
    (run / "checkpoints" / "3").rename(run / "checkpoints" / "3.aside")
    start(folder, "-m", "deltarl", "train", "--resume", str(run))
    repeated = rl_rows(run)[-1]
    assert repeated["step"] == expected["step"] == STEPS
    for name in MEASURED:
        assert repeated[name] == pytest.approx(expected[name], rel=CLOSE, abs=1e-6), name


def test_two_processes_learn_from_an_engine_in_its_own(folder):
    placed = ("--set", "rollout.engine=vllm", "--set", "rollout.placement=process", "--set", "rl.steps=2")
    start(folder, "-m", "deltarl", "train", "job.yaml", "--set", "name=vllm", *placed, processes=2)
    rows = rl_rows(folder / "runs" / "vllm")
    assert [row["weight_version"] for row in rows] == [0, 1]
    # Both in float32: what is left is rounding (docs/results/rollout.md).
    assert all(row["logp_gap_mean"] <= 1e-4 for row in rows)


def test_a_colocated_engine_is_refused(monkeypatch):
    job = Job.model_validate({**JOB, "name": "two", "rollout": {**JOB["rollout"], "engine": "vllm"}})
    check_learner(job)
    monkeypatch.setattr(train, "processes", lambda: 2)
    with pytest.raises(
        UserError, match=r"rollout.placement = colocated is for one process: .*rollout.placement=process"
    ):
        check_learner(job)


def test_the_warm_up_alone_is_for_one_process(monkeypatch):
    job = Job.model_validate({**JOB, "name": "two"})
    monkeypatch.setattr(train, "processes", lambda: 2)
    with pytest.raises(UserError, match="deltarl sft is for one process"):
        train.train(job, sft_only=True)


SHARDED = """
    import sys
    import torch
    from types import SimpleNamespace
    from tiny_models import MOE, tiny_model, token_ids
    from deltarl.rl.optimizers import make_optimizer
    from deltarl.rl.sharding import from_main, leave_together, open_processes, processes, shard, shares, summed
    from deltarl.rl.sharding import whole_state

    open_processes()
    model = tiny_model(**MOE)
    if processes() > 1:
        shard(model, torch.device("cpu"))
    settings = SimpleNamespace(optimizer=sys.argv[1], learning_rate=1e-2, weight_decay=0.1)
    optimizer, ids = make_optimizer(model, settings), token_ids(3, 9)
    for step in range(3):
        model.zero_grad()
        total = torch.zeros(())
        for row, counts in shares(ids):
            loss = model(row[None], labels=row[None]).loss / len(ids) * counts
            loss.backward()
            total += loss.detach()
        optimizer.step()
        total = summed(total)
        optimizer.load_state_dict(optimizer.state_dict())
    state, of_optimizer = whole_state(model), optimizer.state_dict()["state"]
    moments = sum(float(v.abs().sum()) for entry in of_optimizer.values() for v in entry.values() if v.ndim)
    from_main(lambda: print(float(total), sum(float(v.abs().sum()) for v in state.values()), moments))
    leave_together()
"""


@pytest.mark.parametrize(("optimizer", "close"), [("adamw", CLOSE), ("muon", 2e-2)])
def test_sharded_optimizers_step_like_whole_ones(tmp_path, optimizer, close):
    """Three rows over two processes: one of them computes a row that does not count. Muon orthogonalises in bfloat16,
    where a last bit that differs is 2^-8 of the update."""
    (tmp_path / "steps.py").write_text(textwrap.dedent(SHARDED))
    (tmp_path / "tiny_models.py").write_text((Path(__file__).parents[1] / "model" / "tiny_models.py").read_text())
    script = ["steps.py", optimizer]
    one, two = (list(map(float, start(tmp_path, *script, processes=n).split())) for n in (1, 2))
    assert two == pytest.approx(one, rel=close)
