"""What a rollout worker takes and gives: `Sampling`, `Trace`, `SyncReport`, and the base class of every worker."""

import abc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

Progress = Callable[[int, int, int], None]
"""Called as progress(done_sequences, total_sequences, tokens_so_far) while a batch is generated."""


class WeightSyncError(ValueError):
    """The weights offered to an engine do not fit it, or did not arrive; the message says which and what to do."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    temperature: 0 is greedy. top_p: nucleus mass in (0, 1]. top_k: -1 is off. max_tokens: completion tokens at most.
    stop_token_ids: end a completion, in addition to the end tokens that the model folder names; the stop token
    is the completion's last token. ignore_eos: do not stop at the model folder's end tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Trace:
    """One sampled completion; the three per-token lists have one entry per completion token.

    logprobs: natural log-probability of each token under the distribution it was drawn from (after temperature,
    top_p and top_k; under temperature 0, of the untempered distribution). versions: the weight version that drew it.
    finish_reason: "stop" (an end token) or "length" (max_tokens).
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    finish_reason: str


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

    max_model_len: prompt and completion tokens of a sequence at most. version: of the weights served (0: the folder's).
    """

    max_model_len: int
    version: int = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        progress: Progress | None = None,
    ) -> list[Trace]:
        """Draw one completion per prompt (token ids), in prompt order; equal seeds and weights give equal tokens.

        Raises ValueError for a prompt of fewer than two tokens, a prompt that leaves no room for
        sampling.max_tokens in the context, or a number of seeds that differs from the number of prompts.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need {len(prompts)} seeds, got {len(seeds)}")
        if sampling.max_tokens < 1:
            raise ValueError(f"max_tokens is {sampling.max_tokens}: set it to 1 or more")
        for index, prompt in enumerate(prompts):
            if len(prompt) < 2:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} token(s): give at least 2, e.g. a start token before the text"
                )
            if len(prompt) + sampling.max_tokens > self.max_model_len:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens and may get {sampling.max_tokens} more, over the context "
                    f"of {self.max_model_len}: shorten it, lower max_tokens, or raise max_model_len"
                )
        if not prompts:
            return []
        return self._generate([list(prompt) for prompt in prompts], sampling, list(seeds), progress)

    @abc.abstractmethod
    def _generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[int], progress: Progress | None
    ) -> list[Trace]:
        """`generate` after its checks."""

    @abc.abstractmethod
    def sync_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncReport:
        """Replace all weights in place and prove it; named_tensors is a whole checkpoint, by checkpoint names.

        Raises WeightSyncError when a tensor is missing, unknown or misshapen: the old weights and version stay.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Free the engine's memory. The worker cannot be used afterwards."""
