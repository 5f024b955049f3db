"""The operators for NVIDIA GPUs, in Triton."""
