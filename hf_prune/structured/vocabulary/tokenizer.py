"""Remove tokens from a tokenizer, so that every text that needs none of them is split as before.

Everything here works on the JSON of the ``tokenizers`` library, which all fast tokenizers have.
"""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from hf_prune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BATCH = 1024


def tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The content of ``tokenizer.json``.

    Args:
        tokenizer: A fast tokenizer.

    Raises:
        DataError: If it has no such file, or its model is not supported.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise DataError(
            f"the tokenizer is a {type(tokenizer).__name__} without tokenizer.json: expected a fast tokenizer, whose "
            f"vocabulary can be rebuilt; convert it, for instance with AutoTokenizer.from_pretrained(...)"
        )
    values: dict[str, Any] = json.loads(backend.to_str())
    if (kind := values["model"]["type"]) not in _MODELS:
        raise DataError(f"the tokenizer's model is {kind!r}: expected one of {', '.join(_MODELS)}")
    return values


def used_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Counter[int]:
    """Count how often texts use each token, without the ones that the tokenizer adds to each text.

    Args:
        tokenizer: A fast tokenizer.
        texts: The texts, which are never truncated.

    Returns:
        Counts by token id; unused ids are not in it.

    Raises:
        DataError: If the tokenizer has no ``tokenizer.json``.

    Example:
        >>> used_tokens(tokenizer, ["a good film", "a bad film"]).most_common(1)  # doctest: +SKIP
        [(1037, 2)]
    """
    tokenizer_json(tokenizer)
    counts: Counter[int] = Counter()
    for ids in _encoded(tokenizer, texts, special=False):
        counts.update(ids)
    return counts


def _encoded(tokenizer: Any, texts: Sequence[str], special: bool = True) -> Iterator[list[int]]:
    """The ids of each text, from a copy of the tokenizer that neither truncates nor pads."""
    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    for i in range(0, len(texts), _BATCH):
        for encoding in copy.encode_batch(list(texts[i : i + _BATCH]), add_special_tokens=special):
            yield encoding.ids


def all_tokens(values: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer with its id, the model's own first and then the added ones.

    Args:
        values: The content of ``tokenizer.json``.
    """
    return {**model_tokens(values), **{token["content"]: token["id"] for token in values["added_tokens"]}}


def model_tokens(values: Mapping[str, Any]) -> dict[str, int]:
    """The tokens that texts are split into, without the added ones.

    Args:
        values: The content of ``tokenizer.json``.
    """
    vocab = values["model"]["vocab"]
    return dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}


def required_tokens(values: Mapping[str, Any], *, keep_characters: bool = True) -> set[int]:
    """The ids that a tokenizer cannot do without.

    These are the added and special tokens, the unknown token, the tokens put around texts, the bytes that spell what
    has no token, and the least likely piece of a Unigram model, which sets the price of an unknown character.

    Args:
        values: The content of ``tokenizer.json``.
        keep_characters: Also keep every single character, so that other texts can be spelled. Byte-level BPE keeps its
            256 bytes in any case.
    """
    model, tokens = values["model"], model_tokens(values)
    needed = {token["id"] for token in values["added_tokens"]} | set(_template_ids(values["post_processor"]))
    if (unknown := model.get("unk_token")) in tokens:
        needed.add(tokens[unknown])
    if values["padding"]:
        needed.add(values["padding"]["pad_id"])
    if model["type"] == "Unigram":
        needed.add(min(range(len(model["vocab"])), key=lambda i: model["vocab"][i][1]))
        if model["unk_id"] is not None:
            needed.add(model["unk_id"])
    if model.get("byte_fallback"):
        needed |= {i for token, i in tokens.items() if _BYTE.fullmatch(token)}
    if keep_characters or '"ByteLevel"' in json.dumps([values["pre_tokenizer"], values["decoder"]]):
        prefix, suffix = _affixes(model)
        needed |= {i for token, i in tokens.items() if len(token.removeprefix(prefix).removesuffix(suffix)) == 1}
    return needed


def _affixes(model: Mapping[str, Any]) -> tuple[str, str]:
    """The prefix of a piece that continues a word, and the suffix of one that ends it."""
    return model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""


def piece_finder(values: Mapping[str, Any]) -> Callable[[Iterable[int]], set[int]]:
    """A function from ids to these ids and the ids of all pieces that are needed to build their tokens.

    Only BPE builds tokens, pair by pair. A token inside a text results from the same merges as the token alone, since
    no merge crossed its ends. Merging each token from its characters therefore finds all pieces.

    Args:
        values: The content of ``tokenizer.json``.
    """
    if values["model"]["type"] != "BPE":
        return set
    tokens = model_tokens(values)
    names = {i: token for token, i in tokens.items()}
    prefix, suffix = _affixes(values["model"])
    ranks = {tuple(pair): rank for rank, pair in enumerate(values["model"]["merges"])}

    def pieces(token: str) -> Iterator[str]:
        characters = token.removeprefix(prefix).removesuffix(suffix)
        merged = [(prefix if i or token.startswith(prefix) else "") + c for i, c in enumerate(characters)]
        if merged and token.endswith(suffix):
            merged[-1] += suffix
        yield from merged
        while pairs := [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(merged)) if pair in ranks]:
            i = min(pairs)[1]  # the pair that was learned first is merged first
            merged[i : i + 2] = [_merged(merged[i], merged[i + 1], prefix)]
            yield merged[i]

    def find(ids: Iterable[int]) -> set[int]:
        wanted = set(ids)
        return wanted | {tokens[p] for i in wanted if i in names for p in pieces(names[i]) if p in tokens}

    return find


def _merged(left: str, right: str, prefix: str) -> str:
    return left + right.removeprefix(prefix)


def number_tokens(values: Mapping[str, Any], kept: Iterable[int]) -> dict[int, int]:
    """New ids without gaps: the model's own tokens in their order, then added ones, then rows without a token.

    Args:
        values: The content of ``tokenizer.json``.
        kept: The old ids that stay.

    Returns:
        New ids by old ones.
    """
    of_model, of_tokenizer = set(model_tokens(values).values()), set(all_tokens(values).values())
    ordered = sorted(kept, key=lambda i: (i not in of_model, i not in of_tokenizer, i))
    return {old: new for new, old in enumerate(ordered)}


def rebuild_tokenizer(tokenizer: Any, ids: Mapping[int, int]) -> Any:
    """Make a tokenizer with fewer tokens; the old one is not changed.

    Args:
        tokenizer: A fast tokenizer.
        ids: New ids by the old ones that stay.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        path = Path(folder) / "tokenizer.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        _trim_json(values, ids)
        path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
        new = type(tokenizer).from_pretrained(folder)
    new.name_or_path = tokenizer.name_or_path
    return new


def _trim_json(values: dict[str, Any], ids: Mapping[int, int]) -> None:
    """Remove and renumber tokens, in place."""
    model = values["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in ids]
        model["unk_id"] = None if model["unk_id"] is None else ids[model["unk_id"]]
    else:
        model["vocab"] = {token: ids[i] for token, i in model["vocab"].items() if i in ids}
    if model["type"] == "BPE":
        vocab, (prefix, _) = model["vocab"], _affixes(model)
        model["merges"] = [
            [a, b] for a, b in model["merges"] if a in vocab and b in vocab and _merged(a, b, prefix) in vocab
        ]
    for token in values["added_tokens"]:
        token["id"] = ids[token["id"]]
    if values["padding"]:
        values["padding"]["pad_id"] = ids[values["padding"]["pad_id"]]
    for processor in _processors(values["post_processor"]):
        if processor["type"] == "TemplateProcessing":
            for token in processor["special_tokens"].values():
                token["ids"] = [ids[i] for i in token["ids"]]
        elif processor["type"] in ("BertProcessing", "RobertaProcessing"):
            for key in ("sep", "cls"):
                processor[key] = [processor[key][0], ids[processor[key][1]]]


def _template_ids(post_processor: Mapping[str, Any] | None) -> Iterator[int]:
    """The ids of the tokens that are put around texts."""
    for processor in _processors(post_processor):
        for token in processor.get("special_tokens", {}).values():
            yield from token["ids"]
        yield from (processor[key][1] for key in ("sep", "cls") if key in processor)


def _processors(post_processor: Mapping[str, Any] | None) -> Iterator[Any]:
    """The post-processors inside a post-processor, or the post-processor itself."""
    if post_processor and "processors" in post_processor:
        for processor in post_processor["processors"]:
            yield from _processors(processor)
    elif post_processor:
        yield post_processor


def check_segmentation(old: Any, new: Any, ids: Mapping[int, int], texts: Sequence[str]) -> int:
    """Check that texts are split as before, and count the tokens for which that is impossible.

    Args:
        old: The original tokenizer.
        new: The tokenizer with fewer tokens.
        ids: New ids by old ones.
        texts: The texts.

    Returns:
        How many tokens of the texts were removed.

    Raises:
        DataError: If a text is split differently although all of its tokens stay.
    """
    removed = 0
    for text, before, after in zip(texts, _encoded(old, texts), _encoded(new, texts), strict=True):
        missing = sum(i not in ids for i in before)
        removed += missing
        if not missing and [ids[i] for i in before] != after:
            tokens = old.convert_ids_to_tokens(before), new.convert_ids_to_tokens(after)
            at = next((i for i, (a, b) in enumerate(zip(*tokens, strict=False)) if a != b), min(map(len, tokens)))
            raise DataError(
                f"the text {text[:60]!r} would be split differently: {tokens[0][at : at + 3]} became "
                f"{tokens[1][at : at + 3]} at token {at}; leave that text out, or keep more tokens with keep=... "
                f"Nothing was changed"
            )
    return removed
