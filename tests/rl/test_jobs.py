"""Job files: what is read, what is refused, and what the refusal says."""

from pathlib import Path

import pytest
import yaml

from deltarl.rl.errors import UserError
from deltarl.rl.jobs import dump_job, load_comparison, load_job

JOBS = Path(__file__).parents[2] / "jobs"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def test_resolved_job_is_a_job_file_of_the_same_job(tmp_path):
    job = load_job(JOBS / "quickstart.yaml", ["rl.steps=3", "seed=4"])
    assert (job.rl.steps, job.seed) == (3, 4)
    assert load_job(write(tmp_path, dump_job(job))) == job


@pytest.mark.parametrize("path", sorted(JOBS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_jobs_are_valid(path):
    values = yaml.safe_load(path.read_text())
    loaded = load_comparison(path) if "base" in values else load_job(path)
    assert loaded.name == path.stem


def test_override_reads_numbers_in_scientific_notation(tmp_path):
    assert load_job(write(tmp_path, "model: {}"), ["rl.learning_rate=1e-4"]).rl.learning_rate == 1e-4


def test_override_makes_a_missing_section(tmp_path):
    assert load_job(write(tmp_path, "seed: 1"), ["rewards.options.strict=true"]).rewards.options == {"strict": True}


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("rl: {stpes: 3}", [], "unknown key rl.stpes; did you mean rl.steps?"),
        ("model: {}", ["rl.lerning_rate=1"], "did you mean rl.learning_rate?"),
        ("sft: {sources: [{nam: x}]}", [], "unknown key sft.sources.nam"),
        ("rl: {steps: -3}", [], "rl.steps: Input should be greater than or equal to 0 (got -3)"),
        ("data: {instruction: hello}", [], "must contain {question}"),
        ("rl: {gradient_checkpointing: [attention]}", [], "rl.gradient_checkpointing"),
        ("rl: {minibatches: 7}", [], "must be a multiple of minibatches = 7"),
        ("rl: {token_budget: 100}", [], "rl.token_budget = 100 is smaller than"),
        ("rollout: {max_model_len: 99999}", [], "rollout.max_model_len = 99999 allows; raise rl.token_budget"),
        ("sft: {max_length: 20000}", [], "token_budget = 16384 is smaller than a row of max_length = 20000"),
        ("sft: {steps: 3, stages: [{steps: 2}]}", [], "steps = 3 and stages are both given"),
        ("sft: {stages: [{steps: 2, rate: 1}]}", [], "unknown key sft.stages.rate"),
        ("sft: {turns: first}", [], "sft.turns"),
        ("rl: {max_completion_length: 300}", [], "raise rollout.max_model_len"),
        ("rl: {algorithm: dpo}", [], "rl.algorithm"),
        (
            "rollout: {partial_tokens: 9, max_staleness: 1}",
            [],
            "partial_tokens = 9 cuts completions at the end of a step, and max_staleness = 1",
        ),
        (
            "rollout: {partial_tokens: 128}",
            [],
            "rollout.partial_tokens = 128 cuts nothing off rl.max_completion_length = 128",
        ),
        ("rollout: {oversample: 1.5}", [], "oversample = 1.5 needs dynamic_sampling = true"),
        (
            "rollout: {oversample: 1.5, dynamic_sampling: true, partial_tokens: 9}",
            [],
            "forgets what was begun, partial_tokens = 9 keeps it",
        ),
        ("rollout: {oversample: 8, dynamic_sampling: true}", [], "oversample = 8.0 is over max_oversampling = 4.0"),
        ("rollout: {stop_repetition: 8}", [], "stop_repetition = 8 is too short: 16 or more, or 0"),
        ("rollout: {replay: runs/x, record: true}", [], "replay = runs/x is a record already: leave record out"),
        (
            "rollout: {engine: hf, max_staleness: 1}",
            [],
            "engine = hf has the learner's random generator, max_staleness = 1",
        ),
        ("rollout: {sleep: true, max_staleness: 2}", [], "sleep = true stops the engine, max_staleness = 2"),
        (
            "rl: {num_generations: 1, algorithm: ppo, critic: {}}",
            ["rollout.dynamic_sampling=true"],
            "of rl.num_generations = 1",
        ),
        ("a: b: c", [], "is not valid YAML"),
        ("- 1", [], "holds no mapping"),
        ("seed: 1", ["seed"], "write it as KEY=VALUE"),
        ("seed: 1", ["seed.x=1"], "seed is a value, not a section"),
        ("name: a/b", [], "name"),
    ],
)
def test_refused(tmp_path, text, overrides, says):
    with pytest.raises(UserError) as error:
        load_job(write(tmp_path, text), overrides)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file():
    with pytest.raises(UserError, match="does not exist"):
        load_job("nowhere.yaml")
