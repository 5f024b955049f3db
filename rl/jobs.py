"""One YAML file is one job: the schema, `--set` overrides, and errors that name the nearest known key."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deltarl.rl.errors import UserError
from deltarl.rl.losses.correction import Correction


class Section(BaseModel):
    """A part of a job; an unknown key is refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class ModelConfig(Section):
    """The policy: a folder or hub name (`path`), or an arm and size built from scratch."""

    path: str | None = None
    arm: str = "kda"
    size: str = "2m"
    vocab_size: int = Field(512, ge=280, description="tokenizer vocabulary of a model built from scratch")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the learner's and engine's compute")


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

    @field_validator("instruction")
    @classmethod
    def _has_question(cls, value: str) -> str:
        if "{question}" not in value:
            raise ValueError("must contain {question}")
        return value


class SFTSource(Section):
    """One weighted source of the SFT mix: `solutions`, `chat`, or a .jsonl file."""

    name: str
    weight: float = Field(1.0, gt=0)


class SFTConfig(Section):
    """The supervised warm-up; `steps: 0` leaves it out."""

    steps: int = Field(0, ge=0)
    batch_size: int = Field(64, ge=1)
    micro_batch_size: int | None = Field(None, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    warmup_steps: int = Field(20, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    max_length: int = Field(256, ge=8)
    sources: list[SFTSource] = Field(
        default_factory=lambda: [SFTSource(name="solutions", weight=0.8), SFTSource(name="chat", weight=0.2)],
        min_length=1,
    )

    @model_validator(mode="after")
    def _micro_batches_divide(self) -> SFTConfig:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size = {self.batch_size} must be a multiple of micro_batch_size = {self.micro_batch_size}"
            )
        return self


class RewardsConfig(Section):
    """Which verifier scores a trace, and the worker pool that runs it."""

    verifier: str = Field("math", description="a built-in or installed name, package.module:attr, or file.py:attr")
    options: dict[str, Any] = Field(default_factory=dict)
    workers: int = Field(1, ge=1)
    timeout: float = Field(5.0, gt=0, description="seconds one verification may take")
    memory_mb: int = Field(2048, ge=64)


class RolloutConfig(Section):
    """The engine that samples traces."""

    engine: Literal["vllm", "hf"] = "vllm"
    max_model_len: int = Field(256, ge=8, description="tokens of prompt and response together")
    max_num_seqs: int = Field(256, ge=1)
    gpu_memory_utilization: float = Field(0.2, gt=0, lt=1)


class RLConfig(Section):
    """GRPO. Names are TRL's where TRL has the notion."""

    algorithm: Literal["grpo"] = "grpo"
    steps: int = Field(60, ge=0)
    prompts_per_step: int = Field(32, ge=1)
    num_generations: int = Field(8, ge=2, description="samples per prompt: the group of the group baseline")
    micro_batch_size: int = Field(64, ge=1, description="sequences per forward/backward pass")
    num_iterations: int = Field(1, ge=1, description="optimizer passes over one batch of traces")
    minibatches: int = Field(1, ge=1, description="optimizer steps that one batch of traces is split into")
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
    entropy_bonus: float = Field(0.0, ge=0)
    baseline: Literal["mean", "leave_one_out", "none"] = Field("mean", description="leave_one_out: RLOO")
    scale_rewards: Literal["group", "batch", "none"] = "group"
    importance_sampling: Correction | Literal["none"] = Field(
        "token_truncate", description="weights of the learner's policy against the engine's"
    )
    importance_sampling_cap: float = Field(2.0, gt=0)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_completion_length: int = Field(128, ge=1)
    gradient_checkpointing: bool = False
    checkpoint_every: int = Field(20, ge=1)
    keep_checkpoints: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _options_agree(self) -> RLConfig:
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError("loss_type cispo needs epsilon_high, the cap of its importance weights, such as 5.0")
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> RLConfig:
        batch = self.prompts_per_step * self.num_generations
        if batch % (self.minibatches * self.micro_batch_size):
            raise ValueError(
                f"prompts_per_step x num_generations = {batch} must be a multiple of "
                f"minibatches x micro_batch_size = {self.minibatches * self.micro_batch_size}"
            )
        return self


class EvalConfig(Section):
    """How held-out accuracy is measured."""

    every: int = Field(10, ge=0, description="RL steps between evaluations; 0: only before and after")
    temperature: float = Field(0.0, ge=0)
    samples_per_problem: int = Field(1, ge=1)


class Job(Section):
    """A whole job, as read from a YAML file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runs_dir: str = "runs"
    seed: int = Field(0, ge=0)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    sft: SFTConfig = Field(default_factory=SFTConfig)
    rewards: RewardsConfig = Field(default_factory=RewardsConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    rl: RLConfig = Field(default_factory=RLConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)

    @model_validator(mode="after")
    def _completion_fits(self) -> Job:
        if self.rl.max_completion_length >= self.rollout.max_model_len:
            raise ValueError(
                f"rl.max_completion_length = {self.rl.max_completion_length} leaves no room for a prompt in "
                f"rollout.max_model_len = {self.rollout.max_model_len}; raise rollout.max_model_len"
            )
        return self


class Comparison(Section):
    """`deltarl compare`: one base job, run for every arm and seed."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runs_dir: str = "runs"
    base: str = Field(description="the job file every run starts from, relative to this file")
    set: dict[str, Any] = Field(default_factory=dict, description="dotted overrides of the base job")
    arms: list[str] = Field(min_length=2)
    seeds: list[int] = Field(min_length=1)


def load_job(path: str | Path, overrides: list[str] | None = None) -> Job:
    """The job in a YAML file, with `a.b=c` overrides applied.

    Raises:
        UserError: the file is missing or no YAML mapping, a key is unknown (the nearest known one is named),
            or a value is refused.
    """
    return validate(Job, _with_overrides(path, overrides or []), str(path))


def load_comparison(path: str | Path, overrides: list[str] | None = None) -> Comparison:
    """The comparison in a YAML file; overrides and errors as in `load_job`."""
    return validate(Comparison, _with_overrides(path, overrides or []), str(path))


def _with_overrides(path: str | Path, overrides: list[str]) -> dict[str, Any]:
    values = read_yaml(path)
    values.setdefault("name", Path(path).stem)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"--set {override}: write it as KEY=VALUE, for example --set rl.steps=20")
        set_key(values, key.strip(), _parse_value(text, override))
    return values


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError when it is missing, unreadable or something else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"job file {path} does not exist; example jobs are in jobs/")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no mapping of keys to values; example jobs are in jobs/")
    return values


def set_key(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b.c` in nested mappings, making the ones that are missing."""
    *parents, last = dotted.split(".")
    for parent in parents:
        inner = values.get(parent)
        if inner is None:
            inner = values[parent] = {}
        if not isinstance(inner, dict):
            raise UserError(f"--set {dotted}: {parent} is a value, not a section")
        values = inner
    values[last] = value


def validate(schema: type[Section], values: dict[str, Any], where: str) -> Any:
    """`values` as `schema`. Raises UserError: one line, the first problem, the nearest known key if one is unknown."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        first = problems[0]
        key = ".".join(part for part in first["loc"] if isinstance(part, str))
        if first["type"] == "extra_forbidden":
            known = _known_keys(schema)
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise UserError(f"{where}: unknown key {key}; did you mean {close[0]}?") from error
        message = first["msg"].removeprefix("Value error, ")
        given = f" (got {first['input']!r})" if not isinstance(first["input"], dict | BaseModel) else ""
        raise UserError(f"{where}: {key + ': ' if key else ''}{message}{given}") from error


def dump_job(job: Section) -> str:
    """The resolved job as YAML, every key with its value."""
    return yaml.safe_dump(job.model_dump(), sort_keys=False, allow_unicode=True, width=110)


def _parse_value(text: str, override: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not valid YAML") from error
    if isinstance(value, str):  # YAML reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _known_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in schema.model_fields.items():
        keys.append(prefix + name)
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type)]
        for kind in inner:
            if issubclass(kind, BaseModel):
                keys += _known_keys(kind, f"{prefix}{name}.")
    return keys
