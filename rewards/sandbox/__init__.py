"""Runs untrusted Python in processes that the kernel keeps apart from everything else.

With isolation "namespaces" (Linux 5.14 or newer where user namespaces are permitted, no privilege needed) a program
sees a file system of its own: the interpreter's installation and the system's libraries, read-only, no packages, no
/proc, and an empty /program of a few megabytes that is emptied after every run. It has no network, not even loopback,
sees no other process, holds no privilege and can gain none. When a run ends, or the caller, or the caller's host, every
process of it ends, however it was detached. What is not isolated: the kernel itself, its system calls all open to the
program; the processor's time, shared with everything else; and memory, which is limited for each process, not in sum.

With isolation "process", used only where asked for, a program still has its own session, the limits and an empty
folder to work in, and its descendants are ended with it; but it runs as this user, reads what this user can read,
reaches the network, and can kill the launcher that would clean up behind it; the limit of processes does not hold for
root.

Limits of either kind: CPU seconds, address space, size of any file written, standard output included, open files,
processes and threads, no core files; an environment that holds three settings of Python's.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LAUNCHER = Path(__file__).with_name("launcher.py")
RUNNER = Path(__file__).with_name("runner.py").read_text()
SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom")
GRACE_SECONDS = 20.0
START_SECONDS = 60.0


class SandboxError(RuntimeError):
    """The sandbox itself cannot work; nothing was learnt about the program."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one run. memory_mb: address space of each process. disk_mb: /program. output_bytes: any one file."""

    memory_mb: int = 512
    disk_mb: int = 64
    output_bytes: int = 4 << 20
    files: int = 64
    processes: int = 16


@dataclass(frozen=True, slots=True)
class Process:
    """One interpreter of a run: its arguments, its standard input, and the text of main.py where it has one."""

    arguments: Sequence[str]
    stdin: str
    main: str | None = None

    @classmethod
    def script(cls, program: str, stdin: str) -> "Process":
        return cls(("main.py",), stdin, program)

    @classmethod
    def role(cls, name: str, stdin: str) -> "Process":
        """One of the roles of runner.py."""
        return cls(("-c", RUNNER, name), stdin)


@dataclass(frozen=True, slots=True)
class Run:
    """How the first process of a run ended.

    exit: its exit code, negative for a signal, None when it was late. output, stderr: the ends of what it wrote.
    full: whether it wrote as much as it may. seconds: of wall clock.
    """

    exit: int | None
    output: str
    stderr: str
    full: bool
    seconds: float


class Sandbox:
    """A launcher that is kept between runs; each run has fresh processes and an empty folder.

    require_isolation: True raises SandboxError where namespaces are not to be had; False falls back to "process".
    """

    def __init__(self, limits: Limits, require_isolation: bool) -> None:
        self.limits = limits
        self.require_isolation = require_isolation
        self.isolation = "none yet"
        self._launcher: subprocess.Popen | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_launcher": None}

    def run(self, processes: Sequence[Process], seconds: float) -> Run:
        """Runs one process, or two joined by a socket, until the first ends. Raises SandboxError."""
        self.start()
        job = {"seconds": seconds, "processes": [asdict(process) for process in processes]}
        return Run(**self._exchange(job, seconds + GRACE_SECONDS))

    def start(self) -> None:
        """Starts the launcher unless it runs. Raises SandboxError."""
        if self._launcher is not None and self._launcher.poll() is None:
            return
        problem = self._start("namespaces")
        if problem is not None and not self.require_isolation:
            problem = self._start("process")
        if problem is not None:
            raise SandboxError(
                f"no isolation for untrusted programs ({problem}): permit user namespaces here, "
                "or set require_isolation: false to run them with limits alone"
            )

    def close(self) -> None:
        """Ends the launcher and everything under it."""
        if self._launcher is not None:
            self._launcher.stdin.close()
            self._launcher.stdout.close()
            self._launcher.wait()
            self._launcher = None

    def _start(self, isolation: str) -> str | None:
        """Starts a launcher with this isolation; the reason why it cannot work, None when it does."""
        self.close()
        python = os.path.realpath(sys._base_executable)
        self._launcher = subprocess.Popen(
            [python, "-I", "-S", str(LAUNCHER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={},
            cwd="/",
            start_new_session=True,
        )
        isolate = isolation == "namespaces"
        limits = asdict(self.limits) | {"as_nobody": isolate and os.getuid() == 0}
        setup = {"isolate": isolate, "sources": visible_paths(python) if isolate else [], "limits": limits}
        problem = self._exchange(setup, START_SECONDS)["problem"]
        self.isolation = isolation if problem is None else "none yet"
        if problem is not None:
            self.close()
        return problem

    def _exchange(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """One line to the launcher and its line back. Raises SandboxError, and then ends it."""
        deadline = time.monotonic() + seconds
        answer = b""
        try:
            request = memoryview(json.dumps(message).encode() + b"\n")
            while request:
                request = request[self._launcher.stdin.write(request) :]
            while not answer.endswith(b"\n"):
                left = max(0.0, deadline - time.monotonic())
                if not select.select([self._launcher.stdout], [], [], left)[0]:
                    raise SandboxError("the sandbox does not answer")
                data = os.read(self._launcher.stdout.fileno(), 1 << 20)
                if not data:
                    raise SandboxError("the sandbox ended")
                answer += data
        except (SandboxError, BrokenPipeError) as error:
            self._launcher.kill()
            self.close()
            raise SandboxError(str(error)) from error
        return json.loads(answer)


def visible_paths(python: str) -> list[str]:
    """What an isolated program sees of the file system: files and folders, none inside another."""
    wanted = [path for path in (*SYSTEM, sys.base_prefix, os.path.dirname(python)) if os.path.exists(path)]
    return [path for path in wanted if not any(path != other and path.startswith(other + "/") for other in wanted)]
