"""`deltarl bench learner`: one optimizer step of the learner over traces of different lengths, packed beside padded.

Both ways compute the same loss over the same traces, with the same head that keeps no logits: packed as the trainer
does it, padded as rows of the longest trace, which for a hybrid is the plain forward and for another model one with an
attention mask, as trainers that pad do it.
"""

import argparse
import json

from deltarl.rl.errors import UserError

WAYS = ("packed", "padded")


def add_options(bench: argparse.ArgumentParser) -> None:
    bench.add_argument(
        "--sizes", nargs="+", default=["30m", "300m"], metavar="SIZE", help="of hybrids, or smollm2-135m, a Llama"
    )
    bench.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="default: both")
    bench.add_argument("--sequences", type=int, default=64, metavar="N", help="of an optimizer step (default: 64)")
    bench.add_argument("--longest", type=int, default=4096, metavar="N", help="tokens of a completion (default: 4096)")
    bench.add_argument("--spread", type=float, default=10.0, metavar="X", help="longest by shortest (default: 10)")
    bench.add_argument("--prompt", type=int, default=64, metavar="N", help="tokens of every prompt (default: 64)")
    bench.add_argument("--budget", type=int, default=32768, metavar="N", help="tokens per pass (default: 32768)")
    bench.add_argument("--vocab", type=int, default=32768, metavar="N", help="of the hybrids (default: 32768)")
    bench.add_argument(
        "--recompute",
        nargs="+",
        default=["none"],
        metavar="WHAT",
        help="activations computed again, each in turn: none, all, or some of linear,mla,ffn (default: none)",
    )
    bench.add_argument("--repeats", type=int, default=3, metavar="N", help="steps timed, after one (default: 3)")
    bench.add_argument("--json", action="store_true", help="print JSON rows instead of a table")


def run(args: argparse.Namespace) -> int:
    """Raises UserError for a size that is not known and numbers that cannot be used together."""
    from deltarl.rl.bench.learner_step import as_table, measure

    if min(args.sequences, args.prompt, args.repeats) < 1 or args.spread < 1 or args.longest < args.spread:
        raise UserError("--sequences, --prompt, --repeats and --spread must be 1 or more, --longest at least --spread")
    if args.budget < args.prompt + args.longest:
        raise UserError(f"--budget {args.budget} is less than --prompt + --longest = {args.prompt + args.longest}")
    rows = [row for size in args.sizes for what in args.recompute for row in measure(size, what, args)]
    print("\n".join(map(json.dumps, rows)) if args.json else as_table(rows))
    return 0
