"""Checkpoints of a transformers Trainer in our layout: the model's folder plus optimizer, scheduler and RNG state."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from deltarl.model import save_checkpoint
from deltarl.rl.runfolder import STATE_FILE


class Checkpointing:
    """Mixin for a `transformers.Trainer`: writes and resumes whole checkpoint folders, atomically.

    A folder holds the model as `deltarl.model.save_checkpoint` writes it, the tokenizer, `optimizer.pt`,
    `scheduler.pt`, `rng_state.pth` and `trainer_state.json`; `trainer.train(resume_from_checkpoint=folder)` goes on
    from it, given a model that was loaded from the same folder.
    """

    def write_checkpoint(self, folder: Path) -> Path:
        """Write everything a resumed run needs into `folder`; a kill leaves the whole folder or none."""
        temporary = folder.with_name(f".{folder.name}.tmp")
        if temporary.exists():
            shutil.rmtree(temporary)
        save_checkpoint(self.accelerator.unwrap_model(self.model), self.processing_class, temporary)
        self._save_optimizer_and_scheduler(str(temporary))
        self._save_rng_state(str(temporary))
        self.state.save_to_json(str(temporary / STATE_FILE))
        self.write_more(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        return folder

    def write_more(self, folder: Path) -> None:
        """Write what else this trainer needs to go on; a checkpoint's folder is complete after it."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
        """Nothing to do: the model was built from the checkpoint folder."""
