"""What happens between the steps of RL: evaluations, checkpoints, stopping."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from deltarl.rl.evaluate import evaluate
from deltarl.rl.interrupt import Interrupted
from deltarl.rl.metrics import read_metrics
from deltarl.rl.parts import Problems, say
from deltarl.rl.runfolder import kept_steps
from deltarl.rl.sharding import from_main
from deltarl.rl.trainer import RLTrainer


class RLStage:
    """The RL steps of a run from step `first` on: what happens between them, and how they stop.

    With several processes every one has a stage; the main one decides, evaluates and writes.
    """

    def __init__(self, trainer: RLTrainer, data: Problems, first: int) -> None:
        self.trainer, self.data, self.first = trainer, data, first
        self.job, self.folder, self.stop = trainer.job, trainer.run, trainer.collector.stop
        trainer.after_step = self.after_step

    def run(self, checkpoint: Path | None) -> None:
        """Train to the last step. Raises Interrupted when stopped; a checkpoint has been written."""
        steps = self.job.rl.steps
        with tqdm(total=steps, initial=self.first, desc="RL", unit="step") as self.trainer.bar:
            try:
                if self.first < steps:
                    self.trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            except Interrupted:
                self.save_stopped()
                raise
        from_main(lambda: self.stop.check())

    def after_step(self, step: int) -> bool:
        """Evaluate and save where the job says so; True asks the trainer to stop."""
        with suppress(Interrupted):  # stopped while evaluating: the step is complete, and saved below
            self.evaluate_if_due(step)
        stopping = from_main(lambda: self.stop.requested)
        rl = self.job.rl
        if stopping or step % rl.checkpoint_every == 0 or step == rl.steps or from_main(lambda: self.is_best(step)):
            self.save(step)
        return stopping

    def is_best(self, step: int) -> bool:
        """Whether held-out accuracy was measured at this step and belongs to the best that the job keeps."""
        accuracies = self.folder.accuracies()
        return step in kept_steps(list(accuracies), last=0, best=self.job.rl.keep_best, scores=accuracies)

    def save(self, step: int) -> None:
        """Write the checkpoint of a completed step, unless it is there; the start of RL needs none."""
        if step > 0 and from_main(lambda: step not in self.folder.steps()):
            self.trainer.write_checkpoint(self.folder.checkpoint(step))
            from_main(lambda: self.folder.prune())

    def save_stopped(self) -> None:
        """Write the checkpoint of a run that was stopped before an RL step's batch came, or inside its updates."""
        trainer, updates = self.trainer, self.trainer.state.global_step
        if trainer.learning is None:
            self.save(trainer.rl_step)
        elif from_main(lambda: updates not in self.folder.steps("window")):
            trainer.write_checkpoint(self.folder.checkpoint(updates, "window"))

    def evaluate_if_due(self, step: int) -> None:
        """The evaluation before RL, or one of those during it, unless it is on record."""
        every = self.job.eval.every
        stage = "during" if step else "before"
        due = step == 0 or (every > 0 and step % every == 0 and step < self.job.rl.steps)
        if due and from_main(lambda: not self.is_recorded(step, stage)):
            self.measure(step, stage)

    def is_recorded(self, step: int, stage: str) -> bool:
        """Whether metrics.jsonl has this evaluation."""
        rows = read_metrics(self.folder.metrics.path)
        return any(row["kind"] == "eval" and (row["step"], row["stage"]) == (step, stage) for row in rows)

    def measure(self, step: int, stage: str) -> None:
        """Held-out accuracy of the learner's weights, into metrics.jsonl and eval/."""
        self.trainer.sync_engine()
        from_main(lambda: self._measure(step, stage))

    def _measure(self, step: int, stage: str) -> None:
        trainer = self.trainer
        with trainer.collector.idle() as worker:
            if worker is None:  # learning from a record
                return
            row, traces = evaluate(
                worker,
                trainer.processing_class,
                self.data.heldout,
                trainer.collector.host,
                self.job,
                step=step,
                stage=stage,
                stop=self.stop,
            )
        self.folder.metrics.append(row)
        self.folder.write_traces("eval", step, traces)
        say(f"held-out accuracy at step {step}: {row['accuracy']:.1%} ± {row['stderr']:.1%}")
