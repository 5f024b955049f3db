"""The vLLM worker: generation, and weight sync into the engine that runs in this process."""

import gc
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from deltarl.rollout import engine
from deltarl.rollout.sync import collect, engine_tensors, load_in_place, match, prove
from deltarl.rollout.types import Progress, RolloutWorker, Sampling, SyncReport, Trace, WeightSyncError


class VllmWorker(RolloutWorker):
    """A `RolloutWorker` on vLLM, in this process; arguments are `make_worker`'s, `options` go to `vllm.LLM`."""

    def __init__(self, model_path: str | Path, *, dtype: str, max_model_len: int, max_num_seqs: int, **options) -> None:
        self.max_model_len = max_model_len
        self.end_tokens = engine.end_tokens(model_path)
        self.broken: str | None = None
        self.requests = 0
        self.llm = engine.start(
            model_path, dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs, **options
        )

    def _generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[int], progress: Progress | None
    ) -> list[Trace]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self.broken:
            raise WeightSyncError(self.broken)
        ends = () if sampling.ignore_eos else self.end_tokens
        core = self.llm.llm_engine
        places: dict[str, int] = {}
        try:
            for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
                params = SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k,
                    max_tokens=sampling.max_tokens,
                    stop_token_ids=sorted({*ends, *sampling.stop_token_ids}),
                    ignore_eos=True,
                    seed=seed,
                    logprobs=0,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                name = str(self.requests)
                self.requests += 1
                places[name] = place
                core.add_request(name, {"prompt_token_ids": prompt}, params)
            return self.run(prompts, places, progress)
        finally:
            if core.has_unfinished_requests():  # interrupted: the next call must find an idle engine
                core.abort_request(list(places))

    def run(self, prompts: list[list[int]], places: dict[str, int], progress: Progress | None) -> list[Trace]:
        """Step the engine until every request is done; `places` maps request names to places in `prompts`."""
        core = self.llm.llm_engine
        traces: list[Trace | None] = [None] * len(prompts)
        done = finished_tokens = 0
        while core.has_unfinished_requests():
            for output in core.step():
                place, completion = places[output.request_id], output.outputs[0]
                ids = list(completion.token_ids)
                traces[place] = Trace(
                    prompt_ids=prompts[place],
                    completion_ids=ids,
                    logprobs=[entry[token].logprob for token, entry in zip(ids, completion.logprobs, strict=True)],
                    versions=[self.version] * len(ids),
                    finish_reason=completion.finish_reason,
                )
                done += 1
                finished_tokens += len(ids)
            if progress is not None:
                running = core.output_processor.request_states.values()
                progress(done, len(prompts), finished_tokens + sum(s.detokenizer.num_output_tokens() for s in running))
        return traces

    def sync_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncReport:
        began = time.perf_counter()
        offered = collect(named_tensors)
        held = engine_tensors(self.model)
        match(offered, held)
        self.broken = "the last weight sync broke off half-way: sync again, or restart the worker"
        load_in_place(self.model, offered, held)
        size, digest = prove(held, offered)
        self.llm.reset_prefix_cache()
        self.version, self.broken = version, None
        return SyncReport(version, len(held), size, time.perf_counter() - began, digest)

    @property
    def model(self) -> torch.nn.Module:
        """The engine's model."""
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def make_worker(
    model_path: str | Path,
    *,
    engine: str = "vllm",
    dtype: str = "float32",
    max_model_len: int = 1024,
    max_num_seqs: int = 256,
    gpu_memory_utilization: float = 0.2,
    seed: int = 0,
) -> RolloutWorker:
    """A worker that serves a model folder (any Hugging Face causal LM, or a Kimi Linear hybrid in Moonshot's layout).

    engine: "vllm", or "hf" (transformers' generate: slow, for debugging). dtype: "float32", "bfloat16" or "float16".
    max_model_len: prompt and completion tokens of a sequence. max_num_seqs: sequences that advance together.
    gpu_memory_utilization: share of the GPU's memory for weights and caches; on CPU, of the free RAM for caches.
    Raises ValueError for an unknown engine, and EngineError (vLLM missing or out of range, no model in the folder).
    """
    if engine == "hf":
        from deltarl.rollout.hf_worker import HfWorker

        return HfWorker(model_path, dtype=dtype, max_model_len=max_model_len)
    if engine == "vllm":
        return VllmWorker(
            model_path,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            gpu_memory_utilization=gpu_memory_utilization,
            seed=seed,
        )
    raise ValueError(f"unknown rollout engine {engine!r}: use vllm or hf")
