"""The process of a remote engine: takes commands from its channel, advances the engine between them, says what ended.

Messages in are pickled (number, command, arguments). Messages out are pickled too: ("ready", layout, device type) or
("unfit", error) once; then ("answer", number, value) or ("refused", number, error) to each command but `add`, and
("ended", [(name, trace), ...], tokens of the running requests) when requests end and at least every BEAT_SECONDS while
some run. ("failed", text) is the last word of a process that ends by an error of its own.
"""

import os
import pickle
import signal
import socket
import time
import warnings
from collections.abc import Iterable
from typing import Any

from deltarl.channel import Channel, die_with_parent
from deltarl.rollout import ranks
from deltarl.rollout.engine import EngineError
from deltarl.rollout.types import Request, Trace
from deltarl.rollout.worker import VllmWorker

BEAT_SECONDS = 0.5


def main(file_descriptor: int, parent: int) -> None:
    """Serves until the parent closes the connection or dies. The first message in: VllmWorker's arguments, pickled."""
    die_with_parent(parent)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(file_descriptor, False)
    channel = Channel(socket.socket(fileno=file_descriptor))
    (arguments,) = channel.receive()
    try:
        worker = VllmWorker(**pickle.loads(arguments))
    except EngineError as error:
        channel.send(pickle.dumps(("unfit", error)))
        return
    except Exception as error:
        channel.send(pickle.dumps(("unfit", EngineError(f"the engine did not start: {type(error).__name__}: {error}"))))
        raise
    try:
        Server(channel, worker).serve()
    except EOFError:
        os._exit(0)  # all that it holds goes with it, and vLLM takes seconds to put it away
    except Exception as error:
        channel.send(pickle.dumps(("failed", f"{type(error).__name__}: {error}")))
        raise


class Server:
    """One engine at the end of a channel."""

    def __init__(self, channel: Channel, worker: VllmWorker) -> None:
        self.channel, self.worker = channel, worker
        self.spoke = time.monotonic()
        self.say("ready", *worker.on_ranks(ranks.describe)[0])

    def serve(self) -> None:
        """Raises EOFError when the parent has closed the connection."""
        while True:
            for message in self.messages():
                number, command, arguments = pickle.loads(message)
                self.obey(number, command, arguments)
            if self.worker.unfinished and not self.worker.broken:
                self.advance()

    def messages(self) -> list[bytes]:
        """Those that are in; waits for one while the engine has nothing to do."""
        busy = self.worker.unfinished and not self.worker.broken
        try:
            return self.channel.receive(0 if busy else None)
        except TimeoutError:
            return []

    def obey(self, number: int, command: str, arguments: tuple) -> None:
        try:
            value = getattr(self, command)(*arguments)
        except ValueError as error:
            self.say("refused", number, error)
            return
        if command != "add":
            self.say("answer", number, value)

    def advance(self) -> None:
        ended = self.worker.step()
        if ended or time.monotonic() - self.spoke >= BEAT_SECONDS:
            self.say("ended", ended, self.worker.running_tokens)

    def say(self, *message: Any) -> None:
        """Raises EOFError when the parent has closed the connection."""
        try:
            self.channel.send(pickle.dumps(message))
        except (BrokenPipeError, ConnectionResetError):
            raise EOFError("the other end is closed") from None
        self.spoke = time.monotonic()

    def add(self, requests: list[Request]) -> None:
        self.worker.add(requests)

    def suspend(self, names: Iterable[str]) -> list[tuple[str, Trace]]:
        return self.worker.suspend(names)

    def begin_sync(self, handle: Any) -> None:
        """From here on until `end_sync` no request advances."""
        self.worker.begin_sync()
        self.worker.on_ranks(ranks.attach_memory, handle)

    def bucket(self, index: int) -> None:
        self.worker.on_ranks(ranks.read_bucket, index)

    def arrived(self) -> list[dict[str, int]]:
        return self.worker.on_ranks(ranks.arrived)

    def end_sync(self, version: int) -> None:
        self.worker.end_sync(version)

    def sleep(self, keep_weights: bool) -> None:
        self.worker.sleep(keep_weights)

    def wake(self) -> None:
        self.worker.wake()
