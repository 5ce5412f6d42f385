"""How a tokenizer reads text, in the words of llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_prune.errors import ExportError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # types of tokens in GGUF
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {  # of byte-level BPE: what splits a text, and its name in llama.cpp
    f"{_WORDS}\\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    f"{_WORDS}\\p{{N}}{_REST}": "qwen2",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
_WHOLE_WORDS_FIRST = ("llama-bpe", "tekken")  # llama.cpp takes words that are tokens whole, without merges
_UNLIKE = "llama.cpp's tokenizer for sentencepiece merges whatever forms a token, so it would read texts otherwise"
_SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unk_token_id", "pad": "pad_token_id"}


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF says of a tokenizer.

    Args:
        model: ``"gpt2"`` for byte-level BPE, ``"llama"`` for that of sentencepiece.
        pre: How a text is split first, by the name that llama.cpp has for it.
        tokens: The tokens, by their numbers.
        types: Their types.
        scores: What is merged first, the largest score; only of ``"llama"``.
        merges: Merges in their order; only of ``"gpt2"``.
        special: Numbers of special tokens.
        flags: ``add_bos_token``, ``add_eos_token`` and ``add_space_prefix``.
        chat_template: The chat template, if there is one.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: dict[str, int]
    flags: dict[str, bool]
    chat_template: str | None


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """Describe a tokenizer to llama.cpp.

    Args:
        tokenizer: A fast tokenizer of transformers.
        size: How many embeddings the model has; rows without a token become unused ones.

    Raises:
        ExportError: If llama.cpp has no such tokenizer, or the model has too few embeddings.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"GGUF: found a {type(tokenizer).__name__}: expected a fast tokenizer (tokenizer.json)")
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise ExportError(f"GGUF: found a tokenizer of type {model['type']}: expected BPE")
    numbers = {**model["vocab"], **{token["content"]: token["id"] for token in described["added_tokens"]}}
    if numbers and max(numbers.values()) >= size:
        raise ExportError(
            f"GGUF: the tokenizer has a token number {max(numbers.values())}, and the model {size} embeddings: "
            f"expected the tokenizer of this model"
        )
    sentencepiece = bool(model.get("byte_fallback"))
    tokens, types = [_unused_name(number, numbers) for number in range(size)], [_UNUSED] * size
    for token, number in numbers.items():
        is_byte = sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[number], types[number] = token, _BYTE if is_byte else _NORMAL
    for token in described["added_tokens"]:
        types[token["id"]] = _CONTROL if token["special"] else _USER_DEFINED
    unknown = numbers.get(model.get("unk_token") or "")
    if unknown is not None and sentencepiece:
        types[unknown] = _UNKNOWN
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if sentencepiece:
        pre, flags = "default", {"add_space_prefix": _adds_space(described)}
        scores = _scores(merges, model["vocab"], tokens)
    else:
        pre, flags, scores = _pre_tokenizer(described, bool(model.get("ignore_merges"))), {}, None
    special = {name: getattr(tokenizer, key, None) for name, key in _SPECIAL.items()}
    first, last = _adds_around(tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=None if sentencepiece else merges,
        special={name: int(number) for name, number in special.items() if number is not None},
        flags={**flags, "add_bos_token": first, "add_eos_token": last},
        chat_template=template.get("default") if isinstance(template, dict) else template,
    )


def _unused_name(number: int, taken: Mapping[str, int]) -> str:
    """A name for a row without a token that no token has: llama.cpp ends its process where two have the same."""
    name = f"[PAD{number}]"
    while name in taken:
        name = f"[{name}]"
    return name


def _adds_around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a tokenizer puts the first and the last special token around a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for first, last in ((False, False), (True, False), (False, True), (True, True)):
        if ids == (before if first else []) + plain + (after if last else []) and (before or not first):
            return first, last
    raise ExportError(
        f"GGUF: the tokenizer turns 'a' into {ids}, and {plain} without special tokens: llama.cpp adds nothing but the "
        f"first and the last special token, {before + after}"
    )


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a part of a tokenizer, in order."""
    if step is None:
        return []
    return [inner for each in step[key] for inner in _steps(each, key)] if step["type"] == "Sequence" else [step]


def _pre_tokenizer(described: dict[str, Any], whole_words_first: bool) -> str:
    """The name that llama.cpp has for how a byte-level tokenizer splits a text."""
    steps = _steps(described["pre_tokenizer"], "pretokenizers")
    normal = [step["type"] for step in _steps(described["normalizer"], "normalizers")]
    name = None
    if steps and steps[-1]["type"] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        *before, last = steps
        own = last.get("use_regex", True)
        if not before and own:
            name = "gpt-2"
        elif len(before) == 1 and before[0]["type"] == "Digits" and before[0]["individual_digits"] and own:
            name = "smollm"
        elif len(before) == 1 and before[0]["type"] == "Split" and not own:
            name = _PATTERNS.get(before[0]["pattern"].get("Regex", ""))
    if name is None or not set(normal) <= {"NFC"} or whole_words_first != (name in _WHOLE_WORDS_FIRST):
        raise ExportError(
            f"GGUF: llama.cpp has no name that we know for a tokenizer with the steps {normal + steps} and "
            f"ignore_merges={whole_words_first}: expected that of GPT-2, SmolLM, Llama 3, Qwen2 or Mistral Nemo, or "
            f"one with byte_fallback, as sentencepiece makes them"
        )
    return name


def _adds_space(described: dict[str, Any]) -> bool:
    """Whether a sentencepiece-like tokenizer puts a space before a text."""
    normal = _steps(described["normalizer"], "normalizers")
    steps = _steps(described["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in normal]
    replaces = [step for step in normal if step["type"] == "Replace"]
    if not steps and kinds in (["Prepend", "Replace"], ["Replace"]) and replaces[0]["content"] == "▁":
        return kinds[0] == "Prepend"
    if not normal and [step["type"] for step in steps] == ["Metaspace"] and not steps[0].get("split", True):
        return bool(steps[0]["prepend_scheme"] != "never")
    raise ExportError(
        f"GGUF: found a sentencepiece tokenizer with the steps {normal + steps}: expected that spaces become '▁', and "
        f"nothing else"
    )


def _scores(merges: list[str], vocabulary: dict[str, int], tokens: list[str]) -> list[float]:
    """Scores that have llama.cpp merge in the order of the merges.

    It merges any two neighbours that form a token, the best token first. So every way to make a token has to be a
    merge, and all merges that make it follow each other.
    """
    order: dict[str, float] = {}
    pairs = set()
    last = None
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ")
        token = left + right
        if token in order and token != last:
            raise ExportError(f"GGUF: merges that make {token!r} are apart in this tokenizer: {_UNLIKE}")
        order.setdefault(token, -float(rank))
        pairs.add((left, right))
        last = token
    for token in order:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary and (left, right) not in pairs:
                raise ExportError(f"GGUF: no merge makes {token!r} of {left!r} and {right!r}: {_UNLIKE}")
    return [order.get(token, 0.0) for token in tokens]
