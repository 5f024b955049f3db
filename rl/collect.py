"""From problems to the graded batch of one RL step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from deltarl.rewards import VerifierHost
from deltarl.rl.batch import Batch, Sample
from deltarl.rl.curriculum import ProblemSource, report_successes
from deltarl.rl.evaluate import stop_token_ids
from deltarl.rl.grading import verifier_items
from deltarl.rl.interrupt import Interrupted, StopRequest
from deltarl.rl.jobs import Job
from deltarl.rl.problems import user_messages
from deltarl.rl.prompts import render_prompts
from deltarl.rollout import RolloutWorker, Sampling


class Collector:
    """Generates the whole batch of an RL step, then verifies it.

    seconds: what was spent in the phases "generate" and "verify"; the caller clears it. say: told what is going on.
    """

    def __init__(
        self,
        *,
        job: Job,
        source: ProblemSource,
        tokenizer: Any,
        worker: RolloutWorker,
        host: VerifierHost,
        stop: StopRequest,
    ) -> None:
        self.job, self.source, self.tokenizer = job, source, tokenizer
        self.worker, self.host, self.stop = worker, host, stop
        self.seconds: Counter[str] = Counter()
        self.say: Callable[[str], None] = lambda text: None
        self.sampling = Sampling(
            temperature=job.rl.temperature,
            top_p=job.rl.top_p,
            max_tokens=job.rl.max_completion_length,
            stop_token_ids=tuple(stop_token_ids(tokenizer)),
        )

    def collect(self, step: int) -> Batch:
        """The batch of the RL step that follows `step` completed ones. Raises Interrupted: it can be asked again."""
        rl = self.job.rl
        began = time.perf_counter()
        state = self.source.state_dict()
        chosen = self.source.next_problems(rl.prompts_per_step)
        problems = [problem for problem in chosen for _ in range(rl.num_generations)]
        prompts = render_prompts(self.tokenizer, [user_messages(p, self.job.data.instruction) for p in problems])
        seeds = np.random.SeedSequence([self.job.seed, step]).generate_state(len(prompts)).tolist()
        try:
            traces = self.worker.generate(prompts, self.sampling, seeds=seeds, progress=self._progress)
        except Interrupted:
            self.source.load_state_dict(state)
            raise
        generated = time.perf_counter()
        self.seconds["generate"] += generated - began
        self.say(f"verifying {len(traces)}")
        texts = self.tokenizer.batch_decode([trace.completion_ids for trace in traces], skip_special_tokens=True)
        verdicts = self.host.verify(verifier_items(problems, texts, traces, rl.num_generations))
        self.seconds["verify"] += time.perf_counter() - generated
        samples = [Sample(*parts) for parts in zip(problems, traces, texts, verdicts, strict=True)]
        report_successes(self.source, samples)
        return Batch(samples, rl.num_generations, self.source.measure())

    def _progress(self, done: int, total: int, tokens: int) -> None:
        self.stop.check()
        self.say(f"generating {done}/{total}")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on where this one stands."""
        return {"problems": self.source.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the collector that gave `state` stood."""
        self.source.load_state_dict(state["problems"])
