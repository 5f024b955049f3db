"""The processes that vLLM starts to look at a model's class import installed packages, not the working folder's."""

import os
import subprocess
import sys

from deltarl.rollout.engine import prepare_environment


def test_a_module_of_the_working_folder_does_not_stand_in_for_an_installed_one(tmp_path, monkeypatch):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    monkeypatch.setattr(os, "environ", environment)
    prepare_environment()
    (tmp_path / "psutil.py").write_text("raise ImportError('the working folder\\'s psutil')")
    command = [sys.executable, "-m", "vllm.model_executor.models.registry"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, input=b"", capture_output=True)
    said = done.stderr.decode()
    assert "working folder's psutil" not in said
    assert "Ran out of input" in said, said  # it came as far as to read which class
