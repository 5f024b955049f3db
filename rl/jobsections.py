"""The sections of a job file: every key with its default and its bounds."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from deltarl.rl.algorithmsections import CriticConfig, CurriculumConfig, KimiConfig, PTXConfig, check_algorithm
from deltarl.rl.losses.correction import Correction
from deltarl.rl.rolloutsections import Modes
from deltarl.rl.section import Section

OptimizerName = Literal["adamw", "adamw_8bit", "muon"]


class LoraConfig(Section):
    """Adapters that RL trains in place of the weights (rl/adapters.py)."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0, description="what the adapters add is scaled by alpha / rank")
    targets: list[str] | None = Field(None, min_length=1, description="linear layers, as q_proj; null: all of them")


Checkpointed = Literal["none", "all"] | list[Literal["linear", "mla", "ffn"]]
Turns = Literal["last", "all", "marked"]


class ModelConfig(Section):
    """The policy: a folder or hub name (`path`), or an arm and size built from scratch."""

    path: str | None = None
    arm: str = "kda"
    size: str = "2m"
    vocab_size: int = Field(512, ge=280, description="tokenizer vocabulary of a model built from scratch")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the learner's and engine's compute")
    lora: LoraConfig | None = Field(None, description="null: RL trains all weights")


class DataConfig(Section):
    """Problems with ground truth, and how they become prompts."""

    source: str = Field("procedural", description="procedural, a .jsonl file, or a hub name such as openai/gsm8k")
    subset: str | None = None
    heldout: str | None = Field(None, description="a .jsonl file or hub split; null splits it off the source")
    train_size: int | None = Field(None, ge=1)
    heldout_size: int = Field(200, ge=1)
    tasks: dict[str, float] = Field(default_factory=lambda: {"chain_sum": 1.0, "linear_equation": 1.0})
    difficulty: int = Field(1, ge=1)
    instruction: str = "{question}"
    question_field: str | None = None
    gold_field: str | None = None
    max_bad_gold: float = Field(0.01, ge=0, le=1, description="share of golds that may fail to parse")
    pass_rates: str | None = Field(None, description="a table that `deltarl difficulty` wrote")
    pass_band: list[float] | None = Field(
        None, min_length=2, max_length=2, description="[low, high]: train on problems whose pass rate lies in it"
    )

    @field_validator("instruction")
    @classmethod
    def _has_question(cls, value: str) -> str:
        if "{question}" not in value:
            raise ValueError("must contain {question}")
        return value

    @model_validator(mode="after")
    def _band_has_its_table(self) -> DataConfig:
        if self.pass_band is not None:
            if self.pass_rates is None:
                raise ValueError("pass_band needs pass_rates, the table that `deltarl difficulty` writes")
            if not 0 <= self.pass_band[0] <= self.pass_band[1] <= 1:
                raise ValueError(f"pass_band = {self.pass_band} must be [low, high] with 0 <= low <= high <= 1")
        return self


class SFTSource(Section):
    """One weighted source of the SFT mix: `solutions`, `chat`, or a .jsonl file."""

    name: str
    weight: float = Field(1.0, gt=0)


class SFTStage(Section):
    """One of several SFT stages; what is left out is as `sft` has it."""

    steps: int = Field(ge=1)
    learning_rate: float | None = Field(None, gt=0)
    warmup_steps: int | None = Field(None, ge=0)
    sources: list[SFTSource] | None = Field(None, min_length=1)


class SFTConfig(Section):
    """The supervised warm-up; without steps and stages it is left out."""

    steps: int = Field(0, ge=0)
    batch_size: int = Field(64, ge=1, description="rows of an optimizer step")
    token_budget: int = Field(16384, ge=1, description="tokens per forward/backward pass")
    optimizer: OptimizerName = "adamw"
    learning_rate: float = Field(2e-3, gt=0)
    warmup_steps: int = Field(20, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    max_length: int = Field(256, ge=8, description="tokens at which a row is cut")
    turns: Turns = Field("last", description="assistant turns of chat rows to learn; marked: those with train: true")
    sources: list[SFTSource] = Field(
        default_factory=lambda: [SFTSource(name="solutions", weight=0.8), SFTSource(name="chat", weight=0.2)],
        min_length=1,
    )
    stages: list[SFTStage] | None = Field(None, min_length=1, description="in place of steps: one after another")
    gradient_checkpointing: Checkpointed = "none"

    @property
    def schedule(self) -> list[SFTStage]:
        """The stages with all their settings; none where there is no SFT."""
        shared = {"learning_rate": self.learning_rate, "warmup_steps": self.warmup_steps, "sources": self.sources}
        if self.stages is None:
            return [SFTStage(steps=self.steps, **shared)] if self.steps else []
        given = [{name: value for name, value in stage if value is not None} for stage in self.stages]
        return [SFTStage(**shared | stage) for stage in given]

    @model_validator(mode="after")
    def _options_agree(self) -> SFTConfig:
        if self.steps and self.stages:
            raise ValueError(f"steps = {self.steps} and stages are both given: put the steps into the stages")
        if self.token_budget < self.max_length:
            raise ValueError(
                f"token_budget = {self.token_budget} is smaller than a row of max_length = {self.max_length}; "
                "raise token_budget"
            )
        return self


class RewardsConfig(Section):
    """Which verifier scores a trace, and the worker pool that runs it."""

    verifier: str = Field("math", description="a built-in or installed name, package.module:attr, or file.py:attr")
    options: dict[str, Any] = Field(default_factory=dict)
    workers: int = Field(1, ge=1)
    timeout: float = Field(5.0, gt=0, description="seconds one verification may take")
    memory_mb: int = Field(2048, ge=64)


class RolloutConfig(Modes):
    """The engine that samples traces."""

    engine: Literal["vllm", "hf"] = "vllm"
    max_model_len: int = Field(256, ge=8, description="tokens of prompt and response together")
    max_num_seqs: int = Field(256, ge=1)
    gpu_memory_utilization: float = Field(0.2, gt=0, lt=1)
    placement: Literal["colocated", "process"] = Field(
        "colocated", description="the engine in the learner's process, or in one of its own that is replaced when lost"
    )
    gpu: int | None = Field(None, ge=0, description="the card of placement process; null: the learner's")
    hang_seconds: float = Field(120.0, gt=0, description="placement process: an engine silent for so long is replaced")
    max_restarts: int = Field(3, ge=0, description="placement process: engines that a run may start after the first")
    sleep: bool = Field(False, description="the engine gives its memory to the learner while that learns; on a GPU")
    tensor_parallel: int = Field(1, ge=1, description="placement process: cards that share the engine's model")
    replay_routing: bool = Field(False, description="the learner's tokens go to the experts that the engine chose")

    @model_validator(mode="after")
    def _placement_fits(self) -> RolloutConfig:
        if self.engine == "hf" and (self.sleep or self.placement == "process" or self.replay_routing):
            raise ValueError("engine = hf has no placement = process, sleep or replay_routing: use engine = vllm")
        if self.gpu is not None and self.placement == "colocated":
            raise ValueError(f"gpu = {self.gpu} needs placement = process: a colocated engine has the learner's card")
        if self.tensor_parallel > 1 and self.placement == "colocated":
            raise ValueError(f"tensor_parallel = {self.tensor_parallel} needs placement = process")
        return self

    @model_validator(mode="after")
    def _engine_fits(self) -> RolloutConfig:
        if self.engine == "hf" and self.max_staleness:
            raise ValueError(
                f"engine = hf has the learner's random generator, max_staleness = {self.max_staleness} needs its "
                "own: use vllm"
            )
        if self.sleep and self.max_staleness:
            raise ValueError(
                f"sleep = true stops the engine, max_staleness = {self.max_staleness} has it run on: choose one"
            )
        return self


class RLConfig(Section):
    """The policy's learning. Names are TRL's where TRL has the notion."""

    algorithm: Literal["grpo", "ppo", "kimi"] = "grpo"
    steps: int = Field(60, ge=0)
    prompts_per_step: int = Field(32, ge=1)
    num_generations: int = Field(8, ge=1, description="samples per prompt: the group of the group baseline")
    token_budget: int = Field(16384, ge=1, description="tokens of prompts and completions per forward/backward pass")
    num_iterations: int = Field(1, ge=1, description="optimizer passes over one batch of traces")
    minibatches: int = Field(1, ge=1, description="optimizer steps that one batch of traces is split into")
    optimizer: OptimizerName = "adamw"
    learning_rate: float = Field(1e-4, gt=0)
    warmup_steps: int = Field(0, ge=0)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    beta: float = Field(0.0, ge=0, description="coefficient of the KL to the policy RL started from")
    epsilon: float = Field(0.2, gt=0)
    epsilon_high: float | None = Field(None, gt=0, description="DAPO's clip-higher; the cap itself with cispo")
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo"] = "dr_grpo"
    importance_sampling_level: Literal["token", "sequence"] = Field("token", description="sequence: GSPO")
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = Field("loss", description="where beta x KL goes: into the loss or the rewards")
    entropy_bonus: float = Field(0.0, ge=0)
    baseline: Literal["mean", "leave_one_out", "none"] = Field("mean", description="leave_one_out: RLOO")
    scale_rewards: Literal["group", "batch", "none"] = "group"
    importance_sampling: Correction | Literal["none"] = Field(
        "token_truncate", description="weights of the learner's policy against the engine's"
    )
    importance_sampling_cap: float = Field(2.0, gt=0)
    importance_sampling_floor: float = Field(0.0, ge=0, description="least weight; below it a mask mode gives 0")
    critic: CriticConfig | None = Field(None, description="ppo")
    kimi: KimiConfig | None = Field(None, description="kimi; null: its defaults")
    ptx: PTXConfig | None = None
    curriculum: CurriculumConfig | None = None
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_completion_length: int = Field(128, ge=1)
    gradient_checkpointing: Checkpointed = Field(
        "none", description="activations computed again in the backward pass; a list: parts of a hybrid's layers"
    )
    checkpoint_every: int = Field(20, ge=1)
    keep_checkpoints: int = Field(2, ge=1, description="the last ones")
    keep_best: int = Field(0, ge=0, description="those of the best held-out accuracy during RL, written when measured")
    keep_every: int | None = Field(None, ge=1, description="each whose step is a multiple of this")
    max_skipped: int = Field(5, ge=1, description="optimizer steps in a row that are not finite before the run stops")

    @model_validator(mode="after")
    def _options_agree(self) -> RLConfig:
        check_algorithm(self)
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError("loss_type cispo needs epsilon_high, the cap of its importance weights, such as 5.0")
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> RLConfig:
        batch = self.prompts_per_step * self.num_generations
        if batch % self.minibatches:
            raise ValueError(
                f"prompts_per_step x num_generations = {batch} must be a multiple of minibatches = {self.minibatches}"
            )
        return self


class EvalConfig(Section):
    """How held-out accuracy is measured."""

    every: int = Field(10, ge=0, description="RL steps between evaluations; 0: only before and after")
    temperature: float = Field(0.0, ge=0)
    samples_per_problem: int = Field(1, ge=1)
