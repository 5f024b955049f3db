import argparse
import sys

from deltarl.rl.bench import kernels
from deltarl.rl.errors import UserError

parser = argparse.ArgumentParser(prog="python -m deltarl.rl.bench.kernels", description=kernels.__doc__)
kernels.add_options(parser)
try:
    sys.exit(kernels.run(parser.parse_args()))
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
