"""What an exported file computes: the logits of a batch, with or without a key-value cache; and tracing it quietly."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hf_prune.errors import ExportError
from hf_prune.inference.backends import PAST, PRESENT
from hf_prune.utils.forward import cache_argument, generates

_FREE = torch.export.Dim.DYNAMIC


@dataclass(frozen=True)
class Graph:
    """A model as a function of tensors in a fixed order, and how to trace it.

    Args:
        module: The function.
        inputs: Values to trace it with.
        input_names: Their names in the file.
        output_names: The names of the results.
        free: Dimensions whose size is left open, by input.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    free: tuple[dict[int, Any], ...]


def logits_graph(model: nn.Module, inputs: Mapping[str, Tensor]) -> Graph:
    """The logits, or else the first output, of a whole batch."""
    free = tuple({0: _FREE, 1: _FREE} if value.dim() == 2 else {0: _FREE} for value in inputs.values())
    return Graph(_Logits(model, tuple(inputs)), tuple(inputs.values()), tuple(inputs), ("logits",), free)


def cached_graph(model: nn.Module, inputs: Mapping[str, Tensor]) -> Graph:
    """The logits of tokens that follow those of a cache, and the longer cache.

    Keys and values are inputs and outputs of shape (batch, heads, tokens, size of a head), under the names that Optimum
    and transformers.js use: ``past_key_values.0.key`` and ``present.0.key``; those of a layer without heads are empty.

    Raises:
        ExportError: If the model is not a causal language model whose layers keep keys and values.
    """
    ids = inputs["input_ids"] if "input_ids" in inputs else None
    if ids is None or not generates(model):
        raise ExportError(
            f"{type(model).__name__} does not continue a text, so it has no key-value cache: leave cache=True "
            f"(--cache) out"
        )
    batch, new = ids.shape
    past = new // 2 + 1
    pairs = _keys_and_values(model, ids[:, :past])
    tokens = {"input_ids": ids, "attention_mask": torch.ones(batch, past + new, dtype=torch.long)}
    if "position_ids" in inspect.signature(model.forward).parameters:
        tokens["position_ids"] = torch.arange(past, past + new)[None].repeat(batch, 1)
    sides = [f"{i}.{side}" for i in pairs for side in ("key", "value")]
    values = [value for pair in pairs.values() for value in pair]
    return Graph(
        _Step(model, tuple(tokens), tuple(pairs)),
        (*tokens.values(), *values),
        (*tokens, *(PAST + side for side in sides)),
        ("logits", *(PRESENT + side for side in sides)),
        (*({0: _FREE, 1: _FREE} for _ in tokens), *({0: _FREE, 2: _FREE} for _ in values)),
    )


def _keys_and_values(model: nn.Module, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """What a model keeps of some tokens, by layer."""
    cache, cause, reason, pairs = DynamicCache(), None, "", {}
    try:
        with torch.no_grad():
            name = cache_argument(model)
            kept = getattr(model(input_ids=ids, use_cache=True, **{name: cache}), name)
        layers = enumerate(cache.layers if kept is cache else ())
        pairs = {i: (layer.keys, layer.values) for i, layer in layers if getattr(layer, "keys", None) is not None}
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        cause, reason = error, f" ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
    if not pairs or any(value.dim() != 4 for pair in pairs.values() for value in pair):
        raise ExportError(
            f"{type(model).__name__} keeps something other than keys and values of each layer{reason}, which is all "
            f"that a file can take: leave cache=True (--cache) out"
        ) from cause
    return pairs


def first_output(outputs: Any) -> Any:
    """The logits of a model's outputs, or else the first output."""
    logits = getattr(outputs, "logits", None)
    return logits if logits is not None else outputs[0]


@contextlib.contextmanager
def attention_by(model: Any, implementation: str | None) -> Iterator[None]:
    """Another implementation of attention, inside the context; None changes nothing."""
    before = model.config._attn_implementation
    if implementation is None:
        yield
        return
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def reason_of(error: BaseException) -> str:
    """What went wrong at first, in a line: what torch says around it only points to its stack trace."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not re.search("stack trace|report|verbose=|TORCH_", line, re.IGNORECASE)]
    first, *others = told or lines or [type(error).__name__]
    return f"{first} {others[0]}" if first.endswith(":") and others else first


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's warnings, since its result is checked."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *values: Tensor) -> Tensor:
        return first_output(self.model(**dict(zip(self.names, values, strict=True))))


class _Step(nn.Module):
    def __init__(self, model: nn.Module, names: tuple[str, ...], layers: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.layers = layers
        self.cache = cache_argument(model)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        count = len(self.names)
        cache = DynamicCache()
        for i, layer in enumerate(self.layers):
            cache.update(values[count + 2 * i], values[count + 2 * i + 1], layer)
        tokens = dict(zip(self.names, values[:count], strict=True))
        logits = self.model(**tokens, use_cache=True, **{self.cache: cache}).logits
        kept: list[Any] = [cache.layers[layer] for layer in self.layers]
        return (logits, *(value for layer in kept for value in (layer.keys, layer.values)))
