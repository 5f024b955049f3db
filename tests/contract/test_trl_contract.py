"""What deltarl uses of TRL's and transformers' private parts: a failure names the place in rl/ that must change."""

import inspect
import re

import pytest
import torch
from transformers import Trainer, TrainerState, TrainingArguments
from trl import GRPOConfig, GRPOTrainer
from trl.kernels import ChunkedLogProbFunction

from deltarl.rl import sft, trainer


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_trainer_can_do_without_trl_s_scoring():
    source = inspect.getsource(GRPOTrainer.__init__)
    for piece in ("if reward_funcs is None:", "if self.beta == 0.0:", "self.ref_model = None"):
        assert piece in source, f"TRL builds its trainer differently ({piece!r} is gone): see RLTrainer.__init__"


def test_an_optimizer_step_is_one_training_step():
    assert parameters(Trainer.training_step) == ["self", "model", "inputs", "num_items_in_batch"], (
        "see RLTrainer.training_step"
    )
    loop = inspect.getsource(Trainer._run_epoch)
    for piece in ("self.training_step(model, inputs, num_items_in_batch)", "self.state.global_step += 1"):
        assert piece in loop, f"transformers' loop changed ({piece!r} is gone): see RLTrainer.training_step"
    assert "self.get_train_dataloader()" in inspect.getsource(Trainer._inner_training_loop), (
        "see RLTrainer.get_train_dataloader"
    )


def test_fused_head_takes_flat_states():
    assert parameters(ChunkedLogProbFunction.forward)[1:] == [
        "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
        "outputs",
    ], "see _score in rl/forward.py"  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("create_optimizer", ["self", "model"]),
        ("_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        ("_load_rng_state", ["self", "checkpoint"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
    ],
)
def test_trainer_loads_its_state_through_what_is_replaced(name, arguments):
    assert parameters(getattr(Trainer, name)) == arguments, f"transformers' {name} changed: see rl/checkpointing.py"


def test_muon_collects_its_matrices_in_one_place():
    assert parameters(torch.optim.Muon._init_group) == [
        "self", "group", "params_with_grad", "grads", "muon_momentum_bufs"
    ], "torch's Muon changed: see Muon in rl/optimizers.py"  # fmt: skip


def test_trainer_state_round_trip(tmp_path):
    state = TrainerState(global_step=7, max_steps=9)
    state.save_to_json(str(tmp_path / "trainer_state.json"))
    assert TrainerState.load_from_json(str(tmp_path / "trainer_state.json")).global_step == 7


@pytest.mark.parametrize(
    ("function", "config"), [(trainer.grpo_config, GRPOConfig), (sft.training_arguments, TrainingArguments)]
)
def test_config_has_every_key_that_is_set(function, config):
    keys = re.findall(r"^        (\w+)=", inspect.getsource(function), flags=re.MULTILINE)
    unknown = set(keys) - set(parameters(config))
    assert keys and not unknown, f"{config.__name__} no longer knows {sorted(unknown)}: see {function.__qualname__}"
