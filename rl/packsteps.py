"""What the trainers of both stages share: an optimizer step is a sum of losses, computed one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from deltarl.rl.objective import Tally
from deltarl.rl.sharding import shares, summed


class PackSteps:
    """Mixin for a `transformers.Trainer` that makes the batches of its `training_step` itself."""

    _tally: Tally

    def get_train_dataloader(self) -> DataLoader:
        """One item for each optimizer step of the run."""
        return DataLoader(range(self.args.max_steps), batch_size=1, collate_fn=list)

    def backward(self, model: torch.nn.Module, losses: Sequence[Callable[[], Tensor]]) -> Tensor:
        """Compute the losses in turn and add up their gradients; the sum of all processes' losses.

        Each process computes its share of them. Collective.
        """
        total = torch.zeros((), device=self.accelerator.device)
        for compute, counts in shares(losses):
            self._tally.counting = counts
            loss = compute() if counts else 0.0 * compute()
            self.accelerator.backward(loss)
            total += loss.detach()
        self._tally.counting = True
        return summed(total)
