"""The `deltarl` command."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

from deltarl import __version__
from deltarl.rl import bench
from deltarl.rl.errors import Diverged, UserError
from deltarl.rl.interrupt import Interrupted

EXAMPLES = """examples:
  deltarl train jobs/quickstart.yaml --set rl.steps=20 --set seed=1
  deltarl train --resume runs/quickstart
  deltarl compare jobs/compare-tiny.yaml
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0: it did what was asked, 2: input that cannot be used, 3: a run diverged, 130: Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args) or 0
    except UserError as error:
        print(f"deltarl: error: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"deltarl: {error}", file=sys.stderr)
        return 3
    except Interrupted as stopped:
        print(f"deltarl: {stopped}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("deltarl: stopped at once", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(
        prog="deltarl",
        description="Reinforcement learning from verifiable rewards for hybrid linear-attention language models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"deltarl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    for name, run, help_text in (
        ("train", run_train, "run a job: SFT warm-up, RL, evaluation, report"),
        ("sft", run_sft, "run a job's SFT warm-up only"),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("job", nargs="?", help="the job file; left out with --resume")
        add_overrides(command)
        command.add_argument("--dry-run", action="store_true", help="print the resolved job and stop")
        command.add_argument("--resume", metavar="RUN", help="go on from the last checkpoint of a run folder")
        command.set_defaults(run=run)

    command = commands.add_parser("eval", help="measure held-out accuracy of a run's checkpoint, or of a job's model")
    command.add_argument("target", help="a run folder, or a job file with model.path")
    command.add_argument("--checkpoint", type=int, metavar="STEP", help="of a run folder (default: the last)")
    add_overrides(command)
    command.set_defaults(run=run_eval)

    command = commands.add_parser("replay", help="compute a batch again whose loss or gradient was not finite")
    command.add_argument("folder", help="a run folder, or one of the folders in its nonfinite/")
    command.set_defaults(run=run_replay)

    command = commands.add_parser("difficulty", help="measure how hard each training problem is for a policy")
    command.add_argument("target", help="a run folder, or a job file with model.path")
    command.add_argument(
        "--checkpoint", type=int, default=0, metavar="STEP", help="of a run folder (default: 0, where RL starts)"
    )
    command.add_argument("--samples", type=int, default=8, metavar="N", help="answers to each problem (default: 8)")
    command.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of sampling (default: 1)")
    command.add_argument(
        "--band", type=float, nargs=2, default=(0.1, 0.9), metavar=("LOW", "HIGH"), help="moderate (default: 0.1 0.9)"
    )
    command.add_argument(
        "--output", type=Path, default=Path("pass_rates.jsonl"), metavar="FILE", help="default: pass_rates.jsonl"
    )
    add_overrides(command)
    command.set_defaults(run=run_difficulty)

    command = commands.add_parser("compare", help="train several arms on the same work and draw their curves together")
    command.add_argument("comparison", help="the comparison file, such as jobs/compare-tiny.yaml")
    add_overrides(command)
    command.add_argument("--dry-run", action="store_true", help="print the runs and stop")
    command.set_defaults(run=run_compare)

    command = commands.add_parser("report", help="write report.html and pictures of a run folder anew")
    command.add_argument("run_folder", metavar="RUN")
    command.set_defaults(run=run_report)

    command = commands.add_parser("verify", help="grade a file of responses, or serve a verifier over HTTP")
    work = command.add_mutually_exclusive_group(required=True)
    work.add_argument("--data", nargs="+", metavar="FILE", help=".jsonl rows: gold, pred or response, expected, meta")
    work.add_argument("--serve", action="store_true", help="answer OpenRLHF's reward requests at /get_reward")
    command.add_argument("--verifier", default="math", metavar="NAME", help="as in a job file (default: math)")
    command.add_argument(
        "--option", dest="options", metavar="KEY=VALUE", action="append", default=[], help="of the verifier; repeatable"
    )
    command.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")
    command.add_argument("--timeout", type=float, default=5.0, metavar="S", help="seconds for a row (default: 5)")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--show-errors", action="store_true", help="list wrong verdicts and rows that gave none")
    command.add_argument("--host", default="127.0.0.1", help="address to serve at (default: 127.0.0.1, this machine)")
    command.add_argument("--port", type=int, default=5000, help="port to serve at (default: 5000; 0: a free one)")
    command.set_defaults(run=run_verify)

    command = commands.add_parser("verifiers", help="list the verifiers that are found, and from where")
    command.set_defaults(run=run_verifiers)

    bench.add_parser(commands)

    command = commands.add_parser("doctor", help="check what is installed, and say how to close each gap")
    command.set_defaults(run=run_doctor)
    return parser


def add_overrides(command: argparse.ArgumentParser) -> None:
    """The `--set KEY=VALUE` option."""
    command.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a key of the job, such as rl.steps=20; repeatable",
    )


def run_train(args: argparse.Namespace, sft_only: bool = False) -> int:
    """`deltarl train` and `deltarl sft`."""
    from deltarl.rl.jobs import dump_job, load_job
    from deltarl.rl.runfolder import RunFolder

    if (args.job is None) == (args.resume is None):
        raise UserError("give a job file, or --resume RUN, and not both")
    if args.dry_run:
        print(dump_job(load_job(args.job or Path(args.resume) / "job.yaml", args.overrides)), end="")
        return 0
    is_main = os.environ.get("RANK", "0") == "0"  # set where several processes were launched
    resume = RunFolder.open(args.resume, args.overrides) if args.resume is not None and is_main else None
    job = load_job(args.job or Path(args.resume) / "job.yaml", args.overrides)

    quiet_libraries()
    from deltarl.rl.sharding import leave_together  # torch and vLLM take seconds to import
    from deltarl.rl.train import train

    train(job, resume, sft_only=sft_only)
    leave_together()
    return 0


def quiet_libraries() -> None:
    """Keep the libraries' own bars and notes out of deltarl's progress; their errors stay."""
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")  # deltarl has its own range
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # Triton is not needed without a GPU
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def run_sft(args: argparse.Namespace) -> int:
    """`deltarl sft`."""
    return run_train(args, sft_only=True)


def run_eval(args: argparse.Namespace) -> int:
    """`deltarl eval`."""
    quiet_libraries()
    from deltarl.rl.measuring import evaluate_target

    evaluate_target(args.target, args.checkpoint, args.overrides)
    return 0


def run_replay(args: argparse.Namespace) -> int:
    """`deltarl replay`."""
    quiet_libraries()
    from deltarl.rl.replay import replay

    print("\n".join(replay(Path(args.folder))))
    return 0


def run_difficulty(args: argparse.Namespace) -> int:
    """`deltarl difficulty`."""
    low, high = args.band
    if args.samples < 1 or args.temperature < 0 or not 0 <= low <= high <= 1:
        raise UserError("--samples at least 1, --temperature at least 0, --band LOW HIGH with 0 <= LOW <= HIGH <= 1")
    quiet_libraries()
    from deltarl.rl.measuring import measure_difficulty

    measure_difficulty(
        args.target,
        args.checkpoint,
        args.overrides,
        samples=args.samples,
        temperature=args.temperature,
        band=(low, high),
        output=args.output,
    )
    return 0


def run_compare(args: argparse.Namespace) -> int:
    """`deltarl compare`."""
    from deltarl.rl.compare import compare

    compare(args.comparison, args.overrides, dry_run=args.dry_run)
    return 0


def run_report(args: argparse.Namespace) -> int:
    """`deltarl report`."""
    from deltarl.rl.report import write_report

    print(write_report(Path(args.run_folder)))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """`deltarl verify`."""
    from deltarl.rl.verify import read_options, serve, verify

    options = read_options(args.options)
    pool = {"workers": args.workers, "timeout": args.timeout}
    if args.serve:
        return serve(args.verifier, options, **pool, address=args.host, port=args.port)
    verify(args.data, args.verifier, options, **pool, as_json=args.json, show_errors=args.show_errors)
    return 0


def run_verifiers(args: argparse.Namespace) -> int:
    """`deltarl verifiers`."""
    from deltarl.rewards import list_verifiers

    rows = [(found.name, found.version, found.origin) for found in list_verifiers()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for name, version, origin in rows:
        print(f"{name:{widths[0]}}  {version:{widths[1]}}  {origin}")
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    """`deltarl doctor`."""
    from deltarl.rl.doctor import run_doctor as doctor

    return doctor()
