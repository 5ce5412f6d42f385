"""The demo's sentences: read, cleaned, and split once into a part to train on and a held-out part."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from hf_prune.errors import DataError


class Example(NamedTuple):
    """One sentence and its label, 1 for positive and 0 for negative."""

    sentence: str
    label: int


def read_sentences(path: Path) -> list[Example]:
    """Read the Rotten Tomatoes rows of the package's CSV."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return [Example(row["text"], int(row["label"])) for row in rows if row["source"] == "rotten_tomatoes"]


def sentence_key(sentence: str) -> str:
    """Return the lower-case words of a sentence; two sentences with one key count as the same sentence.

    Ignoring punctuation as well as case and spaces is the near-duplicate check: among these 8,530 sentences the word
    sets of only two pairs overlap by more than 75 % (Jaccard), and both pairs differ in punctuation alone.
    """
    return " ".join(re.findall(r"\w+", sentence.lower()))


def clean_examples(examples: Iterable[Example]) -> list[Example]:
    """Drop repeated sentences, sentences with two different labels, and sentences without a word.

    Args:
        examples: Sentences with labels, in any order.

    Returns:
        The first example of each sentence, in the order given, with every run of white space made one space.

    Example:
        >>> clean_examples([Example("a  joy .", 1), Example("A joy", 1), Example("meh", 0), Example("Meh!", 1)])
        [Example(sentence='a joy .', label=1)]
    """
    first: dict[str, Example] = {}
    conflicting = {""}
    for sentence, label in examples:
        key = sentence_key(sentence)
        if first.setdefault(key, Example(" ".join(sentence.split()), label)).label != label:
            conflicting.add(key)
    return [example for key, example in first.items() if key not in conflicting]


def split_examples(
    examples: Sequence[Example], heldout_per_label: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Cut a held-out part with equally many sentences of each label.

    A sentence's place depends on the seed and its words only, not on the order of ``examples``.

    Args:
        examples: What :func:`clean_examples` returned, so no sentence occurs twice.
        heldout_per_label: Sentences of each label in the held-out part.
        seed: Another seed gives another split.

    Returns:
        The training part and the held-out part, each in a random order that ``seed`` fixes.

    Raises:
        DataError: If some label would have no sentence left to train on.

    Example:
        >>> train, heldout = split_examples([Example("good", 1), Example("fine", 1), Example("bad", 0),
        ...                                  Example("poor", 0)], heldout_per_label=1, seed=0)
        >>> sorted(example.label for example in heldout)
        [0, 1]
    """

    def place(example: Example) -> str:
        return hashlib.sha256(f"{seed}:{sentence_key(example.sentence)}".encode()).hexdigest()

    train: list[Example] = []
    heldout: list[Example] = []
    for label in (0, 1):
        of_label = sorted((example for example in examples if example.label == label), key=place)
        if len(of_label) <= heldout_per_label:
            raise DataError(
                f"found {len(of_label)} sentences with label {label}, expected more than {heldout_per_label}, the "
                "number to hold out. Give more sentences or hold out fewer."
            )
        heldout += of_label[:heldout_per_label]
        train += of_label[heldout_per_label:]
    return sorted(train, key=place), sorted(heldout, key=place)


def write_tsv(path: Path, examples: Iterable[Example]) -> None:
    """Write examples in GLUE style; :func:`clean_examples` has already removed tabs and line breaks."""
    lines = ["sentence\tlabel", *(f"{sentence}\t{label}" for sentence, label in examples)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
