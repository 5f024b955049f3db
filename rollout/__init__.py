"""Rollout: drawing completions from the policy, on vLLM, and putting new weights into the running engine."""

from deltarl.rollout.engine import EngineError, check_vllm_version
from deltarl.rollout.types import (
    Progress,
    Request,
    RolloutWorker,
    Sampling,
    SyncReport,
    Trace,
    WeightSyncError,
)
from deltarl.rollout.worker import make_worker

__all__ = [
    "EngineError",
    "Progress",
    "Request",
    "RolloutWorker",
    "Sampling",
    "SyncReport",
    "Trace",
    "WeightSyncError",
    "check_vllm_version",
    "make_worker",
]
