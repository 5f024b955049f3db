"""Asking an OpenAI-compatible endpoint for a chat completion: retries, a cache on disk, a budget that workers share."""

import contextlib
import hashlib
import http.client
import json
import os
import random
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_REPLY_BYTES = 1 << 20
CHUNK_BYTES = 1 << 16
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
LOCK_SECONDS = 30.0
BROKEN_CONNECTION = (OSError, http.client.HTTPException)


class EndpointError(RuntimeError):
    """The endpoint refused the request, or gave no usable reply in all attempts."""


class EndpointTimeout(RuntimeError):
    """No usable reply before the deadline."""


class BudgetSpent(RuntimeError):
    """The budget permits no further call."""


@dataclass(frozen=True, slots=True)
class Reply:
    """text: of the first choice. tokens: prompt and completion, as the endpoint counts. calls: 0 from the cache."""

    text: str
    tokens: int
    calls: int


class Store:
    """Replies and spending in one SQLite file, which any number of processes may use at once.

    The budget is the file's: what earlier runs with the same file spent counts, until the file is deleted.
    max_calls, max_tokens: None is no limit. Tokens are known only after a call: each worker may pass it by one call.
    """

    def __init__(self, path: str, max_calls: int | None, max_tokens: int | None) -> None:
        self.path = str(Path(path).expanduser().absolute())
        self.max_calls = max_calls
        self.max_tokens = max_tokens

    def prepare(self) -> None:
        """Makes the file and its tables where they are missing. Raises sqlite3.Error, OSError."""
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        with self._open() as database:
            database.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text TEXT, tokens INTEGER)")
            database.execute(
                "CREATE TABLE IF NOT EXISTS spent (one INTEGER PRIMARY KEY, calls INTEGER, tokens INTEGER)"
            )
            database.execute("INSERT OR IGNORE INTO spent VALUES (1, 0, 0)")

    def find(self, key: str) -> Reply | None:
        with self._open() as database:
            row = database.execute("SELECT text, tokens FROM replies WHERE key = ?", (key,)).fetchone()
        return Reply(row[0], row[1], 0) if row else None

    def keep(self, key: str, reply: Reply) -> None:
        with self._open() as database:
            database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", (key, reply.text, reply.tokens))

    def reserve_call(self) -> None:
        """Counts a call before it is made. Raises BudgetSpent where there is none left."""
        with self._open() as database:
            calls, tokens = database.execute("SELECT calls, tokens FROM spent").fetchone()
            if self.max_calls is not None and calls >= self.max_calls:
                raise BudgetSpent(f"{calls} calls made, max_calls is {self.max_calls}")
            if self.max_tokens is not None and tokens >= self.max_tokens:
                raise BudgetSpent(f"{tokens} tokens used, max_total_tokens is {self.max_tokens}")
            database.execute("UPDATE spent SET calls = calls + 1")

    def count_tokens(self, tokens: int) -> None:
        with self._open() as database:
            database.execute("UPDATE spent SET tokens = tokens + ?", (tokens,))

    def spent(self) -> tuple[int, int]:
        """Calls and tokens so far."""
        with self._open() as database:
            return database.execute("SELECT calls, tokens FROM spent").fetchone()

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection inside a transaction that holds the file's write lock, undone when the block raises."""
        with contextlib.closing(sqlite3.connect(self.path, timeout=LOCK_SECONDS, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would carry the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class ChatClient:
    """Posts to {base_url}/chat/completions.

    Status 429 and 5xx, a broken connection and a reply that is no chat completion are tried again, `attempts` times in
    all, after 0.5 s, 1 s, 2 s, … up to 30 s, each up to half as long again at random, or after the Retry-After that
    the endpoint asks for; any other status at once raises EndpointError with the endpoint's own line.
    """

    def __init__(self, base_url: str, api_key_env: str | None, attempts: int, store: Store | None) -> None:
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.api_key_env = api_key_env
        self.attempts = attempts
        self.store = store

    def ask(self, payload: Mapping[str, Any], deadline: float) -> Reply:
        """The endpoint's reply. deadline: on time.monotonic().

        Raises BudgetSpent, EndpointTimeout, EndpointError.
        """
        problem = "no attempt"
        for attempt in range(1, self.attempts + 1):
            if time.monotonic() >= deadline:
                raise EndpointTimeout(problem)
            if self.store is not None:
                self.store.reserve_call()
            pause = FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(1, 1.5)
            try:
                return self._keep(self._post(payload, deadline), attempt)
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"status {error.code}: {one_line(error.read(2000).decode(errors='replace'))}"
                if error.code != 429 and error.code < 500:
                    raise EndpointError(problem) from error
                pause = asked_pause(error.headers.get("Retry-After")) or pause
            except BROKEN_CONNECTION as error:
                problem = one_line(f"{type(error).__name__}: {error}")
            except ValueError as error:
                problem = f"the reply is no chat completion: {one_line(str(error))}"
            pause = min(pause, LONGEST_PAUSE_SECONDS)
            if attempt < self.attempts:
                if time.monotonic() + pause >= deadline:
                    raise EndpointTimeout(problem)
                time.sleep(pause)
        raise EndpointError(f"{problem} ({self.attempts} attempts)")

    def key(self, payload: Mapping[str, Any]) -> str:
        """What a reply is kept under: everything that it depends on."""
        return hashlib.sha256(json.dumps([self.url, payload], sort_keys=True).encode()).hexdigest()

    def _keep(self, body: bytes, calls: int) -> Reply:
        reply = parse_completion(body, calls)
        if self.store is not None:
            self.store.count_tokens(reply.tokens)
        return reply

    def _post(self, payload: Mapping[str, Any], deadline: float) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "deltarl"}
        if self.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.api_key_env]}"
        request = urllib.request.Request(self.url, json.dumps(payload).encode(), headers)
        opener = urllib.request.build_opener(NoRedirect)
        body = bytearray()
        with opener.open(request, timeout=max(0.01, deadline - time.monotonic())) as response:
            while chunk := response.read1(CHUNK_BYTES):
                body += chunk
                if len(body) > MAX_REPLY_BYTES:
                    raise ValueError(f"more than {MAX_REPLY_BYTES} bytes")
                if time.monotonic() >= deadline:
                    raise TimeoutError("the reply is late")
        return bytes(body)


def parse_completion(body: bytes, calls: int) -> Reply:
    """Raises ValueError where the body is not a chat completion with a text."""
    try:
        data = json.loads(body)
        text = data["choices"][0]["message"]["content"]
        usage = data.get("usage") or {}
        tokens = int(usage.get("total_tokens") or 0)
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__} {error} in {body[:80]!r}") from error
    if not isinstance(text, str):
        raise ValueError("its content is no text")
    return Reply(text, tokens, calls)


def asked_pause(header: str | None) -> float | None:
    """Seconds of a Retry-After header; None without one, and where it gives a date."""
    return float(header) if header and header.strip().isdecimal() else None


def one_line(text: str) -> str:
    return " ".join(text.split())[:200]
