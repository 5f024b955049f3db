"""`deltarl bench`: what deltarl promises, measured beside its public peers in one run; one module a bench."""

import argparse
import os

from deltarl.rl.bench import kernels, learner, mismatch, rollout, stock, worker


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `bench` and its benches to the command line; what a bench measures with is imported when it runs."""
    command = commands.add_parser("bench", help="measure parts of deltarl beside their public peers")
    benches = command.add_subparsers(required=True, metavar="BENCH")

    bench = benches.add_parser("kernels", help="the operators of linear attention")
    kernels.add_options(bench)
    bench.set_defaults(run=kernels.run)

    bench = benches.add_parser("learner", help="an optimizer step over traces of different lengths, packed and padded")
    learner.add_options(bench)
    bench.set_defaults(run=learner.run)

    bench = benches.add_parser("mismatch", help="the engine's logprobs beside the learner's on long traces")
    mismatch.add_options(bench)
    bench.set_defaults(run=mismatch.run)

    bench = benches.add_parser("rollout", help="decode speed of the engine at short and long contexts")
    rollout.add_options(bench)
    bench.set_defaults(run=rollout.run)

    bench = benches.add_parser("trl", help="a job's RL steps beside those of TRL's own GRPOTrainer")
    stock.add_options(bench)
    bench.set_defaults(run=stock.run)

    bench = benches.add_parser(
        "verifiers", help="the math verifier beside math-verify: speed, accuracy, hostile inputs"
    )
    bench.add_argument("--data", metavar="FILE", help="worked solutions to time (default: 800 that come with deltarl)")
    bench.add_argument(
        "--cases", metavar="PATH", nargs="+", default=[], help="labelled .jsonl files, or folders of them"
    )
    bench.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, at most (default: one a core)")
    bench.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    bench.set_defaults(run=run_verifiers)

    bench = benches.add_parser("worker", help="what the rollout worker adds to a bare LLM.generate")
    worker.add_options(bench)
    bench.set_defaults(run=worker.run)


def run_verifiers(args: argparse.Namespace) -> None:
    """`deltarl bench verifiers`."""
    from deltarl.rl.bench.verifiers import bench

    bench(args.data, args.cases, args.workers, as_json=args.json)
