"""The processes of a verifier host: where it can be made, and that none of them stays behind."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from deltarl.rewards import HostClosed, VerifierHost, VerifierSpec

FAULT = VerifierSpec(f"{Path(__file__).with_name('fault_verifier.py')}:FaultVerifier")
RIGHT = ("a", "a", {})


def running(processes):
    """Those that run: a zombie that waits for its parent does not."""
    return [p for p in processes if runs(p)]


def runs(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # ended between the two questions
        return False


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return held


def run(folder, program, *, through_stdin=False):
    """Output of a program in a process of its own, with the fault verifier's name as its argument."""
    program = textwrap.dedent(program)
    script = folder / "program.py"
    script.write_text(program)
    command = [sys.executable, "-P", "-" if through_stdin else str(script), FAULT.name]
    given = program if through_stdin else ""
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_close_ends_every_process_and_fails_what_is_unanswered():
    before = set(psutil.Process().children(recursive=True))
    pool = VerifierHost(FAULT, workers=3, timeout=30.0)
    processes = set(psutil.Process().children(recursive=True)) - before
    assert {p.pid for p in processes} == set(pool.worker_pids()) and len(processes) == 3
    busy = [pool.submit(("sleep", "a", {})) for _ in range(2)]
    assert wait_until(lambda: all(future.running() for future in busy))
    busy.append(pool.submit(("hang", "a", {})))
    waiting = pool.submit(RIGHT)
    pool.close()
    pool.close()
    for future in [*busy, waiting]:
        assert isinstance(future.exception(timeout=0), HostClosed)
    assert pool.worker_pids() == []
    assert not any(p.is_running() for p in processes)
    with pytest.raises(HostClosed):
        pool.submit(RIGHT)


def test_close_answers_every_future_while_workers_die():
    for _ in range(3):
        pool = VerifierHost(FAULT, workers=2)
        first = set(pool.worker_pids())
        futures = [pool.submit(("exit", "a", {})) for _ in range(40)]
        assert wait_until(lambda pool=pool, first=first: not first & set(pool.worker_pids()))
        pool.close()
        assert all(future.done() for future in futures)
        assert any(isinstance(future.exception(), HostClosed) for future in futures)


def test_close_wakes_those_who_wait_for_verdicts(tmp_path):
    pool = VerifierHost(FAULT, workers=1, timeout=60.0, max_pending=2)
    raised = []

    def verify(progress):
        try:
            pool.verify([(f"wait {tmp_path / 'never'}", "a", {})] * 10, progress)
        except HostClosed as error:
            raised.append(error)

    threads = [threading.Thread(target=verify, args=(p,)) for p in (None, lambda done, total: None) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    pool.close()
    for thread in threads:
        thread.join(timeout=20)
    assert len(raised) == 4


def test_close_may_be_called_by_a_callback_of_a_verdict():
    pool = VerifierHost(FAULT, workers=1)
    closed = threading.Event()
    pool.submit(RIGHT).add_done_callback(lambda _: (pool.close(), closed.set()))
    assert closed.wait(20)
    assert wait_until(lambda: pool.worker_pids() == [])


def test_an_idle_worker_leaves_by_itself(tmp_path):
    verifier = tmp_path / "tidy.py"
    verifier.write_text(
        "import atexit, pathlib\n"
        "from deltarl.rewards import Verdict\n"
        "class Tidy:\n"
        "    name = version = '1'\n"
        "    def __init__(self, note): atexit.register(lambda: pathlib.Path(note).write_text('tidied'))\n"
        "    def verify(self, response, gold, *, meta): return Verdict(1.0, 'correct')\n"
    )
    note = tmp_path / "note"
    with VerifierHost(VerifierSpec(f"{verifier}:Tidy", {"note": str(note)})) as pool:
        pool.verify([RIGHT])
    assert note.read_text() == "tidied"


PARENT = """
    import sys, time
    from deltarl.rewards import VerifierHost, VerifierSpec
    name, state = sys.argv[1:]
    spec = VerifierSpec(name, {"start_seconds": 60.0 if state == "starting" else 0.0})
    host = VerifierHost(spec, workers=2, timeout=60.0)
    host.verify([("a", "a", {})] * 4)
    if state == "busy":
        host.verify([("hang", "a", {})] * 50)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("state", ["idle", "busy", "starting"])
def test_no_worker_outlives_its_parent(tmp_path, how, state):
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    with subprocess.Popen([sys.executable, str(script), FAULT.name, state], stderr=subprocess.DEVNULL) as parent:
        try:
            watched = psutil.Process(parent.pid)
            assert wait_until(lambda: len(watched.children(recursive=True)) == 2)
            workers = watched.children(recursive=True)
            if state == "busy":
                assert wait_until(lambda: min(p.cpu_times().user for p in workers) > 1.0)
            else:
                time.sleep(0.5)
            parent.send_signal(how)
            parent.wait(timeout=30)
        finally:
            parent.kill()
    assert len(workers) == 2
    assert wait_until(lambda: not running(workers))


def test_a_host_outlives_the_thread_that_made_it():
    made = []
    thread = threading.Thread(target=lambda: made.append(VerifierHost(FAULT, workers=2)))
    thread.start()
    thread.join()
    with made[0] as pool:
        pids = pool.worker_pids()
        assert [v.status for v in pool.verify([RIGHT] * 20)] == ["correct"] * 20
        assert pool.worker_pids() == pids


def test_a_program_from_standard_input_needs_no_main_guard(tmp_path):
    program = """
        import sys
        from deltarl.rewards import VerifierHost, VerifierSpec
        with VerifierHost(VerifierSpec(sys.argv[1]), workers=2) as host:
            print([v.status for v in host.verify([("a", "a", {})] * 2)])
    """
    assert run(tmp_path, program, through_stdin=True) == "['correct', 'correct']\n"


def test_a_host_left_open_ends_with_the_program(tmp_path):
    program = """
        import sys
        from deltarl.rewards import VerifierHost, VerifierSpec
        host = VerifierHost(VerifierSpec(sys.argv[1]), workers=2, timeout=60)
        futures = [host.submit(("hang", "a", {})) for _ in range(5)]
        print(*host.worker_pids())
    """
    pids = [int(pid) for pid in run(tmp_path, program).split()]
    assert len(pids) == 2 and not any(map(psutil.pid_exists, pids))


def test_usable_in_a_daemonic_process_that_was_spawned(tmp_path):
    program = """
        import multiprocessing, sys
        from deltarl.rewards import VerifierHost, VerifierSpec

        def work(name, answers):
            host = VerifierHost(VerifierSpec(name))
            answers.put(([v.status for v in host.verify([("a", "a", {})] * 3)], host.worker_pids()))

        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            answers = context.Queue()
            process = context.Process(target=work, args=(sys.argv[1], answers), daemon=True)
            process.start()
            statuses, pids = answers.get(timeout=60)
            process.join(60)
            print(process.exitcode, *statuses, *pids)
    """
    code, *statuses, pid = run(tmp_path, program).split()
    assert (code, statuses) == ("0", ["correct"] * 3)
    assert wait_until(lambda: not psutil.pid_exists(int(pid)))


def test_a_fork_can_neither_use_nor_close_the_host_of_its_parent(tmp_path):
    program = """
        import os, sys
        from deltarl.rewards import HostClosed, VerifierHost, VerifierSpec
        spec = VerifierSpec(sys.argv[1])
        host = VerifierHost(spec)
        pids = host.worker_pids()
        child = os.fork()
        if child == 0:
            try:
                host.verify([("a", "a", {})])
            except HostClosed as error:
                print(error, flush=True)
            with VerifierHost(spec) as own:
                print(own.verify([("a", "a", {})])[0].status, flush=True)
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print(host.verify([("a", "a", {})])[0].status, host.worker_pids() == pids)
        host.close()
    """
    refused, own, parents = run(tmp_path, program).splitlines()
    assert "open one in this process" in refused
    assert (own, parents) == ("correct", "correct True")


def test_a_host_is_not_sent_to_another_process():
    with VerifierHost(FAULT) as pool, pytest.raises(TypeError, match="send its spec"):
        pickle.dumps(pool)


def test_a_worker_holds_its_own_channel_only():
    with VerifierHost(FAULT, workers=3) as pool:
        killed = pool.worker_pids()[0]
        os.kill(killed, signal.SIGKILL)

        def replaced() -> bool:
            pool.verify([RIGHT] * 9)
            return len({*pool.worker_pids()} - {killed}) == 3

        assert wait_until(replaced)
        held = [v.info["sockets"] for v in pool.verify([("sockets", "", {})] * 60)]
    assert all(len(sockets) == 1 for sockets in held)
    assert len({sockets[0] for sockets in held}) > 1
