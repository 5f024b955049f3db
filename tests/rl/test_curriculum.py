"""Which problems come next: deterministic, resumable, and in the proportions that are promised."""

import json
from collections import Counter

import numpy as np
import pytest

from deltarl.rl.algorithmsections import CurriculumConfig
from deltarl.rl.curriculum import LEAST_WEIGHT, Curriculum, InTurn
from deltarl.rl.errors import UserError
from deltarl.rl.problems import Problem


def problems(count, **meta):
    return [Problem(f"p{i}", f"{i}?", str(i), meta={k: v(i) for k, v in meta.items()}) for i in range(count)]


def curriculum(count=20, *, rates=None, meta=None, seed=1, **settings):
    config = CurriculumConfig(**settings)
    return Curriculum(problems(count, **(meta or {})), config, seed=seed, prompts_per_step=4, pass_rates=rates)


def ids(drawn):
    return [problem.id for problem in drawn]


def test_in_turn_every_problem_comes_once_a_pass():
    source = InTurn(problems(5), seed=0)
    drawn = ids(source.next_problems(3)) + ids(source.next_problems(12))
    passes = [drawn[first : first + 5] for first in (0, 5, 10)]
    assert all(sorted(one) == [f"p{i}" for i in range(5)] for one in passes)
    assert len({tuple(one) for one in passes}) > 1, "each pass has an order of its own"
    again = InTurn(problems(5), seed=0)
    assert ids(again.next_problems(15)) == drawn, "in portions or at once"


@pytest.mark.parametrize("make", [lambda: InTurn(problems(7), seed=3), lambda: curriculum(20, seed=3)])
def test_goes_on_where_it_stood(make):
    first = make()
    for problem in first.next_problems(6):
        first.report(problem.id, 1, 4)
    second = make()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for n in (4, 9):
        a, b = first.next_problems(n), second.next_problems(n)
        assert ids(a) == ids(b)
        for source in (first, second):
            source.report(a[0].id, 3, 4)


def test_drawn_in_proportion_to_failures():
    """One draw at a time with rates 0, 0.5, 0.9 and 1: weights 1, 0.5, 0.1 and the least weight."""
    source = curriculum(4, rates={"p0": 0.0, "p1": 0.5, "p2": 0.9, "p3": 1.0})
    draws = 6000
    counts = Counter(source.next_problems(1)[0].id for _ in range(draws))
    weights = np.array([1, 0.5, 0.1, LEAST_WEIGHT])
    expected = draws * weights / weights.sum()
    for i, mean in enumerate(expected):
        spread = np.sqrt(mean * (1 - mean / draws))
        assert abs(counts[f"p{i}"] - mean) < 5 * spread, (i, counts)


def test_no_problem_twice_in_a_step():
    source = curriculum(6)
    assert len(set(ids(source.next_problems(6)))) == 6
    more = Counter(ids(source.next_problems(15)))
    assert set(more.values()) == {2, 3}, "all of them, before any comes again"


def test_running_success_rate():
    source = curriculum(3, newest=0.25)
    source.report("p0", 2, 4)
    source.report("p0", 4, 4)
    source.report("p1", 0, 0)  # nothing was graded
    assert source.rates == {"p0": pytest.approx(0.5 + 0.25 * 0.5)}
    assert source.measure() == {"curriculum_admitted": 1.0, "curriculum_success": pytest.approx(0.625)}


@pytest.mark.parametrize(
    ("rates", "meta"),
    [({f"p{i}": 1 - i / 20 for i in range(20)}, {}), (None, {"difficulty": lambda i: i})],
)
def test_easiest_first(rates, meta):
    """20 problems, 4 a step, a quarter at first, all after 5 steps."""
    source = curriculum(20, rates=rates, meta=meta, easy_first=5, easy_share=0.25, prioritised=False)
    hardest = []
    for _ in range(7):
        hardest.append(max(int(name[1:]) for name in ids(source.next_problems(4))))
    assert hardest[0] < 5 and hardest[1] < 8 and hardest[2] < 11
    assert source.measure()["curriculum_admitted"] == 1.0


def test_easiest_first_needs_to_know_what_is_easy():
    with pytest.raises(UserError, match=r"rl\.curriculum\.easy_first .* data\.pass_rates"):
        curriculum(3, easy_first=5)
