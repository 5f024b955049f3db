"""What an engine refuses to start with, in one line that names the key or the number to change."""

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from test_parity import GREEDY, assert_same_function

from deltarl.rollout import EngineError, make_worker
from deltarl.rollout.refusals import check_servable, explained
from deltarl.rollout.worker import VllmWorker


@pytest.fixture
def make_config(make_hybrid, tmp_path):
    """A model folder whose config.json has been changed; weights are not looked at."""

    def make(arm: str = "kda", **changes: Any) -> Path:
        config = make_hybrid(arm).config.to_moonshot() | changes
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))
        (tmp_path / "model.safetensors").touch()
        return tmp_path

    return make


@pytest.mark.parametrize("arm", ["kda", "gdn", "mla", "mla-rope", "kda-1:1"])
def test_every_arm_is_served(make_config, arm) -> None:
    check_servable(make_config(arm))


LINEAR = {"kda_layers": [1, 2, 3], "full_attn_layers": [4], "num_heads": 4, "head_dim": 32, "short_conv_kernel_size": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": "gone"}, "kv_lora_rank is missing"),
        ({"hidden_size": -1}, "hidden_size is -1: it must be a whole number"),
        ({"linear_attn_config": LINEAR | {"head_dim": None}}, r"linear_attn_config\.head_dim is missing"),
        (
            {"linear_attn_config": LINEAR | {"kda_layers": [0, 1, 2]}},
            "name layers .0, 1, 2, 4.: they must name each of 1",
        ),
        ({"num_hidden_layers": 6}, "each of 1 to 6"),
        ({"q_lora_rank": 128}, "q_lora_rank is 128, and the engine serves None only"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, and the engine serves False only"),
        ({"num_experts": 8, "moe_intermediate_size": 64}, "num_experts_per_token is missing"),
        ({"num_expert_group": 4}, "num_expert_group is 4"),
        ({"quantization_config": {"bits": 8}}, "quantization_config is"),
    ],
)
def test_a_config_that_cannot_be_served_names_the_key(make_config, changes, message) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        check_servable(make_config(**changes))
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_models_are_left_to_vllm(make_config) -> None:
    check_servable(make_config(architectures=["LlamaForCausalLM"], kv_lora_rank="gone"))


def test_what_vllm_says_of_a_gpu_without_memory_is_one_line() -> None:
    said = "Free memory on device cuda:0 (11.5/79.1 GiB) on startup is less than desired GPU memory utilization (0.3)."
    with (
        pytest.raises(EngineError, match=r"gpu_memory_utilization = 0\.3 wants more than is free on the GPU, 11\.5 of"),
        explained(1024, 0.3),
    ):
        raise ValueError(said)


def start(folder: Path, **options: Any):
    return make_worker(folder, **{"max_model_len": 256, "max_num_seqs": 2, "gpu_memory_utilization": 0.05} | options)


def test_a_context_longer_than_the_model_s_is_refused(make_hybrid, make_folder) -> None:
    with pytest.raises(EngineError, match=r"max_model_len = 8192 is over the model's context of 4096 tokens"):
        start(make_folder(make_hybrid("kda")), max_model_len=8192)


def test_an_architecture_that_nobody_serves_is_named(make_hybrid, make_folder) -> None:
    folder = make_folder(make_hybrid("kda"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NobodyForCausalLM"]}))
    with pytest.raises(EngineError, match=r"no model with architectures = \['NobodyForCausalLM'\]") as caught:
        start(folder)
    assert len(str(caught.value)) < 200


def test_a_port_that_was_taken_is_said() -> None:
    """vLLM 0.26 looks for a free port and opens it a moment later; 0.32 needs none for an engine of one rank."""
    with socket.create_server(("localhost", 0)) as taken, pytest.raises(EngineError, match="took the port"):
        port = taken.getsockname()[1]
        with explained(1024, 0.3):
            torch.distributed.TCPStore("localhost", port, 1, is_master=True)


def test_a_context_longer_than_the_memory_names_one_that_fits(make_hybrid, make_folder, prompts, closing) -> None:
    model = make_hybrid("kda")
    folder = make_folder(model)
    memory = {"kv_cache_memory_bytes": 2 << 20}
    options = {"dtype": "float32", "max_num_seqs": 1, "gpu_memory_utilization": 0.05, "seed": 0} | memory
    with pytest.raises(EngineError, match="max_model_len = 4096 does not fit") as caught:
        VllmWorker(folder, max_model_len=4096, **options)
    fits = int(re.search(r"lower max_model_len to (\d+)", str(caught.value))[1])
    assert 256 <= fits < 4096
    worker = VllmWorker(folder, max_model_len=fits, **options)
    closing.append(worker)
    assert_same_function(model, worker.generate(prompts[:2], GREEDY, seeds=[0, 0]))
