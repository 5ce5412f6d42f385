"""A model on the meta device, built from its config alone, and the place of each of its weights in the files.

:class:`~hf_prune.conversion.streaming.lazy_weights.LazyWeights` then reads the weights when a module is called, so that
the model runs as its author wrote it, in the memory of a few modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from hf_prune.checkpoint.files import INDEX, SINGLE, find_file, weight_files
from hf_prune.checkpoint.load import limited_to_files
from hf_prune.checkpoint.native import explained_loading, load_config, native_class
from hf_prune.checkpoint.shards import Shards, read_rows, read_tensor
from hf_prune.checkpoint.sources import check_model_source
from hf_prune.conversion.streaming.merged import Index, MergedWeights
from hf_prune.errors import CalibrationError, CheckpointError, HfPruneError, PlanError
from hf_prune.planning.prunable import prunable_weights
from hf_prune.utils.formatting import first_few
from hf_prune.utils.notices import warn_user
from hf_prune.utils.number_formats import EXPECTED, method_of_config


@dataclass(frozen=True)
class MetaModel:
    """A model on the meta device, and the files with its weights.

    Args:
        model: The model in eval mode. Buffers that are in no file have the values that their class computes.
        shards: The weight files.
        keys: The names in the files of each parameter, by its name in the model: several if tied ones were all saved,
            none if its class computes it. A computed parameter has its values, and is not on the meta device.
        buffers: The names in the files of buffers, by their names in the model.
        dtypes: The dtype of each parameter in a loaded model.
        parts: Of each parameter that several tensors in the files are merged into, where each of them lies in it.
    """

    model: Any
    shards: Shards
    keys: Mapping[str, tuple[str, ...]]
    buffers: Mapping[str, str]
    dtypes: Mapping[str, torch.dtype]
    parts: Mapping[str, Mapping[str, Index]]

    def stand_ins(self) -> Iterator[Tensor]:
        """Tensors with the shapes and dtypes of the parameters, which take no memory."""
        for name, parameter in self.model.named_parameters():
            yield torch.empty((), dtype=self.dtypes[name]).expand(parameter.shape)

    def load_buffers(self) -> None:
        """Read the buffers that are in the files, such as the running statistics of a batch norm."""
        for name, buffer in self.model.named_buffers():
            if name in self.buffers:
                buffer.copy_(read_tensor(self.shards.folder, self.shards.entries[self.buffers[name]]))

    def read(self, name: str, folder: Path | None = None) -> Tensor:
        """Read a parameter, in the dtype of a loaded model.

        Args:
            name: Its name in the model.
            folder: Another folder with files of the same form.
        """
        folder, entries = folder or self.shards.folder, self.shards.entries
        if (parts := self.parts.get(name)) is None:
            return read_tensor(folder, entries[self.keys[name][0]]).to(self.dtypes[name])
        shape, dtype = self.model.get_parameter(name).shape, entries[self.keys[name][0]].torch_dtype
        weight = torch.empty(shape, dtype=dtype)
        for key, index in parts.items():
            weight[index] = read_tensor(folder, entries[key])
        return weight.to(self.dtypes[name])

    def read_rows(self, name: str, rows: Sequence[int], folder: Path | None = None) -> Tensor:
        """Read some rows of a parameter that is one tensor in the files; see :meth:`read`."""
        entry = self.shards.entries[self.keys[name][0]]
        return read_rows(folder or self.shards.folder, entry, rows).to(self.dtypes[name])


def load_meta_model(source: str, unknown: str = "copied unchanged") -> MetaModel:
    """Build a checkpoint's model without reading its weights.

    Args:
        source: Folder or Hub id, with weights in safetensors files.
        unknown: What becomes of tensors that do not belong to the model, for a warning.

    Raises:
        DataError: If the source cannot be found, or its config names no transformers class.
        CheckpointError: If a file is missing or damaged, or its tensors cannot be matched with the model.
    """
    native = native_class(source)
    hub = {"local_files_only": check_model_source(source)}
    config = load_config(source)
    if (method := method_of_config(config)) is not None:
        raise CheckpointError(f"{source!r} is quantized with {method!r}: {EXPECTED}")
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(
            f"{source!r} is compressed or shrunk, so its weights are not stored as they are in the model: prune "
            f"without streaming"
        )
    files = weight_files(source, hub)
    if not files:
        raise CheckpointError(f"{source!r} has no weights: expected {SINGLE}, or {INDEX} and the files that it names")
    sharded = find_file(source, SINGLE, hub) is None
    shards = Shards(files, find_file(source, INDEX, hub) if sharded else None)
    if config.dtype is None:  # as from_pretrained does
        floating = (entry.torch_dtype for entry in shards.entries.values() if entry.dtype.endswith(("F16", "F32")))
        config.dtype = next(floating, None)
    with explained_loading(source):
        with limited_to_files(source, files), init_empty_weights(include_buffers=False), _EmptyOnMeta():
            model = native._from_config(config)
        if any(buffer.is_meta for buffer in model.buffers()):
            with init_empty_weights(include_buffers=False):
                model = native._from_config(config)
        model.tie_weights()
    model.eval()
    keys, buffers, parts = _match(model, shards, source, unknown)
    return MetaModel(model, shards, keys, buffers, _dtypes(model), parts)


class _EmptyOnMeta(TorchFunctionMode):
    """Create the results of ``torch.empty``, which weights start from, on the meta device, without any memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.empty:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))


def _match(
    model: Any, shards: Shards, source: str, unknown_are: str
) -> tuple[dict[str, tuple[str, ...]], dict[str, str], dict[str, dict[str, Index]]]:
    """Match the tensors in the files with the parameters and buffers of the model, by the rules of transformers."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    prefix = model.base_model_prefix
    state = model.state_dict(keep_vars=True)
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    keys: dict[str, list[str]] = {name: [] for name in first.values()}
    buffers: dict[str, str] = {}
    unknown = []
    assembled = MergedWeights(converters, shards, source)
    for key in sorted(shards.entries, key=dot_natural_key):
        name, merged = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, merged = rename_source_key(key, [], [], prefix, state)
        if merged is not None and name in state:  # else of layers that the class does not load
            assembled.add(name, merged, key)
            continue
        if name not in state:
            unknown.append(key)
            continue
        shape = shards.entries[key].shape
        if shape != tuple(state[name].shape):
            raise CheckpointError(
                f"{key} of {source!r} has shape {shape}, and the model that its config describes has "
                f"{tuple(state[name].shape)} there: the weights do not fit the config"
            )
        if isinstance(state[name], nn.Parameter):
            keys[first[id(state[name])]].append(key)
        else:
            buffers[name] = key
    parts = assembled.parts(dict(model.named_parameters()))
    for name, of_weight in parts.items():
        keys[name].extend(of_weight)
    missing = [name for name, stored in keys.items() if not stored]
    if missing := [name for name in missing if name not in set(_compute_missing(model, missing))]:
        pruned = any(f"{name}_orig" in shards.entries for name in missing)
        hint = "it was pruned with torch.nn.utils.prune: load it once without streaming" if pruned else "found others"
        raise CheckpointError(
            f"{source!r} has no weights for {len(missing)} of {len(keys)} parameters of {type(model).__name__} "
            f"({first_few(missing)}), and has {len(unknown)} that it does not know "
            f"({first_few(unknown) or 'none'}): {hint}; the config must name the class that was saved"
        )
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    if strange := [key for key in unknown if not any(re.search(pattern, key) for pattern in ignored)]:
        warn_user(
            f"{len(strange)} tensors of {source!r} do not belong to {type(model).__name__}, and are {unknown_are}: "
            f"{first_few(strange)}",
        )
    return {name: tuple(stored) for name, stored in keys.items()}, buffers, parts


def _compute_missing(model: Any, names: Sequence[str]) -> list[str]:
    """Compute parameters that are missing in the files since their class computes them, such as sinusoidal positions.

    Random initial values and prunable weights do not count as computed.

    Args:
        model: A model on the meta device; gets the values of computed parameters.
        names: The missing parameters.

    Returns:
        The names of the computed ones.
    """
    allowed = model._keys_to_ignore_on_load_missing or ()
    prunable = {id(weight.weight) for weight in prunable_weights(model)}
    computed = []
    for name in names:
        holder, _, key = name.rpartition(".")
        module, parameter = model.get_submodule(holder), model.get_parameter(name)
        if id(parameter) in prunable or not any(re.search(pattern, name) for pattern in allowed):
            continue
        parts = [holder[:end] for end in range(len(holder) + 1) if end in (0, len(holder)) or holder[end] == "."]
        owners = [part for part in map(model.get_submodule, parts) if isinstance(part, PreTrainedModel)]
        values = []
        for seed in (0, 1):  # computed values depend neither on the seed nor on what was there before
            module._parameters[key] = nn.Parameter(
                torch.full_like(parameter, seed, device="cpu"), requires_grad=parameter.requires_grad
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                owners[-1]._init_weights(module)
            values.append(module._parameters[key])
        if torch.equal(*values):
            computed.append(name)
        else:
            module._parameters[key] = parameter
    return computed


def _dtypes(model: Any) -> dict[str, torch.dtype]:
    """The dtypes in a loaded model, where some classes keep a few weights in float32."""
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    if exceptions := model._get_dtype_plan(model.config.dtype):
        pattern, patterns, _ = build_glob_alternation(list(exceptions))
        for name in dtypes:
            if (match := pattern.search(name)) is not None:
                dtypes[name] = exceptions[patterns[str(match.lastgroup)]]
    return dtypes


@contextmanager
def explaining_meta_errors(model: nn.Module) -> Iterator[None]:
    """A model runs inside with weights that are read when they are used; explains what it cannot do that way.

    Raises:
        PlanError: If it computes something from weights that are not there.
    """
    try:
        yield
    except (RuntimeError, CalibrationError) as error:
        cause = error.__cause__ if isinstance(error, CalibrationError) else error
        if not isinstance(cause, RuntimeError) or isinstance(cause, HfPruneError):
            raise
        if (explained := explain_meta_error(model, cause)) is cause:
            raise
        raise explained from cause


def explain_meta_error(model: nn.Module, error: Exception) -> Exception:
    """Explain an error about the meta device from a model that runs without its weights; return others unchanged."""
    if "meta" not in str(error):
        return error
    line = next((line for line in str(error).splitlines() if line.strip()), repr(error))
    return PlanError(
        f"{type(model).__name__} computes something from weights before they are read ({line}): prune it without "
        f"streaming"
    )
