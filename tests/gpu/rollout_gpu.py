"""vLLM on one GPU against the trainer's model: parity before and after three syncs, speed, start time, for every arm.

Run by hand:  python tests/gpu/rollout_gpu.py [kda mla moe] [--log FOLDER] [--limit SECONDS] [--tokens N] [--at-once]
With as many GPUs, --ranks N shares the engine's model among N of them.
Each arm runs in a process of its own, and a failed or late one does not stop the others. Its rows go to ARM.txt of the
log folder as they come, what vLLM says to ARM.log. --at-once: all arms beside each other, whose speeds say little then.
DELTARL_VLLM_MODEL=vllm has vLLM's own class serve.

"same seeds same tokens": of two draws; "step by step": of a third without bursts of several steps, whose states are
written with each token and so rounded otherwise (in fp32), and how far logprobs differ until a trace's tokens do.
The floor is the distance between the trainer's model in bf16 and in fp32 on the same tokens: what bf16 alone costs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["TRITON_CACHE_AUTOTUNING"] = "1"
os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from deltarl.model import build_model, checkpoint_tensors, save_checkpoint
from deltarl.rollout import RolloutWorker, Sampling, SyncReport, Trace, make_worker
from deltarl.rollout.worker import VllmWorker

MOE = {
    "mlp_layer_types": ["dense"] + ["sparse"] * 7,
    "num_experts": 16,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 512,
}
ARMS = {
    **{arm: (arm, {}) for arm in ("kda", "mla", "gdn", "mla-rope")},
    "moe": ("kda", MOE),
    "bounded": ("kda", {"gate_lower_bound": -5.0}),
}
VOCAB = 8192
SEQUENCES = 256
CACHE_BYTES = 3 << 30
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


def engine(folder: Path, ranks: int) -> RolloutWorker:
    options = {"dtype": "bfloat16", "max_model_len": 1024, "max_num_seqs": SEQUENCES, "gpu_memory_utilization": 0.1}
    if ranks > 1:
        return make_worker(folder, placement="process", tensor_parallel=ranks, gpu=0, **options)
    # measured free memory means little where several engines start
    return VllmWorker(folder, seed=0, kv_cache_memory_bytes=CACHE_BYTES, **options)


def run(arm: str, tokens: int, ranks: int) -> Iterator[Row]:
    plan, overrides = ARMS[arm]
    torch.manual_seed(0)
    master = build_model(plan, "30m", vocab_size=VOCAB, **overrides).cuda().eval()
    words = {f"t{index}": index for index in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")))
    folder = Path(tempfile.mkdtemp()) / arm
    save_checkpoint(master, tokenizer, folder)

    began = time.perf_counter()
    worker = engine(folder, ranks)
    start = time.perf_counter() - began
    worker.generate([[1, 2, 3]], GREEDY, seeds=[0])
    first = time.perf_counter() - began
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in (2, 3, 17, 64, 65, 200, 400)]

    def exact() -> torch.nn.Module:
        copy = build_model(plan, "30m", vocab_size=VOCAB, **overrides).cuda().eval()
        copy.load_state_dict(master.state_dict())
        return copy

    note = f"start {start:.1f} s, first completion at {first:.1f} s"
    for version in range(4):
        if version:
            scramble(master, version)
            report: SyncReport = worker.sync_weights(checkpoint_tensors(master), version)
            note = f"sync {report.seconds * 1e3:.0f} ms, {report.tensors} tensors"
        traces = worker.generate(prompts, GREEDY, seeds=[0] * len(prompts))
        yield compare(arm, f"version {version}", exact(), traces, note)

    sampled = Sampling(temperature=1.0, max_tokens=tokens, ignore_eos=True)
    many = [torch.randint(1, VOCAB, (64,), generator=generator).tolist() for _ in range(SEQUENCES)]
    speeds = []
    outputs = []
    for _ in range(2):
        began = time.perf_counter()
        outputs.append(worker.generate(many, sampled, seeds=list(range(SEQUENCES))))
        speeds.append(SEQUENCES * tokens / (time.perf_counter() - began))
    note = f"{max(speeds):.0f} tok/s at {SEQUENCES} x {tokens}, same seeds same tokens {same(*outputs):.0%}"
    if ranks == 1:
        worker.llm.llm_engine.engine_core.engine_core.scheduler.longest_burst = 1
        outputs.append(worker.generate(many, sampled, seeds=list(range(SEQUENCES))))
        apart = logprobs_apart(outputs[0], outputs[2])
        note += f", step by step {same(outputs[0], outputs[2]):.0%}, logprobs {apart:.1e} apart"
    yield compare(arm, "sampled", exact(), outputs[0][:16], note)
    worker.close()


def same(some: list[Trace], others: list[Trace]) -> float:
    """The share of traces with equal tokens."""
    return sum(a.completion_ids == b.completion_ids for a, b in zip(some, others, strict=True)) / len(some)


def logprobs_apart(some: list[Trace], others: list[Trace]) -> float:
    """The mean distance of logprobs of the tokens before two traces part."""
    apart = []
    for a, b in zip(some, others, strict=True):
        for place in range(len(a.completion_ids)):
            if a.completion_ids[place] != b.completion_ids[place]:
                break
            apart.append(abs(a.logprobs[place] - b.logprobs[place]))
    return sum(apart) / max(1, len(apart))


HEAD = "arm      weights    greedy=argmax(fp32)  mean gap  max gap  bf16 floor  notes"


def line(row: Row) -> str:
    return (
        f"{row.arm:8s} {row.weights:10s} {row.same_tokens:19.1%} {row.gap_mean:9.4f} {row.gap_max:8.3f} "
        f"{row.floor:11.4f}  {row.note}"
    )


def start(arm: str, folder: Path, args: argparse.Namespace) -> subprocess.Popen:
    command = ["timeout", str(args.limit), sys.executable, "-P", __file__, "--arm", arm]
    command += ["--tokens", str(args.tokens), "--ranks", str(args.ranks)]
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "INFO", "ROWS": str(folder / f"{arm}.txt")}
    with (folder / f"{arm}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arms", nargs="*", default=["kda", "mla"], help=f"of {', '.join(ARMS)}")
    parser.add_argument("--log", help="folder for the rows and for what vLLM says, two files an arm")
    parser.add_argument("--limit", type=int, default=240, help="seconds for an arm")
    parser.add_argument("--tokens", type=int, default=512, help="for each of the sequences whose speed is measured")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs that share the engine's model")
    parser.add_argument("--at-once", action="store_true", help="all arms beside each other")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        for row in run(args.arm, args.tokens, args.ranks):
            with open(os.environ["ROWS"], "a") as rows:
                print(line(row), file=rows, flush=True)
        return 0
    folder = Path(args.log or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    processes = {}
    for arm in args.arms:  # vLLM captures CUDA graphs for one engine a process
        processes[arm] = start(arm, folder, args)
        if not args.at_once:
            processes[arm].wait()
    failed = 0
    print(HEAD)
    for arm, process in processes.items():
        code, rows = process.wait(), folder / f"{arm}.txt"
        print(rows.read_text() if rows.exists() else f"{arm}: no row", end="\n", flush=True)
        if code:
            failed += 1
            log = folder / f"{arm}.log"
            print(f"{arm}: exit code {code}; the end of {log}:", *log.read_text().splitlines()[-20:], sep="\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
