"""Times decoding with every configuration worth a try, on one GPU: what kernels/fused/configs.py is chosen by.

    python tools/tune_decode.py                     (a minute and a half, most of it compiling)

H32 K=V=128, bf16 inputs, fp32 states. Each call is replayed from a CUDA graph, the L2 cache overwritten before it;
medians of 20, in microseconds. `in place` multiplies the same states by a number: what reading and writing
them costs. A configuration whose values are not those of the torch code is marked WRONG.
"""

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton

from deltarl.kernels.fused import decode
from deltarl.kernels.fused.configs import CONFIGS, Config
from deltarl.kernels.recurrent import kda_decode_ as kda_decode_torch

HEADS, SIZE = 32, 128
COUNTS = (1, 8, 64, 256, 1024)
# Columns of a state that one step works on, warps, pipeline stages: one program for a head, or one for a step.
WHOLE = [(16, 2, 3), (16, 4, 2), (16, 4, 3), (16, 4, 4), (32, 2, 2), (32, 4, 2), (32, 4, 3), (32, 8, 2), (32, 8, 3)]
WHOLE += [(64, 4, 2), (64, 8, 2), (128, 8, 1), (128, 16, 1)]
APART = [(8, 2), (16, 2), (16, 4), (32, 2), (32, 4), (32, 8), (64, 4), (64, 8)]
# These are also timed with the output's norm, and with states that leave the cache first.
CHOSEN = {(16, 4, 3), (32, 4, 2), (64, 8, 2), (128, 8, 1), (16, 4), (32, 4), (64, 8)}


def inputs(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(count)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").bfloat16()

    x = {name: draw(count, HEADS, SIZE) for name in ("q", "k", "v", "g")}
    x |= {"beta": draw(count, HEADS), "A_log": draw(HEADS).float(), "dt_bias": draw(HEADS * SIZE).float()}
    return x | {"slots": torch.randperm(count, generator=generator, device="cuda")}


def replayed(work: Callable) -> float:
    """Microseconds of `work`'s kernels."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    flush, times = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda"), []
    for i in range(23):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def use(config: Config, whole: bool) -> None:
    CONFIGS["decode"] = CONFIGS["decode_few"] = config
    decode.FEW_HEADS = 0 if whole else 2**31


def times(pools: dict[int, torch.Tensor], batches: dict[int, dict], norm: bool = False) -> str:
    """A line of times, one a batch; each is judged by torch's values first."""
    cells = []
    for count, x in batches.items():
        extra = {"norm_weight": x["A_log"].repeat(4), "norm_gate": x["g"]} if norm else {}
        if count <= 64:
            ours, torchs = pools[count].clone(), pools[count].clone()
            o = decode.kda_decode_(**x, state=ours, **extra)
            expected = kda_decode_torch(**x, state=torchs, **extra)
            right = (o - expected).norm() <= 4e-3 * expected.norm() and (ours - torchs).norm() <= 1e-5 * torchs.norm()
        wrong = "" if right else " WRONG"
        cells.append(
            f"{replayed(lambda x=x, c=count, e=extra: decode.kda_decode_(**x, state=pools[c], **e)):.1f}{wrong}"
        )
    return "".join(f"{cell:>10}" for cell in cells)


def norm_apart(x: dict[str, torch.Tensor], pool: torch.Tensor) -> None:
    o = decode.kda_decode_(**x, state=pool)
    F.rms_norm(o, (SIZE,), o[0, 0], 1e-5) * x["g"].sigmoid()


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    pools = {count: torch.randn(count, HEADS, SIZE, SIZE, device="cuda") for count in COUNTS}
    batches = {count: inputs(count) for count in COUNTS}
    print(f"{'sequences':<44}{''.join(f'{count:>10}' for count in COUNTS)}")
    floor = [replayed(lambda p=pool: p.mul_(1.0)) for pool in pools.values()]
    print(f"{'in place':<44}{''.join(f'{us:>10.1f}' for us in floor)}", flush=True)
    for block, warps, *stages in WHOLE + APART:
        whole = bool(stages)
        use(Config(block, warps, *(stages or [1])), whole)
        name = f"{block} columns, {warps} warps" + (f", {stages[0]} stages, whole head" if whole else "")
        print(f"{name:<44}{times(pools, batches)}", flush=True)
        if (block, warps, *stages) in CHOSEN:
            if whole:
                print(f"{'    with the norm':<44}{times(pools, batches, norm=True)}", flush=True)
            decode.EVICTION = "evict_first"
            print(f"{'    evict first':<44}{times(pools, batches)}", flush=True)
            decode.EVICTION = ""
    use(Config(32, 4, 1), whole=False)
    apart = [replayed(lambda x=x, p=pools[c]: norm_apart(x, p)) for c, x in batches.items()]
    print(f"{'32 columns, 4 warps, norm in torch (3 more)':<44}{''.join(f'{us:>10.1f}' for us in apart)}")


if __name__ == "__main__":
    main()
