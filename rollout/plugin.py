"""The vLLM plugin (entry-point group `vllm.general_plugins`): makes Kimi Linear hybrids run on vLLM's CPU platform."""

import os


def register() -> None:
    """On CPU, serve `KimiLinearForCausalLM` with our class; on CUDA vLLM's own class stays.

    MLA layers run there as expanded multi-head attention, and vLLM must know before it builds its model config:
    with VLLM_MLA_DISABLE unset it plans a latent cache, turns chunked prefill off, and its CPU kernel takes
    latents of 512 + 64 only.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    os.environ["VLLM_MLA_DISABLE"] = "1"
    from vllm import ModelRegistry

    ModelRegistry.register_model("KimiLinearForCausalLM", "deltarl.rollout.vllm_model:KimiLinearForCausalLM")
