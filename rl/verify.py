"""`deltarl verify`: grade a file of responses at full speed, or serve a verifier over HTTP."""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import yaml
from tqdm import tqdm

from deltarl.rewards import STATUSES, Verdict, VerifierHost, VerifierLoadError, VerifierSpec
from deltarl.rewards.host import Item
from deltarl.rewards.server import RewardServer
from deltarl.rewards.types import UNUSABLE
from deltarl.rl.errors import UserError

PRED_OPTIONS = {"math": {"extraction": "lenient"}}
ROWS_AHEAD = 4096
CHARS_AHEAD = 64 << 20
MAX_INTEGER_DIGITS = 4000
SHOWN_CHARS = 160
DRAIN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a file: where it stands, what is graded (pred or response), and whether it should be accepted."""

    where: str
    key: str
    item: Item
    expected: bool | None


@dataclass
class Tally:
    """What the verdicts add up to. `labelled` counts rows with `expected`; `reasons` has the first of each status."""

    statuses: Counter[str] = field(default_factory=Counter)
    labelled: int = 0
    false_positives: int = 0
    false_negatives: int = 0
    score: float = 0.0
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, row: Row, verdict: Verdict) -> str | None:
        """Counts one verdict; what is wrong about it, None when nothing is."""
        self.statuses[verdict.status] += 1
        self.score += verdict.score or 0.0
        if verdict.status in UNUSABLE:
            self.reasons.setdefault(verdict.status, f"{row.where}: {verdict.info.get('reason', 'no reason given')}")
        accepted = verdict.status == "correct"
        if row.expected is not None:
            self.labelled += 1
            self.false_positives += accepted and not row.expected
            self.false_negatives += row.expected and not accepted
            if accepted != row.expected:
                return "false positive" if accepted else "false negative"
        return verdict.status if verdict.status in UNUSABLE else None

    def summary(self, seconds: float, latency: Mapping[str, float]) -> dict[str, Any]:
        """The object that `--json` prints: seconds of scoring, latency in milliseconds inside the verifier."""
        n = self.statuses.total()
        graded = n - self.statuses["gold_error"]
        wrong = self.false_positives + self.false_negatives
        labels = {
            "labelled": self.labelled,
            "accuracy": round(1 - wrong / max(self.labelled, 1), 6),
            "false_positives": self.false_positives,
            "false_negatives": self.false_negatives,
        }
        return {
            "n": n,
            **(labels if self.labelled else {}),
            "mean_score": round(self.score / graded, 6) if graded else None,
            **{key: round(latency[key], 3) if latency else None for key in ("p50_ms", "p99_ms", "max_ms")},
            "per_second": round(n / seconds, 1),
            "statuses": {status: self.statuses[status] for status in STATUSES},
        }


def verify(
    files: Sequence[str],
    verifier: str,
    options: Mapping[str, Any],
    *,
    workers: int | None = None,
    timeout: float = 5.0,
    as_json: bool = False,
    show_errors: bool = False,
) -> None:
    """Grades every row of the .jsonl files and prints what the verdicts add up to.

    A row has `gold` (text, number, or a list of which any may be met), `pred` or `response`, and optionally `expected`
    (true, false, 1 or 0) and `meta` (an object for the verifier); a run's traces are such rows. The first row says
    which of `pred` and `response` is graded. A `pred` may be a bare answer: `math` then takes extraction=lenient unless
    the options say otherwise. workers: processes, by default one a core. timeout: seconds for a row.

    Rows are read as they are needed. Raises UserError for a file, row, verifier or option that cannot be used.
    """
    rows = read_rows(files)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{' '.join(files)}: no rows; a row is one line of JSON with gold and pred (or response)")
    options = {**(PRED_OPTIONS.get(verifier, {}) if first.key == "pred" else {}), **options}
    tally = Tally()
    with start_host(verifier, options, workers, timeout) as host, progress_bar(files) as bar:
        began = time.perf_counter()
        for row, verdict in graded(host, chain([first], rows)):
            problem = tally.add(row, verdict)
            if problem and show_errors:
                bar.clear()
                write(error_line(problem, row, verdict), sys.stderr if as_json else sys.stdout)
            bar.update()
        summary = tally.summary(time.perf_counter() - began, host.latency())
    for status, reason in tally.reasons.items():
        write(f"first {status}: {reason}", sys.stderr)
    if as_json:
        write(json.dumps(summary))
        return
    write(f"{summary['n']} rows graded by {described(verifier, options)}, {summary['per_second']:.0f} a second")
    write(text_summary(summary))


def graded(host: VerifierHost, rows: Iterable[Row]) -> Iterator[tuple[Row, Verdict]]:
    """Rows with their verdicts, in order; the host is kept busy by a bounded number of rows ahead."""
    ahead: deque[tuple[Row, Future[Verdict]]] = deque()
    chars = 0
    for row in rows:
        ahead.append((row, host.submit(row.item)))
        chars += len(row.item[0])
        while len(ahead) > ROWS_AHEAD or chars > CHARS_AHEAD:
            done, future = ahead.popleft()
            chars -= len(done.item[0])
            yield done, future.result()
    for done, future in ahead:
        yield done, future.result()


def read_rows(files: Sequence[str]) -> Iterator[Row]:
    """The rows of the files, one line in memory at a time. Raises UserError naming file and line."""
    key = None
    for file in files:
        try:
            with open(file, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        row = read_row(line, f"{file}:{number}", key)
                        key = row.key
                        yield row
        except OSError as error:
            hint = f"name its files, such as {file}/*.jsonl" if error.errno == errno.EISDIR else error.strerror
            raise UserError(f"{file} cannot be read: {hint}") from error


def read_row(line: bytes, where: str, key: str | None) -> Row:
    """One line; `key` is what the rows before it were graded by. Raises UserError."""
    try:
        text = line.decode("utf-8", "surrogatepass")
        values = DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f'{where}: not an object: a row is like {{"gold": "4", "pred": "2+2"}}')
    found = "pred" if "pred" in values else "response"
    key = key or found
    if key not in values:
        other = f": it has {found}, and the rows before have {key}" if found in values else ""
        raise UserError(f"{where}: no {key if other else 'pred or response'}{other}")
    expected = values.get("expected")
    if expected not in (None, True, False):
        raise UserError(f"{where}: expected is {expected!a:.40}: use true or false")
    meta = read_meta(values, where)
    return Row(
        where,
        key,
        (read_text(values[key]), read_gold(values, where), meta),
        None if expected is None else bool(expected),
    )


def read_meta(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row's meta, and what a trace knows of it besides. Raises UserError."""
    meta = values.get("meta") or {}
    if not isinstance(meta, dict):
        raise UserError(f"{where}: meta is not an object")
    of_trace = {"n_tokens": values["n_tokens"]} if "n_tokens" in values else {}
    if "finish_reason" in values:
        of_trace["truncated"] = values["finish_reason"] == "length"
    return of_trace | meta


def read_gold(values: Mapping[str, Any], where: str) -> str | list[str]:
    """A gold as text, or a list of which any may be met; null is a gold that is unusable. Raises UserError."""
    if "gold" not in values or isinstance(values["gold"], dict):
        raise UserError(f"{where}: no gold: give text, a number, or a list of them")
    gold = values["gold"]
    return [read_text(one) for one in gold] if isinstance(gold, list) else read_text(gold)


def read_text(value: Any) -> str:
    """Text as it is, nothing for null, and anything else as JSON writes it."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def read_integer(digits: str) -> int | str:
    """Python refuses to make a number of more than 4300 digits: those stay text."""
    return int(digits) if len(digits) <= MAX_INTEGER_DIGITS else digits


# Responses may hold anything: control characters, lone surrogates, numbers of any length.
DECODER = json.JSONDecoder(strict=False, parse_int=read_integer)


def read_options(texts: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE options of a verifier, each value in YAML as in a job file. Raises UserError."""
    options = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UserError(f"--option {text}: write it as KEY=VALUE, such as extraction=strict")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--option {text}: {value!r} is not YAML; put quotes around it") from error
    return options


def start_host(verifier: str, options: Mapping[str, Any], workers: int | None, timeout: float) -> VerifierHost:
    """The pool of processes, ready. Raises UserError when it cannot be had as asked for."""
    try:
        return VerifierHost(VerifierSpec(verifier, options), workers or len(os.sched_getaffinity(0)), timeout)
    except (VerifierLoadError, ValueError) as error:
        raise UserError(str(error)) from error


def progress_bar(files: Sequence[str]) -> tqdm:
    """Rows done, on stderr; silent where that is no terminal."""
    hidden = not sys.stderr.isatty()
    regular = all(Path(file).is_file() for file in files)
    total = sum(map(count_lines, files)) if regular and not hidden else None
    return tqdm(total=total, unit="row", disable=hidden, leave=False, dynamic_ncols=True)


def count_lines(file: str) -> int:
    with open(file, "rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 20), b""))


def error_line(problem: str, row: Row, verdict: Verdict) -> str:
    response, gold, _ = row.item
    reason = verdict.info.get("reason")
    shown = {
        "gold": gold,
        "graded" if verdict.extracted is not None else row.key: verdict.extracted or response[-SHOWN_CHARS:],
    }
    fields = [
        f"{name} {value if isinstance(value, str) else json.dumps(value):.{SHOWN_CHARS}}"
        for name, value in shown.items()
    ]
    return "  ".join([problem, row.where, *fields, *([f"({reason})"] if reason else [])])


def text_summary(summary: Mapping[str, Any]) -> str:
    """What a person reads."""
    lines = []
    if "accuracy" in summary:
        lines.append(
            f"accuracy    {summary['accuracy']:.4f} of {summary['labelled']} rows with expected: "
            f"{summary['false_positives']} false positives, {summary['false_negatives']} false negatives"
        )
    if summary["mean_score"] is not None:
        lines.append(f"mean score  {summary['mean_score']:.4f}")
    if summary["max_ms"] is not None:
        lines.append(f"latency     p50 {summary['p50_ms']} ms, p99 {summary['p99_ms']} ms, max {summary['max_ms']} ms")
    lines.append("verdicts    " + ", ".join(f"{status} {n}" for status, n in summary["statuses"].items() if n))
    return "\n".join(lines)


def described(verifier: str, options: Mapping[str, Any]) -> str:
    return verifier + "".join(f" {key}={value}" for key, value in options.items())


def write(text: str, stream: TextIO | None = None) -> None:
    """Prints lines; what rows may use to fool a terminal (control characters, reversing marks) is spelled out."""
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"
    try:
        print(shown.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except BrokenPipeError:  # the reader has seen enough, as `| head` does: the rest goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def serve(
    verifier: str,
    options: Mapping[str, Any],
    *,
    workers: int | None = None,
    timeout: float = 5.0,
    address: str = "127.0.0.1",
    port: int = 5000,
) -> int:
    """Serves rewards over HTTP until SIGINT (130) or SIGTERM (0); requests being graded are answered first.

    Port 0 takes a free one; the address is printed on stderr. Raises UserError when it, or the verifier, cannot be had.
    """
    asked: list[int] = []
    stop = threading.Event()

    def on_signal(number: int, _: Any) -> None:
        asked.append(number)
        stop.set()

    try:
        server = RewardServer(address, port)
    except (OSError, OverflowError) as error:
        raise UserError(f"no server at {address} port {port}: {reason_of(error)}") from error
    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with server, start_host(verifier, options, workers, timeout) as server.verifiers:
            serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
            serving.start()
            announce(verifier, options, server)
            stop.wait()
            server.stop(DRAIN_SECONDS)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 130 if asked[0] == signal.SIGINT else 0


def reason_of(error: OSError | OverflowError) -> str:
    if getattr(error, "errno", None) == errno.EADDRINUSE:
        return "the port is in use; give another with --port (0 takes a free one)"
    return f"{getattr(error, 'strerror', None) or error}"


def announce(verifier: str, options: Mapping[str, Any], server: RewardServer) -> None:
    address = server.server_address[0]
    host = f"[{address}]" if ":" in address else address
    write(f"serving {described(verifier, options)} at http://{host}:{server.port}/get_reward", sys.stderr)
    if not ipaddress.ip_address(address).is_loopback:
        write(f"{address} can be reached from other machines: whoever reaches it can have work done here", sys.stderr)
