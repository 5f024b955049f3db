"""Rows of an SFT mix as token ids, with the tokens of the turns that are learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deltarl.rl.errors import UserError
from deltarl.rl.packing import Marked


def encode(tokenizer: Any, rows: Iterable[Mapping[str, Any]], max_length: int) -> list[Marked]:
    """The rows through the chat template, cut at `max_length` tokens; those that leave nothing to learn are left out.

    What is learned of a turn is what the template puts after the prompt for it, its end token included. Raises
    UserError where the template writes a turn otherwise when more follows.
    """
    rows = list(rows)
    conversations = [[*row["prompt"], *row["completion"]] for row in rows]
    learned = [(place, turn) for place, row in enumerate(rows) for turn in row["learned"]]
    followed = [(place, turn) for place, turn in learned if turn + 1 < len(conversations[place])]
    whole = _render(tokenizer, conversations)
    before = _render(tokenizer, [conversations[place][:turn] for place, turn in learned], add_generation_prompt=True)
    parts = _render(tokenizer, [conversations[place][: turn + 1] for place, turn in followed])
    through = dict(zip(followed, parts, strict=True))
    places: list[list[int]] = [[] for _ in rows]
    for (place, turn), prompt in zip(learned, before, strict=True):
        ids = whole[place]
        answered = through.get((place, turn), ids)
        if answered[: len(prompt)] != prompt or ids[: len(answered)] != answered:
            raise UserError(
                "the chat template does not put an answer after its prompt, or writes a turn otherwise when more "
                "turns follow; learn the last turns alone (sft.turns: last) or fix the template"
            )
        places[place] += range(len(prompt), min(len(answered), max_length))
    return [Marked(ids[:max_length], found) for ids, found in zip(whole, places, strict=True) if found]


def _render(
    tokenizer: Any, conversations: list[list[dict[str, str]]], add_generation_prompt: bool = False
) -> list[list[int]]:
    """Token ids of each, all in one call: the tokenizer works on several at a time."""
    if not conversations:
        return []
    return tokenizer.apply_chat_template(
        conversations, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt
    )["input_ids"]
