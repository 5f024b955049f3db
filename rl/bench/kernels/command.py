"""The command: which cases run on which device."""

import fnmatch
from collections.abc import Sequence
from typing import Protocol, TypeVar

from deltarl.rl.bench.kernels.rows import Report
from deltarl.rl.errors import UserError


class Named(Protocol):
    name: str


AnyCase = TypeVar("AnyCase", bound=Named)


def bench(
    device: str, *, as_json: bool, case: Sequence[str] = ("*",), peer: str = "all", out: str | None = None
) -> int:
    """Print the table, or one JSON object with `rows`; 1 when a case of ours failed.

    Raises UserError for another device than cpu and cuda, or where there is no GPU, for a case or a peer that is not
    there and for a file that cannot be written.
    """
    if device == "cpu":
        if peer != "all":
            raise UserError(f"--peer {peer} is for --device cuda: on a CPU the peer is transformers")
        return bench_cpu(as_json, case, out)
    if device == "cuda":
        from deltarl.rl.bench.kernels.cuda import bench_cuda

        return bench_cuda(as_json, case, peer, out)
    raise UserError(f"--device {device} is not known: use cpu or cuda")


def bench_cpu(as_json: bool, patterns: Sequence[str], out: str | None) -> int:
    from deltarl.rl.bench.kernels import cpu

    cases = selected(cpu.CASES, patterns)
    report = Report(cpu.about(), out, as_json=as_json)
    for one in cases:
        report.add(cpu.measure(one))
    return report.finish()


def selected(cases: Sequence[AnyCase], patterns: Sequence[str]) -> list[AnyCase]:
    """The cases whose name fits one of the patterns. Raises UserError for a pattern that fits none."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case.name, pattern) for case in cases):
            raise UserError(f"--case {pattern} fits none of: {', '.join(case.name for case in cases)}")
    return [case for case in cases if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)]
