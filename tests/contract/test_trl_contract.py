"""What deltarl uses of TRL's and transformers' private parts: a failure names the place in rl/ that must change."""

import inspect

import pytest
from transformers import Trainer, TrainerState
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer
from trl.trainer.utils import add_fused_lm_head

SOURCE = inspect.getsource(GRPOTrainer)


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_engine_is_asked_through_vllm_generation():
    source = inspect.getsource(GRPOTrainer._generate_single_turn)
    for piece in (
        "if self.use_vllm",
        "self.state.global_step != self._last_loaded_step",
        "self.vllm_generation.sync_weights()",
        "_, completion_ids, logprobs, _ = self.vllm_generation.generate(",
        "prompts=prompt_ids",
        "num_generations=num_generations",
        "[[lp[0] for lp in seq] for seq in logprobs]",
    ):
        assert piece in source, f"TRL samples differently now ({piece!r} is gone): see EngineBridge in rl/trainer.py"


def test_scored_batch_has_what_the_loss_needs():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    for key in (
        "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch",
        "old_per_token_logps", "sampling_per_token_logps", "ref_per_token_logps",
    ):  # fmt: skip
        assert f'"{key}"' in source, f"TRL's scored batch has no {key} now: see RLTrainer._compute_loss"
    assert "self.args.gradient_accumulation_steps % generate_every != 0 or (" in source, (
        "TRL decides differently when to compute old logprobs: see RLTrainer._compute_loss"
    )


def test_loss_is_computed_in_one_place():
    assert parameters(GRPOTrainer._compute_loss) == ["self", "model", "inputs"], "see RLTrainer._compute_loss"
    assert parameters(GRPOTrainer._get_per_token_logps_and_entropies)[:5] == [
        "self", "model", "input_ids", "attention_mask", "logits_to_keep"
    ], "see RLTrainer._compute_loss"  # fmt: skip


def test_a_batch_of_traces_is_generated_once_per_window():
    source = inspect.getsource(GRPOTrainer._prepare_inputs)
    assert "generate_every = self.args.steps_per_generation * self.num_iterations" in source, (
        "TRL's generation window changed: see updates_per_step in rl/trainer.py"
    )


def test_reference_model_is_set_after_construction():
    for piece in ("self.beta != 0.0", "self.ref_model is not None"):
        assert piece in SOURCE, f"TRL decides on the reference differently ({piece!r}): see RLTrainer._set_reference"
    assert parameters(add_fused_lm_head)[:2] == ["model", "temperature"], (
        "add_fused_lm_head: see RLTrainer._set_reference"
    )
    assert "fused_lm_head=True" in inspect.getsource(GRPOTrainer._get_per_token_logps_and_entropies), (
        "TRL computes logprobs without the fused head now: see RLTrainer._set_reference"
    )


def test_end_tokens_come_from_the_trainer():
    assert "self.eos_token_ids = " in SOURCE, "TRL has no eos_token_ids now: see RLTrainer.sample"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("_save_optimizer_and_scheduler", ["self", "output_dir"]),
        ("_save_rng_state", ["self", "output_dir"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
    ],
)
def test_trainer_saves_its_state(name, arguments):
    assert parameters(getattr(Trainer, name)) == arguments, f"transformers' {name} changed: see rl/checkpointing.py"


def test_trainer_state_round_trip(tmp_path):
    state = TrainerState(global_step=7, max_steps=9)
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    assert TrainerState.load_from_json(str(tmp_path / "trainer_state.json")).global_step == 7


def test_config_has_every_key_that_is_set():
    import re

    from deltarl.rl import trainer

    keys = re.findall(r"^        (\w+)=", inspect.getsource(trainer.grpo_config), flags=re.MULTILINE)
    unknown = set(keys) - set(parameters(GRPOConfig))
    assert not unknown, f"GRPOConfig no longer knows {sorted(unknown)}: see grpo_config in rl/trainer.py"


def test_sampler_repeats_rows_in_order():
    sampler = grpo_trainer.RepeatSampler(
        data_source=list(range(4)), mini_repeat_count=2, batch_size=2, repeat_count=3, shuffle=False, seed=0
    )
    window = [0, 0, 1, 1] * 3 + [2, 2, 3, 3] * 3
    assert list(sampler) == window, "TRL orders prompts differently now: see training_order in rl/trainer.py"
