"""Messages over a stream socket: each arrives whole, and is waited for no longer than asked.

What the processes that this package starts share: the verifier host's workers and the engine of a rollout worker.
"""

import ctypes
import os
import select
import signal
import socket
import struct
import time

HEADER = struct.Struct("!Q")
CHUNK_BYTES = 1 << 18
PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Has the kernel SIGKILL this process when the thread that started it ends, however it ends."""
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0 or os.getppid() != parent:
        os._exit(1)


class Channel:
    """One end of a connection. Bytes in, bytes out; what they mean is for the two sides to agree on.

    longest: bytes of a message that this end accepts, None for any.
    """

    def __init__(self, end: socket.socket, longest: int | None = None) -> None:
        self._socket = end
        self._longest = longest
        self._ready = select.poll()
        self._ready.register(end, select.POLLIN)
        self._received = bytearray()
        self._unsent = bytearray()

    def send(self, message: bytes) -> None:
        """Returns when it is all on its way. Raises OSError when the other end is gone."""
        self._socket.sendall(HEADER.pack(len(message)) + message)

    def post(self, message: bytes) -> None:
        """Never blocks: what the other end does not take now goes out during `receive`, and when it is gone, `receive`
        says so."""
        self._unsent += HEADER.pack(len(message)) + message
        self._push()

    def receive(self, seconds: float | None = None) -> list[bytes]:
        """The messages that are in, one at least. Raises TimeoutError when none is there in time, EOFError or OSError
        when the other end is gone or sends no messages. What has come before the call is seen however late the call is
        made, and what was sent before the other end went is seen first."""
        end = None if seconds is None else time.monotonic() + seconds
        while not (messages := self._whole_messages()):
            if not self._wait(end):
                raise TimeoutError(f"no message in {seconds:g} s")
            chunk = self._socket.recv(CHUNK_BYTES)
            if not chunk:
                raise EOFError("the other end is closed")
            self._received += chunk
        return messages

    def close(self) -> None:
        """The other end sees the end of the stream, even where a fork of this process holds a copy of this end."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other end went first
            pass
        finally:
            self._socket.close()

    def _wait(self, end: float | None) -> bool:
        """Whether there is something to receive before `end`; meanwhile sends what was left."""
        while True:
            self._ready.modify(self._socket, select.POLLIN | select.POLLOUT if self._unsent else select.POLLIN)
            events = self._ready.poll(None if end is None else max(end - time.monotonic(), 0) * 1e3)
            if not events:
                return False
            if events[0][1] != select.POLLOUT:
                return True
            self._push()

    def _push(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._socket.send(self._unsent, socket.MSG_DONTWAIT)]
        except BlockingIOError:
            pass
        except OSError:  # the other end is gone: `receive` says so, after what it sent before
            self._unsent.clear()

    def _whole_messages(self) -> list[bytes]:
        messages, start = [], 0
        with memoryview(self._received) as received:
            while len(received) - start >= HEADER.size:
                (length,) = HEADER.unpack_from(received, start)
                if self._longest is not None and length > self._longest:
                    if messages:
                        break
                    raise ConnectionError(f"a message of {length} bytes, limit {self._longest}")
                end = start + HEADER.size + length
                if len(received) < end:
                    break
                messages.append(bytes(received[start + HEADER.size : end]))
                start = end
        del self._received[:start]
        return messages
