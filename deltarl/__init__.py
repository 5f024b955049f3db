"""deltarl: reinforcement learning from verifiable rewards for hybrid linear-attention models."""

from importlib.metadata import version

__version__ = version("deltarl")
