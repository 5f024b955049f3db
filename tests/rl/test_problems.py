"""Problems: ground truth, worked solutions, splits without overlap, and errors that name the row."""

import json
import math
import os
import re
import subprocess
import sys
from fractions import Fraction

import pytest

from deltarl.rewards import VerifierHost, VerifierSpec
from deltarl.rl.errors import UserError
from deltarl.rl.jobs import DataConfig
from deltarl.rl.problems import Problem, drop_bad_golds, load_problems, normalised, user_messages
from deltarl.rl.procedural import LEVELS, TASKS

ALL_TASKS = dict.fromkeys(TASKS, 1.0)
# Left sides as the worked solutions write them: integers joined by operators, nothing else.
ARITHMETIC = re.compile(r"-?\d+(?:[-+*/]-?\d+)*")


def procedural(seed=0, **settings):
    return load_problems(DataConfig(**{"train_size": 200, "heldout_size": 40, "tasks": ALL_TASKS} | settings), seed)


def write_jsonl(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def arithmetic(text):
    """The value of integers joined by + - * /, products before sums, exactly."""
    assert ARITHMETIC.fullmatch(text), text
    total = Fraction(0)
    for sign, term in re.findall(r"(^|[-+])(-?\d+(?:[*/]-?\d+)*)", text):
        first, *rest = re.split(r"([*/])", term)
        value = Fraction(int(first))
        for operator, factor in zip(rest[::2], rest[1::2], strict=True):
            value = value * int(factor) if operator == "*" else value / int(factor)
        total += -value if sign == "-" else value
    return total


def true_answer(problem):
    """The answer recomputed from the question's text alone."""
    numbers = [int(number) for number in re.findall(r"\d+", problem.question)]
    task = problem.meta["task"]
    if task == "chain_sum":
        return arithmetic(re.search(r"[-+\d]+\d", problem.question).group())
    if task == "product":
        return numbers[0] * numbers[1]
    if task == "gcd":
        return math.gcd(*numbers)
    a, sign, b, c = re.search(r"(\d+)\*[a-z]([-+])(\d+)=(-?\d+)", problem.question).groups()
    return Fraction(int(c) - int(sign + b), int(a))


@pytest.mark.parametrize("difficulty", range(1, LEVELS + 1))
def test_gold_is_the_answer_to_the_question(difficulty):
    for problem in procedural(difficulty=difficulty).train:
        assert true_answer(problem) == int(problem.gold), problem


@pytest.mark.parametrize("difficulty", range(1, LEVELS + 1))
def test_every_written_step_is_true_and_the_last_gives_the_box(difficulty):
    for problem in procedural(difficulty=difficulty).train:
        body, _, box = problem.solution.partition(". ")
        assert box == f"\\boxed{{{problem.gold}}}"
        for step in body.split("; "):
            sides = [side for side in step.split("=") if not re.search("[a-z]", side)]
            assert sides
            assert len({arithmetic(side) for side in sides}) == 1, problem.solution
        if problem.meta["task"] != "gcd":
            assert body.endswith(f"={problem.gold}")


def test_questions_and_easy_solutions_are_short():
    # A digit, an operator and a letter are at most one token each, so characters bound tokens from above.
    problems = procedural(difficulty=1).train
    assert max(len(problem.question) for problem in problems) <= 40
    assert max(len(problem.solution) for problem in problems) <= 80


def test_no_operands_or_questions_twice_within_or_across_the_split():
    train, heldout, report = procedural(train_size=400, heldout_size=100)
    problems = train + heldout
    assert (report["train"], report["heldout"]) == (len(train), len(heldout)) == (400, 100)
    keys = {(problem.meta["task"], tuple(problem.meta["operands"])) for problem in problems}
    assert len(keys) == len({normalised(problem.question) for problem in problems}) == 500
    assert len({problem.id for problem in problems}) == 500


def test_operands_do_not_depend_on_the_order_of_terms():
    for problem in procedural(tasks={"chain_sum": 1}).train:
        terms = re.findall(r"[-+]?\d+", problem.question)
        assert sorted(int(term) for term in terms) == problem.meta["operands"]


def test_the_seed_decides_and_neighbouring_seeds_share_little():
    assert procedural(seed=3) == procedural(seed=3)
    first, second = (
        {tuple(problem.meta["operands"]) for problem in procedural(seed=seed, difficulty=5).train} for seed in (3, 4)
    )
    # Difficulty 5 has millions of problems, so that more than a few in common would mean that streams overlap.
    assert len(first & second) <= 3


def test_heldout_stays_when_training_grows():
    assert procedural(train_size=100).heldout == procedural(train_size=300).heldout


def test_tasks_come_in_proportion_to_their_weights():
    train = procedural(train_size=120, tasks={"chain_sum": 3, "gcd": 1}).train
    assert [sum(problem.meta["task"] == task for problem in train) for task in ("chain_sum", "gcd")] == [90, 30]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": {"chainsum": 1}}, "chainsum, which does not exist; known tasks: chain_sum"),
        ({"tasks": {"chain_sum": 0}}, "weight above 0"),
        ({"tasks": {}}, "at least one task"),
        ({"difficulty": 99}, "choose 1 to 5"),
        ({"train_size": None}, "set data.train_size"),
        ({"heldout": "test"}, "leave data.heldout out"),
        ({"tasks": {"gcd": 1}, "train_size": 5000}, "gcd has too few distinct problems at difficulty 1"),
    ],
)
def test_procedural_settings_that_cannot_work(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        procedural(**settings)


GSM8K_ROW = {
    "question": "Natalia sold clips to 48 friends, and half as many in May. How many?",
    "answer": "In May she sold 48/2 = <<48/2=24>>24 clips.\nShe sold 48+24 = <<48+24=72>>72 clips.\n#### 72",
}


def test_gsm8k_rows(tmp_path):
    rows = [GSM8K_ROW, {"question": "2 and 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}]
    train, heldout, report = load_problems(
        DataConfig(source=write_jsonl(tmp_path / "g.jsonl", rows), heldout_size=1), 0
    )
    problem = next(p for p in train + heldout if p.gold == "72")
    assert problem.solution == "In May she sold 48/2 = 24 clips.\nShe sold 48+24 = 72 clips."
    assert problem.id == f"{tmp_path / 'g.jsonl'}:1"
    assert (report["rows_read"], len(train), len(heldout)) == (2, 1, 1)


def test_fields_are_found_or_named(tmp_path):
    rows = [
        {"problem": "1+1?", "final_answer": 2, "level": 3, "solution": "1+1=2"},
        {"prompt": "half of 1?", "gold": ["1/2", "0.5"]},
    ]
    train, heldout, _ = load_problems(DataConfig(source=write_jsonl(tmp_path / "a.jsonl", rows), heldout_size=1), 0)
    by_question = {problem.question: problem for problem in train + heldout}
    assert by_question["1+1?"].gold == "2"
    assert by_question["1+1?"].solution == "1+1=2"
    assert by_question["1+1?"].meta["level"] == 3
    assert by_question["half of 1?"].gold == ("1/2", "0.5")

    named = [{"answer": "no", "q": f"{i}+1?", "a": str(i + 1)} for i in range(2)]
    cfg = DataConfig(
        source=write_jsonl(tmp_path / "b.jsonl", named), question_field="q", gold_field="a", heldout_size=1
    )
    assert {problem.gold for problem in [*load_problems(cfg, 0).train, *load_problems(cfg, 0).heldout]} == {"1", "2"}


def test_duplicates_and_overlap_are_dropped_and_counted(tmp_path):
    train_rows = [{"question": f"What is {i} + 1?", "answer": i + 1} for i in range(10)]
    train_rows += [{"question": "what  is 3 +1?", "answer": 4}]
    heldout_rows = [{"question": "What is 5+1?", "answer": 6}, {"question": "What is 50+1?", "answer": 51}]
    cfg = DataConfig(
        source=write_jsonl(tmp_path / "train.jsonl", train_rows),
        heldout=write_jsonl(tmp_path / "heldout.jsonl", heldout_rows),
        heldout_size=1,
    )
    train, heldout, report = load_problems(cfg, 0)
    assert (report["duplicates_dropped"], report["overlap_dropped"]) == (1, 1)
    assert len(train) == 9 and len(heldout) == 1
    # The overlap is taken with the whole held-out file, not only with the problems chosen from it.
    assert all(normalised("What is 5+1?") != normalised(problem.question) for problem in train)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "a?", "answer": "1"}, {"question": "b?"}], "data.jsonl:2: no gold"),
        ([{"question": "a?", "answer": "1"}, {"question": "b?", "answer": "  "}], "data.jsonl:2: no gold"),
        ([{"question": "a?", "answer": "so\n####  "}], "data.jsonl:1: answer holds no answer"),
        ([{"question": "a?", "answer": {"x": 1}}], "data.jsonl:1: answer is neither text nor a number"),
        ([{"question": "a?", "answer": []}], "data.jsonl:1: answer holds no answer"),
        ([{"answer": "1"}], "data.jsonl:1: no question (looked for question, problem, prompt)"),
        ([{"question": ["a?"], "answer": "1"}], "data.jsonl:1: question is not text"),
        (["", '{"question": "a?", '], "data.jsonl:2 is not valid JSON"),
        (["[1, 2]"], "data.jsonl:1 is not a JSON object"),
        ([], "data.jsonl holds no rows"),
        ([{"question": "a?", "answer": "1"}], "lower data.heldout_size"),
        ([{"question": f"{i}?", "answer": "1"} for i in range(2)], "leaves no problem to train on"),
        ([{"question": f"{i}?", "answer": "1"} for i in range(4)], "lower data.train_size"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    cfg = DataConfig(source=write_jsonl(tmp_path / "data.jsonl", rows), heldout_size=2, train_size=3)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_problems(cfg, 0)
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.jsonl does not exist"):
        load_problems(DataConfig(source=str(tmp_path / "nowhere.jsonl")), 0)
    (tmp_path / "latin.jsonl").write_bytes('{"question": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.jsonl is not UTF-8"):
        load_problems(DataConfig(source=str(tmp_path / "latin.jsonl")), 0)
    with pytest.raises(UserError, match=r"neither procedural, a .jsonl file, nor a hub name"):
        load_problems(DataConfig(source="procedurale"), 0)
    source = write_jsonl(tmp_path / "a.jsonl", [{"question": "a?", "answer": "1"}])
    with pytest.raises(UserError, match="has no splits"):
        load_problems(DataConfig(source=source, heldout="test"), 0)


def test_unreachable_hub_is_one_line_that_names_the_way_out():
    code = (
        "from deltarl.rl.problems import load_problems\n"
        "from deltarl.rl.jobs import DataConfig\n"
        "from deltarl.rl.errors import UserError\n"
        "try:\n    load_problems(DataConfig(source='nobody/nothing'), 0)\n"
        "except UserError as error:\n    print('one line:', error)\n"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1"}  # the hub library's own switch for a machine without network
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    lines = [line for line in out.stdout.splitlines() if line.startswith("one line:")]
    assert len(lines) == 1, out.stderr
    assert "cannot be reached for nobody/nothing" in lines[0]
    assert "point data.source to a .jsonl file" in lines[0]


def test_instruction_keeps_other_braces():
    messages = user_messages(Problem("x", "1+1?", "2"), "{question} Answer in \\boxed{}.")
    assert messages == [{"role": "user", "content": "1+1? Answer in \\boxed{}."}]


def test_golds_that_do_not_parse_are_split_off_or_refused():
    problems = [Problem(f"p{i}", f"{i}?", gold) for i, gold in enumerate(["1", "one half", "3", ("4", "4.0")])]
    with VerifierHost(VerifierSpec(name="numeric")) as host:
        good, bad = drop_bad_golds(problems, host.check_golds, 0.25)
        assert [problem.id for problem in good] == ["p0", "p2", "p3"]
        assert [(problem.id, bool(reason)) for problem, reason in bad] == [("p1", True)]
        with pytest.raises(UserError, match=r"1 of 4 golds do not parse, more than data.max_bad_gold = 0.2: p1"):
            drop_bad_golds(problems, host.check_golds, 0.2)
