"""One engine of `deltarl bench rollout`, in a process of its own: starts it, measures, and appends rows as they come.

python -P -m deltarl.rl.bench.rollout_engine SPEC.json       (written by rl/bench/rollout.py)
"""

import json
import os
import random
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WARM_STEPS = 8
PROFILED_STEPS = 8
SPARE_STEPS = 2 * WARM_STEPS + 2 * PROFILED_STEPS + 5 * 16
"""More than a sequence is drawn for; each of five phases goes on for up to two bursts of eight steps too long."""
CAUSE_CHARS = 300
KERNELS, NAME_CHARS = 12, 80
CONNECTOR = {
    "kv_connector": "PresentContext",
    "kv_connector_module_path": "deltarl.rl.bench.rollout_context",
    "kv_role": "kv_producer",
}
"""Not a consumer: for one of those vLLM keeps blocks back while the GPU is a step ahead, as no rollout does."""


@dataclass
class Spec:
    """What to measure. name: the arm's; served: `deltarl` or `vllm`, whose class. equal: batch size by context.

    longest: tokens of the longest sequence, prompt and new ones.
    began: time.time() at which the process was asked for. share: of the GPU's memory (of the free RAM on a CPU).
    whole: sequences, prompt tokens and new tokens of a batch that reads its prompts for real; empty for none.
    """

    name: str
    served: str
    folder: str
    dtype: str
    out: str
    contexts: list[int]
    longest: int
    equal: dict[str, int]
    max_num_seqs: int
    steps: int
    share: float
    began: float
    whole: list[int] = field(default_factory=list)


@dataclass
class Row:
    """One measurement. kind: `start` (seconds until the first token), `decode`, `whole` (prompts read for real), or
    `failed` (note: why no more rows of this engine come).

    gpu_ms: the time of a decode step's kernels, in milliseconds; what ms_per_token has over it is waiting for the host.
    kernels: those that take most of it, by name.
    host_us: microseconds of processor time for a sequence and decode step, in the thread that steps the engine, outside
    of vLLM's model runner; runner_us: inside of it.
    """

    arm: str
    served: str
    kind: str
    context: int = 0
    batch: int = 0
    note: str = ""
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    ms_per_token: float = 0.0
    gpu_ms: float = 0.0
    host_us: float = 0.0
    runner_us: float = 0.0
    cache_bytes: int = 0
    kernels: dict[str, float] = field(default_factory=dict)


class Engine:
    def __init__(self, spec: Spec) -> None:
        from deltarl.rollout import engine

        self.spec = spec
        self.llm = engine.start(
            spec.folder,
            dtype=spec.dtype,
            max_model_len=spec.longest,
            max_num_seqs=spec.max_num_seqs,
            gpu_memory_utilization=spec.share,
            seed=0,
            load_format="dummy",
            enable_chunked_prefill=True,
            max_num_batched_tokens=max(8192, spec.max_num_seqs),
            kv_transfer_config=CONNECTOR,
        )
        self.core = self.llm.llm_engine
        self.cache = self.scheduler.kv_cache_config
        self.requests = 0

    @property
    def vocab_size(self) -> int:
        return self.core.model_config.get_vocab_size()

    def blocks_of(self, tokens: int) -> int:
        """Cache blocks that one sequence of this length takes, of all groups of layers."""
        from vllm.v1.kv_cache_interface import MambaSpec

        specs = [group.kv_cache_spec for group in self.cache.kv_cache_groups]
        return sum(1 if isinstance(spec, MambaSpec) else -(-tokens // spec.block_size) for spec in specs)

    def bytes_of(self, tokens: int) -> int:
        """Cache memory that one sequence of this length takes."""
        total = sum(tensor.size for tensor in self.cache.kv_cache_tensors)
        return self.blocks_of(tokens) * total // self.cache.num_blocks

    def most_sequences(self, tokens: int) -> int:
        return min((self.cache.num_blocks - 1) // self.blocks_of(tokens), self.spec.max_num_seqs)

    def add(self, prompt: list[int], tokens: int) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from deltarl.rollout.vllm_scheduler import keep_drawn

        params = SamplingParams(
            temperature=1.0,
            max_tokens=tokens,
            ignore_eos=True,
            seed=self.requests,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self.requests += 1
        name = self.core.add_request(str(self.requests), {"prompt_token_ids": prompt}, params)
        keep_drawn(self.scheduler, name)
        return str(self.requests)

    @property
    def scheduler(self) -> Any:
        return self.core.engine_core.engine_core.scheduler

    def drawn(self) -> int:
        """Tokens drawn so far for the requests that run."""
        return sum(request.num_output_tokens for request in self.scheduler.requests.values())

    def step_until(self, tokens: int) -> None:
        while self.drawn() < tokens:
            if not self.core.has_unfinished_requests():
                raise RuntimeError(f"the engine went idle before it had drawn {tokens} tokens")
            self.core.step()
        synchronize()

    def decode(self, context: int, batch: int) -> dict[str, Any]:
        """What a `Row` says of `steps` decode steps of a batch whose sequences begin at this context.

        The batch is smaller than asked for when the scheduler did not admit all.
        """
        prompt = [1 + place % (self.vocab_size - 1) for place in range(context)]
        names = [self.add(prompt, self.spec.steps + SPARE_STEPS) for _ in range(batch)]
        self.step_until(WARM_STEPS * batch // 2)
        running = {request.request_id.split("-")[0] for request in self.scheduler.running}
        left_out = [name for name in names if name not in running]
        self.core.abort_request(left_out)
        batch -= len(left_out)
        fill_caches(self.core)
        self.step_until(WARM_STEPS * batch)
        before, began = self.drawn(), time.perf_counter()
        self.step_until(before + self.spec.steps * batch)
        seconds, tokens = time.perf_counter() - began, self.drawn() - before
        kernels = self.kernel_milliseconds(batch)
        host_us, runner_us = self.host_microseconds(batch)
        evicted = len(self.scheduler.waiting)
        self.core.abort_request(names)
        while self.core.has_unfinished_requests():
            self.core.step()
        if evicted:
            raise RuntimeError(f"{evicted} of {batch} sequences lost their cache at context {context}")
        return {
            "batch": batch,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "ms_per_token": seconds / tokens * batch * 1e3,
            "gpu_ms": sum(kernels.values()),
            "kernels": dict(sorted(kernels.items(), key=lambda kernel: -kernel[1])[:KERNELS]),
            "host_us": host_us,
            "runner_us": runner_us,
        }

    def kernel_milliseconds(self, batch: int) -> dict[str, float]:
        """Milliseconds that each kernel takes in a step, from a profile of a few steps more; none without a GPU."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        if not torch.cuda.is_available():
            return {}
        before = self.drawn()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            self.step_until(before + PROFILED_STEPS * batch)
        a_step = batch / (self.drawn() - before) / 1e3
        found: dict[str, float] = {}
        for event in profiled.key_averages():
            name = event.key[:NAME_CHARS]
            found[name] = found.get(name, 0.0) + event.self_device_time_total * a_step
        return found

    def host_microseconds(self, batch: int) -> tuple[float, float]:
        """Processor time of this thread per sequence and step outside and inside of the model runner, of a few steps
        more."""
        executor, inside = self.core.engine_core.engine_core.model_executor, 0.0

        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal inside
                began = time.thread_time()
                try:
                    return function(*args, **kwargs)
                finally:
                    inside += time.thread_time() - began

            return call

        executor.execute_model, executor.sample_tokens = timed(executor.execute_model), timed(executor.sample_tokens)
        before, whole = self.drawn(), 0.0
        while self.drawn() < before + PROFILED_STEPS * batch:
            began = time.thread_time()
            self.core.step()
            whole += time.thread_time() - began
        del executor.execute_model, executor.sample_tokens
        per_token = 1e6 / (self.drawn() - before)
        return (whole - inside) * per_token, inside * per_token

    def whole(self, batch: int, prompt: int, tokens: int) -> float:
        """Seconds for a batch of this many prompts, read for real, and so many tokens for each."""
        from deltarl.rl.bench.rollout_context import PresentContext

        generator = random.Random(0)
        prompts = [[generator.randrange(1, self.vocab_size) for _ in range(prompt)] for _ in range(batch)]
        PresentContext.present = False
        try:
            began = time.perf_counter()
            for ids in prompts:
                self.add(ids, tokens)
            while self.core.has_unfinished_requests():
                self.core.step()
            return time.perf_counter() - began
        finally:
            PresentContext.present = True


def fill_caches(core: Any) -> None:
    """Fill all caches with small random numbers, finite both as bf16 and as fp32: zeros would draw less power."""
    import torch

    layers = core.vllm_config.compilation_config.static_forward_context.values()
    storages = {}
    for layer in layers:
        caches = getattr(layer, "kv_cache", ())
        for tensor in [caches] if isinstance(caches, torch.Tensor) else caches:
            storages[tensor.untyped_storage().data_ptr()] = tensor
    for tensor in storages.values():
        storage = tensor.untyped_storage()
        raw = torch.empty(0, dtype=torch.bfloat16, device=tensor.device).set_(storage)
        for piece in raw.split(1 << 28):
            piece.normal_(0, 0.02)


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(spec: Spec) -> Iterator[Row]:
    """The rows of one engine, as they come."""
    engine = Engine(spec)
    started = time.time() - spec.began
    engine.add([1, 2, 3], 1)
    while engine.core.has_unfinished_requests():
        engine.core.step()
    row = {"arm": spec.name, "served": spec.served}
    first = time.time() - spec.began
    yield Row(**row, kind="start", seconds=first, note=f"engine up after {started:.1f} s")
    if spec.whole:
        batch, prompt, tokens = spec.whole
        engine.whole(batch, prompt, 4)  # what is compiled or tuned at its first use is so now
        seconds = engine.whole(batch, prompt, tokens)
        yield Row(
            **row,
            kind="whole",
            context=prompt,
            batch=batch,
            note=f"prompts read, {tokens} tokens each",
            seconds=seconds,
            tokens_per_second=batch * tokens / seconds,
            ms_per_token=seconds / tokens * 1e3,
            cache_bytes=engine.bytes_of(prompt + tokens),
        )
    for context in spec.contexts:
        last = context + spec.steps + SPARE_STEPS
        most = engine.most_sequences(last)
        if not most:
            yield Row(**row, kind="decode", context=context, note="one sequence does not fit")
            continue
        batches = {most: "largest batch"}
        if equal := spec.equal.get(str(context)):
            batches[min(equal, most)] = "equal batch" if equal != most else "equal batch, its largest"
        for batch, note in sorted(batches.items()):
            found = engine.decode(context, batch)
            yield Row(**row, **found, kind="decode", context=context, note=note, cache_bytes=engine.bytes_of(last))
    engine.llm.llm_engine.engine_core.shutdown()


def append_row(path: str | Path, row: Row) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def one_line(text: str) -> str:
    """The text on one line of at most 300 characters; what is over is cut off."""
    return textwrap.shorten(text, CAUSE_CHARS, placeholder=" ...")


def main() -> None:
    """Raises what stopped the measurement, after a row of kind `failed`."""
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text()))
    os.environ["DELTARL_VLLM_MODEL"] = spec.served
    try:
        for row in measure(spec):
            append_row(spec.out, row)
    except Exception as error:
        append_row(spec.out, Row(spec.name, spec.served, "failed", note=one_line(f"{type(error).__name__}: {error}")))
        raise


if __name__ == "__main__":
    main()
