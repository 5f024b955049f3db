"""`deltarl bench mismatch`: how far the engine's logprobs lie from the learner's on the same tokens, by position.

The engine samples long traces from a trained model. The learner scores them as it does in training (fp32 weights, under
bf16 autocast on a GPU) and in fp32 throughout. The distance between these two, `floor`, is what bf16 alone costs; an
engine that computes the same function is no further from fp32 than the learner itself is.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from deltarl.rl.errors import UserError

BUCKETS = 8
STATE_DTYPES = ("float32", "bfloat16")


def add_options(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("model", help="a trained model's folder, such as runs/NAME/checkpoints/64")
    bench.add_argument("--traces", type=int, default=16, metavar="N", help="default: 16")
    bench.add_argument("--tokens", type=int, default=4096, metavar="N", help="of each trace (default: 4096)")
    bench.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="default: bfloat16")
    bench.add_argument("--state-dtype", default="float32", choices=STATE_DTYPES, help="of the engine's KDA states")
    bench.add_argument("--seed", type=int, default=0)
    bench.add_argument("--memory", type=float, default=0.3, help="share of the memory for the engine (default: 0.3)")
    bench.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """Raises UserError for a folder that holds no model, or numbers of traces or tokens that cannot be used."""
    if args.traces < 1 or args.tokens < BUCKETS:
        raise UserError(f"give at least 1 for --traces and {BUCKETS} for --tokens")
    if not Path(args.model).is_dir():
        raise UserError(f"{args.model} is no model folder: give one such as runs/NAME/checkpoints/64")
    from deltarl.rl.bench.mismatch_logprobs import measure

    found = measure(args)
    print(json.dumps(found) if args.json else as_text(found))
    return 0


def as_text(found: dict[str, Any]) -> str:
    def line(values: list[float]) -> str:
        return "  ".join(f"{value:.2e}" for value in values)

    ratio = "" if found["ratio"] is None else f": {found['ratio']:.2f} times what bf16 costs the learner itself"
    return "\n".join(
        [
            f"{found['traces']} traces of {found['tokens']} tokens on {found['device']}, {found['dtype']}, "
            f"KDA states {found['state_dtype']}",
            f"engine to learner as it trains: mean {found['gap']:.2e}, largest {found['gap_max']:.2e}, "
            f"KL {found['kl']:.2e}, effective sample size {found['ess']:.4f}",
            f"engine to learner in fp32:      mean {found['gap_exact']:.2e}{ratio}",
            f"by position, first to last:     {line(found['gap_by_position'])}",
            f"learner's own distance:         {line(found['floor_by_position'])}",
        ]
    )
