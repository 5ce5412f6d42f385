"""Conversations of chat models, written out by the chat template that the model was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_prune.errors import CalibrationError, DataError, HfPruneError
from hf_prune.utils.column_names import usual_column

CONVERSATIONS = ("messages", "conversations", "conversation")


def conversation_column(columns: Mapping[str, Sequence[Any]]) -> str | None:
    """The column that holds conversations, if there is one: lists of messages, each with a role and its content."""
    name = usual_column(columns, CONVERSATIONS)
    return name if name is not None and is_conversation(next(iter(columns[name]), None)) else None


def is_conversation(value: object) -> bool:
    """Whether a value is a list of messages: ``[{"role": "user", "content": "…"}, …]``."""
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_message, value))


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and {"role", "content"} <= value.keys()


def in_template(
    conversation: Sequence[Mapping[str, Any]], tokenizer: Any, error: type[HfPruneError], name: str, **options: Any
) -> Any:
    """A conversation as the chat template writes it out.

    Args:
        conversation: The messages.
        tokenizer: The tokenizer, with a chat template.
        error: What is raised if the template does not take them.
        name: What the conversation is called then.
        **options: Of ``apply_chat_template``.
    """
    # Tables fill in None for keys that only other messages have.
    messages = [{k: v for k, v in message.items() if v is not None or k == "content"} for message in conversation]
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as why:  # templates raise errors of their own, such as for roles that do not alternate
        raise error(
            f"the chat template does not take {name} ({why}): expected messages with the roles that the model was "
            f"trained on"
        ) from why


def conversation_tokens(rows: Sequence[Any], tokenizer: Any, longest: int | None = None) -> list[list[int]]:
    """The tokens of conversations, as a chat model reads them.

    Args:
        rows: Conversations, see :func:`is_conversation`.
        tokenizer: The tokenizer of a chat model.
        longest: Longer conversations are cut to this many tokens; None for no limit.

    Returns:
        A list of tokens for each.

    Raises:
        CalibrationError: If the tokenizer has no chat template, or the template does not take a conversation.
        DataError: If a row is no conversation.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise CalibrationError(
            f"the data holds conversations, and {type(tokenizer).__name__} has no chat template to write them out: use "
            f"the tokenizer of the chat model, set its chat_template, or pass texts"
        )
    tokens = []
    for number, row in enumerate(rows, start=1):
        if not is_conversation(row):
            raise DataError(
                f"row {number} of the data is {row!r:.60}, expected a conversation as in row 1: a list of messages, "
                f"each with a role and its content"
            )
        text = in_template(row, tokenizer, CalibrationError, f"row {number} of the data", tokenize=False)
        # Special tokens, such as that of the beginning, are in the template already.
        cut = {"truncation": False} if longest is None else {"truncation": True, "max_length": longest}
        encoded = tokenizer(text, add_special_tokens=False, verbose=False, **cut)
        tokens.append([int(token) for token in encoded["input_ids"]])
    return tokens
