"""Every table of the kernels on a GPU, one after the other; the last line of each, and whether all passed.

python tests/gpu/whole_table.py
"""

import subprocess
import sys
from pathlib import Path

TABLES = ("kernels_gpu.py", "gdn_gpu.py", "decode_gpu.py", "conv_norm_gpu.py")


def main() -> int:
    failed = []
    for name in TABLES:
        done = subprocess.run([sys.executable, Path(__file__).with_name(name)], capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
        print("\n".join([*lines, f"{name}: {(done.stdout or done.stderr).strip().splitlines()[-1]}"]), flush=True)
        if done.returncode:
            failed.append(name)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
