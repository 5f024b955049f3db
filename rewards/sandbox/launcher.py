"""The trusted process around untrusted programs; `Sandbox` starts it as a script. Imports the standard library alone.

In namespaces it is three kinds of process: the launcher, which waits; an init, process 1 of a new process namespace;
the programs. When launcher or init ends, however it ends, the kernel ends every process of the namespace.

Standard input has one JSON object a line: first {"isolate", "sources", "limits"}, then jobs {"seconds", "processes":
[{"main", "arguments", "stdin"}, ...]}. Each is answered by a line on standard output: the first {"problem": text or
null}, a job {"exit", "output", "stderr", "seconds"}, where exit is null for a program that was late. The end of
standard input, also in the middle of a job, ends every program and the launcher.
"""

import contextlib
import ctypes
import json
import math
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 8, 0x4000, 0x40000, 2
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_MOUNT_SETATTR = 428, 429, 442
AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE, OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH = -100, 0x1000, 0x8000, 1, 4
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
NOBODY = 65534
WORK = "/program"
CHUNK = 1 << 16
STDERR_KEPT = 2000
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"}
LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    control = Lines(0)
    line = control.read()
    if line is None:
        return
    setup = json.loads(line)
    try:
        if setup["isolate"]:
            become_init_of_new_namespaces()
            build_root(setup["sources"], setup["limits"])
        else:
            check(LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1), "prctl")
        check(LIBC.prctl(PR_SET_DUMPABLE, 0), "prctl")
    except OSError as error:
        answer({"problem": f"{error.filename}: {error.strerror}"})
        return
    answer({"problem": None})
    while (line := control.read()) is not None:
        with work_folder(setup["isolate"], setup["limits"]):
            result = run(json.loads(line), setup["limits"], end_namespace if setup["isolate"] else end_descendants)
        if result is None:
            return
        answer(result)


class Lines:
    """Lines of a descriptor. Between a job's line and the next nothing is buffered, so `select` tells of its end."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.kept = b""

    def read(self) -> str | None:
        parts = [self.kept]
        while b"\n" not in parts[-1]:
            parts.append(os.read(self.descriptor, CHUNK))
            if not parts[-1]:
                return None
        line, _, self.kept = b"".join(parts).partition(b"\n")
        return line.decode()


def answer(message: dict) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


def check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def become_init_of_new_namespaces() -> None:
    """Returns in the init process; the process that called waits for it and exits."""
    with users_mapped():
        flags = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
        check(LIBC.unshare(flags), "unshare")
    check(LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")
    alive, held_by_launcher = os.pipe()
    init = os.fork()
    if init:
        os.close(0)
        os.waitpid(init, 0)
        os._exit(0)
    os.close(held_by_launcher)
    check(LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")
    if select.select([alive], [], [], 0)[0]:
        os._exit(1)
    os.close(alive)


@contextlib.contextmanager
def users_mapped():
    """Keeps this user in the user namespace made inside the block; root also gets nobody, whom its programs run as.

    Two users can be mapped from outside only, which a child of root does that stays there.
    """
    user, group, target = os.getuid(), os.getgid(), os.getpid()
    if user != 0:
        yield
        write_map("self", "setgroups", "deny")
        write_map("self", "uid_map", f"{user} {user} 1")
        write_map("self", "gid_map", f"{group} {group} 1")
        return
    wait, go = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(go)
        os.read(wait, 1)
        try:
            for name in ("uid_map", "gid_map"):
                write_map(target, name, f"0 0 1\n{NOBODY} {NOBODY} 1")
        except OSError as error:
            os._exit(error.errno)
        os._exit(0)
    os.close(wait)
    try:
        yield
    finally:
        os.close(go)
        code = os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])
    if code:
        raise OSError(code, os.strerror(code), "uid_map")


def write_map(process: int | str, name: str, text: str) -> None:
    with open(f"/proc/{process}/{name}", "w") as file:
        file.write(text)


def build_root(sources: list[str], limits: dict) -> None:
    """Makes the sources, read-only, and an empty /program the whole file system of this process.

    A chroot also denies the programs user namespaces of their own, and with them every capability.
    """
    check(LIBC.mount(None, b"/", None, MS_REC | MS_PRIVATE, None), "mount")
    trees = [(source, os.path.isdir(source), read_only_copy(source)) for source in sources]
    check(LIBC.mount(b"tmpfs", b"/tmp", b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=755,size=1m"), "mount tmpfs")
    os.mkdir("/tmp" + WORK)
    for source, is_folder, tree in trees:
        target = "/tmp" + source
        os.makedirs(target if is_folder else os.path.dirname(target), exist_ok=True)
        if not is_folder:
            open(target, "x").close()
        moved = LIBC.syscall(SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, target.encode(), MOVE_MOUNT_F_EMPTY_PATH)
        check(moved, f"move_mount {source}")
        os.close(tree)
    os.chroot("/tmp")
    os.chdir("/")
    make_read_only(b"/", AT_FDCWD, 0)
    mount_work_folder(limits)


def read_only_copy(source: str) -> int:
    tree = LIBC.syscall(SYS_OPEN_TREE, AT_FDCWD, source.encode(), OPEN_TREE_CLONE | AT_RECURSIVE | os.O_CLOEXEC)
    check(tree, f"open_tree {source}")
    make_read_only(b"", tree, AT_EMPTY_PATH | AT_RECURSIVE)
    return tree


def make_read_only(path: bytes, descriptor: int, flags: int) -> None:
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    check(LIBC.syscall(SYS_MOUNT_SETATTR, descriptor, path, flags, attributes, len(attributes)), "mount_setattr")


def mount_work_folder(limits: dict) -> None:
    data = f"mode=1777,size={limits['disk_mb']}m,nr_inodes=4096".encode()
    check(LIBC.mount(b"tmpfs", WORK.encode(), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, data), f"mount {WORK}")
    os.chdir(WORK)


@contextlib.contextmanager
def work_folder(isolate: bool, limits: dict):
    """An empty working directory for one job, gone with everything in it afterwards."""
    if isolate:
        yield
        os.chdir("/")
        check(LIBC.umount2(WORK.encode(), MNT_DETACH), f"umount {WORK}")
        mount_work_folder(limits)
        return
    folder = tempfile.mkdtemp(prefix="program-")
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir("/")
        shutil.rmtree(folder)


def run(job: dict, limits: dict, end_programs) -> dict | None:
    """Runs a job's one or two processes until the first of them ends or is late; None when the caller is gone.

    Two processes share a socket, descriptor 3 in both. Only the first one's output is kept.
    """
    start = time.monotonic()
    joints = socket.socketpair() if len(job["processes"]) == 2 else (None,)
    output, errors, unread = (os.memfd_create(name) for name in ("output", "errors", "unread"))
    streams = ((output, errors), (unread, unread))
    pids = [
        start_program(process, to, joint, limits, job["seconds"])
        for process, to, joint in zip(job["processes"], streams, joints, strict=False)
    ]
    for joint in filter(None, joints):
        joint.close()
    ended = os.pidfd_open(pids[0])
    ready, _, _ = select.select([0, ended], [], [], job["seconds"])
    code = os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) if ended in ready else None
    end_programs()
    result = {
        "exit": code,
        "output": tail(output, limits["output_bytes"]),
        "full": os.fstat(output).st_size >= limits["output_bytes"],
        "stderr": tail(errors, STDERR_KEPT),
        "seconds": time.monotonic() - start,
    }
    for descriptor in (output, errors, unread, ended):
        os.close(descriptor)
    return None if 0 in ready else result


def tail(file: int, size: int) -> str:
    """The last `size` bytes: more than the limit in a file means that the program ran into it."""
    start = max(0, os.fstat(file).st_size - size)
    return os.pread(file, size, start).decode(errors="replace")


def start_program(
    process: dict, streams: tuple[int, int], joint: socket.socket | None, limits: dict, seconds: float
) -> int:
    """Starts an interpreter whose standard input is a file with `process["stdin"]`; gives its process id."""
    if process["main"] is not None:
        with open("main.py", "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(process["main"])
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        stdin = os.memfd_create("input")
        with open(stdin, "wb", closefd=False) as file:
            file.write(process["stdin"].encode(errors="surrogatepass"))
        os.lseek(stdin, 0, os.SEEK_SET)
        for target, descriptor in enumerate((stdin, *streams)):
            os.dup2(descriptor, target)
        if joint is not None:
            os.dup2(joint.fileno(), 3)
            os.set_inheritable(3, True)
        if limits["as_nobody"]:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
        set_limits(limits, seconds)
        os.execve(sys.executable, [sys.executable, "-s", "-P", "-S", *process["arguments"]], ENVIRONMENT)
    finally:
        os._exit(126)


def set_limits(limits: dict, seconds: float) -> None:
    for name, value in (
        (resource.RLIMIT_CPU, math.ceil(seconds) + 1),
        (resource.RLIMIT_AS, limits["memory_mb"] << 20),
        (resource.RLIMIT_FSIZE, limits["output_bytes"]),
        (resource.RLIMIT_NOFILE, limits["files"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def end_namespace() -> None:
    """Ends every process of the namespace but this one, its init, and reaps them."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    reap(0)


def end_descendants() -> None:
    """Ends every descendant; those of a dead parent are this process's children, which it adopts."""
    while found := descendants():
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        reap(os.WNOHANG)


def descendants() -> list[int]:
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
    family = {os.getpid()}
    while found := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= found
    return list(family - {os.getpid()})


def reap(options: int) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, options)[0]:
            pass


if __name__ == "__main__":
    main()
