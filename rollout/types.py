"""What a rollout worker takes and gives: `Sampling`, `Request`, `Trace`, `SyncReport`; every worker's base class."""

import abc
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

Progress = Callable[[int, int, int], None]
"""Called as progress(done_sequences, total_sequences, tokens_so_far) while a batch is generated."""


class WeightSyncError(ValueError):
    """The weights offered to an engine do not fit it, or did not arrive; the message says which and what to do."""


CHECKED_EVERY = 16
"""Whether a completion goes round in circles is looked at when its length is a multiple of this."""


def goes_round(ids: Sequence[int], tail: int) -> bool:
    """Whether the last `tail` tokens are one block of at most tail/8 tokens, over and over."""
    if len(ids) < tail:
        return False
    ids = ids[-tail:]
    return any(ids[period:] == ids[:-period] for period in range(1, tail // 8 + 1))


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    temperature: 0 is greedy. top_p: nucleus mass in (0, 1]. top_k: -1 is off. max_tokens: completion tokens at most.
    stop_token_ids: end a completion, in addition to the end tokens that the model folder names; the stop token
    is the completion's last token. ignore_eos: do not stop at the model folder's end tokens. stop_repetition: end a
    completion whose last so many tokens go round in circles (`goes_round`); 0 is off.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stop_repetition: int = 0


@dataclass(frozen=True)
class Trace:
    """One sampled completion; the three per-token lists have one entry per completion token.

    logprobs: natural log-probability of each token under the distribution it was drawn from (after temperature,
    top_p and top_k; under temperature 0, of the untempered distribution). versions: the weight version that drew it.
    finish_reason: "stop" (an end token), "length" (max_tokens), "repetition" (`Sampling.stop_repetition`), or
    "suspended": taken out of the engine before its end, and to be gone on with (`Request.begun`). routing: the experts
    of all its tokens [prompt and completion, sparse layers, top_k], int16, negative where the engine read no token,
    which is so of the last; None unless the worker records it.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    finish_reason: str
    routing: torch.Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Request:
    """One completion to draw, under a name of the caller's that no other running request has.

    begun: what was drawn of it before; its tokens are read again with the prompt, keep their logprobs and versions,
    and count towards sampling.max_tokens. What is drawn next depends on the weights, `seed` and the number of tokens
    in `begun`: the same request gives the same tokens, but a completion that was suspended goes on otherwise than one
    that ran through.
    """

    id: str
    prompt_ids: list[int]
    sampling: Sampling
    seed: int
    begun: Trace | None = None

    @property
    def drawn(self) -> int:
        """Tokens of the completion that are there already."""
        return 0 if self.begun is None else len(self.begun.completion_ids)

    @property
    def read(self) -> list[int]:
        """Tokens that the engine reads before it draws one."""
        return [*self.prompt_ids, *(self.begun.completion_ids if self.begun else ())]

    @property
    def next_seed(self) -> int:
        """The seed of the random generator that draws the remaining tokens."""
        return int(np.random.SeedSequence([self.seed, self.drawn]).generate_state(1)[0]) if self.drawn else self.seed

    def trace(
        self,
        ids: list[int],
        logprobs: list[float],
        versions: list[int],
        finish_reason: str,
        routing: torch.Tensor | None = None,
    ) -> Trace:
        """The trace of `begun` with the tokens that were drawn since; `routing` is of all its tokens."""
        if self.begun is not None:
            ids = self.begun.completion_ids + ids
            logprobs, versions = self.begun.logprobs + logprobs, self.begun.versions + versions
            if routing is not None and self.begun.routing is not None:
                drawn_from = len(self.begun.routing) - 1  # the last was drawn, and read only now
                routing[:drawn_from] = self.begun.routing[:-1]
        return Trace(self.prompt_ids, ids, logprobs, versions, finish_reason, routing)


@dataclass(frozen=True)
class SyncReport:
    """A proven weight sync: every tensor of the engine was read back and its checksum equals the one sent.

    seconds: whole sync, proof included. checksum: one hex digest over all names, dtypes, shapes and bytes.
    """

    version: int
    tensors: int
    bytes: int
    seconds: float
    checksum: str


class RolloutWorker(abc.ABC):
    """Draws completions from a policy and takes new weights for it, in place.

    Requests are added, the engine is advanced step by step, and completions come out as each ends; `generate` does it
    for a batch. Weights may be replaced while requests run: tokens drawn later carry the new version. One thread at
    a time.

    max_model_len: prompt and completion tokens of a sequence at most. version: of the weights served (0: the folder's).
    weights: the weights that the engine should have now, as `sync_weights` takes them, for an engine that replaces a
    lost one; to be set by whoever has them, if they can be read whenever this worker is called. keep_weights: have such
    an engine keep a copy of those synced last in the host's memory instead. on_restart: told in one line when an
    engine was replaced.
    """

    max_model_len: int
    version: int = 0
    weights: Callable[[], tuple[Iterable[tuple[str, torch.Tensor]], int]] | None = None
    keep_weights: bool = False
    on_restart: Callable[[str], None] | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        progress: Progress | None = None,
    ) -> list[Trace]:
        """Draw one completion per prompt (token ids), in prompt order; equal seeds and weights give equal tokens.

        Raises ValueError for requests that `add` refuses, for a number of seeds that differs from the number of
        prompts, and while added requests run.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need {len(prompts)} seeds, got {len(seeds)}")
        if self.unfinished:
            raise ValueError(f"{self.unfinished} requests are running: suspend or abort them before generate")
        traces: dict[str, Trace] = {}
        drawn = 0
        try:
            self.add(
                Request(str(place), list(prompt), sampling, seed)
                for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
            )
            while self.unfinished:
                for place, trace in self.step():
                    traces[place] = trace
                    drawn += len(trace.completion_ids)
                if progress is not None:
                    progress(len(traces), len(prompts), drawn + self.running_tokens)
        finally:
            self.suspend()  # interrupted: the next call must find an idle engine
        return [traces[str(place)] for place in range(len(prompts))]

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests; all of them or, if one is refused, none.

        Raises ValueError for a prompt of fewer than two tokens or one that leaves no room for sampling.max_tokens in
        the context, a begun trace that has sampling.max_tokens already, or the name of a running request.
        """
        requests = list(requests)
        names: set[str] = set()
        for request in requests:
            self._check(request)
            if request.id in names or request.id in self.running:
                raise ValueError(f"request {request.id} is running already: give each request a name of its own")
            names.add(request.id)
        self._add(requests)

    def _check(self, request: Request) -> None:
        prompt, sampling = request.prompt_ids, request.sampling
        if sampling.max_tokens < 1:
            raise ValueError(f"max_tokens is {sampling.max_tokens}: set it to 1 or more")
        if sampling.stop_repetition and sampling.stop_repetition < CHECKED_EVERY:
            raise ValueError(
                f"stop_repetition is {sampling.stop_repetition}: set it to {CHECKED_EVERY} or more, or to 0"
            )
        if len(prompt) < 2:
            raise ValueError(
                f"prompt {request.id} has {len(prompt)} token(s): give at least 2, e.g. a start token before the text"
            )
        if len(prompt) + sampling.max_tokens > self.max_model_len:
            raise ValueError(
                f"prompt {request.id} has {len(prompt)} tokens and may get {sampling.max_tokens} more, over the "
                f"context of {self.max_model_len}: shorten it, lower max_tokens, or raise max_model_len"
            )
        if request.drawn >= sampling.max_tokens:
            raise ValueError(
                f"request {request.id} goes on with {request.drawn} tokens, and max_tokens is {sampling.max_tokens}: "
                "raise max_tokens"
            )

    @property
    def unfinished(self) -> int:
        """Requests that were added and have neither ended nor been taken out."""
        return len(self.running)

    @property
    @abc.abstractmethod
    def running(self) -> Collection[str]:
        """Names of the unfinished requests, in the order in which they were added."""

    @property
    @abc.abstractmethod
    def running_tokens(self) -> int:
        """Completion tokens that the unfinished requests have by now, those of `begun` included."""

    @abc.abstractmethod
    def _add(self, requests: list[Request]) -> None:
        """`add` after its checks."""

    @abc.abstractmethod
    def step(self) -> list[tuple[str, Trace]]:
        """Advance the running requests by a few tokens each; (name, trace) of those that ended, maybe none."""

    def nudge(self) -> None:  # noqa: B027 - most never wait
        """Have a `step` that waits in another thread return; called from any thread."""

    @abc.abstractmethod
    def suspend(self, ids: Iterable[str] | None = None) -> list[tuple[str, Trace]]:
        """Take running requests (default: all) out of the engine with what they have; their caches are freed.

        (name, trace with finish_reason "suspended") in the order in which they were added; names that do not run, for
        they have ended, are passed over. Where the engine advances by itself, one may have ended since the last step:
        it comes as it ended, with its own finish_reason.
        """

    def abort(self, ids: Iterable[str]) -> None:
        """Drop running requests; names that do not run are passed over."""
        self.suspend(ids)

    @abc.abstractmethod
    def sync_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncReport:
        """Replace all weights in place and prove it; named_tensors is a whole checkpoint, by checkpoint names.

        Cached prefixes are dropped. Requests that run go on with the new weights over the caches and states that the
        old ones wrote (as PipelineRL, Piché et al. 2025, and Magistral, 2025, do); where prefixes are cached they are
        read again instead. Either way a token's logprob is that of the distribution that drew it. Raises
        WeightSyncError when a tensor is missing, unknown or misshapen: the old weights and version stay.
        """

    @abc.abstractmethod
    def sleep(self, keep_weights: bool = False) -> None:
        """Give the memory of caches and weights to others; the weights go to the host's memory if kept.

        `sync_weights` and `add` take back what they need. Weights that were not kept must be synced before anything is
        drawn. Raises ValueError while requests run, and EngineError for an engine that cannot.
        """

    @abc.abstractmethod
    def wake(self) -> None:
        """Take all memory back now."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free the engine's memory. The worker cannot be used afterwards."""
