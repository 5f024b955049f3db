"""Verifiers in other frameworks: as reward functions of TRL (and back), of verl, and behind OpenRLHF's reward URL."""

from deltarl.rewards.adapters.trl import as_async_trl_reward, as_trl_reward, from_trl_reward

__all__ = ["as_async_trl_reward", "as_trl_reward", "from_trl_reward"]
