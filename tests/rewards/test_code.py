"""The verifier `code`: what passes, what fails, and every way around it that we know."""

import json
import pickle
from pathlib import Path

import pytest

from deltarl.rewards import VerifierLoadError, VerifierSpec, load_verifier
from deltarl.rewards.code import CodeVerifier, last_block
from deltarl.rewards.sandbox import SandboxError, launcher

STDIN_GOLD = json.dumps({"inputs": ["2 3\n", "10 -4\n"], "outputs": ["5\n", "6\n"]})
CALL_GOLD = json.dumps({"inputs": [[2, 3], [10, -4]], "outputs": [5, 6], "fn_name": "add"})
ROWS_GOLD = json.dumps(
    [
        {"input": "2\n3", "output": "5", "testtype": "functional"},
        {"input": "10\n-4", "output": "6", "testtype": "functional"},
    ]
)
ASSERT_GOLD = ["assert add(2, 3) == 5", "assert add(10, -4) == 6"]
CHECK_GOLD = "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(10, -4) == 6\n"
TEST_GOLD = "def test_a():\n    assert add(2, 3) == 5\n\ndef test_b():\n    assert add(10, -4) == 6\n"
META = {"entry_point": "add"}
GOLDS = [CALL_GOLD, ROWS_GOLD, ASSERT_GOLD, CHECK_GOLD, TEST_GOLD]
ADD = "def add(a, b):\n    return a + b\n"


@pytest.fixture(scope="module")
def verifier():
    made = CodeVerifier(test_seconds=20, total_seconds=60)
    yield made
    made.sandbox.close()


@pytest.fixture(scope="module")
def marks():
    made = CodeVerifier(partial_credit=True, test_seconds=20, total_seconds=60)
    yield made
    made.sandbox.close()


def fenced(program):
    return f"Here it is.\n```python\n{program}\n```\n"


def grade(verifier, program, gold, meta=META):
    return verifier.verify(fenced(program), gold, meta=meta)


@pytest.mark.parametrize("gold", GOLDS)
def test_every_form_of_gold_tells_right_from_wrong(verifier, marks, gold):
    assert grade(verifier, ADD, gold).status == "correct"
    wrong = grade(verifier, ADD.replace("+", "-"), gold)
    assert (wrong.status, wrong.score) == ("incorrect", 0.0)
    half = grade(marks, "def add(a, b):\n    return 5", gold)
    assert (half.status, half.score) == ("incorrect", 0.0 if gold is CHECK_GOLD else 0.5)


def test_standard_input_and_output(verifier, marks):
    program = "a, b = map(int, input().split())\nprint(a + b, end='  ')"
    assert grade(verifier, program, STDIN_GOLD).score == 1.0
    assert grade(marks, "print(5)", STDIN_GOLD).score == 0.5
    assert grade(verifier, "print(5)\nprint(6)", STDIN_GOLD).score == 0.0
    assert grade(verifier, program + "\nraise KeyError('x')", STDIN_GOLD).info["reason"] == (
        "test 1 of 2: exit code 1: KeyError: 'x'"
    )


def test_method_of_solution_and_what_tests_may_do_with_objects(verifier):
    solution = "class Solution:\n    def add(self, a, b):\n        return a + b\n"
    assert grade(verifier, solution, CALL_GOLD).score == 1.0
    program = """
class Stack:
    def __init__(self): self.items = []
    def push(self, item): self.items.append(item); return self
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i]
def sort(l): l.sort()
def apply(f, x): return f(x) + 1
def fail(x): raise ValueError("no " + x)
def count():
    yield from range(3)
"""
    gold = """
stack = Stack()
stack.push(1).push((2, {3: {4}}))
assert stack.items == [1, (2, {3: {4}})] and len(stack) == 2 and stack[0] == 1
numbers = [3, 1, 2]
sort(numbers)
assert numbers == [1, 2, 3]
assert apply(lambda x: 2 * x, 4) == 9
assert list(count()) == [0, 1, 2] and next(count()) == 0
assert math.isclose(apply(float, 1), 2.0)
assert apply(lambda x: 10 ** 5000, 0) == 10 ** 5000 + 1
try:
    fail("way")
    raise SystemExit
except ValueError as error:
    assert str(error) == "no way"
"""
    assert grade(verifier, program, gold).info["reason"] == "every test passed"


EQUAL_TO_ALL = """
class Any(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __contains__ = __lt__
    def __hash__(self): return 0
    def __abs__(self): return self
    def __sub__(self, other): return self
    __rsub__ = __add__ = __sub__
    def __iter__(self): return iter(())
class Object:
    __eq__ = Any.__eq__
"""
CHEATS = {
    "leaves before the tests": "import sys\nsys.exit(0)",
    "leaves at once": "import os\nos._exit(0)",
    "leaves in the call": "def add(a, b):\n    import os\n    os._exit(0)",
    "raises SystemExit in the call": "def add(a, b):\n    raise SystemExit(0)",
    "raises GeneratorExit": "def add(a, b):\n    raise GeneratorExit",
    "prints what passing looks like": "print('{\"passed\": true}')\nprint('OK')\nprint('5\\n6')",
    "reports by itself": """
import os
for fd in range(64):
    try: os.write(fd, b'{"passed": true, "reason": ""}\\n')
    except OSError: pass
os._exit(0)""",
    "writes what was asked into the socket": """
import os
for fd in range(3, 64):
    try: os.write(fd, b'{"value": [["add"], [true]], "changed": []}\\n' * 9)
    except OSError: pass
def add(a, b): return True""",
    "equal to everything, an int": EQUAL_TO_ALL + "def add(a, b): return Any(1)",
    "equal to everything, an object": EQUAL_TO_ALL + "def add(a, b): return Object()",
    "equal to everything, a class": "class M(type):\n    def __eq__(s, o): return True\nclass add(metaclass=M):\n"
    "    def __init__(self, a, b): pass\n    def __eq__(s, o): return True",
    "replaces built-ins": """
import builtins, json, sys
for name in ("AssertionError", "isinstance", "abs", "exec", "compile", "all", "any", "sorted", "str"):
    setattr(builtins, name, lambda *a, **k: True)
json.dumps = lambda *a, **k: '{"passed": true}'
def add(a, b): return None""",
    "patches the module it runs in": """
import sys, gc
main = sys.modules["__main__"]
for name in list(vars(main)):
    if callable(getattr(main, name)) and not name.startswith("__"):
        setattr(main, name, lambda *a, **k: True)
def add(a, b): return None""",
    "looks up the stack": """
import sys, ast, gc
def add(a, b):
    seen = []
    frame = sys._getframe()
    while frame:
        seen += [*frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    seen += [o for o in gc.get_objects() if isinstance(o, (str, list, dict))]
    text = repr(seen)
    return 5 if a == 2 and "== 5" in text or "== 6" in text else None""",
    "defines what the tests call": "def check(candidate): pass\ndef test_a(): pass\ndef test_b(): pass\n"
    "def add(a, b): pass\nassert_equal = print",
    "asks the tests for what they hold": """
import sys
def add(a, b):
    frame = sys._getframe(1)
    while "self" not in frame.f_locals: frame = frame.f_back
    peer = frame.f_locals["self"]
    return peer.ask("attribute", peer, "__globals__")""",
    "traces the other processes": """
import ctypes, os
def add(a, b):
    libc, seize = ctypes.CDLL(None), 0x4206
    return a + b if any(libc.ptrace(seize, pid, 0, 0) == 0 for pid in range(1, os.getpid())) else None""",
    "is no text that can be encoded": "# \ud800\n" + ADD,
    "has a null byte": ADD + "\0",
    "ends its parent and everybody": "import os, signal\nos.kill(1, 9)\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)",
    "never ends": "import time\nwhile True: time.sleep(1)",
    "speaks without end": "while True: print('5' * 1000)",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_no_cheat_passes(verifier, cheat):
    slow = cheat in ("never ends", "speaks without end")
    used = CodeVerifier(test_seconds=0.5) if slow else verifier
    for gold in [*GOLDS, STDIN_GOLD]:
        verdict = grade(used, CHEATS[cheat], gold)
        assert (verdict.status, verdict.score) == ("incorrect", 0.0), (gold, verdict)
        assert "\n" not in verdict.info["reason"]
    assert grade(verifier, ADD, ASSERT_GOLD).score == 1.0
    if slow:
        used.sandbox.close()


def test_without_isolation_only_where_asked_for(monkeypatch, tmp_path):
    shim = tmp_path / "launcher.py"
    shim.write_text(
        Path(launcher.__file__).read_text().replace("flags = CLONE_NEWUSER", "flags = 0xFFFFFFFF | CLONE_NEWUSER")
    )
    monkeypatch.setattr("deltarl.rewards.sandbox.LAUNCHER", shim)
    with pytest.raises(SandboxError, match=r"no isolation .*unshare.*require_isolation: false"):
        CodeVerifier().warm_up()
    verifier = CodeVerifier(require_isolation=False)
    verdict = grade(verifier, ADD, ASSERT_GOLD)
    assert verdict.score == 1.0 and verdict.info["isolation"] == "process"
    verifier.sandbox.close()


@pytest.mark.parametrize(
    ("gold", "meta", "reason"),
    [
        ("assert add(", META, "does not parse"),
        ("add(1, 2)", META, "no assert statement"),
        ("from solution import add\nassert add(1, 2)", META, "imports 'solution'"),
        ("def helper(x):\n    assert x", META, "calls none"),
        (CHECK_GOLD, {}, "entry_point"),
        (ROWS_GOLD, {}, "entry_point"),
        ('{"inputs": [], "outputs": []}', {}, "no tests"),
        ('{"inputs": ["1"], "outputs": []}', {}, "one length"),
        ('{"inputs": ["1"], "outputs": [1], "fn_name": "f"}', {}, "a list of arguments"),
        ('{"inputs": [1], "outputs": ["1"]}', {}, "must be texts"),
        ('[{"input": "1"}]', {}, '"input" and "output"'),
        ('[{"input": "x", "output": "1", "testtype": "functional"}]', META, "JSON values"),
        ([], {}, "no tests"),
    ],
)
def test_golds_without_a_test_are_gold_errors(verifier, gold, meta, reason):
    verdict = grade(verifier, ADD, gold, meta)
    assert verdict.status == "gold_error" and verdict.score is None
    assert reason in verdict.info["reason"] and "\n" not in verdict.info["reason"]


@pytest.mark.parametrize("program", ["import os\nos._exit(0)", "def add(a, b):\n    import os\n    os._exit(0)"])
def test_no_value_is_not_null(verifier, program):
    gold = json.dumps({"inputs": [[2, 3]], "outputs": [None], "fn_name": "add"})
    assert grade(verifier, program, gold).info["reason"].endswith("the program ended before it gave a value")
    assert grade(verifier, "def add(a, b): pass", gold).score == 1.0


def test_which_block_is_run(verifier):
    assert last_block("```python\nx = 1\n```\nand\n```python\nx = 2\n```\n") == "x = 2\n"
    assert last_block("```\nx = 1\n```\n```text\nout\n```") == "x = 1\n"
    assert last_block("<think>\n```python\nx = 1\n```\n</think> none") is None
    assert last_block("```python\nx = 1") is None
    assert last_block("```python\nx = '```'\n```") == "x = '```'\n"
    assert last_block("```python\n" * 100_000) is None
    assert verifier.verify("no code", ASSERT_GOLD, meta={}).status == "no_answer"
    assert grade(verifier, ADD, ASSERT_GOLD, {"truncated": True}).status == "no_answer"
    whole = CodeVerifier(extraction="whole", test_seconds=20, total_seconds=60)
    assert whole.verify(ADD, ASSERT_GOLD, meta={}).score == 1.0
    whole.sandbox.close()


def test_numbers_within_a_tolerance():
    gold = json.dumps({"inputs": [""], "outputs": ["3 0.3333"]})
    for tolerance, program, score in [(0.0, "3 0.33333", 0), (1e-3, "3 0.33333", 1), (1e-3, "3.0001 0.3333", 0)]:
        verifier = CodeVerifier(float_tolerance=tolerance, test_seconds=20, total_seconds=60)
        assert grade(verifier, f"print('{program}')", gold).score == score
        verifier.sandbox.close()


def test_tests_cut_off_by_the_whole_time_are_a_timeout():
    verifier = CodeVerifier(partial_credit=True, test_seconds=1.5, total_seconds=2.0)
    gold = json.dumps({"inputs": ["1", "1"], "outputs": ["", ""]})
    verdict = grade(verifier, "import time; time.sleep(60)", gold)
    assert verdict.status == "timeout" and "1 of 2 tests in 2 s: allow more total_seconds" in verdict.info["reason"]
    verifier.sandbox.close()


@pytest.mark.parametrize(
    "options",
    [{"extraction": "all"}, {"test_seconds": 0}, {"test_seconds": 9}, {"float_tolerance": -1}, {"memory_mb": 1}],
)
def test_bad_options(options):
    with pytest.raises(VerifierLoadError, match="rejects its options: ValueError") as caught:
        load_verifier(VerifierSpec("code", options))
    assert "\n" not in str(caught.value)


def test_it_is_picklable_while_it_runs(verifier):
    verifier.warm_up()
    again = pickle.loads(pickle.dumps(verifier))
    assert grade(again, ADD, ASSERT_GOLD).score == 1.0
    again.sandbox.close()
