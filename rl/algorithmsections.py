"""The sections of `rl` that belong to one algorithm or recipe: the critic, Kimi's, PTX, the curriculum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from deltarl.rl.section import Section

if TYPE_CHECKING:
    from deltarl.rl.jobsections import RLConfig


class CriticConfig(Section):
    """PPO's critic and what its values are used for."""

    kind: Literal["head", "model"] = Field("head", description="a head on the policy's states, or a model of its own")
    path: str | None = Field(None, description="model: the folder it starts from; null: the policy that RL starts from")
    learning_rate: float = Field(1e-3, gt=0)
    trunk_gradient: float = Field(0.1, ge=0, description="head: weight of the value loss in the policy's own weights")
    warmup_steps: int = Field(0, ge=0, description="first RL steps in which the critic alone learns")
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1, description="GAE's lambda")
    value_clip: float | None = Field(0.2, gt=0)
    whiten_rewards: bool = False
    whiten_advantages: bool = True

    @model_validator(mode="after")
    def _kind_agrees(self) -> CriticConfig:
        if self.kind == "head" and self.path is not None:
            raise ValueError(f"path = {self.path} needs kind = model: a head has no model of its own")
        return self


class KimiConfig(Section):
    """The k1.5 and Kimi Linear recipe; its PTX and curriculum have sections of their own."""

    tau: float = Field(0.1, gt=0, description="coefficient of the KL to the policy that the step began from")
    target_kl: float | None = Field(None, gt=0, description="nats per token; tau is adjusted to it after each step")
    adapt_minibatches: bool = Field(False, description="fewer, larger minibatches where engine and learner disagree")
    length_weight: float = Field(0.0, ge=0, description="weight of k1.5's length reward")
    length_warmup: int = Field(0, ge=0, description="first RL steps without it")


class PTXSource(Section):
    """One weighted source of the PTX stream: `solutions`, `chat`, or a .jsonl file."""

    name: str
    weight: float = Field(1.0, gt=0)


class PTXConfig(Section):
    """Supervised data mixed into every update."""

    weight: float = Field(0.1, gt=0, description="of the PTX loss beside the policy's")
    batch_size: int = Field(16, ge=1, description="supervised sequences per update")
    max_length: int = Field(256, ge=8)
    sources: list[PTXSource] = Field(min_length=1)


class CurriculumConfig(Section):
    """Which problems come next. Without this section: all in turn."""

    prioritised: bool = Field(True, description="drawn in proportion to 1 - the problem's success rate")
    newest: float = Field(0.5, gt=0, le=1, description="weight of the newest measurement in the running success rate")
    easy_first: int = Field(0, ge=0, description="RL steps over which problems are admitted, the easiest first")
    easy_share: float = Field(0.25, gt=0, le=1, description="share of the problems that is there from the first step")


def check_algorithm(rl: RLConfig) -> None:
    """Raise ValueError, naming both keys, where options of `rl` contradict each other; fill in kimi's defaults."""
    for section, algorithm in (("critic", "ppo"), ("kimi", "kimi")):
        if getattr(rl, section) is not None and rl.algorithm != algorithm:
            raise ValueError(f"{section} needs algorithm = {algorithm}, and algorithm is {rl.algorithm}")
    if rl.algorithm == "ppo" and rl.critic is None:
        raise ValueError("algorithm = ppo needs critic, its settings, such as critic: {kind: head}")
    if rl.algorithm == "kimi":
        _check_kimi(rl)
    if rl.num_generations == 1 and rl.algorithm != "ppo":
        if rl.baseline != "none":
            raise ValueError(f"num_generations = 1 is no group for baseline = {rl.baseline}; use baseline: none")
        if rl.scale_rewards == "group":
            raise ValueError("num_generations = 1 is no group for scale_rewards = group; use batch or none")
    if rl.kl_in == "reward" and rl.beta == 0:
        raise ValueError("kl_in = reward needs beta, the coefficient of the KL, and beta is 0")
    if rl.ptx is not None and rl.ptx.max_length > rl.token_budget:
        raise ValueError(f"ptx.max_length = {rl.ptx.max_length} must fit token_budget = {rl.token_budget}")
    if rl.importance_sampling_floor >= rl.importance_sampling_cap:
        raise ValueError(
            f"importance_sampling_floor = {rl.importance_sampling_floor} must be less than "
            f"importance_sampling_cap = {rl.importance_sampling_cap}"
        )


def shapes_length_twice(rl: RLConfig, options: dict[str, Any]) -> bool:
    """Whether the Kimi recipe's length reward and the `length` verifier's, among the options of a job's, both count."""
    parts = [options, *(part.get("options") or {} for part in options.get("parts", []) if isinstance(part, dict))]
    return bool(rl.kimi and rl.kimi.length_weight) and any(part.get("shape") == "kimi" for part in parts)


def _check_kimi(rl: RLConfig) -> None:
    """Mirror descent has one baseline, the group's mean, one normalisation, and no scale."""
    rl.kimi = rl.kimi or KimiConfig()
    if rl.baseline != "mean":
        raise ValueError(f"algorithm = kimi has the baseline mean, and baseline is {rl.baseline}")
    if rl.loss_type != "dr_grpo":
        raise ValueError(f"algorithm = kimi has a loss of its own, and loss_type is {rl.loss_type}: leave it out")
    if "scale_rewards" not in rl.model_fields_set:
        rl.scale_rewards = "none"
    if rl.scale_rewards != "none":
        raise ValueError(f"algorithm = kimi scales no rewards, and scale_rewards is {rl.scale_rewards}: leave it out")
