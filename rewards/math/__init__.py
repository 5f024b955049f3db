"""The `math` verifier: extraction, a grammar of its own, exact and bounded evaluation, comparison by kind."""

from deltarl.rewards.math.verifier import MathVerifier

__all__ = ["MathVerifier"]
