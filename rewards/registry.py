"""Finding verifiers: built in, by entry point, by `package.module:attr`, by `file.py:attr`."""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from deltarl.rewards.types import Verifier, VerifierSpec

ENTRY_POINT_GROUP = "deltarl.verifiers"
BUILT_IN = {
    "math": "deltarl.rewards.math:MathVerifier",
    "exact": "deltarl.rewards.simple:ExactVerifier",
    "numeric": "deltarl.rewards.simple:NumericVerifier",
    "code": "deltarl.rewards.code:CodeVerifier",
    "ifeval": "deltarl.rewards.ifeval:IfevalVerifier",
    "judge": "deltarl.rewards.judge:JudgeVerifier",
    "format": "deltarl.rewards.format:FormatVerifier",
    "length": "deltarl.rewards.length:LengthVerifier",
    "multiple_choice": "deltarl.rewards.choice:MultipleChoiceVerifier",
    "reasoning_gym": "deltarl.rewards.reasoning_gym:ReasoningGymVerifier",
    "combine": "deltarl.rewards.combine:CombineVerifier",
}


class VerifierLoadError(ValueError):
    """A verifier that cannot be found or built; the message is one line with the cause and the fix."""


@dataclass(frozen=True, slots=True)
class VerifierInfo:
    """One row of `list_verifiers()`; `problem` is the line that says why it does not load, None when it does."""

    name: str
    version: str
    origin: str
    problem: str | None = None


def load_verifier(spec: VerifierSpec | str) -> Verifier:
    """Builds the verifier that `spec` names. Raises VerifierLoadError."""
    spec = VerifierSpec(spec) if isinstance(spec, str) else spec
    target = _find(spec.name)
    verifier = _build(spec.name, target, spec.options)
    if not callable(getattr(verifier, "verify", None)):
        raise VerifierLoadError(
            f"verifier {spec.name!r} gave a {type(verifier).__name__} without verify(): "
            "return an object with verify(response, gold, *, meta)"
        )
    for attribute in ("name", "version"):
        if not isinstance(getattr(verifier, attribute, None), str):
            raise VerifierLoadError(f"verifier {spec.name!r} has no {attribute}: give it one, a string")
    return verifier


def list_verifiers() -> list[VerifierInfo]:
    """The verifiers that can be named without a path: the built-in ones, then those of installed packages."""
    rows = [_describe(name, "built-in") for name in BUILT_IN]
    for name, entry in sorted(_entry_points().items()):
        package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an installed package"
        rows.append(_describe(name, f"{package} ({entry.value})"))
    return rows


def absolute_spec(spec: VerifierSpec) -> VerifierSpec:
    """The same spec with a file path made absolute, so that it means the same in another working directory."""
    path, colon, attribute = spec.name.rpartition(":")
    return replace(spec, name=f"{Path(path).resolve()}:{attribute}") if colon and path.endswith(".py") else spec


def _describe(name: str, origin: str) -> VerifierInfo:
    """A class tells its version itself: it may have options that must be given."""
    try:
        target = _find(name)
        versioned = inspect.isclass(target) and isinstance(getattr(target, "version", None), str)
        return VerifierInfo(name, (target if versioned else load_verifier(name)).version, origin)
    except VerifierLoadError as error:
        return VerifierInfo(name, "?", origin, str(error))


def _entry_points() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.name not in BUILT_IN}


def _find(name: str) -> Any:
    if ":" in name:
        path, _, attribute = name.rpartition(":")
        return _attribute(name, _import_file(path) if path.endswith(".py") else _import_module(path), attribute)
    if name in BUILT_IN:
        return _find(BUILT_IN[name])
    found = _entry_points()
    if name in found:
        return _find(found[name].value)
    known = [*BUILT_IN, *sorted(found)]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    raise VerifierLoadError(f"no verifier named {name!r}: {hint} (or give package.module:attr, or file.py:attr)")


def _import_module(path: str) -> ModuleType:
    _append_to_path(Path.cwd())
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not (path == error.name or path.startswith(error.name + ".")):
            raise VerifierLoadError(f"module {path!r} needs {error.name!r}: install it") from error
        raise VerifierLoadError(f"no module {path!r}: install its package, or run where it can be imported") from error
    except Exception as error:
        raise VerifierLoadError(f"module {path!r} fails on import: {_line(error)}") from error


def _import_file(path: str) -> ModuleType:
    file = Path(path).resolve()
    if not file.is_file():
        raise VerifierLoadError(f"no verifier file {file}: give its path, relative to {Path.cwd()} or absolute")
    _append_to_path(file.parent)
    module_name = f"deltarl_verifier_{hashlib.sha1(str(file).encode()).hexdigest()[:12]}_{file.stem}"
    module_spec = importlib.util.spec_from_file_location(module_name, file)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise VerifierLoadError(f"verifier file {file} fails on import: {_line(error)}") from error
    return module


def _append_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _attribute(name: str, module: ModuleType, attribute: str) -> Any:
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            near = difflib.get_close_matches(part, [n for n in dir(value) if not n.startswith("_")], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "define it, or name another"
            raise VerifierLoadError(f"{name!r}: nothing called {part!r} in {module.__file__}: {hint}")
        value = getattr(value, part)
    return value


def _build(name: str, target: Any, options: Mapping[str, Any]) -> Any:
    if not inspect.isclass(target) and callable(getattr(target, "verify", None)):
        if options:
            raise VerifierLoadError(f"verifier {name!r} is a ready object and takes no options: name a factory instead")
        return target
    if not callable(target):
        raise VerifierLoadError(f"{name!r} is a {type(target).__name__}: name a verifier, its class or a factory")
    _check_options(name, target, options)
    try:
        return target(**options)
    except Exception as error:
        raise VerifierLoadError(f"verifier {name!r} rejects its options: {_line(error)}") from error


def _check_options(name: str, factory: Callable, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(factory).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [p.name for p in parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known) or 'none'}"
            raise VerifierLoadError(f"verifier {name!r} has no option {option!r}: {hint}")


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
