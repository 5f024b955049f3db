"""Checkpoints of a transformers Trainer: one folder holds all that the next optimizer step depends on.

model and tokenizer      as deltarl.model.save_checkpoint writes them; adapters merged, sharded weights whole
adapter/                 the adapters alone, where the job has them (rl/adapters.py)
optimizer.pt             the optimizer's state, whole
state.pt                 scheduler, random generators of each process, and every part of the trainer with a state
trainer_state.json       transformers' count of steps
manifest.json            the hash of every file (rl/manifest.py)
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from deltarl.model.checkpoints import write_model
from deltarl.rl.adapters import ADAPTER_FOLDER, has_adapters, merged_state, save_adapters
from deltarl.rl.manifest import publishing
from deltarl.rl.optimizers import OptimizerSettings, make_optimizer
from deltarl.rl.precision import check_precision
from deltarl.rl.sharding import from_main, gathered, rank, whole_state

OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.pt"
TRAINER_FILE = "trainer_state.json"


class Stateful(Protocol):
    """A part of a trainer that the next step depends on. States are of plain values and tensors."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpointing:
    """Mixin for a `transformers.Trainer`: makes the optimizer by our rules, writes and resumes checkpoint folders.

    `trainer.train(resume_from_checkpoint=folder)` goes on from a folder, given a model that was loaded from it.
    """

    settings: OptimizerSettings

    def parts(self) -> dict[str, Stateful]:
        """What has a state besides model, optimizer, schedule and random generators, by name."""
        return {}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of the job's section. Raises UserError where something is not float32 that must be."""
        if self.optimizer is None:
            check_precision(self.model)
            self.optimizer = make_optimizer(self.model, self.settings)
        return self.optimizer

    def write_checkpoint(self, folder: Path) -> None:
        """Write all that a resumed run needs to `folder`, which appears whole or not at all. Collective.

        Raises FileExistsError if there is something at `folder`.
        """
        model = self.accelerator.unwrap_model(self.model)
        state, optimizer = whole_state(model), self.optimizer.state_dict()
        generators = gathered(random_state())
        parts = {name: part.state_dict() for name, part in self.parts().items()}

        def write() -> None:
            with publishing(folder) as inside:
                write_policy(model, self.processing_class, state, inside)
                torch.save(optimizer, inside / OPTIMIZER_FILE)
                rest = {"scheduler": self.lr_scheduler.state_dict(), "random": generators, "parts": parts}
                torch.save(rest, inside / STATE_FILE)
                self.state.save_to_json(str(inside / TRAINER_FILE))

        from_main(write)

    def load_parts(self, folder: Path) -> None:
        """Give every part the state that it had when `folder` was written."""
        saved = _load(folder / STATE_FILE)["parts"]
        for name, part in self.parts().items():
            part.load_state_dict(saved[name])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing to do: the model was built from the checkpoint folder."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.optimizer.load_state_dict(_load(Path(checkpoint) / OPTIMIZER_FILE))
            self.lr_scheduler.load_state_dict(_load(Path(checkpoint) / STATE_FILE)["scheduler"])
            check_precision(self.accelerator.unwrap_model(self.model), self.optimizer)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            saved = _load(Path(checkpoint) / STATE_FILE)["random"]
            set_random_state(saved[min(rank(), len(saved) - 1)])


def write_policy(model: Any, tokenizer: Any, state: dict[str, Any], folder: Path) -> None:
    """The files of a model folder, adapters merged, from its whole state; beside them the adapters alone."""
    if has_adapters(model):
        save_adapters(model, state, folder / ADAPTER_FOLDER)
        state = merged_state(model, state)
    write_model(model, tokenizer, folder, state)


def publish_policy(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model alone to `folder`, which appears whole or not at all."""
    with publishing(folder) as inside:
        write_policy(model, tokenizer, model.state_dict(), inside)


def random_state() -> dict[str, Any]:
    """The state of this process's random generators: python, numpy, torch, cuda."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to what `random_state` gave."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)
