"""Batches whose optimizer step was left out because nothing finite came of it: kept, and looked into afterwards.

runs/<name>/nonfinite/<optimizer step>/  job.yaml  model/  batch.pt  manifest.json
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltarl.rl.buffered import to_plain
from deltarl.rl.checkpointing import write_policy
from deltarl.rl.errors import UserError
from deltarl.rl.forward import packed_logprobs
from deltarl.rl.guard import gradient_norm
from deltarl.rl.jobs import dump_job, load_job
from deltarl.rl.manifest import Damaged, check, publishing
from deltarl.rl.packing import make_pack
from deltarl.rl.parts import open_algorithm, open_model
from deltarl.rl.sharding import from_main, whole_state

if TYPE_CHECKING:
    from deltarl.rl.trainer import RLTrainer

FOLDER = "nonfinite"
BATCH_FILE = "batch.pt"
JOB_FILE = "job.yaml"
LISTED = 5
"""How many names or tokens of a kind are listed."""


def keep_for_replay(trainer: RLTrainer) -> Path:
    """Write the weights and the batch of the update that a trainer is in; returns the folder. Collective.

    Of folders like it the last 2 x `rl.max_skipped` stay. Steps that are left out one after the other have the same
    weights, which are stored once.
    """
    update = trainer.state.global_step + 1
    parent = trainer.run.path / FOLDER
    folder, before = parent / str(update), parent / str(update - 1) / "model"
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = whole_state(model)

    def write() -> Path:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that diverged here before
        with publishing(folder) as inside:
            if trainer.guard.in_a_row > 1 and before.is_dir():
                shutil.copytree(before, inside / "model", copy_function=os.link)
            else:
                (inside / "model").mkdir()
                write_policy(model, trainer.processing_class, state, inside / "model")
            (inside / JOB_FILE).write_text(dump_job(trainer.job))
            learning, algorithm = to_plain(trainer.learning), trainer.algorithm.state_dict()
            torch.save({"update": update, "learning": learning, "algorithm": algorithm}, inside / BATCH_FILE)
        for old in kept_batches(trainer.run.path)[: -2 * trainer.job.rl.max_skipped]:
            shutil.rmtree(parent / str(old))
        return folder

    return from_main(write)


def kept_batches(run: Path) -> list[int]:
    """The optimizer steps of a run whose batches were kept, ascending."""
    folder = run / FOLDER
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.is_dir() else []


def replay(path: Path) -> list[str]:
    """Compute loss and gradients of a kept batch again; says, line by line, what is not finite.

    `path`: a folder that `keep_for_replay` wrote, or a run folder, whose last one is taken.

    Raises UserError: there is none, or it is damaged.
    """
    if kept := kept_batches(path):
        path = path / FOLDER / str(kept[-1])
    if not (path / BATCH_FILE).is_file():
        raise UserError(f"{path} has no batch to replay: give a run folder with {FOLDER}/, or a folder in there")
    try:
        check(path)
    except Damaged as damage:
        raise UserError(f"{damage}: replay another") from damage
    trainer = _trainer_at(path)
    model, device = trainer.model, trainer.accelerator.device
    update = trainer.state.global_step % (trainer.job.rl.minibatches * trainer.job.rl.num_iterations)
    losses = trainer.losses(model, update)
    total = torch.zeros((), device=device)
    for part in losses:
        loss = part()
        trainer.accelerator.backward(loss)
        total += loss.detach()
    left_out = (trainer.job.rl.minibatches - trainer.learning.minibatches) * trainer.job.rl.num_iterations
    rows = trainer.minibatch(update - left_out)
    lines = [
        f"optimizer step {trainer.state.global_step + 1}, RL step {trainer.rl_step + 1}: {len(rows)} traces",
        f"loss {total.item():.6g}, gradient norm {gradient_norm(model).item():.6g}",
        *_named("weights", ((name, p) for name, p in model.named_parameters())),
        *_named("gradients", ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)),
    ]
    about_samples = [line for row in rows for line in _about(trainer, model, row, rows)]
    if not about_samples and math.isfinite(total.item()):
        about_samples = ["every trace is finite by itself here: look at the device and the precision of the run"]
    return lines + about_samples


def _trainer_at(path: Path) -> RLTrainer:
    from deltarl.rl.buffered import from_plain
    from deltarl.rl.trainer import RECORDS, RLTrainer

    job = load_job(path / JOB_FILE)
    model, tokenizer = open_model(str(path / "model"))
    saved = torch.load(path / BATCH_FILE, map_location="cpu", weights_only=True)
    algorithm = open_algorithm(job, model, str(path / "model"))
    algorithm.load_state_dict(saved["algorithm"])
    trainer = RLTrainer(
        model=model,
        tokenizer=tokenizer,
        job=job,
        collector=SimpleNamespace(),
        run=SimpleNamespace(path=path),
        algorithm=algorithm,
    )
    trainer.state.global_step = saved["update"] - 1
    trainer.learning = from_plain(saved["learning"], *RECORDS)
    return trainer


def _named(what: str, tensors: Iterator[tuple[str, Tensor]]) -> list[str]:
    """A line about the tensors that have values that are not finite, if any has."""
    found = [name for name, tensor in tensors if not tensor.isfinite().all()]
    return [f"{len(found)} {what} are not finite: {_listed(found)}"] if found else []


def _about(trainer: RLTrainer, model: nn.Module, row: int, rows: list[int]) -> Iterator[str]:
    """A line about one trace of a minibatch, if something about it is not finite."""
    learning, device = trainer.learning, trainer.accelerator.device
    traces = [sample.trace for sample in learning.batch.samples]
    tokens = sum(len(traces[row].completion_ids) for row in rows)
    pack = make_pack(traces, [row]).to(device)
    model.zero_grad()
    loss = trainer.pack_loss(model, pack, len(rows), tokens)
    trainer.accelerator.backward(loss)
    norm = gradient_norm(model).item()
    with torch.no_grad(), trainer.accelerator.autocast():
        logprobs = packed_logprobs(model, pack, temperature=trainer.job.rl.temperature).logprobs
    scores, targets, length = learning.scores, learning.targets, len(traces[row].completion_ids)
    recorded = {
        "logprobs now": logprobs.cpu(),
        "the engine's logprobs": scores.sampler[row, :length],
        "logprobs before the first update": None if scores.old is None else scores.old[row, :length],
        "the reference's logprobs": None if scores.reference is None else scores.reference[row, :length],
        "values": None if scores.values is None else scores.values[row, :length],
        "advantages": targets.advantages[row].expand(length)
        if targets.advantages.shape[1] == 1
        else targets.advantages[row, :length],
    }
    wrong = [
        f"{name} of {_tokens(trainer.processing_class, traces[row].completion_ids, values)}"
        for name, values in recorded.items()
        if values is not None and not values.isfinite().all()
    ]
    if wrong or not (math.isfinite(loss.item()) and math.isfinite(norm)):
        problem = learning.batch.samples[row].problem.id
        what = "; ".join(wrong) or "nothing recorded about it"
        yield f"trace {row} ({problem}): loss {loss.item():.6g}, gradient norm {norm:.6g}; not finite: {what}"


def _tokens(tokenizer: Any, ids: list[int], values: Tensor) -> str:
    """Which tokens have values that are not finite."""
    places = (~values.isfinite()).nonzero().flatten().tolist()
    if len(places) == len(ids):
        return "all tokens"
    return _listed([f"token {place} ({tokenizer.decode([ids[place]])!r})" for place in places])


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
