"""Supervised data: weighted sources of prompts and completions, mixed row by row."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import datasets

from deltarl.rl.errors import UserError
from deltarl.rl.jobsections import Turns
from deltarl.rl.problems import Problem, Row, first_gold, read_jsonl, user_messages

Message = dict[str, str]
Answered = tuple[list[Message], str]  # the conversation so far, and the answer to learn


class Turn(NamedTuple):
    """A conversation that ends in an answer, and which of its messages are to be learned, by index, the last of all."""

    prompt: list[Message]
    answer: str
    learned: list[int]


DIRECT_ANSWERS = ("The answer is \\boxed{{{gold}}}.", "It's \\boxed{{{gold}}}, I think.")
SMALL_TALK_SHARE = 0.15
SMALL_TALK = (
    (("Hi!", "Hello.", "Hey there!", "Good morning."), ("Hello! What shall we work out?", "Hi! Ask me a problem.")),
    (("Who are you?", "What are you?"), ("I am a small language model that solves math problems.",)),
    (("What can you do?", "How can you help me?"), ("I can add, multiply and solve equations.",)),
    (("Thanks!", "Thank you.", "Great, thanks."), ("You're welcome!", "Glad to help.")),
    (("How are you?", "How is it going?"), ("Fine, thanks. Ready for a problem.",)),
    (("Bye!", "See you later."), ("Goodbye!", "See you!")),
)


class SourceConfig(Protocol):
    """A named source and its share of the mix, relative to the other sources' weights."""

    name: str
    weight: float


def build_mix(
    sources: Sequence[SourceConfig],
    problems: Sequence[Problem],
    seed: int,
    n: int,
    instruction: str,
    turns: Turns = "last",
) -> datasets.Dataset:
    """`n` rows drawn from `sources` with probabilities proportional to their weights.

    Each source goes round its rows, reshuffled every round, so a small one repeats and none runs dry.

    Args:
        sources: names are `solutions` (worked solutions of `problems`), `chat` (their answers without working, and
            some small talk), or a .jsonl file of `messages`, `prompt` and `response`, or `instruction`, `input`,
            `output`.
        problems: the training problems.
        seed: decides the order within the sources and the choice between them.
        n: rows of the result.
        instruction: the template of the user turn, with {question}.
        turns: which of the assistant's messages in rows of `messages` are learned: the last, all, or those that have
            `"train": true`. The conversation ends with the last one learned.

    Returns:
        Columns `prompt` and `completion` (lists of {"role", "content"}), `source` (its name), and `learned`: the
        indices of the messages to learn in prompt + completion.

    Raises:
        UserError: no source, an unknown name, a weight of 0 or less, a source without rows, a row that has none of the
            known forms (with its line number), or a missing file.
    """
    if not sources:
        raise UserError(f"sft.sources is empty; known sources: {known_sources()}")
    parts = []
    for source in sources:
        if source.weight <= 0:
            raise UserError(f"sft source {source.name} has weight {source.weight}; give it more than 0 or remove it")
        rng = random.Random(f"{seed}:{source.name}")
        known = _turns(source.name, problems, instruction, rng, turns)
        parts.append(_rows(source.name, _go_round(known, n, rng)))
    total = sum(source.weight for source in sources)
    mixed = datasets.interleave_datasets(
        parts,
        probabilities=[source.weight / total for source in sources],
        seed=seed,
        stopping_strategy="first_exhausted",
    )
    return mixed.select(range(n))  # every part has n rows, so the first to end ends no earlier than this


def known_sources() -> str:
    """The names a source may have, for messages and listings."""
    return f"{', '.join(NAMED)}, or a .jsonl file"


def _turns(name: str, problems: Sequence[Problem], instruction: str, rng: random.Random, which: Turns) -> list[Turn]:
    """One round of a source."""
    if name in NAMED:
        return [Turn(prompt, answer, [len(prompt)]) for prompt, answer in NAMED[name](problems, instruction, rng)]
    if not name.endswith(".jsonl"):
        raise UserError(f"sft source {name} is not known; known sources: {known_sources()}")
    turns = [_file_turn(row, which) for row in read_jsonl(Path(name))]
    if not turns:
        raise UserError(f"sft source {name} holds no rows")
    return turns


def _solutions(problems: Sequence[Problem], instruction: str, rng: random.Random) -> list[Answered]:
    """Worked solutions.  One that does not box its answer gets a last line that does."""
    turns = []
    for problem in problems:
        if problem.solution is not None:
            boxed = "" if "\\boxed" in problem.solution else f"\nThe answer is \\boxed{{{first_gold(problem)}}}."
            turns.append((user_messages(problem, instruction), problem.solution + boxed))
    if not turns:
        raise UserError("sft source solutions: no problem has a worked solution; use the source chat or a .jsonl file")
    return turns


def _chat(problems: Sequence[Problem], instruction: str, rng: random.Random) -> list[Answered]:
    """Answers without working, with SMALL_TALK_SHARE of small talk among them."""
    turns = [
        (user_messages(problem, instruction), rng.choice(DIRECT_ANSWERS).format(gold=first_gold(problem)))
        for problem in problems
    ]
    for _ in range(round(len(turns) * SMALL_TALK_SHARE / (1 - SMALL_TALK_SHARE))):
        openings, replies = rng.choice(SMALL_TALK)
        turns.append(([{"role": "user", "content": rng.choice(openings)}], rng.choice(replies)))
    return turns


NAMED: dict[str, Callable[[Sequence[Problem], str, random.Random], list[Answered]]] = {
    "solutions": _solutions,
    "chat": _chat,
}


def _file_turn(row: Row, which: Turns) -> Turn:
    """The turn in a row of a .jsonl file, whichever of the three known forms it has."""
    values = row.values
    if "messages" in values:
        return _conversation(row, values["messages"], which)
    if "response" in values:
        prompt = values.get("prompt", [])
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, list):
            raise UserError(f"{row.where}: prompt is neither text nor messages")
        return _conversation(row, [*prompt, {"role": "assistant", "content": values["response"]}], "last")
    if "output" in values:
        parts = [values.get("instruction") or "", values.get("input") or ""]
        if not all(isinstance(part, str) for part in parts):
            raise UserError(f"{row.where}: instruction and input must be text")
        question = "\n\n".join(part for part in parts if part)
        return _conversation(
            row, [{"role": "user", "content": question}, {"role": "assistant", "content": values["output"]}], "last"
        )
    raise UserError(
        f"{row.where} is no training row; write messages, or prompt and response, or instruction, input and output"
    )


def _conversation(row: Row, messages: list[dict[str, Any]], which: Turns) -> Turn:
    """The conversation up to the last of the assistant's messages that are learned."""
    well_formed = isinstance(messages, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        and message["content"].strip()
        and isinstance(message.get("train", False), bool)
        for message in messages
    )
    if not well_formed:
        raise UserError(
            f"{row.where}: every message needs a role and a text that is not blank, and train, if it is there, true or "
            "false"
        )
    answers = [i for i, message in enumerate(messages) if i > 0 and message["role"] == "assistant"]
    learned = [i for i in answers if messages[i].get("train")] if which == "marked" else answers
    if not learned:
        marked = " with train: true" if which == "marked" else ""
        raise UserError(f"{row.where}: no prompt followed by an assistant's answer{marked}; fix the row")
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    last = learned[-1]
    return Turn(turns[:last], turns[last]["content"], [last] if which == "last" else learned)


def _go_round(turns: list[Turn], n: int, rng: random.Random) -> list[Turn]:
    """`n` turns: rounds of all of them, each round shuffled."""
    drawn: list[Turn] = []
    while len(drawn) < n:
        drawn += rng.sample(turns, len(turns))
    return drawn[:n]


def _rows(name: str, turns: list[Turn]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {
            "prompt": [turn.prompt for turn in turns],
            "completion": [[{"role": "assistant", "content": turn.answer}] for turn in turns],
            "source": [name] * len(turns),
            "learned": [turn.learned for turn in turns],
        }
    )
