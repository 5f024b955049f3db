"""What `DecodeSteps` gives of a burst, beside the runner's own outputs of the same steps."""

import numpy as np
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

from deltarl.rollout.vllm_bursts import together
from deltarl.rollout.vllm_decode import joined

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
