"""`python -m deltarl` is the `deltarl` command."""

import sys

from deltarl.rl.cli import main

sys.exit(main())
