import pytest

from deltarl.rewards import VerifierHost, VerifierSpec
from deltarl.rl.grading import part_means, verifier_items
from deltarl.rl.problems import Problem
from deltarl.rollout import Trace

PROBLEMS = [Problem("a", "1+1", "2", meta={"task": "add"}), Problem("b", "2+2", "4")]
PARTS = [
    {"verifier": "numeric"},
    {"verifier": "length", "weight": 0.5, "needs": "numeric", "options": {"shape": "kimi", "correct": "numeric"}},
]


def trace(tokens, finish="stop"):
    return Trace([1], [0] * tokens, [0.0] * tokens, [0] * tokens, finish)


def items(group):
    traces = [trace(2), trace(6), trace(4), trace(9, "length")]
    repeated = [problem for problem in PROBLEMS for _ in range(2)]
    return verifier_items(repeated, ["2", "3", "4", "4"], traces, group)


def test_a_trace_reaches_the_verifier_with_the_lengths_of_its_own_group():
    metas = [meta for _, _, meta in items(2)]
    assert [meta["group_lengths"] for meta in metas] == [[2, 6], [2, 6], [4, 9], [4, 9]]
    assert [meta["n_tokens"] for meta in metas] == [2, 6, 4, 9]
    assert [meta["truncated"] for meta in metas] == [False, False, False, True]
    assert [meta.get("task") for meta in metas] == ["add", "add", None, None]
    assert [meta["group_lengths"] for _, _, meta in items(1)] == [[2], [6], [4], [9]]


def test_parts_are_averaged_over_the_traces_they_scored():
    """numeric: right, wrong, right, cut off; length runs for the two right ones, each the shortest of its group."""
    with VerifierHost(VerifierSpec("combine", {"parts": PARTS})) as host:
        verdicts = host.verify(items(2))
    assert [verdict.score for verdict in verdicts] == [1.25, 0.0, 1.25, 0.0]
    assert part_means(verdicts) == {"numeric": pytest.approx(0.5), "length": pytest.approx(0.5)}


def test_a_verifier_without_parts_has_no_means():
    with VerifierHost("numeric") as host:
        assert part_means(host.verify(items(2))) == {}
