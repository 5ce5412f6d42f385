"""Prompts for a language model: beginnings of lines, alone or in the chat template, and conversations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_prune.calibration.conversations import in_template
from hf_prune.errors import DataError
from hf_prune.evaluation.data.classification import sample_order

_LEAST = 16  # tokens of a line whose first half is a prompt


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Args:
        text: As the model reads it.
        tokens: The same as token ids.
        chat: Whether it is in the chat template.
    """

    text: str
    tokens: tuple[int, ...]
    chat: bool


def find_prompts(
    texts: Iterable[Any], tokenizer: Any, n: int, prompt_tokens: int, room: int, chat: bool | None
) -> list[Prompt]:
    """Prompts in the order of the texts, drawn at random; the first ones of a larger number are the same.

    Args:
        texts: Texts or conversations, see :func:`hf_prune.evaluate_generation`.
        tokenizer: The tokenizer.
        n: How many, at most.
        prompt_tokens: The most tokens of the beginning of a line.
        room: The most tokens of a prompt, with those of a chat template.
        chat: Whether lines are put into the chat template; None if there is one.

    Raises:
        DataError: If nothing is long enough, nothing fits, or there is no chat template where one is needed.
    """
    given = [] if isinstance(texts, str) else list(texts)
    conversations = [text for text in given if not isinstance(text, str)]
    if not given or (conversations and len(conversations) < len(given)):
        raise DataError(f"found {len(given)} texts, {len(conversations)} of them conversations: expected one kind")
    if conversations:
        chat = True
    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise DataError(
            f"{type(tokenizer).__name__} has no chat template, which prompts of a chat need: set "
            f"tokenizer.chat_template, or leave out chat"
        )
    chat = bool(template) if chat is None else chat
    rows = given if conversations else [line for text in given for line in text.splitlines() if line.strip()]
    chosen: list[tuple[int, Prompt]] = []
    for i in sample_order(len(rows)):
        if conversations:
            prompt = _of_conversation(rows[i], tokenizer, i + 1)
        else:
            prompt = _of_line(rows[i], tokenizer, prompt_tokens, chat)
        if prompt is not None and len(prompt.tokens) <= room:
            chosen.append((i, prompt))
        if len(chosen) == n:
            break
    if not chosen:
        raise DataError(
            f"none of {len(rows):,} {'conversations' if conversations else 'lines'} makes a prompt: expected lines of "
            f"at least {_LEAST} tokens, or conversations with a message of the user, whose prompt has at most "
            f"{room:,} tokens"
        )
    return [prompt for _, prompt in sorted(chosen, key=lambda pair: pair[0])]


def _of_line(line: str, tokenizer: Any, prompt_tokens: int, chat: bool) -> Prompt | None:
    """The first half of a line; None if it is too short."""
    tokens = tokenizer(line.strip(), truncation=False, verbose=False)["input_ids"]
    if len(tokens) < _LEAST:
        return None
    tokens = tokens[: min(prompt_tokens, len(tokens) // 2)]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    if not chat:
        return Prompt(text, tuple(tokens), False)
    return _in_template([{"role": "user", "content": text}], tokenizer)


def _of_conversation(messages: Any, tokenizer: Any, row: int) -> Prompt | None:
    """All messages up to the last one of the user; None if there is none."""
    try:
        asked = [i for i, message in enumerate(messages) if message["role"] == "user" and message["content"]]
    except (TypeError, KeyError) as error:
        raise DataError(
            f"row {row}: {messages!r:.80} is not a conversation: expected a list of messages with role and content"
        ) from error
    return _in_template(messages[: asked[-1] + 1], tokenizer) if asked else None


def _in_template(messages: Sequence[Any], tokenizer: Any) -> Prompt:
    options = {"add_generation_prompt": True, "return_dict": True}
    encoded = in_template(messages, tokenizer, DataError, f"{messages!r:.80}", **options)
    tokens = tuple(encoded["input_ids"])
    return Prompt(tokenizer.decode(tokens), tokens, True)
