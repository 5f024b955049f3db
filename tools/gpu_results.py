"""The measurements of docs/results that need a GPU, each in a process of its own under a limit, one after the other.

    python -P tools/gpu_results.py --out results rl-30m rl-30m-ahead    # or no name: the list
    python -P tools/gpu_results.py --out results rl-300m --limit 200 --set rl.token_budget=8192

NAME.log in the folder is what a command said; rl-* runs lie under runs/. Prints each command, how it ended, after how
many seconds, its last lines, and the phases of each RL step. `trl` needs a model folder: --model DIR, as
tools/make_smollm2.py makes it. `tensor-parallel` and `fsdp` need two GPUs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from deltarl.rl.metrics import read_metrics

ROOT = Path(__file__).parent.parent
DELTARL = [sys.executable, "-P", "-m", "deltarl"]
JOB = str(ROOT / "jobs" / "gpu-30m.yaml")
RL = (
    "sft.steps=0 rl.prompts_per_step=256 rl.num_generations=16 rl.max_completion_length=2048 eval.every=0 "
    "rollout.max_model_len=2304 rollout.max_num_seqs=1024 data.heldout_size=50 rl.checkpoint_every=100"
)
AHEAD = "rollout.max_staleness=1 rollout.placement=process"
TRL = (
    "rl.prompts_per_step=64 rl.num_generations=8 rl.max_completion_length=1024 rollout.max_model_len=1280 "
    "rl.learning_rate=1e-6"
)
BENCHES = {
    "kernels": "kernels --device cuda --peer none --case kda/* --case gdn/* --case decode/* --case conv/* "
    "--case norm/*",
    "kernels-transformers": "kernels --device cuda --peer transformers --case kda/b1-t8192-h16/*",
    "kernels-fla": "kernels --device cuda --peer fla --case kda/b1-t32768-h16/*",
    "first-call": "kernels --device cuda --peer none --case first-call/*",
    "rollout": "rollout --contexts 512 8192 32768 131072 --equal 256 64 24 8 --steps 64",
    "rollout-long": "rollout --contexts 524288 1048320 --equal 4 2 --steps 64",
    "rollout-vllm": "rollout --arms kda --classes vllm --contexts 512 --equal 256 --steps 64",
    "worker": "worker --repeats 3",
    "learner": "learner --sizes 30m 300m smollm2-135m --sequences 64 --longest 4096 --budget 32768 --repeats 3",
}
RUNS = {
    "rl-30m": f"{RL} model.size=30m rl.steps=3",
    "rl-30m-ahead": f"{RL} model.size=30m rl.steps=5 {AHEAD}",
    "rl-300m": f"{RL} model.size=300m rl.steps=2",
    "rl-300m-ahead": f"{RL} model.size=300m rl.steps=4 rl.token_budget=8192 {AHEAD}",
}
SCRIPTS = {
    "kernels-right": "whole_table.py",
    "packed": "packed_gpu.py",
    "parity": "rollout_gpu.py kda mla gdn moe mla-rope bounded --tokens 256",
    "sync-sleep": "sync_sleep_gpu.py",
    "tensor-parallel": "rollout_gpu.py kda mla --ranks 2 --tokens 256",
    "fsdp": "fsdp_gpu.py --steps 4",
}
NAMES = (*BENCHES, *RUNS, "trl", *SCRIPTS)


def command_of(name: str, out: Path, model: str | None, overrides: list[str]) -> list[str]:
    """What runs under this name; `overrides` are keys of a job."""
    if name in SCRIPTS:
        script, *arguments = SCRIPTS[name].split()
        return [sys.executable, "-P", str(ROOT / "tests" / "gpu" / script), *arguments]
    if name in BENCHES:
        return [*DELTARL, "bench", *BENCHES[name].split()]
    if name == "trl":
        settings = [f"model.path={model}", *TRL.split(), *overrides]
        return [*DELTARL, "bench", "trl", JOB, "--steps", "3", "--limit", "280", *set_options(settings)]
    return [
        *DELTARL,
        "train",
        JOB,
        *set_options([f"name={name}", f"runs_dir={out / 'runs'}", *RUNS[name].split(), *overrides]),
    ]


def set_options(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def run(command: list[str], log: Path, limit: float) -> tuple[int | None, float]:
    """The exit code (None: it was late, and was stopped with all that it had started) and the seconds."""
    began = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return code, time.monotonic() - began


def last_lines(log: Path, count: int) -> str:
    lines = [line.rstrip()[:300] for line in log.read_text(errors="replace").replace("\r", "\n").splitlines()]
    return "\n".join([line for line in lines if line][-count:])


def step_lines(metrics: Path) -> str:
    """Each RL step of a run: what was drawn, how fast, and the seconds of its phases."""
    rows: list[dict[str, Any]] = (
        [row for row in read_metrics(metrics) if row["kind"] == "rl"] if metrics.exists() else []
    )
    return "\n".join(
        f"step {row['step']}: {row['tokens_drawn']} tokens, {row['tokens_per_second']:.0f} a second, engine idle "
        f"{row['overlap']['engine_idle']:.2f}; " + ", ".join(f"{what} {s:.2f} s" for what, s in row["time"].items())
        for row in rows
    )


def main() -> int:
    """The number of measurements that failed or were late."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for logs and runs")
    parser.add_argument("--limit", type=float, default=300, metavar="S", help="seconds for each (default: 300)")
    parser.add_argument("--lines", type=int, default=12, metavar="N", help="last lines of each to print (default: 12)")
    parser.add_argument("--model", metavar="DIR", help="for trl: a causal LM's folder")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="for rl-*, trl"
    )
    args = parser.parse_args()
    if not args.names:
        print("\n".join(NAMES))
        return 0
    if unknown := [name for name in args.names if name not in NAMES]:
        parser.error(f"there is no {unknown[0]}: give some of {', '.join(NAMES)}")
    if "trl" in args.names and args.model is None:
        parser.error("trl needs --model DIR, the folder of a causal LM that TRL can train")
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    failed = 0
    for name in args.names:
        command, log = command_of(name, args.out, args.model, args.overrides), args.out / f"{name}.log"
        print(f"== {name}: {shlex.join(command)}", flush=True)
        code, seconds = run(command, log, args.limit)
        steps = step_lines(args.out / "runs" / name / "metrics.jsonl") if name in RUNS else ""
        failed += code != 0
        how = "late, stopped" if code is None else f"exit code {code}"
        print(
            "\n".join(filter(None, [last_lines(log, args.lines), steps, f"-- {how} after {seconds:.0f} s"])), flush=True
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
