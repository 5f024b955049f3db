"""One process of the pool: reads tasks from its connection, answers each, exits when the connection closes."""

import ctypes
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from deltarl.rewards.registry import VerifierLoadError, load_verifier
from deltarl.rewards.types import Verdict, Verifier, VerifierSpec

PR_SET_PDEATHSIG = 1


def main(file_descriptor: int, parent: int) -> None:
    """Serves until the parent closes the connection or dies.

    First message in: {"spec": VerifierSpec, "memory_mb": int}. First message out: None when ready, else the line that
    says why not. Then each message in is a list of tasks (kind, response, gold, meta), each answered by one message
    (score, status, extracted, info, seconds) in order.
    """
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    connection = Connection(file_descriptor)
    try:
        setup = connection.recv()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit_memory(setup["memory_mb"])
        verifier = start_verifier(setup["spec"])
    except VerifierLoadError as error:
        connection.send(str(error))
        return
    except EOFError:
        return
    connection.send(None)
    serve(connection, verifier)


def die_with_parent(parent: int) -> None:
    """Has the kernel SIGKILL this process when the thread that started it ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def limit_memory(megabytes: int) -> None:
    """Private writable memory (heap, stacks, anonymous maps): what a runaway verification grows."""
    resource.setrlimit(resource.RLIMIT_DATA, (megabytes << 20, megabytes << 20))


def start_verifier(spec: VerifierSpec) -> Verifier:
    verifier = load_verifier(spec)
    warm_up = getattr(verifier, "warm_up", None)
    if warm_up is not None:
        try:
            warm_up()
        except Exception as error:
            raise VerifierLoadError(f"verifier {spec.name!r} fails in warm_up(): {describe(error)}") from error
    return verifier


def serve(connection: Connection, verifier: Verifier) -> None:
    while True:
        try:
            tasks = connection.recv()
        except EOFError:
            return
        if tasks is None:
            return
        for task in tasks:
            connection.send(answer(verifier, task))


def answer(verifier: Verifier, task: tuple) -> tuple:
    kind, response, gold, meta = task
    start = time.perf_counter()
    try:
        verdict = verifier.verify(response, gold, meta=meta) if kind == "verify" else check_gold(verifier, gold)
        result = flatten(verdict)
    except MemoryError:
        result = (0.0, "limit", None, {"reason": "memory limit reached"})
    except Exception as error:  # noqa: BLE001 - a verifier that raises costs its own trace only
        result = (0.0, "error", None, {"reason": describe(error)})
    return (*result, time.perf_counter() - start)


def check_gold(verifier: Verifier, gold: str | Sequence[str]) -> Verdict:
    """Status gold_error with the reason, or correct, without grading a response."""
    check = getattr(verifier, "check_gold", None)
    if check is not None:
        reason = check(gold)
        return Verdict(1.0, "correct") if reason is None else Verdict(None, "gold_error", info={"reason": reason})
    first = gold if isinstance(gold, str) else gold[0]
    return verifier.verify(f"\\boxed{{{first}}}", gold, meta={})


def flatten(verdict: Verdict) -> tuple:
    if not isinstance(verdict, Verdict):
        return (0.0, "error", None, {"reason": f"verify() returned a {type(verdict).__name__}, not a Verdict"})
    score = None if verdict.score is None else float(verdict.score)
    extracted = None if verdict.extracted is None else str(verdict.extracted)
    return (score, verdict.status, extracted, plain(verdict.info))


def plain(value: Any) -> Any:
    """The value made of str, int, float, bool, None, list and dict, so that unpickling it imports nothing."""
    if value is None or type(value) in (str, int, bool):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    return str(value)


def describe(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
