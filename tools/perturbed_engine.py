"""Train a job with an engine that is off on purpose, with and without importance correction; print what became of it.

    python -P tools/perturbed_engine.py jobs/quickstart.yaml --lag 16 --seeds 0 1 2 --set rl.steps=40

The engine draws from another policy than the learner holds, and records that policy's logprobs; without correction the
learner takes what was drawn for its own. --noise: after every weight sync each tensor in the engine is
W + noise x rms(W) x N(0, 1), drawn anew from (seed, version), or with --fixed once for all syncs, as an engine with a
bad kernel or bad quantisation would be off.
--bias: the engine's logits are off by bias x N(0, 1), one number for each token of the vocabulary, the same all along.
--heat: the engine draws at heat x rl.temperature.
--lag: the engine gets the learner's weights after every lag-th step only, and draws with the old ones in between.
Accuracies are shares of right training samples, drawn from that engine; the last column is the learner's own held-out
accuracy, from an engine as it should be. The curves of all runs go to perturbed.png beside them; what is held-out there
is drawn from the engine that is off.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deltarl.rl import train as runs
from deltarl.rl.cli import quiet_libraries
from deltarl.rl.jobs import Job, load_job
from deltarl.rl.measuring import evaluate_target
from deltarl.rl.metrics import read_metrics
from deltarl.rl.parts import open_engine
from deltarl.rl.plots import draw_comparison
from deltarl.rollout import Request, Sampling

LAST = 5


@dataclass(frozen=True)
class Off:
    """How an engine is off: see the options of the same names."""

    noise: float
    fixed: bool
    bias: float
    heat: float
    lag: int


class PerturbedEngine:
    """A rollout worker with noisy or old weights or shifted logits, or that draws hotter; the rest is its own."""

    def __init__(self, worker: Any, off: Off, seed: int) -> None:
        self.worker, self.off, self.seed = worker, off, seed
        self.held: list[tuple[str, torch.Tensor]] = []
        if off.bias:
            self._shift(worker.model)

    def _shift(self, model: Any) -> None:
        exact = model.compute_logits

        def shifted(*args: Any, **kwargs: Any) -> torch.Tensor:
            logits = exact(*args, **kwargs)
            drawn = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(self.seed))
            return logits + self.off.bias * drawn.to(logits)

        model.compute_logits = shifted

    def __getattr__(self, name: str) -> Any:
        return getattr(self.worker, name)

    def add(self, requests: Iterable[Request]) -> None:
        """The worker's, at another temperature."""
        self.worker.add([replace(request, sampling=self._hotter(request.sampling)) for request in requests])

    def _hotter(self, sampling: Sampling) -> Sampling:
        return replace(sampling, temperature=self.off.heat * sampling.temperature)

    def sync_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> Any:
        """The worker's sync, of the weights that it is to have at this version, with noise on each tensor."""
        if not self.held or version % self.off.lag == 0:
            self.held = [(name, tensor.clone()) for name, tensor in named_tensors]
        return self.worker.sync_weights(self._noisy(version), version)

    def _noisy(self, version: int) -> Iterator[tuple[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + (0 if self.off.fixed else version))
        for name, tensor in self.held:
            drawn = torch.randn(tensor.shape, generator=generator).to(tensor.device)
            scale = self.off.noise * tensor.float().square().mean().sqrt()
            yield name, (tensor + scale * drawn).to(tensor.dtype)


def run(job: Job, off: Off) -> tuple[Path, list[dict[str, Any]], float]:
    """A run's folder, the rows of its steps, and the learner's held-out accuracy after it."""
    opened = runs.open_engine
    runs.open_engine = lambda job, path: PerturbedEngine(open_engine(job, path), off, job.seed)
    try:
        folder = runs.train(job)
    finally:
        runs.open_engine = opened
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "rl"]
    return folder, rows, evaluate_target(str(folder), None, [])["accuracy"]


def main() -> None:
    """Run every mode with every seed; one table row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--fixed", action="store_true")
    parser.add_argument("--bias", type=float, default=0.0)
    parser.add_argument("--heat", type=float, default=1.0)
    parser.add_argument("--lag", type=int, default=1)
    parser.add_argument("--modes", nargs="+", default=["none", "token_truncate"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    quiet_libraries()
    off = Off(args.noise, args.fixed, args.bias, args.heat, args.lag)
    heads = ("correction", "seed", "is_ess", "first step", "best step", "last 5 steps", "entropy", "held-out, clean")
    table = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    folders: dict[str, list[Path]] = {mode: [] for mode in args.modes}
    for mode in args.modes:
        for seed in args.seeds:
            chosen = [f"rl.importance_sampling={mode}", f"seed={seed}", f"name=perturbed-{mode}-{seed}"]
            folder, rows, heldout = run(load_job(args.job, [*args.overrides, *chosen]), off)
            folders[mode].append(folder)
            accuracy = [row["accuracy"] or 0.0 for row in rows]
            last = accuracy[-LAST:]
            ess = sum(row["is_ess"] for row in rows) / len(rows)
            table.append(
                f"| {mode} | {seed} | {ess:.3f} | {accuracy[0]:.1%} | {max(accuracy):.1%} "
                f"| {sum(last) / len(last):.1%} | {rows[-1]['entropy']:.3f} | {heldout:.1%} |"
            )
            print(table[-1], flush=True)
    print("\n".join(table))
    print(draw_comparison(folders, folder.parent / "perturbed.png"))


if __name__ == "__main__":
    main()
