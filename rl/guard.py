"""Optimizer steps whose loss or gradient is not finite are skipped and counted; too many in a row stop the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from deltarl.rl.sharding import gathered, whole


class Guard:
    """Looks at the gradients of each optimizer step before it is taken.

    skipped: steps since the last call of `take`; in_a_row: those since the last good one.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped = 0
        self.in_a_row = 0

    def passes(self, modules: Sequence[nn.Module], loss: Tensor) -> bool:
        """Whether this process's part of the loss and all gradients are finite on every process. Collective.

        Where they are not the gradients are dropped, so that the step of any of our optimizers changes nothing.
        """
        values = [loss, *(whole(gradient_norm(module)) for module in modules)]
        finite = all(gathered(all(math.isfinite(value.item()) for value in values)))
        if finite:
            self.in_a_row = 0
        else:
            self.in_a_row += 1
            self.skipped += 1
            for module in modules:
                module.zero_grad(set_to_none=True)
        return finite

    @property
    def exhausted(self) -> bool:
        """Whether so many steps in a row were skipped that going on makes no sense."""
        return self.in_a_row >= self.limit

    def take(self) -> int:
        """Steps skipped since the last call."""
        skipped, self.skipped = self.skipped, 0
        return skipped

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def gradient_norm(model: nn.Module) -> Tensor:
    """The 2-norm of all gradients together, sharded as they are; 0 without any."""
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
