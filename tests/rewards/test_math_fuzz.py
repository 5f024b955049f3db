"""Fuzzing: any text as an answer and as a gold is graded, without an exception and for less than a second.

2000 examples by default, always the same; FUZZ_EXAMPLES=200000 makes a long run of others. Time is processor time of
this thread: what else the machine does is no property of the verifier.
"""

import os
import time

from hypothesis import HealthCheck, assume, given, settings
from latex_strategies import balanced, mutated, texts

from deltarl.rewards.math import MathVerifier
from deltarl.rewards.math.verifier import read_gold

ASKED = os.environ.get("FUZZ_EXAMPLES")
SETTINGS = settings(
    max_examples=int(ASKED or 2000),
    derandomize=ASKED is None,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
VERIFIERS = [MathVerifier(), MathVerifier(extraction="lenient", require_evaluated=False)]
ANSWERED = ("correct", "incorrect", "no_answer", "limit")
ELSEWHERE = ("box", "think", "#", "answer", "$", "\\(", "\\[")
verifier_of_golds = VERIFIERS[0]
verifier_of_golds.warm_up()


@SETTINGS
@given(texts, texts)
def test_any_text_is_graded_in_time(answer, gold):
    for verifier in VERIFIERS:
        for response in (f"so \\boxed{{{answer}}}", answer):
            read_gold.cache_clear()
            start = time.thread_time()
            verdict = verifier.verify(response, gold, meta={})
            assert time.thread_time() - start < 1
            assert verdict.status in (*ANSWERED, "gold_error")
            assert (verdict.status == "gold_error") == (verifier.check_gold(gold) is not None)


@SETTINGS
@given(mutated())
def test_a_gold_that_can_be_graded_against_equals_itself(text):
    assume(balanced(text) and not any(word in text for word in ELSEWHERE))
    assume(verifier_of_golds.check_gold(text) is None)
    assert verifier_of_golds.verify(f"\\boxed{{{text}}}", text, meta={}).status in ("correct", "limit")
