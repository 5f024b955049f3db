import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from deltarl.rewards import HostClosed, VerifierHost, VerifierLoadError, VerifierSpec, check_golds

FAULT_FILE = Path(__file__).with_name("fault_verifier.py")
FAULT = VerifierSpec(f"{FAULT_FILE}:FaultVerifier")
SLOW = VerifierSpec(FAULT.name, {"seconds": 0.005})


@pytest.fixture(scope="module")
def host():
    with VerifierHost(FAULT, workers=2, timeout=1.0, memory_mb=512) as shared:
        yield shared


def alive(pid: int) -> bool:
    """Whether a process runs: a zombie that waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_verdicts_come_in_order_with_meta_and_progress(host):
    items = [(str(i % 3), "0", {"row": i}) for i in range(300)]
    seen = []
    verdicts = host.verify(items, progress=lambda done, total: seen.append((done, total)))
    assert [v.extracted for v in verdicts] == [response for response, _, _ in items]
    assert [v.info["row"] for v in verdicts] == list(range(300))
    assert [v.score for v in verdicts] == [float(i % 3 == 0) for i in range(300)]
    assert seen == [(i + 1, 300) for i in range(300)]


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        ("hang", "timeout", "no verdict after 1 s"),
        ("sleep", "timeout", "no verdict after 1 s"),
        ("raise", "error", "KeyError: 'no such key'"),
        ("exit", "error", "exit code 3"),
        ("segfault", "error", "SIGSEGV"),
        ("memory", "limit", "memory"),
        ("nothing", "error", "returned a NoneType, not a Verdict"),
    ],
)
def test_a_fault_costs_its_own_trace_only(host, fault, status, reason):
    before = host.counts()
    verdicts = host.verify([*[("a", "a", {})] * 5, (fault, "a", {}), *[("a", "a", {})] * 20])
    assert [v.status for v in verdicts] == ["correct"] * 5 + [status] + ["correct"] * 20
    assert verdicts[5].score == 0.0
    assert reason in verdicts[5].info["reason"]
    assert host.counts()[status] == before[status] + 1
    assert host.counts()["correct"] == before["correct"] + 25


def test_output_of_a_verifier_does_not_disturb_the_answers(host):
    assert [v.status for v in host.verify([("print", "print", {})] * 3)] == ["correct"] * 3


def test_long_texts_are_not_sent(host):
    with VerifierHost(FAULT, max_response_chars=10, max_gold_chars=5) as small:
        verdicts = small.verify([("x" * 11, "a", {}), ("a", "a" * 6, {}), ("a", ["a", "bbbbb"], {}), ("a", "a", {})])
    assert [v.status for v in verdicts] == ["limit", "limit", "limit", "correct"]


def test_workers_import_nothing_heavy(host):
    assert host.verify([("modules", "", {})])[0].info["heavy"] == []


def test_killed_workers_lose_nothing_and_change_no_verdict():
    items = [(str(i % 7), "3", {"row": i}) for i in range(500)]
    with VerifierHost(SLOW, workers=2, timeout=5.0) as pool:
        stop = threading.Event()
        killed = []

        def killer():
            while not stop.wait(0.4):
                killed.append(pool.worker_pids()[len(killed) % 2])
                os.kill(killed[-1], signal.SIGKILL)

        thread = threading.Thread(target=killer)
        thread.start()
        verdicts = pool.verify(items)
        stop.set()
        thread.join()
    assert len(killed) >= 2
    assert [v.info.get("row") for v in verdicts] == list(range(500))
    assert [v.status for v in verdicts] == ["correct" if i % 7 == 3 else "incorrect" for i in range(500)]


def test_usable_from_threads(host):
    results = {}

    def work(name):
        results[name] = [v.status for v in host.verify([(name, "3", {})] * 40)]

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {str(i): ["correct" if i == 3 else "incorrect"] * 40 for i in range(6)}


def test_close_ends_every_process_and_cancels_what_waits():
    pool = VerifierHost(FAULT, workers=2, timeout=30.0)
    pids = pool.worker_pids()
    running = [pool.submit(("sleep", "a", {})) for _ in range(2)]
    assert wait_until(lambda: all(f.running() for f in running))
    waiting = pool.submit(("a", "a", {}))
    pool.close()
    pool.close()
    assert waiting.cancelled()
    for future in running:
        with pytest.raises(HostClosed):
            future.result(timeout=0)
    assert not any(map(alive, pids))
    with pytest.raises(HostClosed):
        pool.submit(("a", "a", {}))


PARENT = """
    import sys, time
    from deltarl.rewards import VerifierHost, VerifierSpec
    if __name__ == "__main__":
        host = VerifierHost(VerifierSpec(sys.argv[1]), workers=2, timeout=60.0)
        futures = [host.submit(("hang", "a", {})) for _ in range(2)]
        while not all(f.running() for f in futures):
            time.sleep(0.01)
        print(*host.worker_pids(), flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_parent(tmp_path, how):
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    arguments = [sys.executable, str(script), FAULT.name]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        parent.send_signal(how)
        parent.wait(timeout=20)
    assert wait_until(lambda: not any(map(alive, pids)))


def test_a_verifier_that_does_not_load_is_one_line():
    with pytest.raises(VerifierLoadError, match=r"^verifier '.*' has no option 'second': did you mean 'seconds'\?$"):
        VerifierHost(VerifierSpec(FAULT.name, {"second": 1}))


def test_check_golds_names_the_bad_ones(host):
    assert check_golds(host, ["1", "odd", "2"]) == [(1, "odd", "an odd gold")]
    assert check_golds("math", ["1/2", "", "\\frac{1}{", ["?", "3"]]) == [
        (1, "", "empty"),
        (2, "\\frac{1}{", "ends too early"),
    ]


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="workers is 0"):
        VerifierHost(FAULT, workers=0)
    with pytest.raises(ValueError, match="timeout is 0"):
        VerifierHost(FAULT, timeout=0)
