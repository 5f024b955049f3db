"""One process of the pool: reads tasks from its channel, answers each, exits when the channel closes."""

import contextlib
import json
import math
import os
import pickle
import resource
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from deltarl.channel import Channel, die_with_parent
from deltarl.rewards.registry import VerifierLoadError, load_verifier
from deltarl.rewards.types import Status, Verdict, Verifier, VerifierSpec

ANSWER_BYTES = 8 << 20
PRINTED_BITS = 4096
ENCODER = json.JSONEncoder(ensure_ascii=False)
DECODER = json.JSONDecoder()


def main(file_descriptor: int, parent: int) -> None:
    """Serves until the parent closes the connection or dies.

    First message in: pickled {"spec": VerifierSpec, "memory_mb": int}. First message out, as all that follow in JSON:
    when ready whether the verifier is `grouped`, else the line that says why it is not. Then each message in is a
    pickled list of tasks (kind, response, gold, meta), each answered by one message [score, status, extracted, info,
    seconds, exhausted] in order.

    Answers are JSON so that nothing a verifier is made to say can run in the parent.
    """
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(file_descriptor, False)
    channel = Channel(socket.socket(fileno=file_descriptor))
    try:
        (setup,) = channel.receive()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        verifier = start_verifier(setup)
    except VerifierLoadError as error:
        channel.send(encode(str(error)))
        return
    channel.send(encode(bool(getattr(verifier, "grouped", False))))
    with contextlib.suppress(EOFError):
        serve(channel, verifier)


def limit_memory(megabytes: int) -> None:
    """Private writable memory (heap, stacks, anonymous maps): what a runaway verification grows."""
    resource.setrlimit(resource.RLIMIT_DATA, (megabytes << 20, megabytes << 20))


def start_verifier(setup: bytes) -> Verifier:
    """Raises VerifierLoadError."""
    try:
        given = pickle.loads(setup)
    except Exception as error:
        raise VerifierLoadError(f"the verifier's options do not load in a worker: {describe(error)}") from error
    spec: VerifierSpec = given["spec"]
    limit_memory(given["memory_mb"])
    verifier = load_verifier(spec)
    warm_up = getattr(verifier, "warm_up", None)
    if warm_up is not None:
        try:
            warm_up()
        except Exception as error:
            raise VerifierLoadError(f"verifier {spec.name!r} fails in warm_up(): {describe(error)}") from error
    return verifier


def serve(channel: Channel, verifier: Verifier) -> None:
    """Raises EOFError when the parent has closed the connection."""
    while True:
        for message in channel.receive():
            for task in pickle.loads(message):
                channel.send(answer(verifier, task))


def answer(verifier: Verifier, task: tuple) -> bytes:
    kind, response, gold, meta = task
    exhausted = False
    start = time.perf_counter()
    try:
        verdict = verifier.verify(response, gold, meta=meta) if kind == "verify" else check_gold(verifier, gold)
        seconds = time.perf_counter() - start
        message = encode([*flatten(verdict), seconds, False])
        reason = None if len(message) <= ANSWER_BYTES else f"a verdict of {len(message)} bytes, limit {ANSWER_BYTES}"
    except MemoryError:
        reason, exhausted = "memory limit reached", True
    except Exception as error:  # noqa: BLE001 - a verifier that raises costs its own trace only
        reason = describe(error)
    if reason is None:
        return message
    status = "limit" if exhausted else "error"
    return encode([0.0, status, None, {"reason": reason}, time.perf_counter() - start, exhausted])


def encode(value: Any) -> bytes:
    """JSON in UTF-8 that also holds the lone surrogates of a broken text."""
    return ENCODER.encode(value).encode("utf-8", "surrogatepass")


def decode(message: bytes) -> Any:
    """What `encode` was given. Raises ValueError."""
    text = message.decode("utf-8", "surrogatepass")
    value, end = DECODER.raw_decode(text)  # json.loads takes twice as long for an answer
    if end != len(text):
        raise ValueError(f"{len(text) - end} characters behind the value")
    return value


def check_gold(verifier: Verifier, gold: str | Sequence[str]) -> Verdict:
    """Status gold_error with the reason, or correct, without grading a response."""
    check = getattr(verifier, "check_gold", None)
    if check is not None:
        reason = check(gold)
        return Verdict(1.0, "correct") if reason is None else Verdict(None, "gold_error", info={"reason": reason})
    first = gold if isinstance(gold, str) else gold[0]
    return verifier.verify(f"\\boxed{{{first}}}", gold, meta={})


def flatten(verdict: Verdict) -> tuple[float | None, Status, str | None, dict[str, Any]]:
    """Raises TypeError for anything but a Verdict."""
    if not isinstance(verdict, Verdict):
        raise TypeError(f"verify() returned a {type(verdict).__name__}, not a Verdict")
    score = None if verdict.score is None else float(verdict.score)
    extracted = None if verdict.extracted is None else str(verdict.extracted)
    return score, verdict.status, extracted, plain(verdict.info)


def plain(value: Any) -> Any:
    """The value made of what JSON has. Other objects become their text, an integer of more digits than Python prints
    its hexadecimal text."""
    if value is None or type(value) in (str, bool):
        return value
    if type(value) is int:
        return value if value.bit_length() <= PRINTED_BITS else hex(value)
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
