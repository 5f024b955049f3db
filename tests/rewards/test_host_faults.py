"""What a verifier host does about workers that die, hang, and run out of memory."""

import os
import random
import signal
from pathlib import Path

import psutil
import pytest

from deltarl.rewards import VerifierHost, VerifierLoadError, VerifierSpec
from deltarl.rewards.tasks import HostClosed, Task, TaskQueue
from deltarl.rewards.types import Verdict

FAULT = f"{Path(__file__).with_name('fault_verifier.py')}:FaultVerifier"
RIGHT = ("a", "a", {})


def kill_one(pool, choose):
    """Kills a worker that runs; whether there was one."""
    pids = pool.worker_pids()
    pid = choose.choice(pids) if pids else None
    try:
        if pid is None or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return False
        os.kill(pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False
    return True


def test_workers_killed_at_random_lose_nothing_and_change_no_verdict():
    choose = random.Random(7)
    values = [choose.randrange(1000) for _ in range(10_000)]
    items = [
        (f"so the answer is {value}" if value % 11 else "no idea", str(value + (value % 3 == 0)), {})
        for value in values
    ]
    with VerifierHost("numeric", workers=2) as pool:
        undisturbed = pool.verify(items)
    disturbed, kills, next_kill = {}, 0, 100
    with VerifierHost("numeric", workers=2) as pool:
        for index, verdict in pool.as_completed(items):
            disturbed[index] = verdict
            if len(disturbed) >= next_kill and kill_one(pool, choose):
                kills += 1
                next_kill = len(disturbed) + choose.randrange(100, 700)
        counts = pool.counts()
    assert kills > 10
    assert [disturbed[index] for index in range(len(items))] == undisturbed
    assert {verdict.status for verdict in undisturbed} == {"correct", "incorrect", "no_answer"}
    assert sum(counts.values()) == len(items)


def test_a_batch_of_tasks_may_take_longer_than_the_deadline_of_each():
    with VerifierHost(FAULT, timeout=1.0) as pool:
        verdicts = pool.verify([RIGHT] * 300 + [("nap 0.15", "a", {})] * 30)
    assert [v.status for v in verdicts] == ["correct"] * 330


def test_a_slot_that_cannot_start_its_worker_costs_no_verdict_while_another_can(monkeypatch):
    pauses = TaskQueue(max_pending=8, takers=2)
    assert [pauses.pause(failures) for failures in range(6)] == pytest.approx([0, 0, 0, 0.05, 0.1, 0.2])
    with VerifierHost(FAULT, workers=2) as pool:
        monkeypatch.setattr("sys.executable", "/nowhere/python")
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
        assert [v.status for v in pool.verify([RIGHT] * 2000)] == ["correct"] * 2000
        monkeypatch.undo()
        os.kill(pool.worker_pids()[-1], signal.SIGKILL)
        assert [v.status for v in pool.verify([RIGHT] * 100)] == ["correct"] * 100


def submit_together(pool, items):
    """The futures of items that a warm worker gets several of at once."""
    pool.verify([RIGHT] * 300)
    with pool._queue.lock:
        return [pool.submit(item) for item in items]


@pytest.mark.parametrize(("fault", "status"), [("exit", "error"), ("segfault", "error"), ("hang", "timeout")])
def test_of_a_batch_the_task_that_loses_the_worker_is_blamed_and_no_other_runs_twice(tmp_path, fault, status):
    notes = tmp_path / "notes"
    items = [(f"note {i} {notes}", "", {}) for i in range(200)]
    items[100] = (fault, "a", {})
    with VerifierHost(FAULT, timeout=1.0) as pool:
        futures = submit_together(pool, items)
        verdicts = [future.result(timeout=60) for future in futures]
    assert [v.status for v in verdicts] == ["correct"] * 100 + [status] + ["correct"] * 99
    assert notes.read_text().split() == [str(i) for i in range(200) if i != 100]


def test_answers_of_a_batch_do_not_wait_for_a_task_that_hangs(tmp_path):
    gate = tmp_path / "gate"
    with VerifierHost(FAULT, timeout=60.0) as pool:
        *futures, held, behind = submit_together(pool, [*[RIGHT] * 100, (f"wait {gate}", "", {}), RIGHT])
        assert [future.result(timeout=30).status for future in futures] == ["correct"] * 100
        assert not held.done() and not behind.done()
        gate.touch()
        assert [held.result(timeout=30).status, behind.result(timeout=30).status] == ["correct", "correct"]


def test_a_worker_is_given_more_before_it_runs_out_but_never_a_task_that_cost_one_already():
    queue = TaskQueue(max_pending=8, takers=1)
    tasks = [Task(("verify", "a", "a", {}), 2, counted=True) for _ in range(4)]
    assert queue.take_more() == []
    tasks[1].future.cancel()
    tasks[3].attempts = 1
    for task in tasks:
        queue.put(task)
    assert queue.take_more() == [tasks[0]]
    assert queue.take_more() == [tasks[2]]
    assert queue.take_more() == []
    assert queue.take("slot") == [tasks[3]]


def test_tasks_behind_one_that_hangs_are_answered():
    with VerifierHost(FAULT, timeout=1.0) as pool:
        verdicts = pool.verify([RIGHT, ("hang", "a", {}), ("sleep", "a", {}), *[RIGHT] * 50])
    assert [v.status for v in verdicts] == ["correct", "timeout", "timeout", *["correct"] * 50]


def test_the_start_of_a_worker_does_not_count_against_a_deadline():
    with VerifierHost(VerifierSpec(FAULT, {"start_seconds": 1.5}), timeout=1.0) as pool:
        verdicts = pool.verify([RIGHT, ("exit", "a", {}), RIGHT, ("hang", "a", {}), RIGHT])
    assert [v.status for v in verdicts] == ["correct", "error", "correct", "timeout", "correct"]


def test_a_worker_killed_while_idle_costs_no_task_an_attempt(tmp_path):
    log = tmp_path / "starts"
    with VerifierHost(VerifierSpec(FAULT, {"log": str(log)})) as pool:
        for _ in range(5):
            os.kill(pool.worker_pids()[0], signal.SIGKILL)
            assert [v.status for v in pool.verify([RIGHT] * 3)] == ["correct"] * 3
    assert len(log.read_text().split()) == 6


def test_a_worker_that_is_stopped_is_replaced():
    with VerifierHost(FAULT, timeout=1.0) as pool:
        os.kill(pool.worker_pids()[0], signal.SIGSTOP)
        verdicts = pool.verify([RIGHT] * 5)
    assert [v.status for v in verdicts] == ["timeout", "correct", "correct", "correct", "correct"]


def test_a_verifier_that_dies_at_every_task_is_started_ever_more_rarely(tmp_path):
    log = tmp_path / "starts"
    with VerifierHost(VerifierSpec(FAULT, {"log": str(log)}), workers=1) as pool:
        verdicts = pool.verify([("exit", "a", {})] * 6)
        assert [v.status for v in pool.verify([RIGHT, ("exit", "a", {})])] == ["correct", "error"]
    died = [int(v.info["reason"].split("died ")[1].split()[0]) for v in verdicts]
    assert [v.status for v in verdicts] == ["error"] * 6
    assert died == [3, 3, 1, 1, 1, 1]
    assert len(log.read_text().split()) <= 1 + sum(died) + 3


def test_pauses_between_starts_grow_with_deaths_in_a_row_and_end_with_an_answer():
    queue = TaskQueue(max_pending=8, takers=1)
    pauses = []
    for _ in range(16):
        queue.worker_died()
        pauses.append(queue.pause(0))
    assert pauses[:5] == [0.0] * 5
    assert pauses[5:12] == pytest.approx([0.05 * 2**k for k in range(7)])
    assert pauses[12:] == pytest.approx([3.2] * 4)
    queue.settle(Task(("verify", "a", "a", {}), 2, counted=True), Verdict(1.0, "correct"), seconds=0.1)
    assert queue.pause(0) == 0.0


def test_a_verifier_that_no_longer_loads_costs_errors_and_comes_back(tmp_path):
    file = tmp_path / "here.py"
    source = Path(FAULT.rpartition(":")[0]).read_text()
    file.write_text(source)
    with VerifierHost(f"{file}:FaultVerifier") as pool:
        file.write_text("import nothing_of_that_name")
        os.kill(pool.worker_pids()[0], signal.SIGKILL)
        (verdict,) = pool.verify([RIGHT])
        assert verdict.status == "error" and "nothing_of_that_name" in verdict.info["reason"]
        file.write_text(source)
        assert [v.status for v in pool.verify([RIGHT] * 20)][-1] == "correct"


def test_memory_that_earlier_tasks_took_changes_no_verdict():
    with VerifierHost(FAULT, memory_mb=512) as pool:
        assert [v.status for v in pool.verify([("leak", "a", {})] * 12)] == ["correct"] * 12
        assert [v.status for v in pool.verify([("leak", "a", {}), ("memory", "a", {})])] == ["correct", "limit"]


def test_a_child_that_holds_the_channel_hides_no_death_and_dies_too(tmp_path):
    log = tmp_path / "orphans"
    with VerifierHost(FAULT, timeout=1.0) as pool:
        verdicts = pool.verify([(f"orphan {log}", "a", {}), RIGHT])
        assert [v.status for v in verdicts] == ["error", "correct"]
        assert "died 3 times (exit code 3)" in verdicts[0].info["reason"]
    orphans = [int(pid) for pid in log.read_text().split()]
    assert len(orphans) == 3
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in orphans)


def test_a_process_that_cannot_be_started_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.executable", str(tmp_path / "no-python"))
    with pytest.raises(VerifierLoadError, match=r"^no process could be started for verifier .*no-python"):
        VerifierHost(FAULT, workers=2)


def test_tasks_given_back_to_a_closed_queue_fail():
    queue = TaskQueue(max_pending=8, takers=1)
    task = Task(("verify", "a", "a", {}), 2, counted=True)
    queue.put(task)
    assert queue.take("slot") == [task]
    queue.give_back([task])
    assert queue.close() == set()
    assert isinstance(task.future.exception(timeout=0), HostClosed)
