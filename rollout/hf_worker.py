"""A worker on transformers' generate, behind the same interface: slow, a second opinion when debugging the engine."""

import time
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from transformers import StoppingCriteriaList

from deltarl.model import checkpoint_tensors, load_model
from deltarl.rollout.engine import EngineError, end_tokens, read_config
from deltarl.rollout.sync import collect, match, prove
from deltarl.rollout.types import CHECKED_EVERY, Request, RolloutWorker, SyncReport, Trace, goes_round


class HfWorker(RolloutWorker):
    """A `RolloutWorker` that generates one sequence at a time, without padding; arguments are `make_worker`'s."""

    def __init__(self, model_path: str | Path, *, dtype: str, max_model_len: int) -> None:
        read_config(model_path)
        self.max_model_len = max_model_len
        self._running: dict[str, Request] = {}
        self.end_tokens = end_tokens(model_path)
        self.model, _ = load_model(model_path, getattr(torch, dtype))
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @property
    def running(self) -> Collection[str]:
        return self._running.keys()

    @property
    def running_tokens(self) -> int:
        return sum(request.drawn for request in self._running.values())

    def _add(self, requests: list[Request]) -> None:
        self._running.update((request.id, request) for request in requests)

    def step(self) -> list[tuple[str, Trace]]:
        """Draw the whole completion of the request that was added first."""
        if not self._running:
            return []
        name = next(iter(self._running))
        trace = self.complete(self._running[name])
        del self._running[name]
        return [(name, trace)]

    def suspend(self, ids: Iterable[str] | None = None) -> list[tuple[str, Trace]]:
        wanted = set(self._running if ids is None else ids)
        taken = [request for name, request in self._running.items() if name in wanted]
        for request in taken:
            del self._running[request.id]
        return [(request.id, request.trace([], [], [], "suspended")) for request in taken]

    @torch.no_grad()
    def complete(self, request: Request) -> Trace:
        device, sampling, prompt = self.model.device, request.sampling, request.read
        ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self.end_tokens)}
        greedy = sampling.temperature == 0
        how = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": max(sampling.top_k, 0)}

        def stuck(ids: torch.Tensor, scores: object) -> torch.Tensor:
            completion = ids[0, len(request.prompt_ids) :].tolist()
            circling = sampling.stop_repetition and len(completion) % CHECKED_EVERY == 0
            return torch.tensor([bool(circling and goes_round(completion, sampling.stop_repetition))], device=device)

        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(request.next_seed)
            out = self.model.generate(
                torch.tensor([prompt], device=device),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=device),
                max_new_tokens=sampling.max_tokens - request.drawn,
                do_sample=not greedy,
                eos_token_id=sorted(ends) or None,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([stuck]),
                return_dict_in_generate=True,
                output_scores=True,
                **({} if greedy else how),
            )
        ids = out.sequences[0, len(prompt) :].tolist()
        logprobs = [
            score[0].float().log_softmax(-1)[token].item() for score, token in zip(out.scores, ids, strict=True)
        ]
        ran_out = len(ids) == sampling.max_tokens - request.drawn
        finish = "stop" if ids[-1] in ends else "length" if ran_out else "repetition"
        return request.trace(ids, logprobs, [self.version] * len(ids), finish)

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

    def sleep(self, keep_weights: bool = False) -> None:
        raise EngineError("transformers' generate keeps its memory: leave rollout.sleep off, or use engine vllm")

    def wake(self) -> None:
        """It never sleeps."""

    def close(self) -> None:
        del self.model
