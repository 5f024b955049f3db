"""`deltarl bench verifiers`: the math verifier beside math-verify, in one run.

Speed on worked solutions, in one process, in several, and through the host; accuracy on labelled cases; what hostile
responses do.
"""

import importlib.util
import json
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from deltarl.rewards import VerifierHost, VerifierSpec, load_verifier
from deltarl.rewards.host import Item
from deltarl.rl.bench.hostile import Hostile, hostile_cases
from deltarl.rl.errors import UserError

OURS = VerifierSpec("math")
OURS_LENIENT = VerifierSpec("math", {"extraction": "lenient"})
PEER = VerifierSpec("deltarl.rl.bench.peer:MathVerify")
REPEATS = 3
RUN_SECONDS = 2.0
START_SECONDS = 120.0
WARM_UP_ITEMS = 100
CASE_SECONDS = 10.0
HOSTILE_SECONDS = 1.0
HOSTILE_CHARS = 2_000_000
WARM_UP = (
    "7",
    "\\frac{1}{2}",
    "\\sqrt{2}",
    "(1, 2)",
    "[0, 1)",
    "\\{1, 2\\}",
    "x = 5",
    "\\sin^2 x + \\cos^2 x",
    "x + y",
)


@dataclass(frozen=True, slots=True)
class Solution:
    """One labelled response; kind: what it is counted under."""

    kind: str
    response: str
    gold: str | list[str]
    expected: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One measure, ours and the peer's.

    unit: "per second" (more is better), "µs each" of processor time, or what is counted among `of` responses (fewer is
    better); ratio: ours / peer, of speeds. ours_are, peer_are: the names of the hostile responses counted.
    """

    case: str
    unit: str
    of: int
    ours: float
    peer: float
    ratio: float | None = None
    ours_are: Sequence[str] = ()
    peer_are: Sequence[str] = ()


def bench(data: str | None, cases: Sequence[str], workers: int, *, as_json: bool) -> None:
    """Prints a table, or one JSON object with `rows`. Raises UserError for input that cannot be used."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("math-verify, the peer of this bench, is not installed: pip install 'math-verify==0.9.*'")
    if workers < 1:
        raise UserError(f"--workers is {workers}: give at least 1")
    solutions = read_solutions([Path(data) if data else files("deltarl.rl.bench") / "data" / "responses.jsonl"])
    labelled = read_solutions(sorted(file for path in map(Path, cases) for file in case_files(path)))

    speeds = speed_rows(solutions)
    rows = [
        *speeds.values(),
        *scaling_rows(solutions, speeds["all"], workers),
        *scaling_rows(*dearest(solutions, speeds), workers),
        *accuracy_rows([*solutions, *labelled], workers),
        *hostile_rows(hostile_cases()),
    ]
    if as_json:
        print(json.dumps({**about(), "rows": [asdict(row) for row in rows]}))
    else:
        print_table(rows)


def about() -> dict[str, str]:
    """Where and with what the numbers were taken."""
    return {
        "date": date.today().isoformat(),
        "device": cpu_model(),
        "python": platform.python_version(),
        "deltarl": version("deltarl"),
        "math-verify": version("math-verify"),
        "gmpy2": version("gmpy2") if importlib.util.find_spec("gmpy2") else "none",
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.machine()


def case_files(path: Path) -> list[Path]:
    """The .jsonl files of a folder, without a disputed.jsonl, which lists rows again; or the file itself.

    Raises UserError.
    """
    found = [f for f in path.glob("*.jsonl") if f.stem != "disputed"] if path.is_dir() else [path]
    if not found:
        raise UserError(f"--cases {path} holds no .jsonl file: give labelled cases with gold, pred and expected")
    return found


def read_solutions(paths: Iterable[Any]) -> list[Solution]:
    """Rows of .jsonl files: gold, response (or pred) and expected; `kind` or `suite` names what they are counted under.

    Rows whose gold is not mathematics but a program's object (`gold_format`) are left out. Raises UserError.
    """
    solutions = []
    for path in paths:
        if not path.is_file():
            raise UserError(f"no file {path}: give a .jsonl file with gold, response and expected")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
                if "gold_format" in row:
                    continue
                response = row["response"] if "response" in row else row["pred"]
                kind = row.get("kind") or row.get("suite") or path.name
                solutions.append(Solution(kind, response, row["gold"] or [], bool(row["expected"])))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{path}, line {number}: {type(error).__name__} {error}; give gold, response and expected"
                ) from error
        if not solutions:
            raise UserError(f"{path} holds no rows: give a .jsonl file with gold, response and expected")
    return solutions


def speed_rows(solutions: Sequence[Solution]) -> dict[str, Row]:
    """Solutions a second in one process, all and by kind: the best of a few passes, each in a fresh process."""
    best = []
    for spec in (OURS, PEER):
        say(f"speed of {label(spec)} in one process")
        passes = [in_fresh_process(pass_seconds, spec, solutions) for _ in range(REPEATS)]
        best.append({kind: min(seconds[kind] for seconds in passes) for kind in passes[0]})
        best[-1]["all"] = min(sum(seconds.values()) for seconds in passes)
    counts = Counter(solution.kind for solution in solutions) | {"all": len(solutions)}
    return {
        kind: speed_row(f"one process, {kind}", counts[kind], *(counts[kind] / seconds[kind] for seconds in best))
        for kind in ("all", *dict.fromkeys(solution.kind for solution in solutions))
    }


def dearest(solutions: Sequence[Solution], speeds: Mapping[str, Row]) -> tuple[list[Solution], Row]:
    """The solutions of the kind that takes ours longest, and the speeds in one process."""
    kind = min({solution.kind for solution in solutions}, key=lambda kind: speeds[kind].ours)
    return [solution for solution in solutions if solution.kind == kind], speeds[kind]


def pass_seconds(spec: VerifierSpec, solutions: Sequence[Solution]) -> dict[str, float]:
    """Seconds by kind of one pass in which every gold is new, and nothing has to be imported any more."""
    verifier = load_verifier(spec)
    for answer in WARM_UP:
        verifier.verify(f"\\boxed{{{answer}}}", "\\tan x", meta={})
        verifier.verify(f"\\boxed{{{answer}}}", f"0 + {answer}", meta={})
    by_kind = defaultdict(list)
    for solution in solutions:
        by_kind[solution.kind].append(solution)
    seconds = {}
    for kind, group in by_kind.items():
        start = time.perf_counter()
        for solution in group:
            verifier.verify(solution.response, solution.gold, meta={})
        seconds[kind] = time.perf_counter() - start
    return seconds


def in_fresh_process(work: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def scaling_rows(solutions: Sequence[Solution], alone: Row, workers: int) -> list[Row]:
    """Solutions a second in 1, 2, 4 … plain processes and through a host of as many workers, their golds seen before;
    and the processor time that the host's process and its workers spend on each.

    alone: the speeds in one process, from which follows how often the solutions are graded.
    """
    items = [(solution.response, solution.gold, None) for solution in solutions]
    copies = [max(1, round(RUN_SECONDS * speed / len(items))) for speed in (alone.ours, alone.peer)]
    kind = alone.case.rpartition(", ")[2]
    rows = []
    for count in sorted({workers, *(2**power for power in range(workers.bit_length()))}):
        plural = "" if count == 1 else "s"
        runs = []
        for spec, times in zip((OURS, PEER), copies, strict=True):
            say(f"speed of {label(spec)}, {kind}, {count} plain process{'es' * (count > 1)} and {count} worker{plural}")
            runs.append((plain_speed(spec, items * times, count), *host_speed(spec, items * times, count)))
        plain, host, parent, worker = zip(*runs, strict=True)
        rows += [
            speed_row(f"{count} plain process{'es' * (count > 1)}, {kind}", len(items), *plain),
            speed_row(f"host, {count} worker{plural}, {kind}", len(items), *host),
            Row(f"host, {count} worker{plural}, {kind}: its process", "µs each", len(items), *parent),
            Row(f"host, {count} worker{plural}, {kind}: workers", "µs each", len(items), *worker),
        ]
    return rows


def host_speed(spec: VerifierSpec, items: Sequence[Item], workers: int) -> tuple[float, float, float]:
    """Responses a second, and the microseconds of processor time on each: of this process, of the workers."""
    with VerifierHost(spec, workers) as host:
        host.verify(items[: WARM_UP_ITEMS * workers])
        pids = host.worker_pids()
        spent, spent_here, start = sum(map(cpu_seconds, pids)), time.process_time(), time.perf_counter()
        host.verify(items)
        seconds = time.perf_counter() - start
        here, there = time.process_time() - spent_here, sum(map(cpu_seconds, pids)) - spent
    return len(items) / seconds, here / len(items) * 1e6, there / len(items) * 1e6


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used, from proc(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def plain_speed(spec: VerifierSpec, items: Sequence[Item], processes: int) -> float:
    """Responses a second where each process has its share from the start, and nobody else takes part."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(processes, context) as pool:
        together = manager.Barrier(processes, timeout=START_SECONDS)
        shares = [pool.submit(grade_share, spec, items[place::processes], together) for place in range(processes)]
        starts, ends = zip(*(share.result() for share in shares), strict=True)
    return len(items) / (max(ends) - min(starts))


def grade_share(spec: VerifierSpec, items: Sequence[Item], together: threading.Barrier) -> tuple[float, float]:
    """When this process began and ended, by the clock that all processes share; it begins with the others."""
    verifier = load_verifier(spec)
    for response, gold, _ in items[:WARM_UP_ITEMS]:
        verifier.verify(response, gold, meta={})
    together.wait()
    start = time.perf_counter()
    for response, gold, _ in items:
        verifier.verify(response, gold, meta={})
    return start, time.perf_counter()


def speed_row(case: str, of: int, ours: float, peer: float) -> Row:
    return Row(f"speed, {case}", "per second", of, ours, peer, ours / peer)


def accuracy_rows(solutions: Sequence[Solution], workers: int) -> list[Row]:
    """False positives and false negatives by kind; ours reads as math-verify does, the last answer of any form."""
    counters = [Counter((solution.kind, solution.expected) for solution in solutions)]
    counters += [wrong_verdicts(spec, solutions, workers) for spec in (OURS_LENIENT, PEER)]
    return [
        Row(f"accuracy, {kind}", unit, *(count(counter, kind, expected) for counter in counters))
        for kind in ("all", *dict.fromkeys(solution.kind for solution in solutions))
        for unit, expected in (("false positives", False), ("false negatives", True))
    ]


def count(counter: Counter[tuple[str, bool]], kind: str, expected: bool) -> int:
    return sum(number for (of, label), number in counter.items() if label == expected and kind in ("all", of))


def wrong_verdicts(spec: VerifierSpec, solutions: Sequence[Solution], workers: int) -> Counter[tuple[str, bool]]:
    """How often a verdict is not the one expected, by (kind, expected)."""
    say(f"accuracy of {label(spec)}")
    with VerifierHost(spec, workers, timeout=CASE_SECONDS) as host:
        verdicts = host.verify([(solution.response, solution.gold, None) for solution in solutions])
    return Counter(
        (solution.kind, solution.expected)
        for solution, verdict in zip(solutions, verdicts, strict=True)
        if (verdict.status == "correct") != solution.expected
    )


def hostile_rows(cases: Sequence[Hostile]) -> list[Row]:
    """Late answers, wrong positives, right answers refused, and lost processes."""
    right = sum(case.right for case in cases)
    of = {
        "late": len(cases),
        "wrong positives": len(cases) - right,
        "right refused": right,
        "processes lost": len(cases),
    }
    found = []
    for spec in (OURS, PEER):
        say(f"hostile responses to {label(spec)}")
        found.append(hostile_names(spec, cases))
    return [
        Row("hostile", unit, number, len(ours), len(peers), ours_are=ours, peer_are=peers)
        for (unit, number), ours, peers in zip(of.items(), *found, strict=True)
    ]


def hostile_names(spec: VerifierSpec, cases: Sequence[Hostile]) -> tuple[list[str], ...]:
    """The names of the cases not answered in time, of those taken for correct and not, of the right ones that were
    refused, and of those that cost their process."""
    late, positive, refused, lost = [], [], [], []
    with VerifierHost(spec, timeout=HOSTILE_SECONDS, max_response_chars=HOSTILE_CHARS) as host:
        for case in cases:
            before = host.worker_pids()
            (verdict,) = host.verify([(case.response, case.gold, None)])
            after = host.worker_pids()
            if verdict.status == "timeout":
                late.append(case.name)
            if verdict.status == "correct" and not case.right:
                positive.append(case.name)
            if verdict.status != "correct" and case.right:
                refused.append(case.name)
            if not after or (before and after != before):
                lost.append(case.name)
    return late, positive, refused, lost


def label(spec: VerifierSpec) -> str:
    return "math-verify" if spec is PEER else spec.name


def say(stage: str) -> None:
    print(f"{stage} …", file=sys.stderr, flush=True)


def print_table(rows: Sequence[Row]) -> None:
    width = max(len(row.case) for row in rows)
    print("  ".join(f"{key} {value}" for key, value in about().items()))
    print(f"{'':{width}}  {'':15}  {'of':>5}  {'ours':>9}  {'math-verify':>11}  ratio")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:5.1f}"
        print(f"{row.case:{width}}  {row.unit:15}  {row.of:5}  {row.ours:9.0f}  {row.peer:11.0f}  {ratio}".rstrip())
