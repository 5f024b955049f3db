"""A worker on transformers' generate, behind the same interface: slow, a second opinion when debugging the engine."""

import time
from collections.abc import Iterable
from pathlib import Path

import torch

from deltarl.model import checkpoint_tensors, load_model
from deltarl.rollout.engine import end_tokens, read_config
from deltarl.rollout.sync import collect, match, prove
from deltarl.rollout.types import Progress, RolloutWorker, Sampling, SyncReport, Trace


class HfWorker(RolloutWorker):
    """A `RolloutWorker` that generates one sequence at a time, without padding; arguments are `make_worker`'s."""

    def __init__(self, model_path: str | Path, *, dtype: str, max_model_len: int) -> None:
        read_config(model_path)
        self.max_model_len = max_model_len
        self.end_tokens = end_tokens(model_path)
        self.model, _ = load_model(model_path, getattr(torch, dtype))
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def _generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[int], progress: Progress | None
    ) -> list[Trace]:
        ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self.end_tokens)}
        traces: list[Trace] = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            traces.append(self.complete(prompt, sampling, seed, ends))
            if progress is not None:
                progress(len(traces), len(prompts), sum(len(trace.completion_ids) for trace in traces))
        return traces

    @torch.no_grad()
    def complete(self, prompt: list[int], sampling: Sampling, seed: int, ends: set[int]) -> Trace:
        device = self.model.device
        greedy = sampling.temperature == 0
        how = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": max(sampling.top_k, 0)}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            out = self.model.generate(
                torch.tensor([prompt], device=device),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=device),
                max_new_tokens=sampling.max_tokens,
                do_sample=not greedy,
                eos_token_id=sorted(ends) or None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_scores=True,
                **({} if greedy else how),
            )
        ids = out.sequences[0, len(prompt) :].tolist()
        logprobs = [
            score[0].float().log_softmax(-1)[token].item() for score, token in zip(out.scores, ids, strict=True)
        ]
        finish = "stop" if ids[-1] in ends else "length"
        return Trace(prompt, ids, logprobs, [self.version] * len(ids), finish)

    @torch.no_grad()
    def sync_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncReport:
        began = time.perf_counter()
        offered = collect(named_tensors)
        held = dict(checkpoint_tensors(self.model))
        match(offered, held)
        for name, tensor in held.items():
            tensor.copy_(offered[name])
        size, digest = prove(dict(checkpoint_tensors(self.model)), offered)
        self.version = version
        return SyncReport(version, len(held), size, time.perf_counter() - began, digest)

    def close(self) -> None:
        del self.model
