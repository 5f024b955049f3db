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
    found = []
    for row in rows:
        conversation = [*row["prompt"], *row["completion"]]
        ids, places = _render(tokenizer, conversation), []
        for turn in row["learned"]:
            before = _render(tokenizer, conversation[:turn], add_generation_prompt=True)
            through = _render(tokenizer, conversation[: turn + 1])
            if through[: len(before)] != before or ids[: len(through)] != through:
                raise UserError(
                    "the chat template does not put an answer after its prompt, or writes a turn otherwise when more "
                    "turns follow; learn the last turns alone (sft.turns: last) or fix the template"
                )
            places += range(len(before), min(len(through), max_length))
        if places:
            found.append(Marked(ids[:max_length], places))
    return found


def _render(tokenizer: Any, conversation: list[dict[str, str]], add_generation_prompt: bool = False) -> list[int]:
    return tokenizer.apply_chat_template(
        conversation, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt
    )["input_ids"]
