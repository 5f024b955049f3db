"""The supervised stream of `rl.ptx`: some rows of an SFT mix for every update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from deltarl.rl.algorithmsections import PTXConfig
from deltarl.rl.forward import packed_logprobs, pads
from deltarl.rl.jobs import Job
from deltarl.rl.losses import ptx_loss
from deltarl.rl.objective import Tally
from deltarl.rl.packing import Pack, make_packs
from deltarl.rl.problems import Problem
from deltarl.rl.recipes import build_mix
from deltarl.rl.supervised import encode


class PTXStream:
    """Rows for update u of a run are those from u x `batch_size` on: which ones depends on the job and u alone.

    Raises UserError: a source is unknown, missing or empty.
    """

    def __init__(self, job: Job, problems: Sequence[Problem], tokenizer: Any) -> None:
        self.settings: PTXConfig = job.rl.ptx
        self.budget, self.tokenizer = job.rl.token_budget, tokenizer
        updates = job.rl.steps * job.rl.minibatches * job.rl.num_iterations
        rows = updates * self.settings.batch_size
        self.rows = build_mix(
            self.settings.sources, problems, seed=job.seed + 1, n=rows, instruction=job.data.instruction
        )

    def losses(
        self, model: torch.nn.Module, update: int, accelerator: Accelerator, tally: Tally
    ) -> list[Callable[[], Tensor]]:
        """What adds up to `weight` x the PTX loss of an update, pack by pack.

        Raises UserError where the chat template does not put an answer after its prompt.
        """
        size = self.settings.batch_size
        rows = self.rows.select(range(update * size, (update + 1) * size))
        sequences = encode(self.tokenizer, rows, self.settings.max_length)
        packs = make_packs(sequences, range(len(sequences)), self.budget, padded=pads(model))
        tokens = float(sum(len(sequence.places) for sequence in sequences))
        return [
            lambda pack=pack: self._loss(model, pack.to(accelerator.device), tokens, accelerator, tally)
            for pack in packs
        ]

    def _loss(
        self, model: torch.nn.Module, pack: Pack, tokens: float, accelerator: Accelerator, tally: Tally
    ) -> Tensor:
        with accelerator.autocast():
            logprobs = packed_logprobs(model, pack).logprobs
        mask = torch.ones_like(logprobs)
        tally.mean("ptx_loss", -logprobs, mask)
        return self.settings.weight * ptx_loss(logprobs, mask, tokens=tokens)
