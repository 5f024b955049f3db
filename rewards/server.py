"""A verifier behind HTTP, as OpenRLHF asks for rewards (`--reward.remote_url http://127.0.0.1:5000/get_reward`).

    POST /get_reward   {"query": [prompt + response, ...], "prompts": [...], "labels": [gold, ...]}
                    -> {"rewards": [...], "scores": [...], "extra_logs": {"correct": [...], ...}}   one entry per query
    GET /health     -> {"status": "ok", "verifier": "math", "verdicts": {status: count, ...}}

A request that cannot be graded is answered with {"error": one line} and 400 (not JSON), 404, 411, 413 (too large), 422
(not of this form, or a label that is unusable as a gold), or 503 (closing).
"""

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from deltarl.rewards.host import HostClosed, Item, VerifierHost
from deltarl.rewards.types import Verdict

MAX_REQUEST_BYTES = 16 << 20
MAX_CONCURRENT = 16
MAX_DISCARDED_BYTES = 4 * MAX_REQUEST_BYTES
CHUNK_BYTES = 1 << 16
PROMPT_END_CHARS = 64
UNREAD = (404, 411, 413)
FAILED = ("timeout", "limit", "error")
END_TOKENS = re.compile(r"(?:\s*(?:<\|[^|<>\s]{1,40}\|>|</s>|<eos>|<end_of_turn>|<pad>))+\s*\Z")


class RequestError(Exception):
    """A request that cannot be graded: the HTTP status, and why in one line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class RewardServer(ThreadingHTTPServer):
    """Answers reward requests from a verifier host; at most MAX_CONCURRENT are read and graded at a time.

    `serve_forever()` runs until another thread calls `stop()`. Port 0 takes a free one: see `port`. Raises OSError when
    the address cannot be had. The verifier host may be given later, before serving: `server.verifiers = host`.
    """

    daemon_threads = True
    request_queue_size = 1024
    verifiers: VerifierHost

    def __init__(self, address: str = "127.0.0.1", port: int = 5000) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.slots = threading.BoundedSemaphore(MAX_CONCURRENT)
        super().__init__((address, port), RewardHandler)

    @property
    def port(self) -> int:
        return self.server_address[1]

    def stop(self, seconds: float) -> None:
        """Takes no further connection and waits, `seconds` at most, until the requests being graded are answered."""
        self.shutdown()
        self.server_close()
        deadline = time.monotonic() + seconds
        for _ in range(MAX_CONCURRENT):
            self.slots.acquire(timeout=max(0.0, deadline - time.monotonic()))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error of the server; anything else is shown whole."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class RewardHandler(BaseHTTPRequestHandler):
    """One connection, one request."""

    server: RewardServer
    timeout = 60.0

    def do_GET(self) -> None:
        if self.path != "/health":
            return self._answer(404, {"error": f"no {self.path!a}: GET /health or POST /get_reward"})
        host = self.server.verifiers
        self._answer(200, {"status": "ok", "verifier": host.spec.name, "verdicts": host.counts()})

    def do_POST(self) -> None:
        unread = False
        with self.server.slots:
            try:
                self._answer(200, rewards(self.server.verifiers, self._read()))
            except RequestError as error:
                print(f"deltarl: {self.client_address[0]}: {error.status}: {error}", file=sys.stderr)
                self._answer(error.status, {"error": str(error)})
                unread = error.status in UNREAD
        if unread:
            self._discard()

    def _read(self) -> bytes:
        if self.path not in ("/get_reward", "/"):
            raise RequestError(404, f"no {self.path!a}: POST /get_reward")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise RequestError(411, "give a Content-Length: the body is read whole")
        if int(length[:20]) > MAX_REQUEST_BYTES:
            raise RequestError(413, f"{length[:20]} bytes, limit {MAX_REQUEST_BYTES}: send fewer rows at a time")
        return self.rfile.read(int(length))

    def _answer(self, status: int, body: Mapping[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _discard(self) -> None:
        """Reads on for a while: a connection closed with unread data is reset, and the client never sees the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        left = MAX_DISCARDED_BYTES
        while left > 0 and (chunk := self.rfile.read1(CHUNK_BYTES)):
            left -= len(chunk)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a training run asks thousands of times."""


def rewards(host: VerifierHost, body: bytes) -> dict[str, Any]:
    """The answer to a request's body. Raises RequestError."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"not JSON: {error}") from error
    items = read_items(request)
    try:
        verdicts = host.verify(items)
    except HostClosed as error:
        raise RequestError(503, "the server is closing") from error
    for row, (verdict, (_, gold, _)) in enumerate(zip(verdicts, items, strict=True)):
        if verdict.score is None:
            reason = verdict.info.get("reason")
            raise RequestError(422, f"labels[{row}] {gold!a:.200} is unusable ({reason}): take its row out of the data")
    return {
        "rewards": [verdict.score for verdict in verdicts],
        "scores": [min(1.0, max(0.0, verdict.score)) for verdict in verdicts],
        "extra_logs": {
            "correct": _share(verdicts, ("correct",)),
            "no_answer": _share(verdicts, ("no_answer",)),
            "failed": _share(verdicts, FAILED),
        },
    }


def read_items(request: Any) -> list[Item]:
    """(response, gold, meta) of each row of a request. Raises RequestError."""
    if not isinstance(request, dict):
        raise RequestError(422, "the body must be an object with query, prompts and labels")
    queries = _strings(request, "query")
    prompts = _strings(request, "prompts") if request.get("prompts") else [""] * len(queries)
    labels = request.get("labels")
    if not isinstance(labels, list):
        raise RequestError(422, "labels must be a list with the gold of each query (OpenRLHF: --data.label_key)")
    if not len(queries) == len(prompts) == len(labels):
        raise RequestError(422, f"{len(queries)} query, {len(prompts)} prompts, {len(labels)} labels: as many of each")
    return [
        (response_of(query, prompt), _gold(row, label), {"prompt": prompt})
        for row, (query, prompt, label) in enumerate(zip(queries, prompts, labels, strict=True))
    ]


def response_of(query: str, prompt: str) -> str:
    """What follows the prompt in a query, without the end tokens behind it.

    OpenRLHF decodes both from tokens: a beginning-of-text token may stand before the prompt, and a prompt that was too
    long has lost its beginning; then its last characters are looked for.
    """
    for known in (prompt, prompt[-PROMPT_END_CHARS:]):
        start = query.find(known)
        if start >= 0:
            query = query[start + len(known) :]
            break
    return END_TOKENS.sub("", query)


def _strings(request: Mapping[str, Any], key: str) -> list[str]:
    value = request.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise RequestError(422, f"{key} must be a list of strings, at least one")
    return value


def _gold(row: int, label: Any) -> str | list[str]:
    golds = label if isinstance(label, list) else [label]
    if not all(isinstance(gold, (str, int, float)) for gold in golds):
        raise RequestError(422, f"labels[{row}] must be a string, a number, or a list of them")
    return [str(gold) for gold in golds] if isinstance(label, list) else str(label)


def _share(verdicts: Sequence[Verdict], statuses: Sequence[str]) -> list[float]:
    return [float(verdict.status in statuses) for verdict in verdicts]
