"""Which parameters are trained how, and that each optimizer trains, saves and goes on as it should."""

import copy
import sys
from dataclasses import dataclass

import pytest
import torch
from tiny_models import MOE, tiny_model, token_ids

from deltarl.rl.errors import UserError
from deltarl.rl.optimizers import Group, check_optimizer, group_table, make_optimizer, parameter_groups
from deltarl.rl.precision import check_precision

OPTIMIZERS = ("adamw", "adamw_8bit", "muon")


@dataclass
class Settings:
    optimizer: str = "adamw"
    learning_rate: float = 1e-2
    weight_decay: float = 0.1


def group_of(groups: list[Group], ending: str) -> str:
    found = {group.name for group in groups for name in group.parameters if name.endswith(ending)}
    assert len(found) == 1, f"{ending} is in {found}"
    return found.pop()


def backward(model: torch.nn.Module, seed: int = 0) -> None:
    ids = token_ids(2, 9).roll(seed, 1)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_every_parameter_is_in_one_group_by_rule():
    model = tiny_model(**MOE)
    groups = parameter_groups(model)
    assert [group.name for group in groups] == ["matrices", "embeddings", "convolutions", "vectors"]
    placed = [name for group in groups for name in group.parameters]
    assert sorted(placed) == sorted(name for name, _ in model.named_parameters())
    for ending in ("A_log", "dt_bias", "o_norm.weight", "layernorm.weight", "model.norm.weight"):
        assert group_of(groups, ending) == "vectors"
    for ending in ("embed_tokens.weight", "lm_head.weight"):
        assert group_of(groups, ending) == "embeddings"
    for ending in ("f_a_proj.weight", "kv_b_proj.weight", "experts.gate_up_proj", "mlp.gate.weight"):
        assert group_of(groups, ending) == "matrices"
    assert group_of(groups, "conv1d.weight") == "convolutions"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_never_touches_gates_norms_and_biases(name):
    model = tiny_model(**MOE)
    before = weights(model)
    optimizer = make_optimizer(model, Settings(name, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = set(next(group for group in parameter_groups(model) if group.name == "vectors").parameters)
    for key, value in weights(model).items():
        expected = before[key] if key in kept else before[key] * (1 - 0.5 * 1e-2)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0, msg=key)


def test_frozen_parameters_are_left_out():
    model = tiny_model()
    model.lm_head.requires_grad_(False)
    groups = parameter_groups(model)
    assert not any("lm_head" in name for group in groups for name in group.parameters)


def test_table_says_what_trains_what():
    lines = group_table(parameter_groups(tiny_model(**MOE)), Settings("muon", weight_decay=0.1)).splitlines()
    cells = {line.split()[0]: line for line in lines[1:]}
    assert "Muon" in cells["matrices"] and "0.1" in cells["matrices"]
    assert "AdamW" in cells["embeddings"] and "AdamW" in cells["convolutions"]
    assert "AdamW" in cells["vectors"] and "never" in cells["vectors"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_optimizer_goes_on_bit_for_bit(name, tmp_path):
    model = tiny_model(**MOE)
    optimizer = make_optimizer(model, Settings(name))
    for step in range(3):
        backward(model, step)
        optimizer.step()
    twin = copy.deepcopy(model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed = make_optimizer(twin, Settings(name, learning_rate=1e-9))
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    dtypes = {v.dtype for state in resumed.state.values() for v in state.values() if isinstance(v, torch.Tensor)}
    assert (torch.uint8 in dtypes) == (name == "adamw_8bit")
    check_precision(twin, resumed)
    for step in range(3, 6):
        for each, its in ((model, optimizer), (twin, resumed)):
            backward(each, step)
            its.step()
    for (key, value), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(value, other), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_lowers_the_loss_of_one_batch(name):
    model = tiny_model(**MOE)
    ids = token_ids(2, 9)
    optimizer = make_optimizer(model, Settings(name, learning_rate=3e-3, weight_decay=0.0))
    first = model(ids, labels=ids).loss.item()
    for _ in range(30):
        backward(model)
        optimizer.step()
    assert model(ids, labels=ids).loss.item() < first / 4


def test_schedulers_reach_every_part():
    model = tiny_model()
    optimizer = make_optimizer(model, Settings("muon", learning_rate=1e-2))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = weights(model)
    backward(model)
    optimizer.step()
    scheduler.step()
    for key, value in weights(model).items():
        assert torch.equal(value, before[key]), f"{key} moved at a learning rate of 0"


def test_muon_takes_each_expert_as_a_matrix_of_its_own():
    """The step of an expert is that of torch's Muon on that expert alone, times 0.2·sqrt(max(rows, columns))."""
    model = tiny_model(**MOE)
    stack = model.model.layers[1].mlp.experts.gate_up_proj
    alone = torch.nn.Parameter(stack[2].detach().clone())
    grad = torch.randn(stack.shape, generator=torch.Generator().manual_seed(3))
    grad[0] = 0
    first = stack[0].detach().clone()
    make = torch.optim.Muon([alone], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optimizer = make_optimizer(model, Settings("muon"))
    stack.grad, alone.grad = grad, grad[2].clone()
    optimizer.step()
    make.step()
    assert torch.equal(stack[2], alone)
    torch.testing.assert_close(stack[0], first * (1 - 1e-3), msg="an expert without gradient only decays")


def test_parameters_without_gradient_stay_as_they_are():
    for name in OPTIMIZERS:
        model = tiny_model()
        before = weights(model)
        make_optimizer(model, Settings(name)).step()
        assert all(torch.equal(value, before[key]) for key, value in weights(model).items())


def test_state_of_another_optimizer_is_refused():
    model = tiny_model()
    saved = make_optimizer(model, Settings("adamw")).state_dict()
    model.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match="other parameter groups"):
        make_optimizer(model, Settings("adamw")).load_state_dict(saved)


def test_missing_bitsandbytes_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"pip install 'deltarl\[8bit\]'") as caught:
        check_optimizer(Settings("adamw_8bit"))
    assert "\n" not in str(caught.value)


def test_precision_is_checked_by_name():
    model = tiny_model(**MOE)
    check_precision(model)
    for ending in (
        "A_log",
        "dt_bias",
        "e_score_correction_bias",
        "o_norm.weight",
        "model.norm.weight",
        "q_proj.weight",
    ):
        broken = copy.deepcopy(model)
        name, tensor = next(
            (n, t) for n, t in (*broken.named_parameters(), *broken.named_buffers()) if n.endswith(ending)
        )
        tensor.data = tensor.data.bfloat16()
        with pytest.raises(UserError, match="bfloat16") as caught:
            check_precision(broken)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_frozen_base_may_be_bf16_but_for_gates_and_norms():
    model = tiny_model(**MOE)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.requires_grad_(False).to(torch.bfloat16)
    check_precision(model)


def test_precision_of_the_optimizer_state_is_checked():
    model = tiny_model()
    optimizer = make_optimizer(model, Settings("adamw"))
    backward(model)
    optimizer.step()
    check_precision(model, optimizer)
    state = optimizer.state[model.lm_head.weight]
    state["exp_avg"] = state["exp_avg"].bfloat16()
    with pytest.raises(UserError, match=r"exp_avg of lm_head\.weight is bfloat16"):
        check_precision(model, optimizer)
