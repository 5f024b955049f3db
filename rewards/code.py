"""`code`: runs the Python of a response against tests, in a sandbox (deltarl.rewards.sandbox).

Expected values never enter the process of the tested program. For input and output, and for calls of a function, they
stay in the verifier; assert statements run in a second process and reach the program's objects through a socket (see
sandbox/runner.py). A program can therefore pass only by giving right values.
"""

import ast
import builtins
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from deltarl.rewards.math.extract import without_thoughts
from deltarl.rewards.sandbox import Limits, Process, Run, Sandbox
from deltarl.rewards.types import Verdict

FENCE = re.compile(r"```[ \t]*(?P<language>[^\s`]*)")
PYTHON = ("", "python", "python3", "py")
DECIMAL = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?")
EXTRACTIONS = ("fenced", "whole")
REASON_CHARS = 200


class GoldError(ValueError):
    """Tests that cannot be run."""


@dataclass(frozen=True, slots=True)
class Test:
    """One test. kind "stdin": given is the input's text, expected the output's. "call": given is the list of
    arguments, expected the JSON value(s) that pass. "assert": given is test code, call what to call after it."""

    kind: str
    given: Any
    expected: Any = None
    call: tuple[str, ...] = ()


class CodeVerifier:
    """Correct when the response's program passes every test.

    The gold is one of
      - a JSON object {"inputs": [...], "outputs": [...]}, texts for standard input and output; with "fn_name", lists
        of arguments and returned values of that function, or of that method of a class Solution (APPS);
      - a JSON list of {"input", "output", "testtype": "stdin" | "functional"}; a functional input has one JSON value a
        line, and meta["entry_point"] names the function (LiveCodeBench);
      - test code with assert statements; its functions test_* without arguments are called, each a test of its own,
        and so is check(candidate) with the function that meta["entry_point"] names (HumanEval);
      - a list of texts, each test code of its own (MBPP).
    Functions that test code calls must be its own, built in, from the standard library, or what is tested.

    extraction: "fenced" takes the last closed ``` block (python, or of no language) outside of <think> blocks, "whole"
    the whole response. A response whose meta says `truncated: true` has no answer.
    partial_credit: the score is the share of tests passed; otherwise 1 or 0, and the first failure ends the work.
    test_seconds: wall clock for one test. total_seconds: for all; keep it below the host's timeout. Tests that it cuts
    off give status "timeout". float_tolerance: how far a number with a decimal point may lie from the expected one e,
    times max(1, |e|). memory_mb: address space of the program. require_isolation: False runs programs also where the
    kernel permits no namespaces, with limits alone; info["isolation"] says how they ran.

    Raises ValueError for options out of range, and SandboxError from warm_up() or verify() without a sandbox.
    """

    name = "code"
    version = "1"

    def __init__(
        self,
        extraction: str = "fenced",
        partial_credit: bool = False,
        test_seconds: float = 2.0,
        total_seconds: float = 4.5,
        float_tolerance: float = 0.0,
        memory_mb: int = 512,
        require_isolation: bool = True,
    ) -> None:
        if extraction not in EXTRACTIONS:
            raise ValueError(f"extraction {extraction!r} is not one of {', '.join(EXTRACTIONS)}")
        if not 0 < test_seconds <= total_seconds:
            raise ValueError(
                f"test_seconds {test_seconds} must lie above 0 and not above total_seconds {total_seconds}"
            )
        if not 0 <= float_tolerance < 1:
            raise ValueError(f"float_tolerance {float_tolerance} must lie in [0, 1)")
        if memory_mb < 64:
            raise ValueError(f"memory_mb {memory_mb} is less than the 64 that the interpreter needs")
        self.extraction = extraction
        self.partial_credit = partial_credit
        self.test_seconds = test_seconds
        self.total_seconds = total_seconds
        self.float_tolerance = float_tolerance
        self.sandbox = Sandbox(Limits(memory_mb=memory_mb), require_isolation)

    def warm_up(self) -> None:
        self.sandbox.start()

    def check_gold(self, gold: str | Sequence[str]) -> str | None:
        try:
            parse_tests(gold, None)
        except GoldError as error:
            return str(error)
        return None

    def verify(self, response: str, gold: str | Sequence[str], *, meta: Mapping[str, Any]) -> Verdict:
        end = time.monotonic() + self.total_seconds
        entry_point = str(meta.get("entry_point") or "")
        try:
            tests = parse_tests(gold, entry_point)
        except GoldError as error:
            return Verdict(None, "gold_error", info={"reason": str(error)})
        program = response if self.extraction == "whole" else last_block(response)
        if meta.get("truncated"):
            return Verdict(0.0, "no_answer", info={"reason": "the response was cut off"})
        if program is None or not program.strip():
            return Verdict(0.0, "no_answer", info={"reason": "no closed ```python block"})
        self.sandbox.start()
        return self._grade(program, tests, entry_point, end)

    def _grade(self, program: str, tests: list[Test], entry_point: str, end: float) -> Verdict:
        passed, reason = 0, ""
        for number, test in enumerate(tests, start=1):
            seconds = min(self.test_seconds, end - time.monotonic())
            problem = self._run(program, test, entry_point, seconds) if seconds > 0 else "late"
            if problem and number > 1 and seconds < self.test_seconds and problem.startswith("late"):
                late = f"{number - 1} of {len(tests)} tests in {self.total_seconds:g} s: allow more total_seconds"
                return self._verdict("timeout", passed, len(tests), program, late)
            passed += problem is None
            if problem is not None:
                reason = reason or f"test {number} of {len(tests)}: {problem}"
                if not self.partial_credit:
                    break
        status = "correct" if passed == len(tests) else "incorrect"
        return self._verdict(status, passed, len(tests), program, reason or "every test passed")

    def _verdict(self, status: str, passed: int, tests: int, program: str, reason: str) -> Verdict:
        score = passed / tests if self.partial_credit else float(passed == tests)
        info = {"reason": reason, "passed": passed, "tests": tests, "isolation": self.sandbox.isolation}
        return Verdict(score, status, program, info)

    def _run(self, program: str, test: Test, entry_point: str, seconds: float) -> str | None:
        """Why the program fails the test; None when it passes."""
        if test.kind == "assert":
            return self._run_asserts(program, test, entry_point, seconds)
        if test.kind == "stdin":
            run = self.sandbox.run([Process.script(program, test.given)], seconds)
        else:
            job = {"program": program, "function": test.call[0], "arguments": test.given}
            run = self.sandbox.run([Process.role("call", json.dumps(job))], seconds)
        problem = failure(run, seconds)
        if problem is not None:
            return problem
        if test.kind == "stdin":
            return None if same_text(run.output, test.expected, self.float_tolerance) else "wrong output"
        try:
            value = json.loads(run.output)
        except (ValueError, RecursionError):
            return "the program ended before it gave a value"
        return None if any(same_value(value, e, self.float_tolerance) for e in test.expected) else "wrong value"

    def _run_asserts(self, program: str, test: Test, entry_point: str, seconds: float) -> str | None:
        names, modules = names_of_program(test.given, entry_point)
        job = {"tests": test.given, "call": test.call, "names": names, "modules": modules}
        pair = [Process.role("tests", json.dumps(job)), Process.role("program", program)]
        run = self.sandbox.run(pair, seconds)
        problem = failure(run, seconds)
        if problem is not None:
            return problem
        report = json.loads(run.output)
        return None if report["passed"] else one_line(report["reason"])


def last_block(response: str) -> str | None:
    """The content of the last closed block of Python, or of no language; a bare ``` line closes a block."""
    found, language, lines = None, None, []
    for line in without_thoughts(response).split("\n"):
        fence = FENCE.fullmatch(line.strip())
        if language is None:
            if fence:
                language, lines = fence["language"].casefold(), []
        elif fence and not fence["language"]:
            found = "\n".join([*lines, ""]) if language in PYTHON else found
            language = None
        else:
            lines.append(line)
    return found


def failure(run: Run, seconds: float) -> str | None:
    """Why a run has no output to look at."""
    if run.exit is None:
        return f"late: no end after {seconds:.3g} s"
    if run.full:
        return "more output than permitted"
    if run.exit != 0:
        last = run.stderr.strip().splitlines()[-1:] or [""]
        return one_line(f"exit code {run.exit}: {last[0]}" if run.exit > 0 else f"ended by signal {-run.exit}")
    return None


def parse_tests(gold: str | Sequence[str], entry_point: str | None) -> list[Test]:
    """The tests of a gold. entry_point None: it is not known yet, and nothing is said of its lack. Raises GoldError."""
    if not isinstance(gold, str):
        tests = [test for code in gold for test in assert_tests(code, entry_point)]
    else:
        data = from_json(gold)
        if isinstance(data, dict) and {"inputs", "outputs"} <= set(data):
            tests = apps_tests(data)
        elif isinstance(data, list) and data and all(isinstance(row, dict) for row in data):
            tests = [row_test(row, entry_point) for row in data]
        elif isinstance(data, list) and all(isinstance(code, str) for code in data):
            tests = [test for code in data for test in assert_tests(code, entry_point)]
        else:
            tests = assert_tests(gold, entry_point)
    if not tests:
        raise GoldError("the gold has no tests")
    return tests


def apps_tests(data: Mapping[str, Any]) -> list[Test]:
    inputs, outputs, function = data["inputs"], data["outputs"], data.get("fn_name")
    if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs)):
        raise GoldError("inputs and outputs must be lists of one length")
    if function is None:
        return [Test("stdin", as_text(i), as_text(o)) for i, o in zip(inputs, outputs, strict=True)]
    if not isinstance(function, str) or not all(isinstance(arguments, list) for arguments in inputs):
        raise GoldError("with fn_name, a text, each input must be a list of arguments")
    # APPS wraps some returned values into a list of one.
    wrapped = [[o, o[0]] if isinstance(o, list) and len(o) == 1 else [o] for o in outputs]
    return [Test("call", i, o, (function,)) for i, o in zip(inputs, wrapped, strict=True)]


def row_test(row: Mapping[str, Any], entry_point: str | None) -> Test:
    if not (isinstance(row.get("input"), str) and isinstance(row.get("output"), str)):
        raise GoldError('each test must have "input" and "output", texts')
    if row.get("testtype", "stdin") == "stdin":
        return Test("stdin", row["input"], row["output"])
    if entry_point == "":
        raise GoldError('a functional test needs meta["entry_point"], the name of the function')
    try:
        arguments = [json.loads(line) for line in row["input"].splitlines() if line.strip()]
        return Test("call", arguments, [json.loads(row["output"])], (entry_point or "",))
    except ValueError as error:
        raise GoldError(f"a functional test must be made of JSON values: {error}") from error


def assert_tests(code: str, entry_point: str | None) -> list[Test]:
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise GoldError(f"the test code does not parse: {one_line(str(error))}") from error
    if not any(isinstance(node, ast.Assert) for node in ast.walk(tree)):
        raise GoldError("the test code has no assert statement")
    foreign = sorted(imported(tree) - sys.stdlib_module_names)
    if foreign:
        raise GoldError(
            f"the test code imports {foreign[0]!r}: it has the standard library, and the program's names without import"
        )
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    calls = [(name,) for name, node in functions.items() if name.startswith("test_") and not takes_arguments(node)]
    if "check" in functions and takes_arguments(functions["check"]):
        if entry_point == "":
            raise GoldError('check(candidate) needs meta["entry_point"], the name of the function it checks')
        calls.append(("check", entry_point or ""))
    definitions = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    statements = [node for node in tree.body if not isinstance(node, definitions)]
    acts = any(isinstance(node, (ast.Assert, ast.Call)) for statement in statements for node in ast.walk(statement))
    if not calls and not acts:
        raise GoldError("the test code defines functions and calls none: name them test_*, or assert at the top level")
    return [Test("assert", code, call=call) for call in calls or [()]]


def imported(tree: ast.AST) -> set[str]:
    """The top names of the modules that code imports."""
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def takes_arguments(function: ast.FunctionDef) -> bool:
    return bool(function.args.posonlyargs or function.args.args or function.args.kwonlyargs)


def names_of_program(code: str, entry_point: str) -> tuple[list[str], list[str]]:
    """The names in test code that come from the program, and the modules that it uses without importing them.

    Nothing built in and no standard module comes from the program, except for the function that is tested.
    """
    tree = ast.parse(code)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used_as_modules = {
        node.value.id for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    reserved = set(dir(builtins)) | sys.stdlib_module_names
    program = (names - reserved) | ({entry_point} if entry_point else set())
    return sorted(program), sorted(used_as_modules & sys.stdlib_module_names - program)


def same_text(output: str, expected: str, tolerance: float) -> bool:
    """Equal line by line, white space counted as one blank, without empty lines at the end."""
    lines, wanted = ([line.split() for line in text.rstrip().splitlines()] for text in (output, expected))
    if lines == wanted or not tolerance:
        return lines == wanted
    return [len(line) for line in lines] == [len(line) for line in wanted] and all(
        same_token(token, other, tolerance)
        for line, other_line in zip(lines, wanted, strict=True)
        for token, other in zip(line, other_line, strict=True)
    )


def same_token(token: str, expected: str, tolerance: float) -> bool:
    if token == expected:
        return True
    decimals = DECIMAL.fullmatch(token) and DECIMAL.fullmatch(expected) and not expected.lstrip("+-").isdigit()
    return bool(decimals) and near(float(token), float(expected), tolerance)


def same_value(value: Any, expected: Any, tolerance: float) -> bool:
    """Equal JSON values; true is not 1, and an integer equals a float of the same value."""
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(same_value, value, expected, repeat(tolerance)))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(same_value(value[k], expected[k], tolerance) for k in value)
    if isinstance(expected, float) and isinstance(value, (int, float)):
        return value == expected or near(value, expected, tolerance)
    return value == expected


def near(value: float, expected: float, tolerance: float) -> bool:
    return abs(value - expected) <= tolerance * max(1.0, abs(expected))


def as_text(value: Any) -> str:
    """A text, or the lines of one."""
    if isinstance(value, list):
        return "\n".join(map(str, value))
    if not isinstance(value, str):
        raise GoldError(f"input and output must be texts, not {type(value).__name__}")
    return value


def from_json(text: str) -> Any:
    """The value that a text is in JSON; None when it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def one_line(text: str) -> str:
    return " ".join(text.split())[:REASON_CHARS]
