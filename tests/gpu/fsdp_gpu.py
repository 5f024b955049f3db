"""The learner's FSDP2 on GPUs over NCCL: what several processes learn against what one learns, and what it costs.

Run by hand on a machine with two GPUs:

    python tests/gpu/fsdp_gpu.py [--size 30m] [--processes 2] [--steps 6] [--optimizers muon]

For each optimizer, in float32 and under bfloat16 autocast: the same packs of random tokens on one process and on
several; prints loss and gradient norm of the last step, their largest relative difference over all steps, seconds a
step and peak memory a GPU. A difference over its bound fails the script: 1e-4 in float32 (sums in another order, TF32
off), 2e-2 under autocast (a last bit of bfloat16 is 2^-8) and with Muon, which orthogonalises in bfloat16.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import torch
from torch import nn

from deltarl.model import build_model
from deltarl.rl.optimizers import make_optimizer
from deltarl.rl.sharding import (
    from_main,
    gathered,
    leave_together,
    local_device,
    open_processes,
    processes,
    shard,
    shares,
    summed,
    whole,
    whole_state,
)

VOCAB = 8192
PACK_TOKENS, SEQUENCES, PACKS = 8192, 8, 3
BOUNDS = {
    ("adamw", "float32"): 1e-4,
    ("adamw", "bfloat16"): 2e-2,
    ("muon", "float32"): 2e-2,
    ("muon", "bfloat16"): 2e-2,
}


def work(size: str, optimizer_name: str, dtype: str, steps: int) -> None:
    """One process of a run: three packs a step, so that of two processes one computes a pack that does not count."""
    open_processes()
    device = local_device() if processes() > 1 else torch.device("cuda", 0)
    torch.manual_seed(0)
    model = build_model("kda", size, vocab_size=VOCAB, pad_token_id=0, bos_token_id=None, eos_token_id=1).to(device)
    if processes() > 1:
        shard(model, device)
    settings = SimpleNamespace(optimizer=optimizer_name, learning_rate=3e-4, weight_decay=0.01)
    optimizer = make_optimizer(model, settings)
    generator = torch.Generator().manual_seed(1)
    packs = torch.randint(2, VOCAB, (PACKS, 1, PACK_TOKENS), generator=generator)
    cu_seqlens = torch.arange(0, PACK_TOKENS + 1, PACK_TOKENS // SEQUENCES, dtype=torch.int32)
    rows, seconds = [], []
    for step in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.zero_grad()
        total = torch.zeros((), device=device)
        for ids, counts in shares(packs):
            with torch.autocast("cuda", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = model(ids.to(device), labels=ids.to(device), cu_seqlens=cu_seqlens).loss / PACKS * counts
            loss.backward()
            total += loss.detach()
        norm = whole(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        rows.append((summed(total).item(), norm.item()))
        torch.cuda.synchronize()
        if step > 0:
            seconds.append(time.perf_counter() - began)
        optimizer.load_state_dict(optimizer.state_dict())
    peak = max(gathered(torch.cuda.max_memory_allocated(device))) / 2**30
    size_of_all = sum(tensor.double().abs().sum().item() for tensor in whole_state(model).values())
    found = {"rows": rows, "seconds": min(seconds), "peak": peak, "weights": size_of_all}
    from_main(lambda: print(json.dumps(found), flush=True))


def launch(count: int, *arguments: str) -> dict:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
    finished = subprocess.run(
        [sys.executable, "-P", *launcher, os.path.abspath(__file__), "--work", *arguments],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(finished.stdout.splitlines()[-1])


def difference(one: list[list[float]], several: list[list[float]]) -> float:
    """The largest relative difference of losses and gradient norms."""
    pairs = [(a, b) for row, other in zip(one, several, strict=True) for a, b in zip(row, other, strict=True)]
    return max(abs(a - b) / abs(a) for a, b in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="30m")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "muon"], choices=["adamw", "muon"])
    parser.add_argument("--work", nargs=4, metavar=("SIZE", "OPTIMIZER", "DTYPE", "STEPS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        size, optimizer, dtype, steps = args.work
        work(size, optimizer, dtype, int(steps))
        leave_together()
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, NCCL {torch.cuda.nccl.version()}; {args.size}")
    print(f"{'optimizer':10} {'compute':9} {'GPUs':>4} {'loss':>10} {'norm':>9} {'s/step':>8} {'GiB':>7} {'differ':>9}")
    failed = 0
    for (optimizer, dtype), bound in BOUNDS.items():
        if optimizer not in args.optimizers:
            continue
        one, several = (launch(n, args.size, optimizer, dtype, str(args.steps)) for n in (1, args.processes))
        differ = difference(one["rows"], several["rows"])
        for count, run in ((1, one), (args.processes, several)):
            loss, norm = run["rows"][-1]
            shown = f"{differ:9.1e}" if count > 1 else f"{'':9}"
            cost = f"{run['seconds']:8.3f} {run['peak']:7.2f}"
            print(f"{optimizer:10} {dtype:9} {count:4} {loss:10.5f} {norm:9.4f} {cost} {shown}", flush=True)
        if differ > bound:
            failed += 1
            print(f"  FAILED: {differ:.1e} is over {bound:.0e}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
