"""From a problem to the token ids that the engine continues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltarl.rl.errors import UserError
from deltarl.rl.jobs import Job
from deltarl.rl.problems import Problem, user_messages


def render_prompts(tokenizer: Any, conversations: Sequence[list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of each conversation through the tokenizer's chat template, ready for the assistant's turn."""
    encoded = tokenizer.apply_chat_template(
        list(conversations), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return encoded["input_ids"]


def check_prompt_lengths(tokenizer: Any, problems: Sequence[Problem], job: Job) -> None:
    """Raise UserError when a prompt and the longest response together exceed the engine's context."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {job.model.path} has no chat template; add a chat_template.jinja to the folder"
        )
    prompts = render_prompts(tokenizer, [user_messages(problem, job.data.instruction) for problem in problems])
    room = job.rollout.max_model_len - job.rl.max_completion_length
    too_long = [(len(ids), problem.id) for ids, problem in zip(prompts, problems, strict=True) if len(ids) > room]
    if too_long:
        longest, identity = max(too_long)
        raise UserError(
            f"{len(too_long)} of {len(problems)} prompts are longer than the {room} tokens that rollout.max_model_len "
            f"- rl.max_completion_length leaves (longest: {longest}, problem {identity}); set rollout.max_model_len to "
            f"{longest + job.rl.max_completion_length} or more"
        )
