"""Messages over a stream socket: each arrives whole, and is waited for no longer than asked."""

import select
import socket
import struct
import time

HEADER = struct.Struct("!Q")
CHUNK_BYTES = 1 << 18


class Channel:
    """One end of a connection. Bytes in, bytes out; what they mean is for the two sides to agree on.

    longest: bytes of a message that this end accepts, None for any.
    """

    def __init__(self, end: socket.socket, longest: int | None = None) -> None:
        self._socket = end
        self._longest = longest
        self._readable = select.poll()
        self._readable.register(end, select.POLLIN)
        self._received = bytearray()

    def send(self, message: bytes, seconds: float | None = None) -> None:
        """Raises TimeoutError when the other end has not taken it all in time, OSError when it is gone."""
        if seconds != self._socket.gettimeout():
            self._socket.settimeout(seconds)
        self._socket.sendall(HEADER.pack(len(message)) + message)

    def receive(self, seconds: float | None = None) -> bytes:
        """The next message. Raises TimeoutError when it is not there in time, EOFError or OSError when the other end is
        gone or sends no messages. What has come before the call is seen however late the call is made."""
        end = None if seconds is None else time.monotonic() + seconds
        while (message := self._take()) is None:
            if end is not None and not self._readable.poll(max(end - time.monotonic(), 0) * 1e3):
                raise TimeoutError(f"no message in {seconds:g} s")
            chunk = self._socket.recv(CHUNK_BYTES)
            if not chunk:
                raise EOFError("the other end is closed")
            self._received += chunk
        return message

    def close(self) -> None:
        """The other end sees the end of the stream, even where a fork of this process holds a copy of this end."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other end went first
            pass
        finally:
            self._socket.close()

    def _take(self) -> bytes | None:
        if len(self._received) < HEADER.size:
            return None
        (length,) = HEADER.unpack_from(self._received)
        if self._longest is not None and length > self._longest:
            raise ConnectionError(f"a message of {length} bytes, limit {self._longest}")
        end = HEADER.size + length
        if len(self._received) < end:
            return None
        message = bytes(memoryview(self._received)[HEADER.size : end])
        del self._received[:end]
        return message
