"""Packed sequences on one GPU against the same sequences alone: logprobs and gradients, hybrids and a Llama.

Run by hand:  python tests/gpu/packed_gpu.py        (half a minute; prints ok or FAIL lines; exit code 1 when one fails)

In bf16 a packed sequence goes through other kernels than one alone, so the two are compared with fp32 alone: packing
may be no further from it than bf16 alone is, plus a fifth.
"""

import sys
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from deltarl.model import build_model
from deltarl.rl.forward import enable_scoring, packed_logprobs
from deltarl.rl.packing import make_pack
from deltarl.rollout import Trace

LENGTHS = [100, 37, 700, 260, 3, 512]
VOCABULARY = 4096
DEVICE = torch.device("cuda")
MODELS = {
    "kda 30m": lambda: build_model("kda", "30m", vocab_size=VOCABULARY),
    "gdn 30m": lambda: build_model("gdn", "30m", vocab_size=VOCABULARY),
    "mla-rope 30m": lambda: build_model("mla-rope", "30m", vocab_size=VOCABULARY),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=9,
            num_key_value_heads=3,
        )
    ),
}


def scored(model: torch.nn.Module, traces: list[Trace], groups: list[list[int]], exact: bool) -> tuple[Tensor, Tensor]:
    """(logprobs, gradients as one vector) of all traces, in the groups given, by rows."""
    model.zero_grad()
    rows: dict[int, Tensor] = {}
    for group in groups:
        pack = make_pack(traces, group).to(DEVICE)
        with nullcontext() if exact else torch.autocast("cuda", torch.bfloat16):
            found = packed_logprobs(model, pack, entropy=True)
        (found.logprobs.sum() + 0.1 * found.entropies.sum()).backward()
        rows |= zip(group, pack.split(found.logprobs.detach()), strict=True)
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return torch.cat([rows[index] for index in range(len(traces))]), gradients


def check(name: str) -> bool:
    torch.manual_seed(0)
    model = MODELS[name]().to(DEVICE).train()
    enable_scoring(model)
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randint(VOCABULARY, (length + 4,), generator=generator).tolist() for length in LENGTHS]
    traces = [Trace(ids[:4], ids[4:], [], [], "stop") for ids in draw]
    alone, packed = [[index] for index in range(len(traces))], [[2, 0, 4, 1], [5, 3]]
    expected = scored(model, traces, alone, exact=True)
    ok = True
    for precision, exact in (("fp32", True), ("bf16", False)):
        floor = [(x - y).norm() / y.norm() for x, y in zip(scored(model, traces, alone, exact), expected, strict=True)]
        found = [(x - y).norm() / y.norm() for x, y in zip(scored(model, traces, packed, exact), expected, strict=True)]
        for what, mine, bound in zip(("logprobs", "gradients"), found, floor, strict=True):
            limit = 1e-4 if exact else 1.2 * bound.item()
            good = mine.item() <= limit
            ok &= good
            print(
                f"{'ok  ' if good else 'FAIL'} {name:<14}{precision} {what:<10} {mine.item():.2e} (at most {limit:.2e})"
            )
    return ok


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    failed = [name for name in MODELS if not check(name)]
    sys.exit(1 if failed else 0)
