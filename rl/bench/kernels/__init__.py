"""`deltarl bench kernels`: the operators of deltarl.kernels beside their public peers, in one run.

On a CPU the peer is transformers' torch code; on CUDA that, fla-core's kernels where they are installed, and the torch
code of this repository. A case may be run by itself (`--case`), since a peer may tune itself for minutes at the first
call of a shape, and rows are written as they come (`--out`).

Also runs where only torch, Triton and deltarl's code are:  python -P -m deltarl.rl.bench.kernels --device cuda
"""

import argparse

PEERS = ("all", "fla", "transformers", "torch", "none")


def add_options(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("--device", default="cpu", help="where to run them: cpu or cuda (default: cpu)")
    bench.add_argument(
        "--case", metavar="GLOB", action="append", help="only the cases of this name, such as 'kda/*'; repeatable"
    )
    bench.add_argument(
        "--peer", default="all", choices=PEERS, help="whom to measure beside ours on CUDA (default: all that are there)"
    )
    bench.add_argument("--out", metavar="FILE", help="append each row to this .jsonl as it comes")
    bench.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    """1 when a case of ours failed. Raises UserError for options that cannot be used."""
    from deltarl.rl.bench.kernels.command import bench

    return bench(args.device, as_json=args.json, case=args.case or ["*"], peer=args.peer, out=args.out)
