"""The KDA/MLA hybrid: configuration, model, named architectures, checkpoints."""

from deltarl.model.checkpoints import CheckpointError, checkpoint_tensors, load_model, save_checkpoint
from deltarl.model.config import HybridConfig
from deltarl.model.hybrid import HybridForCausalLM
from deltarl.model.presets import ARMS, SIZES, UnknownArm, UnknownSize, build_model, hybrid_config

__all__ = [
    "ARMS",
    "SIZES",
    "CheckpointError",
    "HybridConfig",
    "HybridForCausalLM",
    "UnknownArm",
    "UnknownSize",
    "build_model",
    "checkpoint_tensors",
    "hybrid_config",
    "load_model",
    "save_checkpoint",
]
