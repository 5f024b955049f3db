"""A verifier that does what its response tells it to: the faults that a host must survive."""

import os
import signal
import stat
import sys
import time
from pathlib import Path

from deltarl.rewards import Verdict

HOARD = []


class FaultVerifier:
    """seconds: what each verification takes. start_seconds: what warm_up() takes. log: a file that gets a line for each
    process that loads the verifier."""

    name = "fault"
    version = "1"

    def __init__(self, seconds: float = 0.0, start_seconds: float = 0.0, log: str | None = None):
        self.seconds = seconds
        self.start_seconds = start_seconds
        self.log = log

    def warm_up(self):
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()}\n")
        time.sleep(self.start_seconds)

    def check_gold(self, gold):
        return "an odd gold" if gold == "odd" else None

    def verify(self, response, gold, *, meta):
        time.sleep(self.seconds)
        fault, _, argument = response.partition(" ")
        if fault in FAULTS:
            return FAULTS[fault](argument)
        return Verdict(float(response == gold), "correct" if response == gold else "incorrect", response, {**meta})


def hang(_):
    while True:
        pass


def raise_(_):
    raise KeyError("no such key")


def hoard(_):
    while True:
        HOARD.append(bytearray(1 << 24))


def leak(_):
    HOARD.append(bytearray(100 << 20))
    return Verdict(1.0, "correct")


def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.005)
    return Verdict(1.0, "correct", "waited")


def note(argument):
    """Appends a word to a file: "note WORD PATH"."""
    word, _, path = argument.partition(" ")
    with open(path, "a") as file:
        file.write(f"{word}\n")
    return Verdict(1.0, "correct", word)


def sockets(_):
    """The sockets that this process holds."""
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return Verdict(1.0, "correct", info={"sockets": [link for link in links if link.startswith("socket:")]})


def garbage(text):
    """Writes what is no verdict into the channel."""
    for file in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(file).st_mode):
                os.write(file, len(text).to_bytes(8, "big") + text.encode())
        except OSError:
            continue
    time.sleep(60)


def orphan(path):
    """Dies, leaving a child that holds a copy of the channel."""
    if os.fork() == 0:
        with open(path, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(600)
    os._exit(3)


def heavy_modules(_):
    return Verdict(1.0, "correct", info={"heavy": [m for m in ("torch", "vllm", "trl") if m in sys.modules]})


FAULTS = {
    "hang": hang,
    "raise": raise_,
    "exit": lambda _: os._exit(3),
    "segfault": lambda _: os.kill(os.getpid(), signal.SIGSEGV),
    "memory": hoard,
    "leak": leak,
    "noise": lambda text: print("noise on standard output") or Verdict(1.0, "correct"),
    "nothing": lambda _: None,
    "sleep": lambda _: time.sleep(60),
    "nap": lambda seconds: time.sleep(float(seconds)) or Verdict(1.0, "correct"),
    "wait": wait_for,
    "note": note,
    "modules": heavy_modules,
    "sockets": sockets,
    "garbage": garbage,
    "orphan": orphan,
    "long": lambda length: Verdict(1.0, "correct", "x" * int(length)),
    "object": lambda _: Verdict(1.0, "correct", info={"big": 10**5000, "nested": {1: {2}}, "type": int}),
    "surrogate": lambda _: Verdict(1.0, "correct", "\ud800", {"\ud800": "\x00"}),
}


def make(seconds: float = 0.0):
    return FaultVerifier(seconds)


READY = FaultVerifier()
NOT_ONE = 7


def make_wrong():
    return "a string"
