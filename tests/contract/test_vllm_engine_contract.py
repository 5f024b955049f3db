"""Pins what rollout/ uses of vLLM to let an engine sleep, share memory with it, and explain why it does not start."""

import inspect
from dataclasses import fields

from deltarl.rollout.engine import prepare_environment

prepare_environment()


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_engines_sleep_and_wake_by_parts() -> None:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.gpu_worker import Worker

    used = "rollout/worker.py sleep, wake, _awake"
    assert "level" in parameters(LLM.sleep), used
    assert parameters(LLM.wake_up)[1] == "tags", used
    assert "enable_sleep_mode" in {field.name for field in fields(EngineArgs)}, used
    source = inspect.getsource(Worker)
    assert 'tag="weights"' in source and 'tag="kv_cache"' in source, used
    assert "resume_scheduler" in inspect.getsource(EngineCore.wake_up), used


def test_device_memory_is_shared_by_the_cuda_runtime_s_handles() -> None:
    from vllm.distributed.device_communicators.cuda_wrapper import CudaRTLibrary, cudaIpcMemHandle_t

    used = "rollout/transfer.py DeviceMemory"
    assert parameters(CudaRTLibrary.cudaMalloc)[1] == "size", used
    assert parameters(CudaRTLibrary.cudaFree)[1] == "devPtr", used
    assert parameters(CudaRTLibrary.cudaIpcGetMemHandle)[1] == "devPtr", used
    assert parameters(CudaRTLibrary.cudaIpcOpenMemHandle)[1] == "handle", used
    handle = cudaIpcMemHandle_t.from_buffer_copy(bytes(range(128)))
    assert bytes(handle) == bytes(range(128)), used


def test_what_vllm_says_when_memory_is_short_is_understood() -> None:
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.worker import utils

    used = "rollout/refusals.py _explain"
    source = inspect.getsource(kv_cache_utils)
    assert "No available memory for the cache" in source, used
    assert "estimated maximum model length is" in source, used
    assert "Free memory on device" in inspect.getsource(utils), used
