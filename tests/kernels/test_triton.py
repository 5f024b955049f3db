"""The Triton kernels in Triton's interpreter, each triton_interpreter*.py in a process of its own.

TRITON_INTERPRET counts when triton is imported, and holds for the whole process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("triton_interpreter*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("triton_"))
def test_kernels_in_the_interpreter(file):
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
