"""How the math verifier scales with processes, on its own and through the host: the rows of `deltarl bench verifiers`
that say so, without math-verify, for as many workers as asked for.

    python tools/verifier_scaling.py 1 2 4 8
"""

import argparse
import os
import sys
from importlib.resources import files

from deltarl.rl.bench.verifiers import OURS, cpu_model, host_speed, plain_speed, read_solutions

ITEMS_PER_WORKER = 8000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workers", type=int, nargs="+", help="numbers of processes")
    counts = parser.parse_args().workers
    solutions = read_solutions([files("deltarl.rl.bench") / "data" / "responses.jsonl"])
    items = [(solution.response, solution.gold, None) for solution in solutions]
    print(f"{cpu_model()}, {os.cpu_count()} processors, Python {sys.version.split()[0]}, {len(items)} responses")
    print("processes  plain /s  host /s  its own process µs  workers µs each")
    for count in counts:
        work = items * max(1, ITEMS_PER_WORKER * count // len(items))
        plain = plain_speed(OURS, work, count)
        host, here, there = host_speed(OURS, work, count)
        print(f"{count:9} {plain:9,.0f} {host:8,.0f} {here:19.1f} {there:16.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
