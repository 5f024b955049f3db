import os
import subprocess
import sys
from pathlib import Path

import pytest

from deltarl.rewards import Verdict, VerifierLoadError, VerifierSpec, list_verifiers, load_verifier

FAULT_FILE = Path(__file__).with_name("fault_verifier.py")
PLUGIN = Path(__file__).parents[2] / "examples" / "verifier_plugin"


def test_built_in_verifiers_are_listed_with_their_origin():
    rows = {row.name: row for row in list_verifiers()}
    assert {"math", "exact", "numeric"} <= set(rows)
    assert all(rows[n].origin == "built-in" and rows[n].problem is None for n in ("math", "exact", "numeric"))


@pytest.mark.parametrize("attribute", ["FaultVerifier", "make", "READY"])
def test_class_factory_and_instance_are_accepted(attribute, monkeypatch):
    monkeypatch.chdir(FAULT_FILE.parent)
    assert load_verifier(f"./{FAULT_FILE.name}:{attribute}").verify("a", "a", meta={}).score == 1.0


def test_module_path():
    assert load_verifier(VerifierSpec("deltarl.rewards.simple:NumericVerifier", {"abs_tol": 0.5})).abs_tol == 0.5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("maths", {}, r"no verifier named 'maths': did you mean math\?"),
        ("zzz", {}, r"no verifier named 'zzz': known: math, exact, numeric"),
        ("./no_such.py:make", {}, r"no verifier file .*/no_such.py: give its path"),
        ("no_such_pkg.mod:make", {}, r"no module 'no_such_pkg.mod': install its package"),
        (f"{FAULT_FILE}:makee", {}, r"nothing called 'makee' .*: did you mean 'make'\?"),
        (f"{FAULT_FILE}:make_wrong", {}, r"gave a str without verify\(\)"),
        (f"{FAULT_FILE}:NOT_ONE", {}, r"is a int: name a verifier, its class or a factory"),
        (f"{FAULT_FILE}:READY", {"seconds": 1}, r"is a ready object and takes no options"),
        ("math", {"precison": 4}, r"has no option 'precison': did you mean 'precision'\?"),
        ("math", {"extraction": "loose"}, r"rejects its options: ValueError: extraction 'loose'"),
    ],
)
def test_errors_are_one_line_with_the_fix(name, options, message):
    with pytest.raises(VerifierLoadError, match=message) as caught:
        load_verifier(VerifierSpec(name, options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("score", "status"), [(1.0, "right"), (None, "correct"), (0.0, "gold_error"), (float("nan"), "correct")]
)
def test_a_verdict_that_contradicts_itself_is_refused(score, status):
    with pytest.raises(ValueError):
        Verdict(score, status)


USE = """
import sys
from deltarl.rewards import VerifierHost, VerifierSpec, list_verifiers
if __name__ == "__main__":
    spec = VerifierSpec(sys.argv[1], {"target_chars": 20, "penalty": 0.5})
    with VerifierHost(spec) as host:
        short, long = host.verify([("\\\\boxed{1/2}", "0.5", {}), ("x" * 40 + "\\\\boxed{0.5}", "1/2", {})])
    print(short.score, long.score, *[row.origin for row in list_verifiers() if row.name == "math_concise"], sep="|")
"""


@pytest.fixture(scope="module")
def installed_plugin(tmp_path_factory):
    """The example package, installed where PYTHONPATH finds it."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "plugin"
    subprocess.run(["cp", "-r", str(PLUGIN), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*pip, str(target), str(source)], check=True)
    return target


@pytest.mark.parametrize("name", ["math_concise", "math_concise:ConciseMathVerifier", "FILE:ConciseMathVerifier"])
def test_the_example_package_installed_and_used(installed_plugin, tmp_path, name):
    script = tmp_path / "use.py"
    script.write_text(USE)
    name = name.replace("FILE", str(PLUGIN / "math_concise" / "__init__.py"))
    environment = os.environ | {"PYTHONPATH": str(installed_plugin)}
    done = subprocess.run(
        [sys.executable, str(script), name], env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.stdout.strip() == ("1.0|0.5|deltarl-math-concise 0.1.0 (math_concise:ConciseMathVerifier)"), done.stderr
