"""Tile widths, warps and pipeline stages of each kernel, measured offline on an H100 with
tools/tune_kernels.py; nothing is tuned while a program runs. NARROW is for GPUs with less shared memory than an H100's
227 KiB for a program, not measured.

`block` is what one step works on: channels (gradients, conv), numbers of whole rows (gated_norm), or state columns (the
others); 0 where there is no choice. A thread has at most `registers`; 0 leaves it to the compiler.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    block: int
    num_warps: int
    num_stages: int
    registers: int = 0

    def launch(self) -> dict[str, int]:
        cap = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **cap}


CONFIGS = {
    "prepare": Config(block=0, num_warps=4, num_stages=1),
    "solve": Config(block=0, num_warps=4, num_stages=1),
    "scan": Config(block=128, num_warps=8, num_stages=3),
    "scan_backward": Config(block=128, num_warps=8, num_stages=3),
    "ends": Config(block=64, num_warps=4, num_stages=3),
    "ends_backward": Config(block=128, num_warps=8, num_stages=3),
    "join": Config(block=16, num_warps=8, num_stages=1),
    "scan_fp32": Config(block=16, num_warps=4, num_stages=1),
    "value_gradients": Config(block=0, num_warps=4, num_stages=1),
    "gradients": Config(block=32, num_warps=4, num_stages=1, registers=168),
    "decode": Config(block=64, num_warps=4, num_stages=1),
    "decode_normed": Config(block=128, num_warps=8, num_stages=1),
    "decode_pending": Config(block=4, num_warps=1, num_stages=4, registers=128),
    "decode_taking": Config(block=32, num_warps=4, num_stages=3, registers=128),
    "ranges": Config(block=0, num_warps=4, num_stages=1),
    "gdn_prepare": Config(block=128, num_warps=4, num_stages=1),
    "gdn_pair_gradients": Config(block=64, num_warps=4, num_stages=1),
    "gdn_gradients": Config(block=64, num_warps=8, num_stages=1),
    "conv": Config(block=512, num_warps=2, num_stages=1),
    "conv_backward": Config(block=256, num_warps=2, num_stages=1),
    "conv_decode": Config(block=512, num_warps=2, num_stages=1),
    "add_norm": Config(block=0, num_warps=4, num_stages=1),
    "gated_norm": Config(block=4096, num_warps=4, num_stages=1),
    "gated_norm_backward": Config(block=2048, num_warps=4, num_stages=1),
}

SHARED_MEMORY = 225 * 2**10
NARROW = {
    "scan": Config(block=64, num_warps=4, num_stages=1),
    "scan_backward": Config(block=64, num_warps=4, num_stages=1),
    "ends": Config(block=64, num_warps=4, num_stages=1),
    "ends_backward": Config(block=64, num_warps=4, num_stages=1),
}
