"""Which columns of a table hold the texts and the labels, where nobody says so."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hf_prune.errors import DataError
from hf_prune.utils.column_names import LABELS, TEXTS, usual_column, usual_texts


def find_text_columns(available: Collection[str], where: str) -> tuple[str, ...]:
    """The columns of texts by their usual names: two for pairs, or one.

    Args:
        available: The columns of the data.
        where: The data, for messages.

    Raises:
        DataError: If none has a usual name; the message lists those that are there.
    """
    if not (found := usual_texts(available)):
        raise DataError(
            f"{where} has the columns {', '.join(available)}, and none with a usual name for texts "
            f"({', '.join(TEXTS)}): name it with text_column"
        )
    return found


def find_label_column(available: Collection[str], where: str, usual: Sequence[str] = LABELS) -> str:
    """The column of labels by its usual name.

    Args:
        available: The columns of the data.
        where: The data, for messages.
        usual: The names to look for.

    Raises:
        DataError: If none has one; the message lists those that are there.
    """
    found = usual_column(available, usual)
    if found is None:
        raise DataError(
            f"{where} has the columns {', '.join(available)}, and none with a usual name for labels "
            f"({', '.join(usual)}): name it with label_column"
        )
    return found
