"""Vocabulary pruning: remove the rows of the embeddings that no text of a corpus uses, and rebuild the tokenizer.

Abdaoui et al., "Load What You Need: Smaller Versions of Multilingual BERT", SustaiNLP 2020 (arXiv:2010.05609).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_prune.errors import ArchitectureError, DataError, PlanError
from hf_prune.planning.checks import check_positive
from hf_prune.structured.vocabulary.rows import find_vocabulary, fixed_ids, named_ids, take_rows
from hf_prune.structured.vocabulary.tokenizer import (
    all_tokens,
    check_segmentation,
    model_tokens,
    number_tokens,
    piece_finder,
    rebuild_tokenizer,
    required_tokens,
    tokenizer_json,
    used_tokens,
)
from hf_prune.utils.formatting import format_table
from hf_prune.utils.offloaded_weights import refuse_offloaded
from hf_prune.utils.progress import working
from hf_prune.utils.results import Result
from hf_prune.utils.wrapping import check_is_model


@dataclass(frozen=True, repr=False)
class TrimResult(Result):
    """What vocabulary pruning did.

    Args:
        model: The model, changed in place.
        tokenizer: The new tokenizer.
        ids: New ids by the old ones that stayed.
        vocabulary_before: Rows of the embedding before.
        parameters_before: Parameters of the whole model before, tied ones counted once.
        parameters: Parameters now.
        bytes_before: Size of the parameters in memory before.
        bytes: Size now.
        texts: How many texts were given.
        tokens: How many tokens they have, without the ones that the tokenizer adds to each.
        tokens_changed: How many of these were removed, so that they are spelled with other tokens now.
        has_output_layer: Whether an output layer lost its rows too.
        saved_products: Share of the weights that each token is multiplied by that went with these rows, 0 to 1.
    """

    bars = ("bytes_before", "bytes")

    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    ids: Mapping[int, int] = field(repr=False)
    vocabulary_before: int
    parameters_before: int
    parameters: int
    bytes_before: int
    bytes: int
    texts: int
    tokens: int
    tokens_changed: int
    has_output_layer: bool
    saved_products: float = 0.0

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding now."""
        return len(self.ids)

    @property
    def removed(self) -> int:
        """How many rows were removed."""
        return self.vocabulary_before - self.vocabulary

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON, and the old ids of the tokens that stayed in the order of their new ones."""
        names = [name for name in self.__dataclass_fields__ if name not in ("model", "tokenizer", "ids")]
        sizes = {"vocabulary": self.vocabulary, "removed": self.removed}
        return {**{name: getattr(self, name) for name in names}, **sizes, "kept_ids": list(self.ids)}

    def __str__(self) -> str:
        rows = [
            ["vocabulary", f"{self.vocabulary_before:,}", f"{self.vocabulary:,}"],
            ["parameters", f"{self.parameters_before:,}", f"{self.parameters:,}"],
            ["bytes", f"{self.bytes_before:,}", f"{self.bytes:,}"],
        ]
        shares = [1 - now / before for now, before in self._sizes()]
        table = format_table(
            ["", "before", "after", "less"],
            [[*row, f"{100 * share:.1f} %"] for row, share in zip(rows, shares, strict=True)],
        )
        return "\n".join([table, self._corpus(), self._speed()])

    def _sizes(self) -> list[tuple[int, int]]:
        return [
            (self.vocabulary, self.vocabulary_before),
            (self.parameters, self.parameters_before),
            (self.bytes, self.bytes_before),
        ]

    def _corpus(self) -> str:
        if not self.texts:
            return "No texts were given: whether any is split as before was not checked."
        line = f"{self.tokens_changed:,} of {self.tokens:,} tokens of {self.texts:,} texts become different"
        if self.tokens_changed:
            return f"{line}: they are rarer than min_count, and are spelled with other tokens now."
        return f"{line}: each text is split as before, which was checked one by one."

    def _speed(self) -> str:
        if self.has_output_layer:
            return (
                f"Embeddings are looked up, not multiplied. The output layer is multiplied: without its rows, a token "
                f"takes {100 * self.saved_products:.1f} % fewer products."
            )
        return "Embeddings are looked up, not multiplied: the model gets smaller, but hardly faster."


@working("Trimming")
def trim_vocabulary(
    model: Any,
    tokenizer: Any,
    texts: Iterable[str] | None = None,
    *,
    keep: Iterable[int | str] = (),
    min_count: int = 1,
    round_to: int | None = None,
    keep_characters: bool = True,
) -> TrimResult:
    """Remove the tokens that texts never use from a model, in place, and make a tokenizer without them.

    Every given text is split as before, which is checked, so the model computes the same, bit for bit, up to its output
    layer. The output layer gives the tokens that stay the same logits up to rounding, since a narrower matrix product
    may add up in another order. Special and added tokens, and every id that a config names, always stay. Other texts
    are spelled with the tokens that are left, so their predictions may change.

    Args:
        model: A transformers model.
        tokenizer: Its fast tokenizer, which is not changed.
        texts: Texts of the kind that the model will see.
        keep: Tokens, or their ids, that stay in any case.
        min_count: Tokens that the texts use less often are removed too; above 1, some texts are split differently.
        round_to: Keep some more tokens, the most frequent ones, so that their number is a multiple of this (at most
            all of them).
        keep_characters: Keep every single character, so that any text that could be spelled still can.

    Returns:
        The model, the new tokenizer, new ids by old ones, and sizes before and after. Save both in the same folder.

    Raises:
        ConfigError: If ``min_count`` or ``round_to`` is below 1.
        DataError: If there are no texts and nothing to keep, the texts use no token, the tokenizer has no
            ``tokenizer.json`` or more tokens than the model has rows, or a text would be split differently.
        PlanError: If ``keep`` has ids or tokens that are not in the vocabulary, or weights are offloaded.
        ArchitectureError: If the model has no embedding of tokens, or a tensor as long as the vocabulary whose rows may
            or may not be tokens. The model is as it was after any error.

    Example:
        >>> result = trim_vocabulary(model, tokenizer, ["a good film", "a bad film"])  # doctest: +SKIP
        >>> result.model.save_pretrained("small"), result.tokenizer.save_pretrained("small")  # doctest: +SKIP
    """
    check_is_model(model)
    check_positive("min_count", min_count)
    check_positive("round_to", 1 if round_to is None else round_to)
    corpus, keep = _checked_texts(texts, keep), list(keep)
    if not corpus and not keep:
        raise DataError("no texts and nothing to keep: expected texts of the kind that the model will see")
    refuse_offloaded(model, "trim_vocabulary()")
    values, vocabulary = tokenizer_json(tokenizer), find_vocabulary(model)
    tokens, rows = all_tokens(values), vocabulary.rows
    if (highest := max(tokens.values())) >= rows:
        raise DataError(
            f"the tokenizer has ids up to {highest:,}, the model's embedding {rows:,} rows: expected the model's own "
            f"tokenizer, or call model.resize_token_embeddings({highest + 1}) first"
        )
    counts = used_tokens(tokenizer, corpus)
    if corpus and not counts:
        raise DataError(f"the {len(corpus):,} texts use no token: all of them are empty")
    fixed = fixed_ids(model, vocabulary)
    wanted = {i for i, count in counts.items() if count >= min_count} | _ids_of(keep, tokens, rows)
    wanted |= required_tokens(values, keep_characters=keep_characters) | fixed | named_ids(model, rows)
    wanted |= set(tokenizer.all_special_ids) | vocabulary.padding
    kept = piece_finder(values)(wanted)
    ids = number_tokens(values, _rounded(kept, values, counts, rows, round_to))
    if moved := [i for i in fixed if ids[i] != i]:
        raise ArchitectureError(
            f"a {type(model).__name__} counts positions from its padding token, id {max(fixed)}, and token "
            f"{moved[0]} would become {ids[moved[0]]}: this vocabulary cannot be trimmed"
        )
    new_tokenizer = rebuild_tokenizer(tokenizer, ids)
    changed = check_segmentation(tokenizer, new_tokenizer, ids, corpus)
    before = _size(model)
    take_rows(model, vocabulary, ids)
    after = _size(model)
    return TrimResult(
        model=model,
        tokenizer=new_tokenizer,
        ids=ids,
        vocabulary_before=rows,
        parameters_before=before[0],
        parameters=after[0],
        bytes_before=before[1],
        bytes=after[1],
        texts=len(corpus),
        tokens=counts.total(),
        tokens_changed=changed,
        has_output_layer=vocabulary.has_output_layer,
        saved_products=_saved_products(model, rows, len(ids)) if vocabulary.has_output_layer else 0.0,
    )


# --- which tokens ----------------------------------------------------------------------------------


def _checked_texts(texts: Iterable[str] | None, keep: Iterable[int | str]) -> list[str]:
    for name, value in (("texts", texts), ("keep", keep)):
        if isinstance(value, str):
            raise DataError(f"{name} is the string {value[:40]!r}: expected a list")
    if texts is None:
        return []
    corpus = list(texts)
    if not corpus:
        raise DataError("texts is empty: expected texts of the kind that the model will see")
    if wrong := [text for text in corpus if not isinstance(text, str)]:
        raise DataError(f"a text is {wrong[0]!r}: expected a string")
    return corpus


def _ids_of(keep: Sequence[int | str], tokens: Mapping[str, int], rows: int) -> set[int]:
    unknown = [t for t in keep if (t not in tokens if isinstance(t, str) else not 0 <= t < rows)]
    if unknown:
        raise PlanError(
            f"keep has {len(unknown)} that the vocabulary of {rows:,} does not have: {unknown[0]!r}; expected ids from "
            f"0 to {rows - 1}, or tokens spelled as the tokenizer does ({min(tokens, key=lambda t: -tokens[t])!r})"
        )
    return {tokens[token] if isinstance(token, str) else int(token) for token in keep}


def _rounded(
    kept: set[int], values: Mapping[str, Any], counts: Counter[int], rows: int, round_to: int | None
) -> set[int]:
    """The ids that stay, with the most useful other ones that make their number a multiple of ``round_to``."""
    size = len(kept) + -len(kept) % (round_to or 1)
    if size >= rows:
        return kept if round_to is None or size == len(kept) else set(range(rows))
    find, of_model = piece_finder(values), set(model_tokens(values).values())
    candidates = sorted(set(range(rows)) - kept, key=lambda i: (i not in of_model, -counts[i], i))
    kept = set(kept)
    while len(kept) < size:  # a token with its pieces may be too many; the shortest one always fits
        kept |= next(new for i in candidates if i not in kept and len(new := find([i]) - kept) <= size - len(kept))
    return kept


def _size(model: Any) -> tuple[int, int]:
    """Parameters, tied ones once, and their bytes."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def _saved_products(model: Any, before: int, now: int) -> float:
    """The share of the weights that each token is multiplied by that an output layer lost with its rows.

    Args:
        model: The model, trimmed.
        before: Rows of its output layer before.
        now: Rows now.
    """
    head = model.get_output_embeddings()
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    if head is None or (width := head.weight.numel() // max(1, now)) == 0:
        return 0.0
    looked_up.discard(id(head.weight))  # tied: looked up, and multiplied as well
    multiplied = sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in looked_up)
    return width * (before - now) / (multiplied + width * (before - now))
