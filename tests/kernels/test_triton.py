"""The Triton kernels in Triton's interpreter, each triton_interpreter*.py in its own process, as many at once as cores.

TRITON_INTERPRET counts when triton is imported, and holds for the whole process.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.glob("triton_interpreter*.py"))


def run(file: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def runs(request) -> Iterator[dict[Path, Future]]:
    """The runs of the files that this session asks for."""
    files = [item.callspec.params["file"] for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {file: pool.submit(run, file) for file in files}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem.removeprefix("triton_"))
def test_kernels_in_the_interpreter(file, runs):
    done = runs[file].result()
    assert done.returncode == 0, done.stdout + done.stderr
