"""What a language model reads: texts, or conversations of a chat model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_prune.calibration.conversations import CONVERSATIONS, is_conversation
from hf_prune.errors import DataError
from hf_prune.evaluation.data.checks import check_texts
from hf_prune.evaluation.data.columns import find_text_columns
from hf_prune.evaluation.data.files import read_text
from hf_prune.evaluation.data.loading import filled_column, read_split
from hf_prune.utils.column_names import usual_column

if TYPE_CHECKING:
    from datasets import Dataset


def load_documents(source: str, split: str, column: str | None = None) -> list[Any]:
    """The texts of a split, as :func:`hf_prune.load_texts` gives them, or its conversations.

    Args:
        source: A file, a folder or a Hub id.
        split: Name of the split; a file is one by itself.
        column: The column of texts or conversations, where there are columns. None for ``text``, else for conversations
            in ``messages``, ``conversations`` or ``conversation``, else for texts with a usual name.

    Returns:
        Strings, or conversations: lists of messages with ``role`` and ``content``.

    Raises:
        DataError: If the data cannot be found or read, the column is missing, or a row is neither a text nor a
            conversation, or not what the first row is.
    """
    content, where = read_split(source, split, texts=True)
    if isinstance(content, Path):
        return read_text(content)
    name = column or _usual_column(content, source)
    values = filled_column(content, name, where)
    if not isinstance(values[0], list):
        check_texts(values, name, where)
        return values
    for number, value in enumerate(values, start=1):
        if not is_conversation(value):
            raise DataError(
                f"row {number} of {where}: {name!r} is {value!r:.80}, expected a conversation: a list of messages, "
                f"each with a role and its content"
            )
    return values


def _usual_column(dataset: Dataset, source: str) -> str:
    available = dataset.column_names
    if "text" in available:
        return "text"
    name = usual_column(available, CONVERSATIONS)
    if name is not None and len(dataset) and isinstance(dataset[0][name], list):
        return name
    return find_text_columns(available, repr(source))[0]
