"""`length`: the three shapes against their papers' formulas, at the ends and between."""

import pytest

from deltarl.rewards import VerifierHost, VerifierLoadError, VerifierSpec, load_verifier
from deltarl.rewards.length import kimi_length_reward, overlong_punishment


@pytest.mark.parametrize(
    ("length", "reward"), [(0, 0.0), (16384, 0.0), (18432, -0.5), (20479, -4095 / 4096), (20480, -1.0), (90000, -1.0)]
)
def test_overlong_punishment_with_the_paper_s_lengths(length, reward):
    """L_max 20480 and L_cache 4096, as DAPO sets them."""
    assert overlong_punishment(length, 20480, 4096) == pytest.approx(reward, abs=1e-12)


@pytest.mark.parametrize(
    ("length", "right", "wrong"),
    [(100, 0.5, 0.0), (150, 0.25, 0.0), (200, 0.0, 0.0), (250, -0.25, -0.25), (300, -0.5, -0.5)],
)
def test_kimi_length_reward_over_a_group_of_100_to_300(length, right, wrong):
    group = [100, 300, 200, length]
    assert kimi_length_reward(length, group, correct=True) == right
    assert kimi_length_reward(length, group, correct=False) == wrong


def test_kimi_length_reward_is_0_where_all_are_of_one_length():
    assert kimi_length_reward(7, [7, 7], correct=True) == 0.0


@pytest.mark.parametrize("group", [[], [1, 2]])
def test_kimi_length_reward_refuses_a_group_without_the_response(group):
    with pytest.raises(ValueError, match="holds its own length too"):
        kimi_length_reward(7, group, correct=True)


@pytest.mark.parametrize(
    ("n_tokens", "score", "status"),
    [
        (100, 1.0, "correct"),
        (90, 1.0, "correct"),
        (110, 1.0, "correct"),
        (160, 0.5, "incorrect"),
        (500, 0.0, "incorrect"),
    ],
)
def test_target_in_tokens(n_tokens, score, status):
    verifier = load_verifier(VerifierSpec("length", {"shape": "target", "target": 100, "tolerance": 10}))
    verdict = verifier.verify("whatever", "", meta={"n_tokens": n_tokens})
    assert (verdict.score, verdict.status) == (score, status)
    assert verdict.info == {"reason": f"{n_tokens} tokens", "length": n_tokens}


@pytest.mark.parametrize(("unit", "length"), [("characters", 13), ("words", 3)])
def test_other_units_come_from_the_text(unit, length):
    verifier = load_verifier(VerifierSpec("length", {"shape": "target", "unit": unit, "target": length}))
    assert verifier.verify("one two\nthree", "", meta={}).score == 1.0


def test_in_the_pool_and_an_error_where_the_caller_gives_no_tokens():
    options = {"shape": "overlong", "limit": 20, "cache": 10}
    with VerifierHost(VerifierSpec("length", options)) as host:
        within, over, unknown = host.verify([("x", "", {"n_tokens": 10}), ("x", "", {"n_tokens": 15}), ("x", "", {})])
    assert (within.score, within.status) == (0.0, "correct")
    assert (over.score, over.status) == (-0.5, "incorrect")
    assert (unknown.status, unknown.info["reason"]) == (
        "error",
        "ValueError: no 'n_tokens' in meta: the caller must give it, as a trainer does",
    )


def test_kimi_shape_reads_the_part_before_it():
    parts = [{"verifier": "numeric"}, {"verifier": "length", "options": {"shape": "kimi", "correct": "numeric"}}]
    with VerifierHost(VerifierSpec("combine", {"parts": parts})) as host:
        meta = {"n_tokens": 10, "group_lengths": [10, 30]}
        right, wrong, long = host.verify([("4", "4", meta), ("5", "4", meta), ("4", "4", meta | {"n_tokens": 30})])
    assert [right.score, wrong.score, long.score] == [1.5, 0.0, 0.5]


def test_a_verifier_that_compares_lengths_says_so_to_the_host():
    kimi = {"verifier": "length", "options": {"shape": "kimi", "correct": "numeric"}}
    plain = {"verifier": "length", "options": {"shape": "target", "target": 9}}
    for part, expected in ((kimi, True), (plain, False)):
        spec = VerifierSpec("combine", {"parts": [{"verifier": "numeric"}, part]})
        assert load_verifier(spec).grouped is expected
        with VerifierHost(spec) as host:
            assert host.grouped is expected


def test_kimi_shape_alone_is_an_error():
    verifier = load_verifier(VerifierSpec("length", {"shape": "kimi", "correct": "math"}))
    with pytest.raises(ValueError, match="no part 'math' before length"):
        verifier.verify("x", "", meta={"n_tokens": 1, "group_lengths": [1, 2]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "long"}, "use target, overlong, kimi"),
        ({"shape": "target"}, "target is None"),
        ({"shape": "target", "target": 0}, "at least 1"),
        ({"shape": "target", "target": 5, "limit": 9}, "limit is 9"),
        ({"shape": "overlong", "limit": 5, "cache": 6}, "cache 6 must lie between 1 and limit 5"),
        ({"shape": "overlong", "limit": 5, "cache": 1, "tolerance": 2}, "tolerance belongs to shape target"),
        ({"shape": "kimi", "correct": "math", "unit": "words"}, "leave unit at tokens"),
        ({"shape": "target", "target": 5, "unit": "bytes"}, "unit 'bytes'"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message):
    with pytest.raises(VerifierLoadError, match=message) as caught:
        load_verifier(VerifierSpec("length", options))
    assert "\n" not in str(caught.value)
