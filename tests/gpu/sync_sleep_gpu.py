"""Weight sync, sleep and an engine in its own process on one GPU, with a hybrid of a thousand million parameters.

Run by hand:  python tests/gpu/sync_sleep_gpu.py        (under four minutes on one card; a line for each check)

Each part runs in a process of its own with its own time limit; a check that fails is printed and makes the exit code 1.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from deltarl.model import build_model, checkpoint_tensors, save_checkpoint
from deltarl.rollout import Sampling, Trace, WeightSyncError, make_worker
from deltarl.rollout.sync import checksums_in

VOCAB = 32768
LIMITS = {"colocated": 100, "process": 130, "cards": 150}
GREEDY = Sampling(temperature=0, max_tokens=32, ignore_eos=True)
SAMPLED = Sampling(temperature=1.0, max_tokens=512, ignore_eos=True)
ENGINE = {"dtype": "bfloat16", "max_model_len": 1024, "max_num_seqs": 64, "gpu_memory_utilization": 0.3, "seed": 0}
failures: list[str] = []


def check(what: str, right: bool, detail: str = "") -> None:
    print(f"{'ok  ' if right else 'FAIL'} {what}  {detail}", flush=True)
    if not right:
        failures.append(what)


def learner() -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return build_model("kda", "300m", vocab_size=VOCAB, hidden_size=2048, intermediate_size=4352).eval()


def scramble(model: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))


def save(model: torch.nn.Module, folder: Path) -> None:
    words = {f"t{index}": index for index in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")))
    save_checkpoint(model, tokenizer, folder)


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCAB, (16 + index,), generator=generator).tolist() for index in range(count)]


def tokens(traces: list[Trace]) -> list[list[int]]:
    return [trace.completion_ids for trace in traces]


def greedy(worker) -> list[list[int]]:
    return tokens(worker.generate(prompts(8), GREEDY, seeds=[0] * 8))


def used() -> float:
    """GiB of the card that are taken, by whomever."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def started(folder: Path, **options):
    began = time.perf_counter()
    worker = make_worker(folder, **ENGINE, **options)
    print(f"     start {time.perf_counter() - began:.1f} s", flush=True)
    return worker


def syncs(worker, model, limit: float | None) -> None:
    times = []
    for version in range(1, 6):
        scramble(model, version)
        torch.cuda.synchronize()
        report = worker.sync_weights(checkpoint_tensors(model), version)
        times.append(report.seconds)
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    detail = f"{parameters:.0f}M parameters, {report.tensors} tensors, {report.bytes / 2**30:.2f} GiB: "
    detail += ", ".join(f"{1e3 * seconds:.0f}" for seconds in times) + " ms"
    check("sync", limit is None or median(times[1:]) <= limit, detail)


def colocated(folder: Path) -> None:
    model = learner()
    save(model, folder)
    worker = started(folder, sleep=True)
    syncs(worker, model, 0.3)
    held = worker.tensors()
    checksums_in(held)
    began = time.perf_counter()
    checksums_in(held)
    check("checksum of the engine's weights", True, f"{1e3 * (time.perf_counter() - began):.0f} ms")

    before = greedy(worker)
    (folder / "greedy.json").write_text(json.dumps(before))
    for keep in (True, False):
        awake = used()
        began = time.perf_counter()
        worker.sleep(keep_weights=keep)
        asleep, slept = used(), time.perf_counter() - began
        began = time.perf_counter()
        worker.wake()
        woke = time.perf_counter() - began
        detail = f"{awake:.2f} GiB awake, {asleep:.2f} asleep, {used():.2f} awake again; {slept:.2f} s, {woke:.2f} s"
        check(f"sleep, weights {'kept' if keep else 'given up'}: memory", awake - asleep > 10, detail)
        if keep:
            check("tokens after waking", greedy(worker) == before)
            continue
        try:
            greedy(worker)
            check("refused without weights", False)
        except WeightSyncError as error:
            check("refused without weights", True, str(error))
        worker.sync_weights(checkpoint_tensors(model), 6)
        check("tokens after waking and a sync", greedy(worker) == before)
    worker.sleep()
    report = worker.sync_weights(checkpoint_tensors(model), 7)
    check("a sync wakes the weights, drawing the caches", greedy(worker) == before, f"sync {report.seconds:.3f} s")
    worker.close()


def process(folder: Path) -> None:
    model = learner()
    for version in range(1, 6):
        scramble(model, version)
    worker = started(folder, placement="process", sleep=True, hang_seconds=30)
    lines: list[str] = []
    worker.on_restart = lines.append
    report = worker.sync_weights(checkpoint_tensors(model), 5)
    print(f"     first sync {report.seconds:.3f} s", flush=True)
    report = worker.sync_weights(checkpoint_tensors(model), 5)
    check("sync across processes", True, f"{report.bytes / 2**30:.2f} GiB, {1e3 * report.seconds:.0f} ms")
    expected = json.loads((folder / "greedy.json").read_text())
    check("tokens of the process are those of the colocated engine", greedy(worker) == expected)
    awake = used()
    worker.sleep()
    check("its sleep frees the card", awake - used() > 10, f"{awake:.2f} GiB to {used():.2f}")
    worker.sync_weights(checkpoint_tensors(model), 5)
    check("tokens after its sleep", greedy(worker) == expected)

    worker.weights = lambda: (checkpoint_tensors(model), 5)
    killed: list[float] = []

    def kill(done: int, total: int, count: int) -> None:
        if not killed and count > 0:
            os.kill(worker.pid, signal.SIGKILL)
            killed.append(time.perf_counter())

    traces = worker.generate(prompts(32), SAMPLED, seeds=list(range(32)), progress=kill)
    seconds = time.perf_counter() - killed[0]
    whole = all(len(trace.completion_ids) == 512 and set(trace.versions) == {5} for trace in traces)
    check("killed while drawing: all completions are there", whole and len(lines) == 1, f"{seconds:.1f} s; {lines}")
    check("tokens after the restart", greedy(worker) == expected)
    worker.close()
    print(f"     used by the card after all: {used():.2f} GiB", flush=True)


def cards(folder: Path) -> None:
    """The learner on the first card; the engine on the second, then on both."""
    model = learner()
    for version in range(1, 6):
        scramble(model, version)
    expected = json.loads((folder / "greedy.json").read_text())
    for options in ({"gpu": 1}, {"tensor_parallel": 2}):
        worker = started(folder, placement="process", **options)
        worker.sync_weights(checkpoint_tensors(model), 5)
        report = worker.sync_weights(checkpoint_tensors(model), 5)
        check(f"sync with {options}", True, f"{report.bytes / 2**30:.2f} GiB, {1e3 * report.seconds:.0f} ms")
        found = greedy(worker)
        agreeing = sum(a == b for a, b in zip(found, expected, strict=True))
        enough = len(expected) if "gpu" in options else 1  # two cards add up in another order
        check(f"tokens with {options}", agreeing >= enough, f"{agreeing} of {len(expected)} completions are the same")
        worker.close()


def main() -> None:
    parts = {"colocated": colocated, "process": process}
    if torch.cuda.device_count() > 1:
        parts["cards"] = cards
    if len(sys.argv) == 3 and Path(sys.argv[2]).is_dir():
        parts[sys.argv[1]](Path(sys.argv[2]) / "model")
        sys.exit(bool(failures))
    with tempfile.TemporaryDirectory() as folder:
        codes = []
        for name in parts:
            began = time.perf_counter()
            print(f"{name}:", flush=True)
            try:
                done = subprocess.run([sys.executable, __file__, name, folder], timeout=LIMITS[name])
                codes.append(done.returncode)
            except subprocess.TimeoutExpired:
                print(f"FAIL {name} took over {LIMITS[name]} s", flush=True)
                codes.append(1)
            print(f"     {name}: {time.perf_counter() - began:.0f} s", flush=True)
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
