"""What `DecodeSteps` gives of a burst, beside the runner's own outputs of the same steps; and what layers are told."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

from deltarl.rollout.engine import pending_room
from deltarl.rollout.vllm_bursts import PendingTokens, together
from deltarl.rollout.vllm_decode import joined
from deltarl.rollout.vllm_scheduler import LONGEST_BURST
from deltarl.rollout.vllm_states import LayerStates, pending_place

NAMES = ["b", "a", "c"]


def step(tokens: list[int], logprobs: list[float], ranks: list[int]) -> ModelRunnerOutput:
    found = LogprobsLists(np.array(tokens)[:, None], np.array(logprobs, np.float32)[:, None], np.array(ranks))
    index = {name: place for place, name in enumerate(NAMES)}
    return ModelRunnerOutput(NAMES, index, [[token] for token in tokens], found)


STEPS = [
    ([5, 6, 7], [-1, -2, -3], [1, 2, 3]),
    ([8, 9, 1], [-4, -5, -6], [4, 5, 6]),
    ([2, 3, 4], [-7, -8, -9], [7, 8, 9]),
]


def test_a_burst_s_output_is_what_its_steps_give_together() -> None:
    later = [np.array(part).T for part in zip(*STEPS[1:], strict=True)]
    found = joined(step(*STEPS[0]), later[0], later[1].astype(np.float32), later[2])
    expected = together([step(*each) for each in STEPS])
    assert found.req_ids == expected.req_ids and found.req_id_to_index == expected.req_id_to_index
    assert found.sampled_token_ids == expected.sampled_token_ids == [[5, 8, 2], [6, 9, 3], [7, 1, 4]]
    for ours, theirs in zip(found.logprobs, expected.logprobs, strict=True):
        assert np.array_equal(ours, theirs)


def test_a_request_s_part_of_it_can_be_taken_out() -> None:
    later = [np.array(part).T for part in zip(*STEPS[1:], strict=True)]
    found = joined(step(*STEPS[0]), later[0], later[1].astype(np.float32), later[2])
    part = found.logprobs.slice_request(1, 3)
    assert part.logprob_token_ids.ravel().tolist() == [6, 9, 3]
    assert part.logprobs.ravel().tolist() == [-2, -5, -8]


def model_of(additional_config: dict) -> tuple[SimpleNamespace, LayerStates]:
    """A model runner's settings, and the states of a model made under them."""
    vllm_config = SimpleNamespace(
        additional_config=additional_config,
        cache_config=SimpleNamespace(enable_prefix_caching=False),
        compilation_config=SimpleNamespace(static_forward_context={"attention": object()}),
        scheduler_config=SimpleNamespace(max_num_seqs=5),
    )
    states = LayerStates(None, vllm_config, "states", pending_place(vllm_config))
    return SimpleNamespace(vllm_config=vllm_config), states


@pytest.mark.parametrize("count", [0, 1, LONGEST_BURST - 1])
@pytest.mark.parametrize("stays", [False, True])
def test_layers_are_told_which_step_of_a_burst_comes(count, stays) -> None:
    runner, states = model_of(pending_room())
    layers = [states.room(2, 24) for _ in range(2)]
    PendingTokens(runner).come(count, stays)
    for layer in layers:
        assert layer.place.tolist() == [count, stays] and layer.place.dtype == torch.int32
        assert layer.tokens.shape == (5, 2, LONGEST_BURST - 1, 24) and layer.tokens.dtype == torch.float32
    assert layers[0].tokens.data_ptr() != layers[1].tokens.data_ptr()


def test_without_bursts_on_a_gpu_every_step_writes_the_states() -> None:
    runner, states = model_of({})
    assert states.room(2, 24) is None
    PendingTokens(runner).come(3, True)
