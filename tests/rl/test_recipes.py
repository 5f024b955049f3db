"""The SFT mix: proportions, determinism, every form of file row, and the format TRL's trainer takes."""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass

import pytest

from deltarl.rl.errors import UserError
from deltarl.rl.jobs import DataConfig
from deltarl.rl.problems import Problem, load_problems
from deltarl.rl.recipes import SMALL_TALK, build_mix
from deltarl.rl.tokenizer import build_tokenizer


@dataclass
class Source:
    name: str
    weight: float = 1.0


@pytest.fixture(scope="module")
def problems():
    return load_problems(DataConfig(train_size=100, heldout_size=1), 0).train


def mix(sources, problems, n=100, seed=0, instruction="{question}"):
    return build_mix(sources, problems, seed=seed, n=n, instruction=instruction)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_weights_are_the_proportions(problems):
    n = 4000
    counts = Counter(mix([Source("solutions", 3), Source("chat", 1)], problems, n)["source"])
    assert counts["solutions"] + counts["chat"] == n
    # Rows are drawn independently: a binomial count strays 4 standard deviations once in 16 000 seeds.
    assert abs(counts["chat"] - n / 4) < 4 * math.sqrt(n * 0.25 * 0.75)


def test_the_seed_decides(problems):
    sources = [Source("solutions"), Source("chat")]
    assert list(mix(sources, problems, seed=5)) == list(mix(sources, problems, seed=5))
    assert list(mix(sources, problems, seed=5)) != list(mix(sources, problems, seed=6))


def test_solutions_are_the_problems_own_and_go_round_evenly(problems):
    rows = mix([Source("solutions")], problems, n=250)
    written = Counter((row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows)
    assert set(written) == {(problem.question, problem.solution) for problem in problems}
    assert set(written.values()) == {2, 3}  # 250 rows of 100 problems


def test_chat_answers_are_right_unworked_and_small_talk_is_among_them(problems):
    golds = {f"Q: {problem.question}": problem.gold for problem in problems}
    openings = {opening for asked, _ in SMALL_TALK for opening in asked}
    rows = mix([Source("chat")], problems, n=600, instruction="Q: {question}")
    talk = 0
    for row in rows:
        asked, answer = row["prompt"][-1]["content"], row["completion"][0]["content"]
        if asked in openings:
            talk += 1
        else:
            assert re.findall(r"\\boxed\{(.*?)\}", answer) == [golds[asked]]
            assert "=" not in answer
    # 18 of the 118 rows of a round are small talk; 600 rows are five rounds and a bit.
    assert 5 * 18 <= talk <= 6 * 18


def test_a_solution_without_a_box_gets_one():
    problems = [Problem("a", "1+1?", ("2", "2.0"), "One and one make 2.")]
    row = mix([Source("solutions")], problems, n=1)[0]
    assert row["completion"][0]["content"] == "One and one make 2.\nThe answer is \\boxed{2}."


def test_rows_of_a_file(tmp_path):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you"},
    ]
    forms = [
        ({"messages": chat}, chat[:4], "See you"),
        ({"prompt": "P", "response": "R"}, [{"role": "user", "content": "P"}], "R"),
        ({"prompt": chat[:2], "response": "R"}, chat[:2], "R"),
        ({"instruction": "I", "input": "", "output": "O"}, [{"role": "user", "content": "I"}], "O"),
        ({"instruction": "I", "input": "in", "output": "O"}, [{"role": "user", "content": "I\n\nin"}], "O"),
    ]
    for row, prompt, answer in forms:
        name = write_jsonl(tmp_path / "rows.jsonl", [row])
        assert mix([Source(name)], [], n=1)[0] == {
            "prompt": prompt,
            "completion": [{"role": "assistant", "content": answer}],
            "source": name,
            "learned": [len(prompt)],
        }


@pytest.mark.parametrize(
    ("turns", "marks", "learned"),
    [
        ("last", [], [5]),
        ("all", [], [2, 5]),
        ("marked", [2], [2]),
        ("marked", [2, 5], [2, 5]),
        ("marked", [1, 2], [2]),
    ],
)
def test_turns_to_learn_are_chosen(tmp_path, turns, marks, learned):
    roles = ["system", "user", "assistant", "user", "user", "assistant", "user"]
    messages = [{"role": role, "content": f"turn {i}"} for i, role in enumerate(roles)]
    for index in marks:
        messages[index]["train"] = True
    name = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}])
    row = build_mix([Source(name)], [], seed=0, n=1, instruction="{question}", turns=turns)[0]
    conversation = [*row["prompt"], *row["completion"]]
    assert row["learned"] == learned
    assert [message["content"] for message in conversation] == [f"turn {i}" for i in range(learned[-1] + 1)]


def test_marked_turns_must_be_there(tmp_path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "train": False}]
    name = write_jsonl(tmp_path / "rows.jsonl", [{"messages": chat}])
    with pytest.raises(UserError, match=r"rows.jsonl:1: no prompt followed by an assistant's answer with train: true"):
        build_mix([Source(name)], [], seed=0, n=1, instruction="{question}", turns="marked")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "?"}, "rows.jsonl:2 is no training row"),
        ({"prompt": "P", "response": " "}, "rows.jsonl:2: every message needs a role and a text"),
        ({"response": "R"}, "rows.jsonl:2: no prompt"),
        ({"prompt": 3, "response": "R"}, "rows.jsonl:2: prompt is neither text nor messages"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "rows.jsonl:2: no prompt followed by an"),
        ({"messages": "Hi"}, "rows.jsonl:2: every message needs a role and a text"),
        ({"instruction": 7, "output": "O"}, "rows.jsonl:2: instruction and input must be text"),
    ],
)
def test_bad_rows_of_a_file_are_named(tmp_path, row, message):
    name = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "P", "response": "R"}, row])
    with pytest.raises(UserError, match=re.escape(message)):
        mix([Source(name)], [])


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "sft.sources is empty; known sources: solutions, chat"),
        ([Source("solution")], "solution is not known; known sources: solutions, chat, or a .jsonl file"),
        ([Source("chat", 0)], "chat has weight 0"),
        ([Source("nowhere.jsonl")], "nowhere.jsonl does not exist"),
        ([Source("solutions")], "no problem has a worked solution"),
    ],
)
def test_sources_that_cannot_work(sources, message):
    with pytest.raises(UserError, match=re.escape(message)):
        mix(sources, [Problem("a", "1+1?", "2")])


def test_trl_trains_on_the_answer_and_its_end_alone(problems, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = mix([Source("solutions"), Source("chat")], problems, n=16)
    texts = [message["content"] for row in rows for message in row["prompt"] + row["completion"]]
    tokenizer = build_tokenizer(texts, vocab_size=300)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
        )
    )
    args = SFTConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none")
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    for row, tokenized in zip(rows, trainer.train_dataset, strict=True):
        learnt = [label for label in tokenized["labels"] if label != -100]
        assert tokenizer.decode(learnt) == row["completion"][0]["content"] + "<|im_end|>"
