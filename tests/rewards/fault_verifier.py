"""A verifier that does what its response tells it to: the faults that a host must survive."""

import os
import signal
import time

from deltarl.rewards import Verdict

HOARD = []


class FaultVerifier:
    name = "fault"
    version = "1"

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds

    def check_gold(self, gold):
        return "an odd gold" if gold == "odd" else None

    def verify(self, response, gold, *, meta):
        time.sleep(self.seconds)
        if response == "hang":
            while True:
                pass
        if response == "raise":
            raise KeyError("no such key")
        if response == "exit":
            os._exit(3)
        if response == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if response == "memory":
            while True:
                HOARD.append(bytearray(1 << 26))
        if response == "print":
            print("noise on standard output")
        if response == "nothing":
            return None
        if response == "sleep":
            time.sleep(60)
        if response == "modules":
            import sys

            return Verdict(1.0, "correct", info={"heavy": [m for m in ("torch", "vllm", "trl") if m in sys.modules]})
        return Verdict(float(response == gold), "correct" if response == gold else "incorrect", response, {**meta})


def make(seconds: float = 0.0):
    return FaultVerifier(seconds)


READY = FaultVerifier()
NOT_ONE = 7


def make_wrong():
    return "a string"
