"""Which checkpoints a run folder keeps, and what it does about damaged ones."""

import os
from pathlib import Path

import pytest

from deltarl.rl.errors import UserError
from deltarl.rl.jobs import Job
from deltarl.rl.manifest import publishing
from deltarl.rl.runfolder import RunFolder, kept_steps


@pytest.fixture
def run(tmp_path) -> RunFolder:
    rl = {"keep_checkpoints": 2, "keep_best": 1, "keep_every": 40}
    return RunFolder.create(Job(name="run", runs_dir=str(tmp_path), rl=rl))


def write(run: RunFolder, *steps: int, stage: str = "rl") -> None:
    for step in steps:
        with publishing(run.checkpoint(step, stage)) as inside:
            (inside / "model.safetensors").write_bytes(bytes(100))


def damage(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 50)


def measure(run: RunFolder, step: int, accuracy: float, stage: str = "during") -> None:
    run.metrics.append({"kind": "eval", "step": step, "stage": stage, "accuracy": accuracy})


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ({"last": 2}, {0, 50, 60}),
        ({"last": 1, "every": 20}, {0, 20, 40, 60}),
        ({"last": 1, "best": 1, "scores": {20: 0.7, 30: 0.9, 50: 0.8}}, {0, 30, 60}),
        ({"last": 1, "best": 2, "scores": {20: 0.7, 30: 0.9, 50: 0.8}}, {0, 30, 50, 60}),
        ({"last": 1, "best": 1, "scores": {20: 0.9, 30: 0.9}}, {0, 30, 60}),
        ({"last": 1, "best": 1, "scores": {15: 0.9, 20: 0.5}}, {0, 20, 60}),
        ({"last": 1, "best": 3, "scores": {}}, {0, 60}),
        ({"last": 9}, {0, 10, 20, 30, 40, 50, 60}),
    ],
)
def test_steps_are_kept_by_policy(policy, kept):
    assert kept_steps([0, 10, 20, 30, 40, 50, 60], **policy) == kept


def test_a_run_keeps_last_best_and_every_kth(run):
    write(run, 0)
    for step in range(10, 110, 10):
        write(run, step)
        measure(run, step, accuracy=0.9 if step == 30 else 0.5)
        run.prune()
    assert run.steps() == [0, 30, 40, 80, 90, 100]


def test_evaluations_before_and_after_do_not_choose(run):
    write(run, 0, 10, 20, 30)
    measure(run, 0, 1.0, "before")
    measure(run, 10, 0.4)
    measure(run, 30, 1.0, "after")
    assert run.accuracies() == {10: 0.4}


def test_damaged_checkpoints_are_set_aside_down_to_a_sound_one(run):
    write(run, 0, 10, 20, 30)
    damage(run.checkpoint(30))
    damage(run.checkpoint(20))
    lines = run.set_aside_damaged()
    assert len(lines) == 2 and "checkpoint 30 is damaged" in lines[0] and "going on with checkpoint 10" in lines[1]
    assert run.steps() == [0, 10] and run.latest() == 10
    assert run.checkpoint(30).with_name("30.damaged").is_dir()
    events = [line for line in run.metrics.path.read_text().splitlines() if '"damaged_checkpoint"' in line]
    assert len(events) == 2
    assert run.set_aside_damaged() == []
    write(run, 20)
    assert run.latest() == 20, "the step can be written again"


def test_older_checkpoints_are_not_read(run):
    write(run, 0, 10, 20)
    damage(run.checkpoint(10))
    assert run.set_aside_damaged() == []


def test_a_damaged_start_of_rl_is_refused_in_one_line(run):
    write(run, 0)
    damage(run.checkpoint(0))
    with pytest.raises(UserError, match="run the job anew") as caught:
        run.set_aside_damaged()
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_of_the_warm_up_goes_back_to_the_one_before(run):
    write(run, 200, 400, stage="sft")
    damage(run.checkpoint(400, "sft"))
    assert "going on with checkpoint 200" in run.set_aside_damaged("sft")[0]
    damage(run.checkpoint(200, "sft"))
    assert "going on from the start" in run.set_aside_damaged("sft")[0]
