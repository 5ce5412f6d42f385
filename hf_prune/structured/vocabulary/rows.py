"""Find the vocabulary of a model and the token ids that it names, and remove rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hf_prune.errors import ArchitectureError
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.utils.number_formats import refuse_quantized

# Settings that hold token ids, in configs, generation configs and attributes of modules.
_ID_KEY = re.compile(
    r"\w+_token_(id|ids|index)|(pad|bos|eos|unk|mask)_index|(begin_)?suppress_tokens|(bad|force)_words_ids"
    r"|forced_decoder_ids|sequence_bias|(lang|task)_to_id"
)


@dataclass(frozen=True)
class Vocabulary:
    """Where a model has its vocabulary.

    Args:
        rows: How many rows the input embedding has.
        tensors: Each tensor with a row for each token, as (name, tensor, dimension of the rows).
        padding: The ids that the embeddings use for padding.
        has_output_layer: Whether an output layer gives each token a logit.
    """

    rows: int
    tensors: list[tuple[str, Tensor, int]]
    padding: set[int]
    has_output_layer: bool


def find_vocabulary(model: Any) -> Vocabulary:
    """Find every tensor of a model that has a row for each token.

    Raises:
        ArchitectureError: If there is none, or a tensor whose rows may or may not be tokens.
        PlanError: If the model is quantized.
    """
    refuse_quantized(model)
    name = type(model).__name__
    embedding = _embedding(model, "get_input_embeddings")
    if not isinstance(embedding, nn.Embedding):
        actual = "none" if embedding is None else f"a {type(embedding).__name__}"
        raise ArchitectureError(
            f"the input embedding of {name} is {actual}: expected a table with a row for each token"
        )
    rows = embedding.num_embeddings
    known: dict[int, int] = {}  # the dimension of the rows, by id of the tensor
    outputs: list[Any] = []
    for inner in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        inputs, output = _embedding(inner, "get_input_embeddings"), _embedding(inner, "get_output_embeddings")
        if isinstance(inputs, nn.Embedding) and inputs.num_embeddings == rows:
            known[id(inputs.weight)] = 0
        if isinstance(getattr(output, "weight", None), Tensor):
            outputs.append(output)
    for output in outputs:
        if (length := len(output.weight)) != rows:
            raise ArchitectureError(
                f"the output layer of {name} has {length:,} rows, its input embedding {rows:,}: expected one vocabulary"
            )
        known |= {id(t): 0 for t in (output.weight, getattr(output, "bias", None)) if t is not None}
    for module in model.modules():  # BERT and ALBERT keep the bias of the output layer in its parent
        if any(child in outputs for child in module.children()) and _is_row(getattr(module, "bias", None), rows):
            known[id(module.bias)] = 0
    unsaved = {f"{n}.{key}".lstrip(".") for n, m in model.named_modules() for key in m._non_persistent_buffers_set}
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n not in unsaved)]
    known |= {id(t): t.dim() - 1 for n, t in tensors if n.endswith("final_logits_bias") and t.shape[-1] == rows}
    if unknown := [(n, t) for n, t in tensors if id(t) not in known and rows in t.shape]:
        raise ArchitectureError(
            f"{unknown[0][0]!r} of {name} has the shape {tuple(unknown[0][1].shape)}, and the vocabulary {rows:,} "
            f"tokens: whether these are its tokens is not known, so nothing was changed"
        )
    _check_one_vocabulary(model, rows)
    padded = [getattr(m, "padding_idx", None) for m in model.modules() if id(getattr(m, "weight", None)) in known]
    padding = {i for i in padded if i is not None}
    return Vocabulary(rows, [(n, t, known[id(t)]) for n, t in tensors if id(t) in known], padding, bool(outputs))


def _check_one_vocabulary(model: nn.Module, rows: int) -> None:
    for holder in _holders(model):
        if isinstance(holder, PretrainedConfig):
            for key, value in vars(holder).items():
                other = "vocab_size" in key and key not in ("vocab_size", "type_vocab_size")
                if other and isinstance(value, int) and value not in (0, rows):
                    raise ArchitectureError(
                        f"the config of {type(model).__name__} has {key}={value:,} beside a vocabulary of {rows:,}: "
                        f"models with two vocabularies cannot be trimmed"
                    )


def _embedding(model: Any, getter: str) -> nn.Module | None:
    try:
        embedding = getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # the model has none
        return None
    return embedding if isinstance(embedding, nn.Module) else None


def _is_row(tensor: Any, rows: int) -> bool:
    return isinstance(tensor, Tensor) and tensor.shape == (rows,)


# --- ids that a model names ------------------------------------------------------------------------


def named_ids(model: nn.Module, rows: int) -> set[int]:
    """The token ids that configs and modules name, such as ``pad_token_id``."""
    named: set[int] = set()

    def note(i: int) -> int:
        named.add(i)
        return i

    for holder in _holders(model):
        for key, value in list(vars(holder).items()):
            if _holds_ids(holder, key):
                _renumbered(key, value, note)
    return {i for i in named if 0 <= i < rows}


def _holds_ids(holder: Any, key: str) -> bool:
    """Whether a setting holds token ids. The ``padding_idx`` of other embeddings is a position or a type."""
    padding = key == "padding_idx" and isinstance(holder, PreTrainedModel)
    return padding or _ID_KEY.fullmatch(key) is not None


def _renumbered(key: str, value: Any, new: Callable[[int], int]) -> Any:
    """The value of a setting with each token id in it replaced; everything else stays."""
    if key == "forced_decoder_ids" and value is not None:  # (position, id)
        return [[position, _renumbered("", token, new)] for position, token in value]
    if key == "sequence_bias" and value is not None:  # (ids, bias)
        pairs = value.items() if isinstance(value, Mapping) else value
        return [[_renumbered("", list(ids), new), bias] for ids, bias in pairs]
    if isinstance(value, Mapping):
        return {name: _renumbered("", entry, new) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_renumbered("", entry, new) for entry in value)
    return new(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _holders(model: nn.Module) -> Iterator[Any]:
    """Every module, and every config and generation config of any of them, each once."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        yield module
        todo = [getattr(module, "config", None), getattr(module, "generation_config", None)]
        while todo:
            config = todo.pop()
            if config is None or id(config) in configs or not hasattr(config, "__dict__"):
                continue
            configs[id(config)] = config
            todo += [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    yield from configs.values()


def fixed_ids(model: nn.Module, vocabulary: Vocabulary) -> set[int]:
    """The ids up to the padding token, in models that count positions from it (RoBERTa)."""
    tables = {id(tensor) for _, tensor, _ in vocabulary.tensors}
    modules = (module for module in model.modules() if not isinstance(module, PreTrainedModel))
    of_others = (module for module in modules if id(getattr(module, "weight", 0)) not in tables)
    padding = [getattr(module, "padding_idx", None) for module in of_others]
    return set(range(max((i for i in padding if isinstance(i, int)), default=-1) + 1))


# --- removing rows ---------------------------------------------------------------------------------


@torch.no_grad()
def take_rows(model: Any, vocabulary: Vocabulary, ids: Mapping[int, int]) -> None:
    """Keep some rows of a vocabulary, in place: in tensors, masks, sizes and the ids that settings name.

    New tensors are made before anything is replaced, so a failure leaves the model as it was. Tied tensors stay tied.

    Args:
        model: The model.
        vocabulary: Where it has its vocabulary.
        ids: New ids by the old ones that stay.
    """
    rows, index = vocabulary.rows, torch.tensor(list(ids))

    def kept_rows(tensor: Tensor, dim: int) -> Tensor:
        return tensor.detach().index_select(dim, index.to(tensor.device))

    new: dict[int, Tensor] = {}
    for _, tensor, dim in vocabulary.tensors:
        values = kept_rows(tensor, dim)
        is_parameter = isinstance(tensor, nn.Parameter)
        new[id(tensor)] = nn.Parameter(values, requires_grad=tensor.requires_grad) if is_parameter else values
    store = MaskStore.of(model)
    dims = {name: dim for name, _, dim in vocabulary.tensors}
    if store is not None:
        store.masks |= {n: kept_rows(m, dims[n]) for n, m in store.masks.items() if n in dims}
        store.dense = store.dense and {n: kept_rows(w, dims[n]) if n in dims else w for n, w in store.dense.items()}
    for module in model.modules():
        tensors = [*module._parameters.items(), *module._buffers.items()]
        for name, tensor in [(n, t) for n, t in tensors if t is not None and id(t) in new]:
            setattr(module, name, new[id(tensor)])
            if name == "weight":
                _resize(module, rows, ids)
    if store is not None:
        store.attach(model)
    for holder in _holders(model):
        _renumber_settings(holder, rows, ids)


def _resize(module: Any, rows: int, ids: Mapping[int, int]) -> None:
    for name in ("num_embeddings", "out_features"):
        if getattr(module, name, None) == rows:
            setattr(module, name, len(ids))
    if getattr(module, "padding_idx", None) is not None:
        module.padding_idx = ids[module.padding_idx]


def _renumber_settings(holder: Any, rows: int, ids: Mapping[int, int]) -> None:
    for key, value in list(vars(holder).items()):
        if _holds_ids(holder, key):
            setattr(holder, key, _renumbered(key, value, lambda i: ids.get(i, i)))
        elif "vocab_size" in key and key != "type_vocab_size" and isinstance(value, int) and value == rows:
            setattr(holder, key, len(ids))
    if isinstance(holder, PretrainedConfig) and getattr(holder, "vocab_size", None) == rows:
        holder.vocab_size = len(ids)  # under another name in some configs
