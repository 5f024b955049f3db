"""`deltarl bench rollout`: decode speed of the engine, arms kda and mla of equal widths, ours beside vLLM's own class.

Every engine (arm and class) runs in a process of its own under a deadline, with random weights, and appends its rows to
a file as they come; of one that fails or is late a row says why, and its log goes to stderr. A batch's context is
allocated as vLLM's scheduler allocates any prompt, and filled with random numbers instead of being read, which at 128k
tokens would take minutes (`rollout_context`); batch sizes are limited by that memory and by --max-sequences.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from deltarl.rl.errors import UserError

ARMS = ("kda", "mla")
CLASSES = ("deltarl", "vllm")
MODELS: dict[str, dict[str, Any]] = {
    "full": {
        "hidden_size": 1024,
        "num_hidden_layers": 16,
        "intermediate_size": 2816,
        "linear_num_heads": 8,
        "linear_head_dim": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 32768,
        "max_position_embeddings": 1 << 20,
    },
    "tiny": {"vocab_size": 320, "intermediate_size": 384},
}
DTYPES = {"full": "bfloat16", "tiny": "float32"}


def add_options(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="default: both")
    bench.add_argument(
        "--classes",
        nargs="+",
        default=["deltarl"],
        choices=CLASSES,
        help="whose model class (default: deltarl; vllm: GPU)",
    )
    bench.add_argument(
        "--model", default="full", choices=MODELS, help="16 layers of width 1024, or a tiny one for CPUs"
    )
    bench.add_argument("--contexts", nargs="+", type=int, default=[512, 8192, 32768, 131072], metavar="N")
    bench.add_argument(
        "--equal", nargs="+", type=int, default=[256, 64, 24, 8], metavar="N", help="sequences, for each context"
    )
    bench.add_argument(
        "--max-sequences", type=int, default=1024, metavar="N", help="of a largest batch (default: 1024)"
    )
    bench.add_argument("--steps", type=int, default=64, metavar="N", help="decode steps timed (default: 64)")
    bench.add_argument(
        "--whole", nargs=3, type=int, default=[], metavar="N", help="also read prompts: sequences, prompt, new tokens"
    )
    bench.add_argument("--share", type=float, default=0.85, help="of the memory for the engine (default: 0.85)")
    bench.add_argument("--limit", type=int, default=300, metavar="S", help="seconds for an engine (default: 300)")
    bench.add_argument("--out", metavar="FILE", help="append each row to this .jsonl as it comes")
    bench.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """1 when an engine failed or was late. Raises UserError for options and a file that cannot be used."""
    if len(args.equal) != len(args.contexts):
        raise UserError(f"--equal has {len(args.equal)} numbers for {len(args.contexts)} --contexts: give one for each")
    if min([*args.contexts, *args.equal, args.max_sequences, args.steps, *args.whole]) < 1:
        raise UserError("contexts, batch sizes and steps must be 1 or more")
    with tempfile.TemporaryDirectory() as work:
        out = Path(args.out or Path(work) / "rows.jsonl")
        try:
            out.open("a").close()
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror}") from error
        before = len(read_rows(out))
        for arm in args.arms:
            for served in args.classes:
                run_engine(args, arm, served, Path(work), out)
        rows = read_rows(out)[before:]
    failures = [f"{row['arm']} by {row['served']}: {row['note']}" for row in rows if row["kind"] == "failed"]
    if args.json:
        print(json.dumps({"rows": rows, "failures": failures}))
    else:
        print_table(rows)
    return 1 if failures else 0


def run_engine(args: argparse.Namespace, arm: str, served: str, work: Path, out: Path) -> None:
    """Measure one engine; if it fails or is late, its last row is of kind `failed` and its log goes to stderr."""
    from deltarl.rl.bench.rollout_engine import SPARE_STEPS, Row, append_row, one_line

    longest = max(max(args.contexts) + args.steps + SPARE_STEPS, sum(args.whole[1:]))
    folder = write_model(arm, args.model, work / arm, longest)
    spec = {
        "name": arm,
        "served": served,
        "folder": str(folder),
        "dtype": DTYPES[args.model],
        "out": str(out),
        "contexts": args.contexts,
        "longest": longest,
        "equal": dict(zip(map(str, args.contexts), args.equal, strict=True)),
        "max_num_seqs": args.max_sequences,
        "steps": args.steps,
        "share": args.share,
        "whole": list(args.whole),
        "began": time.time(),
    }
    path = work / f"{arm}-{served}.json"
    path.write_text(json.dumps(spec))
    log, before = path.with_suffix(".log"), len(read_rows(out))
    ended = run_process([sys.executable, "-P", "-m", "deltarl.rl.bench.rollout_engine", str(path)], log, args.limit)
    if ended is None:
        return
    print(f"log of {arm} by {served}:", log.read_text(errors="replace"), sep="\n", file=sys.stderr, flush=True)
    if not any(row["kind"] == "failed" for row in read_rows(out)[before:]):
        append_row(out, Row(arm, served, "failed", note=one_line(ended)))


def run_process(command: list[str], log: Path, limit: int) -> str | None:
    """Run a command for `limit` seconds at most, what it prints going to `log`; how it ended if not well."""
    with log.open("w") as output:
        try:
            code = subprocess.run(command, stdout=output, stderr=output, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return f"not done after {limit} s: give it more with --limit"
    if code == 0:
        return None
    last = log.read_text(errors="replace").strip().rpartition("\n")[2]
    return f"{signal.Signals(-code).name if code < 0 else f'exit code {code}'} after: {last or 'no word'}"


def write_model(arm: str, size: str, folder: Path, longest: int) -> Path:
    """A model folder for sequences of `longest` tokens or more, whose weights the engine makes up itself.

    Both arms have the same widths, FFN included.
    """
    import torch
    from safetensors.torch import save_file

    from deltarl.model import hybrid_config

    folder.mkdir(exist_ok=True)
    config = hybrid_config(arm, "2m", **MODELS[size])
    config.max_position_embeddings = max(config.max_position_embeddings, longest)
    (folder / "config.json").write_text(json.dumps(config.to_moonshot() | {"dtype": DTYPES[size]}))
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'arm':4s} {'class':8s} {'context':>8s} {'batch':>6s} {'tokens/s':>10s} {'ms/token':>9s} {'of it GPU':>9s} "
        f"{'host us':>8s} {'runner us':>9s} {'MB/seq':>8s}  note"
    )
    for row in rows:
        if row["kind"] == "start":
            numbers = f"{'':74s}  first token after {row['seconds']:.1f} s, {row['note']}"
        elif row["kind"] == "failed":
            numbers = f"failed: {row['note']}"
        else:
            numbers = (
                f"{row['context']:8d} {row['batch']:6d} {row['tokens_per_second']:10.0f} {row['ms_per_token']:9.2f} "
                f"{row['gpu_ms']:9.2f} {row['host_us']:8.1f} {row['runner_us']:9.1f} {row['cache_bytes'] / 1e6:8.1f}  "
                f"{row['note']}"
            )
        print(f"{row['arm']:4s} {row['served']:8s} {numbers}")
