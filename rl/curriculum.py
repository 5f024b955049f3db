"""Which problems come next: all in turn, or more often those that the policy fails at, the easy ones first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from deltarl.rl.algorithmsections import CurriculumConfig
from deltarl.rl.errors import UserError
from deltarl.rl.problems import Problem

LEAST_WEIGHT = 0.02


class ProblemSource(Protocol):
    """Gives problems, is told how they went, and can be put back to where it stood."""

    problems: Sequence[Problem]

    def next_problems(self, n: int) -> list[Problem]: ...

    def report(self, problem_id: str, successes: int, n: int) -> None: ...

    def measure(self) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class InTurn:
    """All problems reshuffled each pass, by seed: two arms see the same data, a resumed run its own place."""

    def __init__(self, problems: Sequence[Problem], *, seed: int) -> None:
        self.problems, self.seed = problems, seed
        self.drawn = 0

    def next_problems(self, n: int) -> list[Problem]:
        """The next `n` problems."""
        chosen: list[Problem] = []
        while len(chosen) < n:
            epoch, first = divmod(self.drawn + len(chosen), len(self.problems))
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.problems))
            chosen += [self.problems[index] for index in order[first : first + n - len(chosen)]]
        self.drawn += n
        return chosen

    def report(self, problem_id: str, successes: int, n: int) -> None:
        """The order does not depend on how a problem went."""

    def measure(self) -> dict[str, float]:
        """Nothing for the step's row."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """How many problems were given."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the one that gave `state` stood."""
        self.drawn = state["drawn"]


class Curriculum:
    """Problems drawn in proportion to 1 - s_i, among those admitted so far.

    s_i is the running success rate of problem i: `newest` x the last measurement + (1 - newest) x what it was. One
    never tried has s_i = 0, or its rate in `pass_rates`. (Prioritised and curriculum sampling: Kimi k1.5, arXiv
    2501.12599, section 2.3.4; weights below 0.02 count as 0.02, so that a solved problem is asked again now and then:
    ours.) With `easy_first`, the easiest `easy_share` of the problems is admitted at first, and all after that many RL
    steps, in a straight line (ours). Easy is a high rate in `pass_rates`, else a low `difficulty` among the problem's
    fields.

    No problem comes twice in one call of `next_problems` unless it asks for more than are admitted. The choice depends
    on the seed, on how many were drawn before, and on what was reported.

    Raises UserError: easiest first, and a problem has neither a pass rate nor a difficulty.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        settings: CurriculumConfig,
        *,
        seed: int,
        prompts_per_step: int,
        pass_rates: Mapping[str, float] | None = None,
    ) -> None:
        self.settings, self.seed, self.prompts_per_step = settings, seed, prompts_per_step
        self.rates = dict(pass_rates or {})
        self.problems = list(problems)
        if settings.easy_first:
            order = np.random.default_rng([seed, 5]).permutation(len(problems))
            self.problems = sorted((problems[index] for index in order), key=self._difficulty)
        self.drawn = 0

    def next_problems(self, n: int) -> list[Problem]:
        """The next `n` problems."""
        rng = np.random.default_rng([self.seed, 6, self.drawn])
        admitted = self.problems[: self._admitted()]
        weights = np.ones(len(admitted))
        if self.settings.prioritised:
            weights = np.array([max(LEAST_WEIGHT, 1 - self.rates.get(problem.id, 0.0)) for problem in admitted])
        chosen: list[Problem] = []
        while len(chosen) < n:
            count = min(n - len(chosen), len(admitted))
            drawn = rng.choice(len(admitted), count, replace=False, p=weights / weights.sum())
            chosen += [admitted[index] for index in drawn]
        self.drawn += n
        return chosen

    def report(self, problem_id: str, successes: int, n: int) -> None:
        """`successes` of `n` graded samples of a problem were right."""
        if n:
            before = self.rates.get(problem_id, successes / n)
            self.rates[problem_id] = before + self.settings.newest * (successes / n - before)

    def measure(self) -> dict[str, float]:
        """Share of the problems admitted, and the mean success rate of those tried: for the step's row."""
        tried = list(self.rates.values())
        admitted = {"curriculum_admitted": self._admitted() / len(self.problems)}
        return admitted | ({"curriculum_success": sum(tried) / len(tried)} if tried else {})

    def state_dict(self) -> dict[str, Any]:
        """How many problems were given, and their success rates."""
        return {"drawn": self.drawn, "rates": dict(self.rates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the one that gave `state` stood."""
        self.drawn, self.rates = state["drawn"], dict(state["rates"])

    def _admitted(self) -> int:
        steps, share = self.settings.easy_first, self.settings.easy_share
        if steps:
            share += (1 - share) * self.drawn / (steps * self.prompts_per_step)
        else:
            share = 1.0
        return max(1, min(len(self.problems), round(share * len(self.problems))))

    def _difficulty(self, problem: Problem) -> float:
        difficulty = problem.meta.get("difficulty")
        if problem.id in self.rates:
            return 1 - self.rates[problem.id]
        if isinstance(difficulty, int | float):
            return float(difficulty)
        raise UserError(
            f"rl.curriculum.easy_first needs to know what is easy: {problem.id} has no pass rate in data.pass_rates "
            "and no difficulty among its fields"
        )
