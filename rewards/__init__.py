"""Verifiers: what they promise, how they are found, and the pool of processes that runs them.

Imports neither torch nor vLLM: a pool's worker starts in the time that Python itself needs.
"""

from deltarl.rewards.adapters import as_async_trl_reward, as_trl_reward, from_trl_reward
from deltarl.rewards.host import HostClosed, VerifierHost
from deltarl.rewards.registry import VerifierInfo, VerifierLoadError, list_verifiers, load_verifier
from deltarl.rewards.types import STATUSES, Status, Verdict, Verifier, VerifierSpec

__all__ = [
    "STATUSES",
    "HostClosed",
    "Status",
    "Verdict",
    "Verifier",
    "VerifierHost",
    "VerifierInfo",
    "VerifierLoadError",
    "VerifierSpec",
    "as_async_trl_reward",
    "as_trl_reward",
    "from_trl_reward",
    "list_verifiers",
    "load_verifier",
]
