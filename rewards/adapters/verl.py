"""Verifiers as verl's custom reward function.

    custom_reward_function.path=pkg://deltarl.rewards.adapters.verl
    custom_reward_function.name=compute_score                        # compute_score_batch for the batch reward manager
    +custom_reward_function.reward_kwargs.verifier=math              # or any name that a job file takes
    +custom_reward_function.reward_kwargs.options.extraction=strict

The file's own path works in place of pkg://. Each process of verl keeps one warm pool of workers for each choice of
these arguments.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from deltarl.rewards.host import Item, VerifierHost
from deltarl.rewards.types import Verdict, VerifierSpec

_hosts: dict[str, VerifierHost] = {}
_starting = threading.Lock()


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    verifier: str = "math",
    options: Mapping[str, Any] | None = None,
    workers: int = 1,
    timeout: float = 5.0,
    **_: Any,
) -> dict[str, Any]:
    """One response's reward: {"score", "acc" (1.0 when correct), "pred" (what was graded), "status"}.

    ground_truth: the gold, or a list or array of golds of which any may be met. extra_info and data_source reach the
    verifier as `meta`. verifier, options, workers, timeout: as in a job's `rewards` section. Keyword arguments that
    verl adds for reward models are not used. Raises ValueError when the gold is unusable: verl needs a number, and 0
    would teach that the response was wrong; VerifierLoadError when the verifier does not load.
    """
    host = _host(verifier, options or {}, workers, timeout)
    return _result(host.submit(_item(data_source, solution_str, ground_truth, extra_info)).result(), ground_truth)


def compute_score_batch(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Mapping[str, Any] | None],
    *,
    verifier: str = "math",
    options: Mapping[str, Any] | None = None,
    workers: int = 1,
    timeout: float = 5.0,
    **_: Any,
) -> list[dict[str, Any]]:
    """The rewards of a batch, for verl's batch reward manager; entries, arguments and errors as of compute_score."""
    rows = zip(data_sources, solution_strs, ground_truths, extra_infos, strict=True)
    verdicts = _host(verifier, options or {}, workers, timeout).verify([_item(*row) for row in rows])
    return [_result(verdict, truth) for verdict, truth in zip(verdicts, ground_truths, strict=True)]


def _host(verifier: str, options: Mapping[str, Any], workers: int, timeout: float) -> VerifierHost:
    options = {key: options[key] for key in options}
    key = json.dumps([verifier, options, workers, timeout], sort_keys=True)
    with _starting:
        if key not in _hosts:
            _hosts[key] = VerifierHost(VerifierSpec(verifier, options), workers, timeout)
        return _hosts[key]


def _item(data_source: str, solution: str, truth: Any, extra_info: Mapping[str, Any] | None) -> Item:
    return solution, _gold(truth), {**(extra_info or {}), "data_source": data_source}


def _gold(truth: Any) -> str | list[str]:
    """verl reads the gold from a parquet file: text, a number, a list, or a numpy array of such."""
    truth = truth.tolist() if hasattr(truth, "tolist") else truth
    if truth is None:
        return []
    return [str(gold) for gold in truth] if isinstance(truth, (list, tuple)) else str(truth)


def _result(verdict: Verdict, truth: Any) -> dict[str, Any]:
    if verdict.score is None:
        raise ValueError(
            f"ground_truth {truth!r} is unusable ({verdict.info.get('reason')}): take its row out of the data set"
        )
    return {
        "score": verdict.score,
        "acc": float(verdict.status == "correct"),
        "pred": verdict.extracted or "",
        "status": verdict.status,
    }
