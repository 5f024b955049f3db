"""The hostile set: each response is answered, none passes that should not, and each costs less than a second.

The second is one of processor time of the worker, read from the operating system, because the time on the wall also
counts what else the machine does. For the same reason the host's own deadline here is long: what is tested is that the
verifier never needs it.
"""

from pathlib import Path

import psutil
import pytest

from deltarl.rewards import VerifierHost, VerifierSpec
from deltarl.rl.bench.hostile import ECHO, hostile_cases

VERIFIER = f"{Path(__file__).with_name('backend_verifier.py')}:BackendVerifier"
INTEGERS = {
    "python": ({"MPMATH_NOGMPY": "1", "SYMPY_GROUND_TYPES": "python"}, ["python", "python"]),
    "gmpy2": ({"SYMPY_GROUND_TYPES": "gmpy"}, ["gmpy", "gmpy"]),
}
OPTIONS = {
    "default": {},
    "lenient": {"extraction": "lenient"},
    "operators worked out": {"require_evaluated": False},
}


@pytest.mark.parametrize(
    ("options", "integers"),
    [("default", "python"), ("default", "gmpy2"), ("lenient", "python"), ("operators worked out", "gmpy2")],
)
def test_hostile_responses_are_answered_for_less_than_a_second_each(monkeypatch, options, integers):
    environment, expected_integers = INTEGERS[integers]
    monkeypatch.delenv("MPMATH_NOGMPY", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cases = [case for case in hostile_cases() if case.name != ECHO or options != "operators worked out"]
    failures = {}
    spec = VerifierSpec(VERIFIER, OPTIONS[options])
    with VerifierHost(spec, timeout=60.0, max_response_chars=2_000_000) as host:
        pids = host.worker_pids()
        for case in cases:
            before = seconds_used(pids[0])
            verdict = host.verify([(case.response, case.gold, {})])[0]
            assert host.worker_pids() == pids, f"{case.name} cost its worker: {verdict}"
            seconds = seconds_used(pids[0]) - before
            assert verdict.info["integers"] == expected_integers, "gmpy2 is part of the test extra: install it"
            wanted = ("correct",) if case.right else ("incorrect", "no_answer", "limit")
            if verdict.status not in wanted or seconds >= 1:
                failures[case.name] = (verdict.status, seconds)
    assert failures == {}


def seconds_used(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def test_a_host_of_one_worker_stays_usable_after_hostile_golds():
    cases = [case for case in hostile_cases() if not case.right]
    with VerifierHost(VerifierSpec("math"), timeout=60.0, max_gold_chars=2_000_000) as host:
        pids = host.worker_pids()
        golds = host.check_golds([case.response for case in cases])
        verdicts = host.verify([("\\boxed{17/19}", case.response, {}) for case in cases])
        assert host.worker_pids() == pids
    assert {v.status for v in golds} <= {"correct", "gold_error", "limit"}
    assert {v.status for v in verdicts} <= {"incorrect", "gold_error", "limit"}
