"""vLLM on one GPU against the trainer's model: parity before and after three syncs, speed, start time, for kda and mla.

Run by hand:  python tests/gpu/rollout_gpu.py [kda mla]        (four minutes an arm; prints a table last)

The floor is the distance between the trainer's model in bf16 and in fp32 on the same tokens: what bf16 alone costs.
"""

import gc
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ["TRITON_CACHE_AUTOTUNING"] = "1"
os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from deltarl.model import build_model, checkpoint_tensors, save_checkpoint
from deltarl.rollout import Sampling, SyncReport, Trace, make_worker

VOCAB = 8192
SEQUENCES, TOKENS = 256, 512
GREEDY = Sampling(temperature=0, max_tokens=64, ignore_eos=True)


@dataclass
class Row:
    arm: str
    weights: str
    same_tokens: float
    gap_mean: float
    gap_max: float
    floor: float
    note: str


def scramble(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator, device=parameter.device))


@torch.no_grad()
def token_logprobs(model: torch.nn.Module, traces: list[Trace]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [traces, tokens] of the completions, and whether each token is the model's own first choice."""
    picked, first = [], []
    for trace in traces:
        ids = torch.tensor([trace.prompt_ids + trace.completion_ids], device="cuda")
        logprobs = model(ids).logits[0, len(trace.prompt_ids) - 1 : -1].float().log_softmax(-1)
        chosen = ids[0, len(trace.prompt_ids) :]
        picked.append(logprobs.gather(1, chosen[:, None]).squeeze(1).cpu())
        first.append((logprobs.argmax(-1) == chosen).cpu())
    return torch.stack(picked), torch.stack(first)


def compare(arm: str, weights: str, model, traces: list[Trace], note: str) -> Row:
    engine = torch.tensor([trace.logprobs for trace in traces])
    exact, first = token_logprobs(model, traces)
    model.to(torch.bfloat16)
    rounded, _ = token_logprobs(model, traces)
    gap, floor = (engine - exact).abs(), (rounded - exact).abs().mean().item()
    return Row(arm, weights, first.float().mean().item(), gap.mean().item(), gap.max().item(), floor, note)


def run(arm: str) -> list[Row]:
    torch.manual_seed(0)
    master = build_model(arm, "30m", vocab_size=VOCAB).cuda().eval()
    words = {f"t{index}": index for index in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")))
    folder = Path(tempfile.mkdtemp()) / arm
    save_checkpoint(master, tokenizer, folder)

    began = time.perf_counter()
    worker = make_worker(
        folder,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=SEQUENCES,
        gpu_memory_utilization=0.4,
    )
    start = time.perf_counter() - began
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in (2, 3, 17, 64, 65, 200, 400)]

    rows = []
    note = f"start {start:.0f} s"
    for version in range(4):
        if version:
            scramble(master, version)
            report: SyncReport = worker.sync_weights(checkpoint_tensors(master), version)
            note = f"sync {report.seconds * 1e3:.0f} ms, {report.tensors} tensors"
        traces = worker.generate(prompts, GREEDY, seeds=[0] * len(prompts))
        copy = build_model(arm, "30m", vocab_size=VOCAB).cuda().eval()
        copy.load_state_dict(master.state_dict())
        rows.append(compare(arm, f"version {version}", copy, traces, note))

    sampled = Sampling(temperature=1.0, max_tokens=TOKENS, ignore_eos=True)
    many = [torch.randint(1, VOCAB, (64,), generator=generator).tolist() for _ in range(SEQUENCES)]
    speeds = []
    outputs = []
    for _ in range(2):
        began = time.perf_counter()
        outputs.append(worker.generate(many, sampled, seeds=list(range(SEQUENCES))))
        speeds.append(SEQUENCES * TOKENS / (time.perf_counter() - began))
    again = sum(a.completion_ids == b.completion_ids for a, b in zip(*outputs, strict=True)) / SEQUENCES
    rows[0].note += f", {max(speeds):.0f} tok/s at {SEQUENCES} x {TOKENS}, same seeds same tokens {again:.0%}"
    worker.close()
    del worker, master, copy
    gc.collect()
    torch.cuda.empty_cache()
    return rows


def main() -> None:
    arms = sys.argv[1:] or ["kda", "mla"]
    if len(arms) > 1:  # vLLM captures CUDA graphs for one engine a process
        for arm in arms:
            subprocess.run([sys.executable, __file__, arm], check=True)
        return
    print("\narm  weights    greedy=argmax(fp32)  mean gap  max gap  bf16 floor  notes")
    for row in run(arms[0]):
        print(
            f"{row.arm:4s} {row.weights:10s} {row.same_tokens:19.1%} {row.gap_mean:9.4f} {row.gap_max:8.3f} "
            f"{row.floor:11.4f}  {row.note}"
        )


if __name__ == "__main__":
    main()
