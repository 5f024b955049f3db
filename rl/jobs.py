"""One YAML file is one job: the schema, `--set` overrides, and errors that name the nearest known key."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from deltarl.rl.algorithmsections import shapes_length_twice
from deltarl.rl.errors import UserError
from deltarl.rl.jobsections import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    RewardsConfig,
    RLConfig,
    RolloutConfig,
    SFTConfig,
)
from deltarl.rl.section import Section


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
    def _length_counts_once(self) -> Job:
        if shapes_length_twice(self.rl, self.rewards.options):
            raise ValueError(
                f"rl.kimi.length_weight = {self.rl.kimi.length_weight} and rewards.options with shape: kimi reward "
                "short answers twice; leave one out"
            )
        return self

    @model_validator(mode="after")
    def _completion_fits(self) -> Job:
        if self.rl.max_completion_length >= self.rollout.max_model_len:
            raise ValueError(
                f"rl.max_completion_length = {self.rl.max_completion_length} leaves no room for a prompt in "
                f"rollout.max_model_len = {self.rollout.max_model_len}; raise rollout.max_model_len"
            )
        return self

    @model_validator(mode="after")
    def _modes_fit(self) -> Job:
        partial, longest = self.rollout.partial_tokens, self.rl.max_completion_length
        if partial is not None and partial >= longest:
            raise ValueError(
                f"rollout.partial_tokens = {partial} cuts nothing off rl.max_completion_length = {longest}: set it "
                "lower, or to null"
            )
        if self.rollout.dynamic_sampling and self.rl.num_generations == 1:
            raise ValueError(
                "rollout.dynamic_sampling drops every group of rl.num_generations = 1; set it to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _sequences_fit(self) -> Job:
        if self.rl.token_budget < self.rollout.max_model_len:
            raise ValueError(
                f"rl.token_budget = {self.rl.token_budget} is smaller than the longest sequence that "
                f"rollout.max_model_len = {self.rollout.max_model_len} allows; raise rl.token_budget"
            )
        return self


class Comparison(Section):
    """`deltarl compare`: one base job, run for every arm, or every variant of other keys, and every seed."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runs_dir: str = "runs"
    base: str = Field(description="the job file every run starts from, relative to this file")
    set: dict[str, Any] = Field(default_factory=dict, description="dotted overrides of the base job")
    arms: list[str] = Field(default_factory=list)
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="name: {key: value}, in place of arms"
    )
    seeds: list[int] = Field(min_length=1)

    @model_validator(mode="after")
    def _two_at_least(self) -> Comparison:
        if bool(self.arms) == bool(self.variants) or len(self.entries) < 2:
            raise ValueError("give arms or variants, one of them and at least two")
        return self

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """What each name under comparison sets in the base job."""
        return self.variants or {arm: {"model.arm": arm} for arm in self.arms}


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
