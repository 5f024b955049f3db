"""The import rule of docs/design.md, and that every folder of code is packaged."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "model", "rewards", "rollout", "rl")
OUR_FOLDERS = {
    "kernels": {"kernels"},
    "model": {"model", "kernels"},
    "rewards": {"rewards"},
    "rollout": {"rollout", "model", "kernels"},
    "rl": set(FOLDERS),
}
SHARED = {"__version__", "channel"}
OTHERS = {
    "kernels": {"torch", "triton"},
    "model": {"torch", "transformers", "safetensors", "tokenizers", "huggingface_hub", "numpy"},
    "rewards": {"sympy", "mpmath", "latex2sympy2_extended", "math_verify"},
    "rollout": {"torch", "transformers", "vllm", "safetensors", "numpy", "psutil"},
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def imported_modules(file: Path) -> Iterator[str]:
    """Dotted names of everything a file imports at any depth, relative imports resolved."""
    package = ("deltarl", *file.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "deltarl" else (module,)


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_imports_only_what_the_design_allows(folder):
    forbidden = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        for name in imported_modules(file):
            top, _, rest = name.partition(".")
            if top in sys.stdlib_module_names:
                continue
            ours = top == "deltarl"
            allowed = rest.partition(".")[0] in OUR_FOLDERS[folder] | SHARED if ours else top in others(folder)
            if not allowed:
                forbidden.append(f"{file.relative_to(ROOT)}: {name}")
    assert not forbidden


def others(folder: str) -> set[str]:
    """The foreign modules a folder may import: its own list, and for rl every declared dependency, extras and peers."""
    if folder != "rl":
        return OTHERS[folder]
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *extras["lora"], *extras["8bit"]]
    declared = {Requirement(line).name.replace("-", "_") for line in lines}
    return declared - {"pyyaml"} | {"yaml", "vllm", "triton", "math_verify", "fla"}


def test_rewards_load_neither_torch_nor_an_engine():
    program = (
        "import pkgutil, sys, importlib, deltarl.rewards as r\n"
        "for m in pkgutil.walk_packages(r.__path__, 'deltarl.rewards.'): importlib.import_module(m.name)\n"
        "print(*sorted({'torch', 'vllm', 'trl', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_folder_of_code_is_packaged():
    settings = PROJECT["tool"]["setuptools"]
    with_code = {file.parent.relative_to(ROOT) for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
    assert {".".join(("deltarl", *folder.parts)) for folder in with_code} == set(settings["packages"]) - {"deltarl"}
    assert all((ROOT / folder / "__init__.py").exists() for folder in with_code)
    assert settings["package-dir"] == {"deltarl": "deltarl"} | {f"deltarl.{folder}": folder for folder in FOLDERS}
