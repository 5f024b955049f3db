"""deltarl: reinforcement learning from verifiable rewards for hybrid linear-attention models."""

import os
from importlib.metadata import version

# Before torch is imported: OpenMP threads that spin while they wait slow whatever else runs on the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = version("deltarl")
