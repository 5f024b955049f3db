"""The commands that tools/gpu_results.py would run on a GPU are commands that deltarl takes."""

import importlib.util
import sys
from pathlib import Path

import pytest

from deltarl.rl.cli import build_parser
from deltarl.rl.jobs import load_job

TOOL = Path(__file__).parents[2] / "tools" / "gpu_results.py"
spec = importlib.util.spec_from_file_location("gpu_results", TOOL)
gpu_results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_results)


@pytest.mark.parametrize("name", [*gpu_results.BENCHES, *gpu_results.RUNS, "trl"])
def test_a_command_is_one_that_deltarl_takes(name, tmp_path):
    command = gpu_results.command_of(name, tmp_path, "models/x", ["rl.learning_rate=1e-5"])
    assert command[: len(gpu_results.DELTARL)] == gpu_results.DELTARL
    args = build_parser().parse_args(command[len(gpu_results.DELTARL) :])
    if name not in gpu_results.BENCHES:
        overrides = args.set if name == "trl" else args.overrides
        assert load_job(args.job, overrides).rl.learning_rate == 1e-5


@pytest.mark.parametrize("name", gpu_results.SCRIPTS)
def test_a_script_is_there(name, tmp_path):
    assert Path(gpu_results.command_of(name, tmp_path, None, [])[2]).is_file()


def test_what_is_late_is_stopped_with_what_it_started(tmp_path):
    code = "import subprocess, sys; print('begun', flush=True); subprocess.run(['sleep', '600'])"
    ended, seconds = gpu_results.run([sys.executable, "-c", code], tmp_path / "log", 3.0)
    assert ended is None and seconds < 60
    assert gpu_results.last_lines(tmp_path / "log", 5) == "begun"


def test_a_failure_counts(tmp_path):
    code, _ = gpu_results.run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", 60.0)
    assert code == 3
