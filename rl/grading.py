"""What a verifier is given about a trace, and what a step's verdicts say part by part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from deltarl.rewards import Verdict
from deltarl.rl.problems import Problem
from deltarl.rollout import Trace


def verifier_item(
    problem: Problem, response: str, trace: Trace, group_lengths: Sequence[int] | None
) -> tuple[str, str | tuple[str, ...], dict[str, Any]]:
    """(response, gold, meta) of a trace.

    meta is the problem's, with `truncated` (the response was cut off: at the token limit, or as it repeated itself),
    `n_tokens` (its tokens) and, where it is known, `group_lengths` (the tokens of every response to the same prompt).
    """
    meta = {**problem.meta, "truncated": trace.finish_reason != "stop", "n_tokens": len(trace.completion_ids)}
    if group_lengths is not None:
        meta["group_lengths"] = list(group_lengths)
    return response, problem.gold, meta


def verifier_items(
    problems: Sequence[Problem], responses: Sequence[str], traces: Sequence[Trace], group: int
) -> list[tuple[str, str | tuple[str, ...], dict[str, Any]]]:
    """`verifier_item` of each trace; the traces of one prompt stand side by side, `group` of them."""
    lengths = [len(trace.completion_ids) for trace in traces]
    return [
        verifier_item(problem, response, trace, lengths[index - index % group :][:group])
        for index, (problem, response, trace) in enumerate(zip(problems, responses, traces, strict=True))
    ]


def part_means(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Mean score of each part of the verdicts (`info["parts"]`, as `combine` gives), over those it scored."""
    scores: dict[str, list[float]] = defaultdict(list)
    for verdict in verdicts:
        for name, part in verdict.info.get("parts", {}).items():
            if part["score"] is not None:
                scores[name].append(part["score"])
    return {name: sum(values) / len(values) for name, values in scores.items()}
