"""The keys of `rollout` that say how generation and learning take turns, and when their disagreement is an alarm."""

from __future__ import annotations

from pydantic import Field, model_validator

from deltarl.rl.section import Section


class AlarmConfig(Section):
    """Limits of how far engine and learner may disagree on a step's tokens; null is none."""

    logp_gap_mean: float | None = Field(0.1, gt=0, description="mean |log p_learner - log p_engine|, nats per token")
    logp_gap_max: float | None = Field(None, gt=0, description="the largest of them")
    engine_kl: float | None = Field(None, gt=0, description="KL of the learner from the engine, nats per token")
    is_ess: float | None = Field(0.5, gt=0, lt=1, description="least effective sample size of the weights, a share")


class Modes(Section):
    """How generation and learning take turns. As they stand: in turn, one batch a step, drawn by its own weights."""

    partial_tokens: int | None = Field(
        None, ge=1, description="tokens that a completion may get in one step; it goes on in the next"
    )
    max_staleness: int = Field(0, ge=0, description="weight versions that generation may run ahead; 0: in turn")
    dynamic_sampling: bool = Field(False, description="drop groups whose rewards are all equal, and draw others")
    max_oversampling: float = Field(4.0, ge=1, description="dynamic_sampling: groups drawn for each that is needed")
    oversample: float = Field(1.0, ge=1, description="dynamic_sampling: groups begun at once for each that is needed")
    stop_repetition: int = Field(
        0, ge=0, description="end a completion whose last so many tokens are a block over and over; 0: never"
    )
    record: bool = Field(False, description="write every batch to rollouts/, tokens and logprobs included")
    replay: str | None = Field(None, description="a run folder whose recorded batches are learned from; no engine")
    alarm: AlarmConfig = Field(default_factory=AlarmConfig)

    @model_validator(mode="after")
    def _modes_agree(self) -> Modes:
        if self.partial_tokens and self.max_staleness:
            raise ValueError(
                f"partial_tokens = {self.partial_tokens} cuts completions at the end of a step, and max_staleness = "
                f"{self.max_staleness} lets them run on: leave one of them out"
            )
        if self.oversample > 1 and not self.dynamic_sampling:
            raise ValueError(f"oversample = {self.oversample} needs dynamic_sampling = true, which drops groups")
        if self.oversample > 1 and self.partial_tokens:
            raise ValueError(
                f"oversample = {self.oversample} forgets what was begun, partial_tokens = {self.partial_tokens} keeps "
                "it: leave one of them out"
            )
        if self.oversample > self.max_oversampling:
            raise ValueError(f"oversample = {self.oversample} is over max_oversampling = {self.max_oversampling}")
        if 0 < self.stop_repetition < 16:
            raise ValueError(f"stop_repetition = {self.stop_repetition} is too short: 16 or more, or 0")
        if self.replay is not None and self.record:
            raise ValueError(f"replay = {self.replay} is a record already: leave record out")
        return self
