"""Make ``from_pretrained`` of transformers read packed weights.

In transformers, a ``quantization_config`` in a checkpoint names the quantizer that converts its weights. This module
is ours for packed weights. It imports nothing else from hf_prune, since its code is also written into checkpoints, see
``remote_code.py``; ``hf_prune/quantizer.py`` adds masks and shrunk models, and is the one that hf_prune registers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_prune.checkpoint.packed.format import (
    HEADER_BYTES,
    SPELLED,
    SUFFIX,
    damaged,
    read_header,
)
from hf_prune.checkpoint.packed.quantization_config import (
    COMPRESSED,
    VERSION,
    compressed_config,
    is_ours,
    is_structure,
    structure_config,
)
from hf_prune.checkpoint.packed.resized import resize_modules
from hf_prune.checkpoint.packed.seal import check_files, damaged_file, unchanged
from hf_prune.checkpoint.packed.unpack import unpack
from hf_prune.errors import CheckpointError
from hf_prune.utils.quantization_method import METHOD


class HfPruneConfig(QuantizationConfigMixin):
    """The part of a config that describes a shrunk or compressed model.

    Args:
        structure: Number of units of each group, by name.
        format_version: Version of this description.
        compressed: Version of the packed format; None if the weights are plain.
        **kwargs: Must be empty: other keys come from a newer version.

    Raises:
        CheckpointError: If it is damaged, or of a newer version.
    """

    def __init__(
        self, structure: Any = None, format_version: Any = VERSION, compressed: Any = None, **kwargs: Any
    ) -> None:
        kwargs.pop("quant_method", None)
        if format_version != VERSION or compressed not in (None, COMPRESSED) or kwargs:
            raise CheckpointError(
                f"the checkpoint's quantization_config has format_version {format_version!r}"
                f"{f', compressed {compressed!r}, expected {COMPRESSED},' if compressed is not None else ''}"
                f"{' and the unknown keys ' + ', '.join(kwargs) if kwargs else ''}: this version of hf_prune reads "
                f"{VERSION}; update hf_prune"
            )
        structure = {} if structure is None else structure
        if not is_structure(structure):
            raise CheckpointError(
                f"the structure in the checkpoint's quantization_config is {structure!r}: expected numbers of heads "
                f"and neurons by module; save or download it again"
            )
        self.quant_method: Any = METHOD
        self.format_version = format_version
        self.structure = structure
        self.compressed = compressed
        self.dequantize = True  # transformers then treats the loaded model as a plain one

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return structure_config(self.structure) if self.compressed is None else compressed_config(self.structure)


class PackedSlice:
    """A packed weight with the interface of a safetensors slice, unpacked when it is used.

    Args:
        packed: Its bytes, a slice from ``get_slice`` of safetensors.

    Attributes:
        unpacked_dtype: The dtype to unpack it to, its own at first: rounding part by part takes no further memory.

    Raises:
        CheckpointError: If they are not a packed weight.
    """

    def __init__(self, packed: Any) -> None:
        self._packed = packed
        if (packed.get_dtype(), len(packed.get_shape())) != ("U8", 1):
            raise damaged(f"it is of {packed.get_dtype()} and of shape {packed.get_shape()}, expected a row of U8")
        header = read_header(packed[:HEADER_BYTES].numpy(), packed.get_shape()[0])
        self._shape, self._dtype = header.shape, header.dtype
        self.unpacked_dtype = header.dtype

    def get_shape(self) -> list[int]:
        """The shape of the weight."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """The dtype of the weight, as in safetensors."""
        return SPELLED[self._dtype]

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Unpack the weight, and return a part of it."""
        return unpack(self._packed[...].numpy(), dtype=self.unpacked_dtype)[index]


def dense_tensors(paths: Sequence[str]) -> dict[str, Any]:
    """The tensors of packed files by their names in a dense checkpoint, none of them read yet."""
    slices: dict[str, Any] = {}
    for path in paths:
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise damaged_file(Path(path), str(error)) from error
        slices |= {name: file.get_slice(name) for name in file.keys()}  # no mapping
    for name in [name for name in slices if name + SUFFIX in slices]:
        slices[name] = PackedSlice(slices.pop(name + SUFFIX))
    return slices


def take_misfits(model: Any, tensors: dict[str, Any], mapping: Sequence[Any]) -> set[tuple[str, Any, Any]]:
    """Remove packed weights whose shape differs from the model's, before they are unpacked.

    transformers compares shapes after it has read the values, so a small file could make it allocate gigabytes.

    Args:
        model: The model, on any device.
        tensors: The result of :func:`dense_tensors`; changed in place.
        mapping: How transformers renames and converts the tensors of this model.

    Returns:
        Name, shape in the files and shape in the model of each removed weight, as transformers reports them.

    Raises:
        CheckpointError: If the remaining weights have far more values than the model.
    """
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    misfits, values = set(), 0
    for name in [name for name, tensor in tensors.items() if isinstance(tensor, PackedSlice)]:
        target, converted = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, converted = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            continue  # never read
        shape = torch.Size(tensors[name].get_shape())
        if converted is None and shape != state[target].shape:
            misfits.add((target, shape, state[target].shape))
            del tensors[name]
        else:
            values += math.prod(shape)
    room = sum(tensor.numel() for tensor in state.values())
    if values > 2 * room:  # twice as many: conversions may drop parts
        raise CheckpointError(
            f"the packed weights stand for {values:,} values, and the model that the config describes has {room:,}: "
            f"they do not belong together; download or save the checkpoint again"
        )
    return misfits


def take_dense_tensors() -> None:
    """Make transformers load the tensors that a quantizer's ``dense_tensors`` returns.

    While loading, transformers fuses, splits and renames the tensors of many model types. A quantizer can add steps
    after these, but they need the names and shapes of a dense checkpoint, so packed weights must be replaced before
    them. transformers can do that with a state dict, but offers it only for GGUF files.
    """
    from transformers.modeling_utils import PreTrainedModel

    load = PreTrainedModel._load_pretrained_model
    if hasattr(load, "takes_dense_tensors"):
        return

    @functools.wraps(load)
    def load_dense(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        make = getattr(load_config.hf_quantizer, "dense_tensors", None)
        misfits: set[Any] = set()
        if state_dict is None and checkpoint_files and make is not None and (found := make(checkpoint_files)):
            misfits = take_misfits(model, found, load_config.weight_mapping or ())
            rounds_all = hasattr(HfQuantizer, "get_new_dtype")
            dtypes = {} if rounds_all else {name: tensor.dtype for name, tensor in model.state_dict().items()}
            with unchanged(checkpoint_files):
                # Without the names of the files, or offloaded weights would be read from them.
                info, *others = load(model, found, None, load_config, *args, **kwargs)
            if not rounds_all:
                round_renamed(model, dtypes, load_config.dtype_plan or {})
        else:
            info, *others = load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        info.missing_keys -= {name for name, *_ in misfits}
        info.mismatched_keys |= misfits
        return info, *others

    load_dense.takes_dense_tensors = True  # type: ignore[attr-defined]
    PreTrainedModel._load_pretrained_model = staticmethod(load_dense)  # type: ignore[method-assign]


def round_renamed(model: Any, dtypes: Mapping[str, torch.dtype], plan: Mapping[str, torch.dtype]) -> None:
    """Round what early releases of transformers 5 load in the dtype of the files: tensors with another name in a model.

    Args:
        model: The model, with its weights.
        dtypes: The dtypes that it was built with, by name.
        plan: Other dtypes for some of them, by pattern.
    """
    from transformers.core_model_loading import build_glob_alternation

    policy, by_group, _ = build_glob_alternation(list(plan)) if plan else (None, {}, None)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        planned = policy.search(name) if policy is not None else None
        dtype = dtypes.get(name, tensor.dtype) if planned is None else plan[by_group[str(planned.lastgroup)]]
        if tensor.is_floating_point() and dtype.is_floating_point and not tensor.is_meta and tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)


class PackedQuantizer(HfQuantizer):
    """Checks the files of packed weights before they are read, and unpacks them."""

    quantization_config: HfPruneConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        if self.quantization_config.structure:
            if (changes := getattr(model, "resized_modules", None)) is None:
                raise CheckpointError("the checkpoint is of a shrunk model: pip install hf_prune, and import it first")
            resize_modules(model, changes)
        if self.quantization_config.compressed is not None and checkpoint_files is not None:
            check_files(checkpoint_files)
        take_dense_tensors()
        return model

    def dense_tensors(self, paths: Sequence[str]) -> dict[str, Any] | None:
        """The state dict to load; None to load the files as they are."""
        return dense_tensors(paths) if self.quantization_config.compressed is not None else None

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype of the model, as without a quantizer; transformers asks before it reads the weight."""
        if isinstance(param, PackedSlice) and dtype in SPELLED:
            param.unpacked_dtype = dtype
        return dtype

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Make the loaded model an ordinary one, which is saved as one."""
        if is_ours(getattr(model.config, "auto_map", None)):
            del model.config.auto_map
        model.__class__ = getattr(model, "native_class", type(model))
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return True


def as_packed(native: Any, changes: Mapping[str, Any] | None = None) -> Any:
    """A subclass of a transformers class for ``auto_map`` to name; the models that it loads have the native class.

    Args:
        native: The class of transformers.
        changes: Of a shrunk model, what :func:`resize_modules` changes before weights are loaded.
    """
    names = {"__module__": __name__, "native_class": native, "is_custom_code": classmethod(lambda cls: False)}
    return type(native.__name__, (native,), {**names, "resized_modules": changes})


def register(config: type, quantizer: Any) -> None:
    """Make transformers use these classes for our checkpoints, in place of earlier ones."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = config
    AUTO_QUANTIZER_MAPPING[METHOD] = quantizer
