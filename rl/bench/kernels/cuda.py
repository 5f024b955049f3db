"""The run on an NVIDIA GPU: ours over all cases first, then one peer after the other."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from deltarl.kernels.dispatch import TORCH, cuda_operators
from deltarl.rl.bench.kernels.cases import CASES, Case
from deltarl.rl.bench.kernels.command import selected
from deltarl.rl.bench.kernels.gpu import copy_rate, gpu_seconds, kernel_seconds, peak_bytes
from deltarl.rl.bench.kernels.rows import Report, Row
from deltarl.rl.errors import UserError

FIRST_CALL_TIMEOUT = 580
FIRST_CALL = """
import sys
from deltarl.rl.bench.kernels.cuda import time_first_call
time_first_call(*sys.argv[1:])
"""


@dataclass(frozen=True)
class FirstCall:
    """The first call of `of` in a process of its own with an empty cache of Triton's."""

    name: str
    of: str
    what: str = "first call, nothing cached"


FIRST_CALLS = tuple(
    FirstCall(f"first-call/{of}", of) for of in ("kda/b1-t8192-h16/forward", "kda/b1-t8192-h16/backward")
)


def bench_cuda(as_json: bool, patterns: Sequence[str], peer: str, out: str | None) -> int:
    """1 when a case of ours failed. Raises UserError without a GPU, for a case or peer that is not there, where the
    dispatcher would run torch's code as ours."""
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU")
    if cuda_operators() is TORCH:
        raise UserError(
            "ours would be the torch code itself: this GPU is no Hopper, or DELTARL_KERNELS is torch; set it to triton"
        )
    peers, cases = peers_of(peer), selected((*CASES, *FIRST_CALLS), patterns)
    report = Report(about("fla" in peers), out, as_json=as_json)
    rows = {case.name: Row(case.name, case.what) for case in cases}
    for implementation in ("ours", *peers):
        for case in cases:
            if add_measurement(rows[case.name], case, implementation):
                report.add(rows[case.name])
    return report.finish()


def peers_of(choice: str) -> list[str]:
    """In the order in which they are measured: what takes longest last."""
    if choice == "fla" and not find_spec("fla"):
        raise UserError("--peer fla: fla-core is not installed: pip install fla-core==0.6.0")
    if choice == "all":
        return [name for name in ("torch", "transformers", "fla") if name == "torch" or find_spec(name)]
    return [] if choice == "none" else [choice]


def about(with_fla: bool) -> dict[str, Any]:
    """Where the numbers were taken, with the bytes per second of a copy."""
    import triton

    found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    if with_fla:
        from deltarl.rl.bench.kernels.fla import VERSION

        found["fla-core"] = VERSION
    return found | {"copy_bytes_per_second": copy_rate()}


def add_measurement(row: Row, case: Case | FirstCall, implementation: str) -> bool:
    """Puts one implementation's numbers, or why there are none, into the row; False where it has no such operator."""
    try:
        if isinstance(case, FirstCall):
            found = first_call(case.of, implementation)
        elif implementation == "ours":
            found = measure_ours(case)
        else:
            found = measure_peer(case, implementation)
    except Exception as error:  # noqa: BLE001 - the row says it, the command ends with 1, and other cases still run
        found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    if not found:
        return False
    if implementation == "ours":
        for key, value in found.items():
            setattr(row, key, value)
    else:
        row.peers[implementation] = found
    return True


def measure_ours(case: Case) -> dict[str, Any]:
    built = case.build("ours", "cuda")
    if built is None:
        return {}
    kernels = kernel_seconds(built.eager or built.work)
    found = {"moved": built.moved, "kernels": kernels, "peak_bytes": peak_bytes(built.work)}
    return found | {"seconds": gpu_seconds(built.work)}


def measure_peer(case: Case, implementation: str) -> dict[str, Any]:
    built = case.build(implementation, "cuda")
    if built is None:
        return {}
    results = built.work()
    found = {"difference": difference(results, case.build("ours", "cuda").work())}
    del results
    return found | {"peak_bytes": peak_bytes(built.work), "seconds": gpu_seconds(built.work)}


def difference(results: Sequence[torch.Tensor], ours: Sequence[torch.Tensor]) -> float:
    """Largest over the results of RMS(result - ours) / RMS(ours); of those with a token dimension, since sums over all
    tokens (of A_log, dt_bias, weight) may cancel to nearly nothing."""
    wide = [(a.float(), b.float()) for a, b in zip(results, ours, strict=True) if a.ndim > 2]
    return max(float((a - b).norm() / b.norm()) for a, b in wide)


def first_call(case: str, implementation: str) -> dict[str, Any]:
    """Raises RuntimeError with the last line of the process that failed."""
    if implementation in ("torch", "transformers"):
        return {}  # compiles nothing
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            [sys.executable, "-P", "-c", FIRST_CALL, case, implementation],
            env={**os.environ, "TRITON_CACHE_DIR": empty},
            capture_output=True,
            text=True,
            timeout=FIRST_CALL_TIMEOUT,
        )
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    return {"seconds": json.loads(done.stdout.splitlines()[-1])}


def time_first_call(name: str, implementation: str) -> None:
    """Prints the seconds of a case's first call, its inputs made before; runs in a process of its own."""
    (case,) = (case for case in CASES if case.name == name)
    built = case.build(implementation, "cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    built.work()
    torch.cuda.synchronize()
    print(json.dumps(time.perf_counter() - began))
