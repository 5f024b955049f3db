"""`reasoning_gym` on rows of the package's own data sets (tests/data/reasoning_gym.md says how they were made)."""

import json
from collections import defaultdict
from pathlib import Path

import pytest

from deltarl.rewards import VerifierHost, load_verifier
from deltarl.rewards.reasoning_gym import RULES, UNDECIDED
from deltarl.rl.jobs import DataConfig
from deltarl.rl.problems import load_problems

FILE = Path(__file__).parents[1] / "data" / "reasoning_gym.jsonl"
ROWS = defaultdict(list)
for line in FILE.read_text(encoding="utf-8").splitlines():
    ROWS[json.loads(line)["metadata"]["source_dataset"]].append(json.loads(line))
GRADED = sorted(set(ROWS) - set(UNDECIDED))
FORMS = (
    "{}",
    "<think>\nIt may be 3, or <answer>4</answer>.\n</think>\n\n{}\n",
    "First I thought <answer>7</answer>.\nThen:\n<answer>\n{}\n</answer>",
    "Here it is:\n<answer>```\n{}\n```</answer>",
)
IN_A_BOX = ("chain_sum", "coin_flip", "countdown", "simple_equations", "family_relationships", "spiral_matrix", "dice")


@pytest.fixture(scope="module")
def host():
    with VerifierHost("reasoning_gym", timeout=3.0) as host:
        yield host


def item(row, response):
    return response, row["answer"], {"metadata": row["metadata"]}


def statuses(host, dataset, answers, index=0):
    row = ROWS[dataset][index]
    return [verdict.status for verdict in host.verify([item(row, f"<answer>{answer}</answer>") for answer in answers])]


def test_there_are_enough_data_sets():
    assert len(GRADED) >= 80
    assert all(len(rows) == 3 for rows in ROWS.values())


@pytest.mark.parametrize("dataset", GRADED)
def test_the_gold_is_right_and_another_row_s_answer_is_wrong(host, dataset):
    rows = ROWS[dataset]
    right = host.verify([item(row, form.format(row["answer"])) for row in rows for form in FORMS])
    assert [(v.status, v.score) for v in right] == [("correct", 1.0)] * len(right)
    assert right[0].info["reason"] == f"right by the rule of {dataset}"
    others = [(row, other["answer"]) for row in rows for other in rows if other is not row]
    wrong = host.verify([item(row, f"<answer>{other}</answer>") for row, other in others])
    assert [(v.status, v.score) for v in wrong] == [("incorrect", 0.0)] * len(wrong)
    assert wrong[0].info["reason"] == f"wrong by the rule of {dataset}"


@pytest.mark.parametrize("dataset", GRADED)
def test_an_answer_that_only_contains_the_gold_or_asks_back_is_wrong(host, dataset):
    """reasoning-gym's scorers give part marks to the first of these."""
    row = ROWS[dataset][0]
    answers = [f"{row['answer']} or {ROWS[dataset][1]['answer']} or else", row["question"], "I do not know"]
    assert statuses(host, dataset, answers) == ["incorrect"] * 3


@pytest.mark.parametrize("dataset", IN_A_BOX)
def test_boxes_and_phrases(host, dataset):
    row = ROWS[dataset][0]
    responses = [f"so \\boxed{{{row['answer']}}}", f"Hence the answer is {row['answer']}."]
    assert [v.status for v in host.verify([item(row, text) for text in responses])] == ["correct", "correct"]


def test_numbers_must_be_worked_out(host):
    row = ROWS["chain_sum"][0]
    gold = row["answer"]
    good = [f"{gold}.0", f"The sum is {gold}", f"x = {gold}", f"${gold}$"]
    bad = [row["metadata"]["expression"], f"{gold}/1", f"2*{gold}/2", f"{gold} {gold}1", f"-{gold}"]
    assert statuses(host, "chain_sum", good + bad) == ["correct"] * len(good) + ["incorrect"] * len(bad)


def test_fractions_must_be_in_lowest_terms(host):
    above, below = map(int, ROWS["dice"][0]["answer"].split("/"))
    answers = [f"\\frac{{{above}}}{{{below}}}", f"{2 * above}/{2 * below}", f"{above / below}"]
    assert statuses(host, "dice", answers) == ["correct", "incorrect", "incorrect"]


def test_polynomials_must_be_multiplied_out(host):
    row = ROWS["polynomial_multiplication"][0]
    terms = row["answer"].replace(" - ", " + -").split(" + ")
    answers = [
        " + ".join(reversed(terms)).replace("+ -", "- "),
        row["metadata"]["polynomial_expr"],
        row["answer"] + " + 1",
    ]
    assert statuses(host, "polynomial_multiplication", answers) == ["correct", "incorrect", "incorrect"]


def test_antiderivatives_are_right_up_to_a_constant(host):
    row = ROWS["simple_integration"][0]
    gold, variable = row["answer"].removesuffix(" + C"), row["metadata"]["variable"]
    left = f"\\int {row['metadata']['integrand']} d{variable}"
    answers = [gold, f"{gold} + 7", f"C + {gold}", f"{gold} + {variable}", left, f"{gold})+(0", f"2*({gold})"]
    assert statuses(host, "simple_integration", answers) == ["correct"] * 3 + ["incorrect"] * 4


def test_a_logarithm_is_the_natural_one(host):
    metadata = {"source_dataset": "intermediate_integration", "integrand": "log(x)", "variable": "x"}
    responses = ["x*log(x) - x + C", "x*ln(x) - x", "x*log(x) + x + C"]
    verdicts = host.verify([(text, "x*log(x) - x + C", {"metadata": metadata}) for text in responses])
    assert [v.status for v in verdicts] == ["correct", "correct", "incorrect"]


def test_roundings_that_the_question_asks_for(host):
    metadata = {"source_dataset": "power_function"}
    gold = "8.05544726166417e-06"
    verdicts = host.verify([(text, gold, {"metadata": metadata}) for text in ("8.06e-6", "8.05e-06", "8.06e-5", gold)])
    assert [v.status for v in verdicts] == ["correct", "incorrect", "incorrect", "correct"]
    (verdict,) = host.verify([("P = 7/64", "0.109375", {"metadata": {"source_dataset": "coin_flip"}})])
    assert verdict.status == "correct"


def test_order_counts_where_it_is_asked_for(host):
    people = ROWS["knights_knaves"][0]["answer"].rstrip(".")
    first, second = people.split(", and ")
    assert statuses(host, "knights_knaves", [f"{second}, and {first}", first]) == ["correct", "incorrect"]
    factors = ROWS["prime_factorization"][0]["answer"].split(" × ")
    products = [
        " * ".join(reversed(factors)),
        "×".join(factors[1:]),
        ROWS["prime_factorization"][0]["metadata"]["number"],
    ]
    assert statuses(host, "prime_factorization", products) == ["correct", "incorrect", "incorrect"]
    words = ROWS["word_sorting"][0]["answer"].split(", ")
    assert statuses(host, "word_sorting", [",".join(words), ", ".join(reversed(words))]) == ["correct", "incorrect"]
    anagrams = json.loads(ROWS["group_anagrams"][0]["answer"])
    answers = [
        json.dumps([group[::-1] for group in anagrams[::-1]]),
        json.dumps(anagrams[1:]),
        json.dumps(anagrams * 2),
    ]
    assert statuses(host, "group_anagrams", answers) == ["correct", "incorrect", "incorrect"]


@pytest.mark.parametrize(
    ("metadata", "gold", "right", "wrong"),
    [
        (
            {"source_dataset": "countdown", "numbers": [3, 5, 2], "target": 13},
            "3 + 5*2",
            ["5*2+3", r"5 \times 2 + 3", "3+(5*2) = 13", "(3 + 5 × 2)"],
            ["13", "3+5+5", "3+5*2*1", "10+3", "3+5*2 = 12", "3+5*(2", "3//5", "5*2", "2*5+3/0", "-" * 900 + "13"],
        ),
        (
            {"source_dataset": "puzzle24", "numbers": [3, 3, 8, 8]},
            "8/(3-8/3)",
            ["8/(3 - 8/3)"],
            ["3*8", "24", "8*3*(8-8)"],
        ),
        (
            {"source_dataset": "n_queens", "puzzle": [list("_Q__"), list("____"), list("____"), list("__Q_")]},
            "_ Q _ _\n_ _ _ Q\nQ _ _ _\n_ _ Q _",
            ["[['_', 'Q', '_', '_'], ['_', '_', '_', 'Q'], ['Q', '_', '_', '_'], ['_', '_', 'Q', '_']]"],
            ["_ _ Q _\nQ _ _ _\n_ _ _ Q\n_ Q _ _", "_ Q _ _\nQ _ _ _\n_ _ _ Q\n_ _ Q _", "_ Q _ _", "_ Q _ _\n" * 4],
        ),
        (
            {
                "source_dataset": "graph_color",
                "puzzle": {"vertices": [0, 1], "edges": [[0, 1]], "color_options": [1, 2]},
            },
            '{"0": 1, "1": 2}',
            ['{"1": 1, "0": 2}'],
            ['{"0": 1, "1": 1}', '{"0": 1}', '{"0": 1, "1": 3}', "[1, 2]"],
        ),
        (
            {"source_dataset": "mini_sudoku", "puzzle": [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]},
            "1 2 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 1",
            ["1 2 3 4\n3 4 2 1\n2 1 4 3\n4 3 1 2"],
            ["2 1 3 4\n3 4 1 2\n1 2 4 3\n4 3 2 1", "1 2 3 4\n2 3 4 1\n3 4 1 2\n4 1 2 3", "1 2 3 4"],
        ),
        (
            {
                "source_dataset": "tower_of_hanoi",
                "num_disks": 2,
                "num_pegs": 3,
                "start_peg": 1,
                "target_peg": 3,
            },
            "Move disk 1 from Peg 1 to Peg 2\nMove disk 2 from Peg 1 to Peg 3\nMove disk 1 from Peg 2 to Peg 3",
            [
                "Move disk 1 from Peg 1 to Peg 3\nMove disk 1 from Peg 3 to Peg 2\n"
                "Move disk 2 from Peg 1 to Peg 3\nMove disk 1 from Peg 2 to Peg 3",
            ],
            [
                "Move disk 1 from Peg 1 to Peg 3\nMove disk 2 from Peg 1 to Peg 3",
                "Move disk 2 from Peg 1 to Peg 3\nMove disk 1 from Peg 1 to Peg 3",
                "Move disk 1 from Peg 1 to Peg 2",
                "Move disk 1 from Peg 9 to Peg 3",
            ],
        ),
        (
            {"source_dataset": "jugs", "puzzle": {"jug_capacities": [3, 5], "target": 4}},
            '["fill B", "pour B->A", "empty A", "pour B->A", "fill B", "pour B->A"]',
            ['["fill A", "pour A->B", "fill A", "pour A->B", "empty B", "pour A->B", "fill A", "pour A->B"]'],
            ['["fill B"]', '["fill C"]', '["pour A->A"]', "[]", '["B"]'],
        ),
        (
            {"source_dataset": "shortest_path", "matrix": [list("*OO"), list("OXO"), list("OO#")]},
            "right right down down",
            ["down down right right", "down, down, right, right"],
            [
                "right down down right",
                "right right down",
                "infeasible",
                "up up down down",
                "right right down down up down",
            ],
        ),
        (
            {"source_dataset": "palindrome_generation", "letters": list("abba")},
            "abba",
            ["baab"],
            ["aba", "abab", "aabb"],
        ),
    ],
    ids=lambda value: value.get("source_dataset") if isinstance(value, dict) else None,
)
def test_puzzles_are_checked_by_their_rules(host, metadata, gold, right, wrong):
    answers = [gold, *right, *wrong]
    verdicts = host.verify([(f"<answer>{text}</answer>", gold, {"metadata": metadata}) for text in answers])
    assert [v.status for v in verdicts] == ["correct"] * (1 + len(right)) + ["incorrect"] * len(wrong)


@pytest.mark.parametrize(
    ("gold", "meta", "reason"),
    [
        ("UP", {"metadata": {"source_dataset": "sokoban"}}, "sokoban: many move lists are right"),
        ("a", {"metadata": {"source_dataset": "sudokus"}}, "no rule for data set 'sudokus'"),
        ("4", {}, "no metadata.source_dataset in the row"),
        ("", {"metadata": {"source_dataset": "gcd"}}, "the gold is empty"),
        ("four", {"metadata": {"source_dataset": "gcd"}}, "gcd: its own rule does not accept the gold 'four'"),
        (
            "3+4",
            {"metadata": {"source_dataset": "countdown", "target": 7}},
            "countdown: no 'numbers' in the row's metadata",
        ),
        (
            "3+4",
            {"metadata": {"source_dataset": "countdown", "target": 8, "numbers": [3, 4]}},
            "countdown: its own rule",
        ),
    ],
)
def test_a_row_that_cannot_decide_is_a_gold_error(host, gold, meta, reason):
    (verdict,) = host.verify([("4", gold, meta)])
    assert (verdict.status, verdict.score) == ("gold_error", None)
    assert verdict.info["reason"].startswith(reason)


def test_no_answer(host):
    row = ROWS["gcd"][0]
    responses = ["", "<think>1", "<answer></answer>", "\\boxed{1"]
    assert [v.status for v in host.verify([item(row, text) for text in responses])] == ["no_answer"] * 4
    (cut,) = host.verify([("1", "1", {"metadata": row["metadata"], "truncated": True})])
    assert cut.status == "no_answer"


@pytest.mark.parametrize("piece", ["(", "[", "1 ", "-", "9", "1/", '{"a":', "\\boxed{", "A is a B, ", "```\n", "x*"])
def test_hostile_answers_cost_no_deadline(host, piece):
    items = [item(ROWS[dataset][0], f"<answer>{piece * (90_000 // len(piece))}</answer>") for dataset in GRADED]
    verdicts = host.verify(items)
    assert {v.status for v in verdicts} <= {"incorrect", "no_answer"}


def test_rows_work_as_a_job_s_data(host):
    """The file as `data.source`: metadata reaches the verifier, and golds that cannot decide are told apart."""
    data = DataConfig(source=str(FILE), heldout_size=20)
    problems = load_problems(data, seed=1)
    assert len(problems.train) + len(problems.heldout) == sum(map(len, ROWS.values()))
    verdicts = host.verify([(str(p.gold), p.gold, p.meta) for p in problems.train])
    assert {
        p.meta["metadata"]["source_dataset"]
        for p, v in zip(problems.train, verdicts, strict=True)
        if v.status != "correct"
    } <= set(UNDECIDED)
    assert {v.status for v in host.check_golds([p.gold for p in problems.train])} == {"correct"}


def test_every_data_set_has_one_rule_or_a_reason():
    assert not set(RULES) & set(UNDECIDED)
    assert load_verifier("reasoning_gym").version
