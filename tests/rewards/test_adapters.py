import asyncio
import importlib.util
import inspect
import pickle

import numpy as np
import pytest

from deltarl.rewards import (
    VerifierHost,
    VerifierLoadError,
    as_async_trl_reward,
    as_trl_reward,
    from_trl_reward,
    load_verifier,
)
from deltarl.rewards.adapters import verl
from deltarl.rewards.math import MathVerifier


def half_for_trying(prompts, completions, gold, **_):
    return [None if g == "?" else 1.0 if g in c else 0.5 for c, g in zip(completions, gold, strict=True)]


def test_verifier_as_trl_reward():
    reward = as_trl_reward(MathVerifier(), gold_column="answer")
    completions = ["\\boxed{1/2}", [{"role": "assistant", "content": "\\boxed{3}"}], "\\boxed{1}"]
    scores = reward(prompts=["p"] * 3, completions=completions, answer=["0.5", "4", ""], trainer_state=object())
    assert scores == [1.0, 0.0, None]
    assert reward.__name__ == "math"
    with pytest.raises(ValueError, match="no column 'answer'"):
        reward(prompts=["p"], completions=["x"], gold=["1"])


def test_host_as_trl_reward():
    with VerifierHost("math") as host:
        reward = as_trl_reward(host)
        assert reward(prompts=["p"] * 2, completions=["\\boxed{1}", "\\boxed{2}"], gold=["1", "1"]) == [1.0, 0.0]


def test_trl_reward_as_verifier():
    verifier = pickle.loads(pickle.dumps(from_trl_reward(half_for_trying)))
    verdicts = [
        verifier.verify(r, g, meta={"prompt": "p", "row": 1}) for r, g in (("a 3", "3"), ("a", "3"), ("a", "?"))
    ]
    assert [(v.score, v.status) for v in verdicts] == [(1.0, "correct"), (0.5, "incorrect"), (None, "gold_error")]


async def awaited_half(prompts, completions, gold, **_):
    await asyncio.sleep(0)
    return half_for_trying(prompts, completions, gold)


def test_async_trl_reward_as_verifier():
    verifier = pickle.loads(pickle.dumps(from_trl_reward(awaited_half, name="half")))
    assert (verifier.name, verifier.verify("a 3", "3", meta={}).status) == ("half", "correct")
    assert verifier.verify("a", "3", meta={}).score == 0.5


class Echo:
    """Scores 1 and shows its meta."""

    name, version = "echo", "1"

    def __init__(self):
        self.seen = []

    def verify(self, response, gold, *, meta):
        self.seen.append(dict(meta))
        return MathVerifier().verify(response, gold, meta=meta)


def test_prompt_and_columns_reach_the_verifier_but_tokens_do_not():
    echo = Echo()
    reward = as_trl_reward(echo)
    columns = {"level": [1, 2], "completion_ids": [[5], [6]], "trainer_state": object()}
    reward(prompts=["p", "q"], completions=["\\boxed{1}", "2"], gold=["1", "2"], **columns)
    assert echo.seen == [{"prompt": "p", "level": 1}, {"prompt": "q", "level": 2}]


def test_trl_trainer_takes_both_kinds_of_reward_function(tmp_path):
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = {word: i for i, word in enumerate(["<pad>", "<end>", *map(str, range(10))])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<pad>")), pad_token="<pad>", eos_token="<end>"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), pad_token_id=0, eos_token_id=1, **sizes))
    rows = [{"prompt": str(n), "answer": "7" if n else "\\frac{"} for n in (0, 1)]
    with VerifierHost("exact") as plain, VerifierHost("math") as host:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=[as_trl_reward(plain, "answer"), as_async_trl_reward(host, "answer")],
            args=GRPOConfig(
                output_dir=str(tmp_path),
                per_device_train_batch_size=8,
                num_generations=4,
                max_completion_length=1,
                max_steps=1,
                logging_steps=1,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
        counts = host.counts()
    logged = trainer.state.log_history[0]
    assert 0 <= logged["rewards/exact/mean"] <= 1
    assert 0 <= logged["rewards/math/mean"] <= 1
    assert counts["gold_error"] == 4
    assert sum(counts.values()) == 8


def test_async_reward_scores_as_the_plain_one():
    with VerifierHost("math", workers=2) as host:
        reward = as_async_trl_reward(host)
        assert inspect.iscoroutinefunction(reward)
        call = {"prompts": ["p"] * 3, "completions": ["\\boxed{1}", "\\boxed{2}", "1"], "gold": ["1", "1", ""]}
        assert asyncio.run(reward(**call)) == as_trl_reward(host)(**call) == [1.0, 0.0, None]


def test_verl_compute_score():
    call = {"data_source": "math", "extra_info": {"split": "test", "index": 0, "num_turns": None}}
    right = verl.compute_score(solution_str="so \\boxed{0.5}", ground_truth="1/2", **call)
    assert right == {"score": 1.0, "acc": 1.0, "pred": "0.5", "status": "correct"}
    silent = verl.compute_score("math", "I cannot tell what the answer to this would be.", "1/2")
    assert silent == {"score": 0.0, "acc": 0.0, "pred": "", "status": "no_answer"}
    arguments = {"options": {"extraction": "strict"}, "reward_router_address": "unused", "reward_model_tokenizer": None}
    assert verl.compute_score("math", "the answer is 3", 3)["score"] == 1.0
    assert verl.compute_score("math", "the answer is 3", 3, **arguments)["status"] == "no_answer"
    assert verl.compute_score("math", "\\boxed{4}", np.array(["3", "4"], dtype=object))["score"] == 1.0
    for unusable in (None, "", "\\frac{"):
        with pytest.raises(ValueError, match="unusable"):
            verl.compute_score("math", "\\boxed{4}", unusable)
    with pytest.raises(VerifierLoadError, match="did you mean math"):
        verl.compute_score("math", "\\boxed{4}", "4", verifier="maths")


def test_verl_batch_by_file_path():
    spec = importlib.util.spec_from_file_location("custom_module", verl.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    scores = module.compute_score_batch(
        data_sources=np.array(["a", "b"], dtype=object),
        solution_strs=["\\boxed{1}", "\\boxed{1}"],
        ground_truths=["1", "2"],
        extra_infos=[{"rollout_reward_scores": {}}, {}],
        workers=1,
    )
    assert [row["score"] for row in scores] == [1.0, 0.0]
    assert {tuple(row) for row in scores} == {("score", "acc", "pred", "status")}, (
        "verl wants the same keys in each row"
    )


def test_exact_and_numeric():
    exact = load_verifier("exact")
    assert [exact.verify(r, "a b", meta={}).status for r in (" a  b\n", "A b", "")] == [
        "correct",
        "incorrect",
        "no_answer",
    ]
    assert exact.verify("a", " ", meta={}).status == "gold_error"
    numeric = load_verifier("numeric")
    assert [numeric.verify(r, "1,234.5", meta={}).status for r in ("is 1234.50", "1234.5 or 3", "none")] == [
        "correct",
        "incorrect",
        "no_answer",
    ]
    assert numeric.verify("3", "three", meta={}).status == "gold_error"
    assert numeric.verify("9" * 2000, "3", meta={}).status == "limit"
