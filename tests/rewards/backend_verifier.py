"""The math verifier, saying in each verdict which integers mpmath and sympy compute with."""

from dataclasses import replace

from mpmath.libmp import BACKEND
from sympy.external.gmpy import GROUND_TYPES

from deltarl.rewards.math import MathVerifier


class BackendVerifier(MathVerifier):
    def verify(self, response, gold, *, meta):
        verdict = super().verify(response, gold, meta=meta)
        return replace(verdict, info={**verdict.info, "integers": [BACKEND, GROUND_TYPES]})
