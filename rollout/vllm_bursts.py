"""Several decode steps of vLLM's model runner for one of its scheduler.

What vLLM does for each request around a step (scheduling it, handing out what was drawn) is then done once for several
tokens. The runner goes through the steps one by one, each as vLLM would have asked for it.
"""

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, LogprobsLists, ModelRunnerOutput

from deltarl.rollout.vllm_states import PENDING, LayerStates

IN_FLIGHT = 2


@dataclass
class Burst(SchedulerOutput):
    """`length` steps in which the same requests draw one more token each, and nothing else happens.

    num_scheduled_tokens are those of all steps together; new blocks, finished requests and the like come with the
    first.
    """

    length: int = 1

    def step(self, place: int) -> SchedulerOutput:
        """The step at this place, from 0, for the runner."""
        names, cached = self.num_scheduled_tokens, self.scheduled_cached_reqs
        one = replace(
            self, length=1, num_scheduled_tokens=dict.fromkeys(names, 1), total_num_scheduled_tokens=len(names)
        )
        if not place:
            return one
        later = replace(
            cached,
            all_token_ids={},
            new_block_ids=[None] * len(names),
            num_computed_tokens=[count + place for count in cached.num_computed_tokens],
            num_output_tokens=[count + place for count in cached.num_output_tokens],
        )
        return replace(
            one,
            scheduled_cached_reqs=later,
            finished_req_ids=set(),
            preempted_req_ids=set(),
            new_block_ids_to_zero=None,
        )


class BurstOutput(AsyncModelRunnerOutput):
    """What the steps of a burst give, once it is asked for."""

    def __init__(self, outputs: list[AsyncModelRunnerOutput]) -> None:
        self.outputs = outputs

    def get_output(self) -> ModelRunnerOutput:
        return together([output.get_output() for output in self.outputs])


def together(outputs: list[ModelRunnerOutput]) -> ModelRunnerOutput:
    """The outputs of successive steps of the same requests as one, with a token of each step for each request."""
    first = outputs[0]
    if any(output.req_ids != first.req_ids for output in outputs):
        raise RuntimeError("vLLM's model runner put the requests of a burst into another order")
    steps, logprobs = len(outputs), [output.logprobs for output in outputs]
    parts = zip(*((x.logprob_token_ids, x.logprobs, x.sampled_token_ranks) for x in logprobs), strict=True)
    begins = list(range(0, steps * (len(first.req_ids) + 1), steps))
    return replace(
        first,
        sampled_token_ids=[
            [token for (token,) in drawn] for drawn in zip(*(x.sampled_token_ids for x in outputs), strict=True)
        ],
        logprobs=LogprobsLists(*(np.stack(part, 1).reshape(-1, *part[0].shape[1:]) for part in parts), begins),
    )


class PendingTokens:
    """Tells the layers, on the device, which step of a burst comes next (`deltarl.kernels.Pending`)."""

    def __init__(self, runner: Any) -> None:
        layers = runner.vllm_config.compilation_config.static_forward_context.values()
        self.place = next((layer.place for layer in layers if isinstance(layer, LayerStates)), None)
        if self.place is not None:
            most = runner.vllm_config.additional_config[PENDING]
            table = [[[count, stays] for stays in (0, 1)] for count in range(most + 1)]
            self.table = torch.tensor(table, dtype=torch.int32, device=self.place.device)

    def come(self, count: int, stays: bool) -> None:
        """So many tokens are pending, and whether that of the next step will be, too."""
        if self.place is not None:
            self.place.copy_(self.table[count, int(stays)])


class BurstRunner:
    """Lets vLLM's model runner take a `Burst`: takes the place of its `execute_model` and `sample_tokens`.

    Never are more than `IN_FLIGHT` steps, or bursts of `DecodeSteps`, begun on the GPU: that many has vLLM buffers for,
    which the GPU reads from the host's memory.
    """

    def __init__(self, runner: Any) -> None:
        self.runner, self.execute, self.sample = runner, runner.execute_model, runner.sample_tokens
        self.burst: Burst | None = None
        self.on_gpu = torch.cuda.is_available()
        self.begun: deque[torch.cuda.Event] = deque()
        self.pending = PendingTokens(runner)
        self.steps = decode_steps(runner, self.pending) if self.on_gpu else None
        self.graph: Any = None
        runner.execute_model, runner.sample_tokens = self.execute_model, self.sample_tokens

    def execute_model(self, scheduled: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        self.burst = scheduled if isinstance(scheduled, Burst) and scheduled.length > 1 else None
        if len(self.begun) == IN_FLIGHT:
            self.begun.popleft().synchronize()
        alone = self.burst is not None and self.steps is not None
        self.graph = self.steps.graph(len(scheduled.num_scheduled_tokens)) if alone else None
        self.pending.come(0, self.graph is not None)
        return self.execute(scheduled if self.burst is None else self.burst.step(0), *args, **kwargs)

    def sample_tokens(self, grammar_output: Any) -> Any:
        if self.burst is None:
            return self._sample(grammar_output)
        if self.graph is not None:
            batch = self.runner.execute_model_state.input_batch
            output = self.steps.take(self.sample(grammar_output), batch, self.graph, self.burst.length - 1)
            self._begin()
            return output
        burst, outputs = self.burst, [self._sample(grammar_output)]
        for place in range(1, burst.length):
            self.execute_model(burst.step(place))
            outputs.append(self._sample(None))
        return together(outputs) if isinstance(outputs[0], ModelRunnerOutput) else BurstOutput(outputs)

    def _sample(self, grammar_output: Any) -> Any:
        output = self.sample(grammar_output)
        self._begin()
        return output

    def _begin(self) -> None:
        """Note that a step more, or a burst, is under way."""
        if self.on_gpu:
            event = torch.cuda.Event(blocking=True)
            event.record()
            self.begun.append(event)


def decode_steps(runner: Any, pending: PendingTokens) -> Any:
    """What takes the later steps of bursts on this model runner; None where the runner must."""
    from deltarl.rollout.vllm_decode import DecodeSteps

    return DecodeSteps(runner, pending) if DecodeSteps.fit(runner) else None


def take_bursts(worker: Any) -> None:
    """Called in each of an engine's ranks with vLLM's worker."""
    BurstRunner(worker.model_runner)
