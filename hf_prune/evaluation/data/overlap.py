"""Which texts have words in a row in common with others: such texts are no independent test of what others taught."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

WORDS = 5  # in a row: in common they tell that two texts are cut from one


def overlapping(texts: Iterable[str], others: Iterable[str], words: int = WORDS) -> list[bool]:
    """Whether each text is one of the others or shares so many words in a row with one, whatever their case.

    Args:
        texts: The texts in question.
        others: What they are compared with.
        words: How many words in a row are too many; shorter texts overlap only if they are equal.

    Example:
        >>> overlapping(["a film that never gets going", "a fine film"], ["Says a film that never gets off"])
        [True, False]
    """
    known = {run for text in others for run in _runs(text, words)}
    return [any(run in known for run in _runs(text, words)) for text in texts]


def _runs(text: str, words: int) -> Iterator[tuple[str, ...]]:
    found = text.lower().split()
    for start in range(max(1, len(found) - words + 1)):
        yield tuple(found[start : start + words])
