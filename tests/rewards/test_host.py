"""What the verifier host answers: verdicts, faults, statistics."""

import math
from pathlib import Path

import pytest

from deltarl.rewards import VerifierHost, VerifierLoadError, VerifierSpec

FAULT_FILE = Path(__file__).with_name("fault_verifier.py")
FAULT = VerifierSpec(f"{FAULT_FILE}:FaultVerifier")


@pytest.fixture(scope="module")
def host():
    with VerifierHost(FAULT, workers=2, timeout=2.0, memory_mb=256) as shared:
        yield shared


def test_verdicts_come_in_order_with_meta_and_progress(host):
    items = [(str(i % 3), "0", {"row": i}) for i in range(300)]
    seen = []
    verdicts = host.verify(items, progress=lambda done, total: seen.append((done, total)))
    assert [v.extracted for v in verdicts] == [response for response, _, _ in items]
    assert [v.info["row"] for v in verdicts] == list(range(300))
    assert [v.score for v in verdicts] == [float(i % 3 == 0) for i in range(300)]
    assert seen == [(i + 1, 300) for i in range(300)]


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        ("hang", "timeout", "no verdict after 2 s"),
        ("sleep", "timeout", "no verdict after 2 s"),
        ("raise", "error", "KeyError: 'no such key'"),
        ("exit", "error", "exit code 3"),
        ("segfault", "error", "SIGSEGV"),
        ("memory", "limit", "memory"),
        ("nothing", "error", "returned a NoneType, not a Verdict"),
        ("garbage junk!", "error", "died 3 times"),
        ('garbage [1.0, "correct", null, {}, NaN, false]', "error", "died 3 times"),
        ('garbage [1.0, "correct", null, {}, 0.1, false] []', "error", "died 3 times"),
        ("long 9000000", "error", "a verdict of 90000"),
    ],
)
def test_a_fault_costs_its_own_trace_only(host, fault, status, reason):
    before = host.counts()
    verdicts = host.verify([*[("a", "a", {})] * 5, (fault, "a", {}), *[("a", "a", {})] * 20])
    assert [v.status for v in verdicts] == ["correct"] * 5 + [status] + ["correct"] * 20
    assert verdicts[5].score == 0.0
    assert reason in verdicts[5].info["reason"]
    assert host.counts()[status] == before[status] + 1
    assert host.counts()["correct"] == before["correct"] + 25


def test_output_of_a_verifier_does_not_disturb_the_answers(host):
    assert [v.status for v in host.verify([("noise", "", {})] * 3)] == ["correct"] * 3


def test_long_texts_are_not_sent():
    with VerifierHost(FAULT, max_response_chars=10, max_gold_chars=5) as small:
        verdicts = small.verify([("x" * 11, "a", {}), ("a", "a" * 6, {}), ("a", ["a", "bbbbb"], {}), ("a", "a", {})])
    assert [v.status for v in verdicts] == ["limit", "limit", "limit", "correct"]


def test_any_text_arrives_as_it_was_sent(host):
    texts = ["", "\x00", "\ud800 \U0001f600", "é" * 100_000, '"\\', "\u202e١٢"]
    assert [v.extracted for v in host.verify([(text, text, {"text": text}) for text in texts])] == texts
    assert host.verify([("surrogate", "", {})])[0].info == {"\ud800": "\x00"}


def test_info_comes_back_as_plain_values(host):
    (verdict,) = host.verify([("object", "", {})])
    assert verdict.info == {"big": hex(10**5000), "nested": {"1": [2]}, "type": "<class 'int'>"}


def test_what_is_no_text_is_the_callers_error(host):
    with pytest.raises(TypeError, match="response is a NoneType: give the text"):
        host.verify([(None, "a", {})])


def test_workers_import_nothing_heavy(host):
    assert host.verify([("modules", "", {})])[0].info["heavy"] == []


def test_latencies_are_those_inside_the_verifier():
    with VerifierHost(VerifierSpec(FAULT.name, {"seconds": 0.02}), timeout=0.5) as pool:
        assert pool.latency() == {} and pool.latency_histogram() == []
        pool.check_golds(["1", "2"])
        assert pool.latency() == {}
        pool.verify([("a", "a", {})] * 10 + [("hang", "a", {})])
        latency, rows = pool.latency(), pool.latency_histogram()
    assert 20 <= latency["p50_ms"] < 500
    assert latency["p99_ms"] == latency["max_ms"] == 500
    assert sum(count for _, _, count in rows) == 11
    assert rows[0][0] < rows[0][1] and rows[0][1] >= 0.02
    assert rows[-1][0] <= 0.5 < rows[-1][1] and rows[-1][2] == 1
    assert all(math.isclose(high / low, 10 ** (1 / 50)) for low, high, _ in rows)


def test_a_verifier_that_does_not_load_is_one_line():
    with pytest.raises(VerifierLoadError, match=r"^verifier '.*' has no option 'second': did you mean 'seconds'\?$"):
        VerifierHost(VerifierSpec(FAULT.name, {"second": 1}))
    with pytest.raises(VerifierLoadError, match=r"^verifier '.*': options must be plain values \(.*lambda.*\)$"):
        VerifierHost(VerifierSpec(FAULT.name, {"seconds": lambda: 1}))


def test_check_golds_names_the_bad_ones(host):
    found = [(verdict.status, verdict.info.get("reason")) for verdict in host.check_golds(["1", "odd", "2"])]
    assert found == [("correct", None), ("gold_error", "an odd gold"), ("correct", None)]
    with VerifierHost("math") as math:
        found = [verdict.info.get("reason") for verdict in math.check_golds(["1/2", "", "\\frac{1}{", ["?", "3"]])]
    assert found == [None, "empty", "ends too early", None]


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="workers is 0"):
        VerifierHost(FAULT, workers=0)
    with pytest.raises(ValueError, match="timeout is 0"):
        VerifierHost(FAULT, timeout=0)
    with pytest.raises(ValueError, match="max_pending is 0"):
        VerifierHost(FAULT, max_pending=0)
