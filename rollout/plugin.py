"""The vLLM plugin (entry-point group `vllm.general_plugins`): vLLM serves Kimi Linear hybrids with our class."""

import os

CHOICE = "DELTARL_VLLM_MODEL"


def serves_our_class() -> bool:
    """Whether Kimi Linear is served with our class: always on a CPU, on a GPU unless DELTARL_VLLM_MODEL is `vllm`.

    Raises ValueError for a DELTARL_VLLM_MODEL that is neither `deltarl` nor `vllm`.
    """
    from vllm.platforms import current_platform

    choice = os.environ.get(CHOICE, "deltarl")
    if choice not in ("deltarl", "vllm"):
        raise ValueError(f"{CHOICE} is {choice!r}: use deltarl, or vllm for vLLM's own class on a GPU")
    return choice == "deltarl" or current_platform.is_cpu()


def register() -> None:
    """Register our class under the name `KimiLinearForCausalLM`.

    On a CPU MLA layers run as expanded multi-head attention, and vLLM must know before it builds its model config:
    with VLLM_MLA_DISABLE unset it plans a latent cache, turns chunked prefill off, and its CPU kernel takes
    latents of 512 + 64 only.
    """
    from vllm.platforms import current_platform

    if not serves_our_class():
        return
    if current_platform.is_cpu():
        os.environ["VLLM_MLA_DISABLE"] = "1"
    from vllm import ModelRegistry

    ModelRegistry.register_model("KimiLinearForCausalLM", "deltarl.rollout.vllm_model:KimiLinearForCausalLM")
