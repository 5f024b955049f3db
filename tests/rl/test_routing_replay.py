"""The engine's choice of experts, recorded token by token, makes a learner that would choose others agree with it."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from deltarl.model import HybridForCausalLM, build_model, save_checkpoint
from deltarl.rl.forward import enable_scoring, packed_logprobs
from deltarl.rl.packing import make_pack
from deltarl.rollout import EngineError, Sampling, Trace, make_worker
from deltarl.rollout.types import Request

VOCAB = 320
PROMPTS = [[5, 9, 3], [7, 2], [11, 4, 8, 1, 30]]
SAMPLING = Sampling(max_tokens=24, ignore_eos=True)
# fp32 in engine and learner: sums in other orders.
SAME = 1e-4


def saved(size: str, folder) -> HybridForCausalLM:
    torch.manual_seed(0)
    model = build_model("kda", size, vocab_size=VOCAB).eval()
    words = {f"t{index}": index for index in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")))
    save_checkpoint(model, tokenizer, folder)
    return model


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A learner whose routers prefer other experts than its engine's, traces, and one of them drawn in two parts."""
    folder = tmp_path_factory.mktemp("model") / "moe"
    model = saved("4m-a2m", folder)
    worker = make_worker(folder, max_model_len=64, max_num_seqs=4, gpu_memory_utilization=0.02, record_routing=True)
    try:
        traces = worker.generate(PROMPTS, SAMPLING, seeds=[1, 2, 3])
        worker.add([Request("halves", PROMPTS[0], SAMPLING, 1)])
        while worker.running_tokens < 9:
            worker.step()
        ((_, begun),) = worker.suspend()
        worker.add([Request("halves", PROMPTS[0], SAMPLING, 1, begun)])
        ended = []
        while not ended:
            ended = worker.step()
    finally:
        worker.close()
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias.copy_(torch.linspace(-1, 1, 8))
    enable_scoring(model)
    return model, [*traces, ended[0][1]]


@torch.no_grad()
def largest_gap(model: HybridForCausalLM, traces: list[Trace]) -> float:
    scored = packed_logprobs(model, make_pack(traces, range(len(traces)))).logprobs
    return (scored - torch.tensor([logprob for trace in traces for logprob in trace.logprobs])).abs().max().item()


def test_every_token_that_was_read_has_its_experts(drawn) -> None:
    _, traces = drawn
    for trace in traces:
        assert trace.routing.shape == (len(trace.prompt_ids) + len(trace.completion_ids), 3, 2)
        assert trace.routing[:-1].min() >= 0 and trace.routing.max() < 8
        assert (trace.routing[:-1, :, 0] != trace.routing[:-1, :, 1]).all()


def test_replay_makes_the_learner_agree(drawn) -> None:
    model, traces = drawn
    assert largest_gap(model, [replace(trace, routing=None) for trace in traces]) > 100 * SAME
    assert largest_gap(model, traces) <= SAME


def test_only_a_mixture_of_experts_has_a_routing_to_record(tmp_path) -> None:
    saved("2m", tmp_path / "dense")
    with pytest.raises(EngineError, match="no Kimi Linear mixture of experts"):
        make_worker(tmp_path / "dense", record_routing=True)
    with pytest.raises(EngineError, match="engine hf does not record"):
        make_worker(tmp_path / "dense", engine="hf", record_routing=True)
