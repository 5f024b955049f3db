"""Options of the algorithms: what is refused, in one line that names both keys, and what is filled in."""

import pytest
import yaml

from deltarl.rl.cli import main
from deltarl.rl.errors import UserError
from deltarl.rl.jobs import Job, dump_job, load_job, validate

KIMI_LENGTH = {"verifier": "combine", "options": {"parts": [
    {"verifier": "math", "name": "right"},
    {"verifier": "length", "options": {"shape": "kimi", "correct": "right"}, "weight": 0.2},
]}}  # fmt: skip


def job(rl, **sections):
    return validate(Job, {"name": "x", "rl": rl, **sections}, "job.yaml")


@pytest.mark.parametrize(
    ("rl", "keys"),
    [
        ({"num_generations": 1}, ("num_generations = 1", "baseline = mean")),
        ({"num_generations": 1, "baseline": "leave_one_out"}, ("num_generations = 1", "baseline = leave_one_out")),
        ({"num_generations": 1, "baseline": "none"}, ("num_generations = 1", "scale_rewards = group")),
        ({"algorithm": "kimi", "num_generations": 1}, ("num_generations = 1", "baseline = mean")),
        ({"algorithm": "ppo"}, ("algorithm = ppo", "critic")),
        ({"critic": {}}, ("critic", "algorithm is grpo")),
        ({"kimi": {}}, ("kimi", "algorithm is grpo")),
        ({"algorithm": "ppo", "critic": {"path": "somewhere"}}, ("path = somewhere", "kind = model")),
        ({"algorithm": "kimi", "baseline": "leave_one_out"}, ("algorithm = kimi", "baseline is leave_one_out")),
        ({"algorithm": "kimi", "scale_rewards": "group"}, ("algorithm = kimi", "scale_rewards is group")),
        ({"algorithm": "kimi", "loss_type": "dapo"}, ("algorithm = kimi", "loss_type is dapo")),
        ({"kl_in": "reward"}, ("kl_in = reward", "beta")),
        ({"importance_sampling_floor": 2.0}, ("importance_sampling_floor = 2.0", "importance_sampling_cap = 2.0")),
        (
            {"ptx": {"sources": [{"name": "chat"}], "max_length": 512}, "token_budget": 300},
            ("ptx.max_length = 512", "token_budget = 300"),
        ),
        ({"ptx": {"sources": []}}, ("rl.ptx.sources",)),
        ({"curriculum": {"easy_share": 0}}, ("rl.curriculum.easy_share",)),
    ],
)
def test_contradictions_are_refused(rl, keys):
    with pytest.raises(UserError) as error:
        job(rl)
    message = str(error.value)
    assert "\n" not in message and all(key in message for key in keys), message


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        ({"pass_band": [0.1, 0.9]}, ("pass_band", "pass_rates")),
        ({"pass_band": [0.9, 0.1], "pass_rates": "x.jsonl"}, ("pass_band = [0.9, 0.1]", "low <= high")),
        ({"pass_band": [0.1], "pass_rates": "x.jsonl"}, ("data.pass_band",)),
    ],
)
def test_a_band_needs_its_table_and_two_ends(data, keys):
    with pytest.raises(UserError) as error:
        job({}, data=data)
    assert all(key in str(error.value) for key in keys)


def test_length_is_not_shaped_twice():
    with pytest.raises(UserError, match=r"rl\.kimi\.length_weight = 0\.1 and rewards\.options"):
        job({"algorithm": "kimi", "kimi": {"length_weight": 0.1}}, rewards=KIMI_LENGTH)
    assert job({"algorithm": "kimi"}, rewards=KIMI_LENGTH).rl.kimi.length_weight == 0


def test_one_sample_a_prompt_is_enough_without_a_group():
    assert job({"algorithm": "ppo", "critic": {}, "num_generations": 1}).rl.num_generations == 1
    assert job({"baseline": "none", "scale_rewards": "batch", "num_generations": 1}).rl.num_generations == 1


def test_kimi_fills_in_its_defaults_and_can_be_read_again(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"name": "x", "rl": {"algorithm": "kimi"}}))
    made = load_job(path)
    assert made.rl.kimi.tau == 0.1 and made.rl.scale_rewards == "none"
    path.write_text(dump_job(made))
    assert load_job(path) == made


def test_exit_code_of_a_contradiction(tmp_path, capsys):
    path = tmp_path / "job.yaml"
    path.write_text("rl: {algorithm: ppo}")
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "algorithm = ppo needs critic" in error
