"""Find texts that share several words in a row with others, and so are no independent test after training on those."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

WORDS = 5  # in a row: texts that share this many are likely cut from one


def overlapping(texts: Iterable[str], others: Iterable[str], words: int = WORDS) -> list[bool]:
    """Whether each text equals one of the others, or shares this many words in a row with one, ignoring case.

    Args:
        texts: The texts to check.
        others: The texts to compare them with.
        words: How many words in a row make an overlap; shorter texts overlap only if they are equal.

    Example:
        >>> overlapping(["a film that never gets going", "a fine film"], ["Says a film that never gets off"])
        [True, False]
    """
    known = {run for text in others for run in _runs(text, words)}
    return [any(run in known for run in _runs(text, words)) for text in texts]


def _runs(text: str, words: int) -> Iterator[tuple[str, ...]]:
    split = text.lower().split()
    for start in range(max(1, len(split) - words + 1)):
        yield tuple(split[start : start + words])
