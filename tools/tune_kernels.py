"""Times the Triton kernels in many configurations on this machine's GPU; prints the table of kernels/fused/configs.py.

    python -P tools/tune_kernels.py                                  all kernels
    python -P tools/tune_kernels.py --only 'scan*' --stages 1 2 3    some

Needs torch, Triton and deltarl. For each entry of CONFIGS and each shape, the candidates are first checked, several at
a time and each in a process of its own, since one may not compile, read outside its memory or hang: those whose results
differ from the present configuration's are out. The others are timed one after the other, the kernel alone.
"""

import argparse
import dataclasses
import fnmatch
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

SHAPES = (
    "kda/b1-t32768-h16/backward",
    "kda/packed-32-of-256-to-4096-h16/backward",
    "kda/b32-t1024-h8-k64/backward",
    "gdn/b1-t32768-h16/backward",
    "conv/b1-t32768-d2048/backward",
    "norm/b1-t32768-h16/backward",
    "decode/n1-h32/eager",
    "decode/n256-h32/eager",
    "decode/n256-h32/8-tokens",
)
KERNELS = {"decode_normed": ["decode_kernel"], "ranges": ["largest_kernel"]}  # others: NAME_kernel
WHERE = {"decode": "decode/*", "decode_normed": "decode/none"}  # the shapes an entry is for, where not all
SAME = 0.01  # RMS of the difference over RMS: other tile widths round sums in another order, and a wrong tile shows
TIMEOUT = 240  # seconds for a candidate's compilation and check


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="GLOB", default="*", help="entries of CONFIGS")
    parser.add_argument("--shape", metavar="GLOB", default="*", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--blocks", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--warps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--registers", type=int, nargs="+", default=[0, 168], help="most per thread; 0: no limit")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="checks at a time")
    parser.add_argument("--out", metavar="FILE", help="append each measurement to this .jsonl as it comes")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        STEPS[args.step](**json.load(sys.stdin))
        return 0
    try:
        return tune(args)
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr)
        return 1


def tune(args: argparse.Namespace) -> int:
    """1 when there was nothing to tune. Raises CalledProcessError when the present configurations fail."""
    found, shapes = [], [shape for shape in SHAPES if fnmatch.fnmatchcase(shape, args.shape)]
    launched = {line["shape"]: line["kernels"] for line in step("profile", shapes=shapes)}
    for shape, kernels in launched.items():
        print(shape, *(f"{name} {1e6 * seconds:.1f} us" for name, seconds in kernels.items()), sep="\n    ", flush=True)
    present = step_once("present")
    for entry, config in present["configs"].items():
        kernels = KERNELS.get(entry, [f"{entry}_kernel"])
        of_entry = fnmatch.filter(launched, WHERE.get(entry, "*")) if fnmatch.fnmatchcase(entry, args.only) else []
        for shape in of_entry:
            if launched[shape].keys() & set(kernels):
                found += measured(entry, kernels, shape, grid(config, args), args)
    for entry, config in best(found).items():
        print(f'    "{entry}": Config({", ".join(f"{key}={value}" for key, value in config.items())}),')
    print(f"# {present['device']}, triton {present['triton']}")
    return int(not found)


def grid(present: dict[str, int], args: argparse.Namespace) -> list[dict[str, int]]:
    """The present configuration first; a block of 0 is one that the kernel does not have."""
    blocks = args.blocks if present["block"] else [0]
    names = ("block", "num_warps", "num_stages", "registers")
    tried = (dict(zip(names, t, strict=True)) for t in product(blocks, args.warps, args.stages, args.registers))
    return [present, *(present | change for change in tried if present | change != present)]


def measured(
    entry: str, kernels: list[str], shape: str, candidates: list[dict], args: argparse.Namespace
) -> list[dict]:
    """One dict per candidate that gave the right values, fastest first; prints all of them."""
    print(f"\n{entry}, {shape}", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        whys = list(pool.map(partial(problem_with, entry, shape), candidates))
    for config, why in zip(candidates, whys, strict=True):
        if why:
            print(f"    {config}: {why}", flush=True)
    right = [config for config, why in zip(candidates, whys, strict=True) if not why]
    rows = []
    for line in step("time", entry=entry, kernels=kernels, shape=shape, configs=right):
        rows.append({"entry": entry, "shape": shape, **line})
        if args.out:
            with Path(args.out).open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    for row in sorted(rows, key=lambda row: row["seconds"]):
        print(f"    {row['config']}: {1e6 * row['seconds']:.1f} us", flush=True)
    return rows


def best(rows: Iterable[dict]) -> dict[str, dict[str, int]]:
    """For each entry the configuration with the smallest geometric mean over the shapes of its time by the best time.

    One that was not right on every shape is out.
    """
    times: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        times.setdefault(row["entry"], {}).setdefault(row["shape"], {})[json.dumps(row["config"])] = row["seconds"]
    chosen = {}
    for entry, shapes in times.items():
        everywhere = set.intersection(*(set(by_config) for by_config in shapes.values()))
        cost = {c: sum(math.log(t[c] / min(t.values())) for t in shapes.values()) for c in sorted(everywhere)}
        if cost:
            chosen[entry] = json.loads(min(cost, key=cost.__getitem__))
    return chosen


def problem_with(entry: str, shape: str, config: dict[str, int]) -> str:
    """Why a candidate is out; empty where it is not."""
    try:
        return step_once("check", entry=entry, shape=shape, config=config)["problem"]
    except subprocess.TimeoutExpired:
        return f"nothing after {TIMEOUT} s"
    except subprocess.CalledProcessError as error:
        return (error.stderr.strip() or f"exit code {error.returncode}").splitlines()[-1][:160]


def step_once(name: str, **task: Any) -> dict[str, Any]:
    (line,) = step(name, timeout=TIMEOUT, **task)  # unpacking runs it to its end
    return line


def step(name: str, timeout: float | None = None, **task: Any) -> Iterator[dict[str, Any]]:
    """The JSON lines that a step prints in a process of its own; after them raises CalledProcessError if it failed."""
    command = [sys.executable, "-P", __file__, "--step", name]
    env = {**os.environ, "DELTARL_KERNELS": "triton"}
    done = subprocess.run(command, input=json.dumps(task), env=env, capture_output=True, text=True, timeout=timeout)
    yield from map(json.loads, done.stdout.splitlines())
    done.check_returncode()


def show_present() -> None:
    """Step: the configurations as they are, and the device."""
    import torch
    import triton

    from deltarl.kernels.fused.configs import CONFIGS

    configs = {entry: dataclasses.asdict(config) for entry, config in CONFIGS.items()}
    device = f"{torch.cuda.get_device_name()} (sm_{''.join(map(str, torch.cuda.get_device_capability()))})"
    print(json.dumps({"configs": configs, "device": device, "triton": triton.__version__}))


def profile(shapes: list[str]) -> None:
    """Step: the kernels of each shape, and their seconds, in the present configurations."""
    from deltarl.rl.bench.kernels.gpu import kernel_seconds

    for shape in shapes:
        built = build(shape)
        if built is not None:
            print(json.dumps({"shape": shape, "kernels": kernel_seconds(built.eager or built.work)}), flush=True)


def check(entry: str, shape: str, config: dict[str, int]) -> None:
    """Step: whether a shape's results are those of the present configuration."""
    from deltarl.rl.bench.kernels.cuda import difference

    expected = build(shape).work()
    configure(entry, config)
    apart = difference(build(shape).work(), expected)
    print(json.dumps({"problem": "" if apart <= SAME else f"differs by {apart:.2g}"}))


def time_all(entry: str, kernels: list[str], shape: str, configs: list[dict[str, int]]) -> None:
    """Step: the seconds of the entry's kernels in each configuration."""
    from deltarl.rl.bench.kernels.gpu import kernel_seconds

    built = build(shape)
    for config in configs:
        configure(entry, config)
        seconds = sum(time for name, time in kernel_seconds(built.eager or built.work).items() if name in kernels)
        print(json.dumps({"config": config, "seconds": seconds}), flush=True)


def configure(entry: str, config: dict[str, int]) -> None:
    from deltarl.kernels.fused.configs import CONFIGS

    CONFIGS[entry] = dataclasses.replace(CONFIGS[entry], **config)


def build(shape: str) -> Any:
    """The case of `deltarl bench kernels`, ours; None where there is no such operator."""
    from deltarl.rl.bench.kernels.cases import CASES

    (case,) = (case for case in CASES if case.name == shape)
    return case.build("ours", "cuda")


STEPS = {"present": show_present, "profile": profile, "check": check, "time": time_all}

if __name__ == "__main__":
    sys.exit(main())
