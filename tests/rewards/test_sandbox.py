"""The sandbox: what outlives a run, what a program sees, what limits it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deltarl.rewards import VerifierHost, VerifierSpec
from deltarl.rewards.sandbox import Limits, Process, Sandbox

DETACHED = """
import os, sys, time
for _ in range(2):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)", "MARKER"])
        os._exit(0)
time.sleep(HOW_LONG)
print(5)
"""


def fenced(program):
    return f"```python\n{program}\n```\n"


def processes_with(marker):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found += [int(folder.name)] if marker in (folder / "cmdline").read_text() else []
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.fixture(scope="module")
def sandbox():
    made = Sandbox(Limits(), require_isolation=True)
    yield made
    made.close()


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return held


def detached(marker, seconds):
    return DETACHED.replace("MARKER", marker).replace("HOW_LONG", str(seconds))


@pytest.mark.parametrize("isolation", ["namespaces", "process"])
def test_no_process_outlives_its_run(isolation):
    sandbox = Sandbox(Limits(), require_isolation=False)
    assert sandbox._start(isolation) is None
    marker = f"orphan-{isolation}-{os.getpid()}"
    assert sandbox.run([Process.script(detached(marker, 0.3), "")], 20).output == "5\n"
    assert processes_with(marker) == []
    assert sandbox.run([Process.script(detached(marker, 60), "")], 0.5).exit is None
    assert processes_with(marker) == []
    sandbox.close()


@pytest.mark.parametrize("isolation", ["namespaces", "process"])
def test_programs_end_with_a_caller_that_is_killed(isolation):
    marker = f"caller-{isolation}-{os.getpid()}"
    caller = (
        "import sys; from deltarl.rewards.sandbox import *\n"
        "s = Sandbox(Limits(), False); s._start(sys.argv[1]); s.run([Process.script(sys.argv[2], '')], 60)"
    )
    process = subprocess.Popen([sys.executable, "-P", "-c", caller, isolation, detached(marker, 60)])
    inside = f"time.sleep(600)\0{marker}"
    assert wait_until(lambda: len(processes_with(inside)) == 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert wait_until(lambda: not processes_with(inside))


def test_a_host_that_loses_patience_leaves_nothing_behind():
    marker = f"host-{os.getpid()}"
    spec = VerifierSpec("code", {"test_seconds": 60, "total_seconds": 60})
    gold = json.dumps({"inputs": [""], "outputs": ["5"]})
    with VerifierHost(spec, timeout=5.0) as host:
        late, right = host.verify([(fenced(detached(marker, 50)), gold, {}), (fenced("print(5)"), gold, {})])
        assert (late.status, right.status) == ("timeout", "correct")
        assert wait_until(lambda: not processes_with(f"time.sleep(600)\0{marker}"))
        (worker,) = host.worker_pids()
        family = [psutil.Process(worker), *psutil.Process(worker).children(recursive=True)]
        assert len(family) >= 3
    assert psutil.wait_procs(family, timeout=20)[1] == []


LOOKS_AROUND = """
import os, socket, json
seen = {"folders": sorted(os.listdir("/")), "home": None, "user": os.getuid(), "pids": os.getppid()}
def refused(action):
    try:
        action()
    except OSError as error:
        return True
    return False
seen["no network"] = refused(lambda: socket.create_connection(("127.0.0.1", PORT), 2))
seen["no gold"] = refused(lambda: open("SECRET"))
seen["read only"] = refused(lambda: open(os.__file__, "a")) and refused(lambda: open("/x", "w"))
seen["environment"] = sorted(os.environ)
seen["here"] = os.listdir(".")
open("left", "w").write("x")
def unshare():
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x10000000) != 0:
        raise OSError(ctypes.get_errno())
seen["no namespaces"] = refused(unshare)
print(json.dumps(seen))
"""


def test_what_a_program_sees(tmp_path, sandbox):
    secret = tmp_path / "gold.json"
    secret.write_text("42")
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = LOOKS_AROUND.replace("PORT", str(server.getsockname()[1])).replace("SECRET", str(secret))
        for _ in range(2):
            run = sandbox.run([Process.script(program, "")], 20)
            seen = json.loads(run.output)
            assert seen["no network"] and seen["no gold"] and seen["read only"] and seen["no namespaces"]
            assert seen["user"] != 0 and seen["pids"] == 1 and seen["here"] == ["main.py"]
            assert not {"home", "proc", "sys", "tmp", "mnt"} & set(seen["folders"])
            assert set(seen["environment"]) <= {"PYTHONHASHSEED", "PYTHONUTF8", "PYTHONDONTWRITEBYTECODE", "LC_CTYPE"}


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("while True: open('f', 'ab').write(bytes(1 << 20))", "File too large"),
        ("l = [open('main.py') for _ in range(100)]", "Too many open files"),
        ("import os\nfor i in range(200):\n    open(f'f{i}', 'wb').write(bytes(1 << 20))", "No space left"),
        (
            "import os, time\nfor _ in range(200):\n    if os.fork() == 0: time.sleep(60)",
            "Resource temporarily unavailable",
        ),
        (
            "import threading, time\n"
            "for _ in range(99): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
            "thread",
        ),
        ("import os\nos.abort()", "signal 6"),
        ("def f(): f()\nf()", "RecursionError"),
    ],
)
def test_limits(sandbox, program, reason):
    run = sandbox.run([Process.script(program, "")], 20)
    assert run.exit not in (0, None) and reason in f"{run.stderr} signal {-run.exit}"
