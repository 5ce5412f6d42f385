"""Has transformers read packed weights in ``from_pretrained``.

transformers has one way for a checkpoint to say "my weights are not what they seem": ``quantization_config``. Here is
what it then calls. Nothing here needs the rest of the package, since this file travels with checkpoints that load
without it, see ``remote_code.py``; ``quantizer.py`` adds what does, and is what to import: transformers imports it
while it is being imported itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
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
    check_files,
    damaged,
    damaged_file,
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
from hf_prune.checkpoint.packed.unpack import unpack
from hf_prune.errors import CheckpointError
from hf_prune.utils.quantization_method import METHOD


class HfPruneConfig(QuantizationConfigMixin):
    """The part of a config that describes a shrunk or compressed model.

    Args:
        structure: Numbers of units by site.
        format_version: Of this description.
        compressed: Version of the format of the weights, None if they are plain.
        **kwargs: Nothing; what else there is comes from a newer version.

    Raises:
        CheckpointError: If it is of a newer version, or damaged.
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
        self.dequantize = True  # transformers then forgets about it once the weights are loaded: a plain model

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return structure_config(self.structure) if self.compressed is None else compressed_config(self.structure)


class PackedSlice:
    """A packed weight as transformers sees the tensors of a file: what is asked of it is read when it is asked for.

    Args:
        packed: Its bytes, as ``get_slice`` of safetensors gives them.

    Raises:
        CheckpointError: If they are no packed weight.
    """

    def __init__(self, packed: Any) -> None:
        self._packed = packed
        if (packed.get_dtype(), len(packed.get_shape())) != ("U8", 1):
            raise damaged(f"it is of {packed.get_dtype()} and of shape {packed.get_shape()}, expected a row of U8")
        header = read_header(packed[:HEADER_BYTES].numpy(), packed.get_shape()[0])
        self._shape, self._dtype = header.shape, header.dtype

    def get_shape(self) -> list[int]:
        """Of the weight."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """Of the weight, as safetensors spells it."""
        return SPELLED[self._dtype]

    def __getitem__(self, index: Any) -> torch.Tensor:
        """The weight, or a part of it."""
        return unpack(self._packed[...].numpy())[index]


def dense_tensors(paths: Sequence[str]) -> dict[str, Any]:
    """The tensors of packed files under the names that they have in a dense checkpoint, none of them read yet."""
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
    """Take out the packed weights whose shape is not that of the model's, before memory is taken for them.

    transformers compares shapes once it has the values: a small file could have it take gigabytes for nothing.

    Args:
        model: On the meta device or not.
        tensors: What :func:`dense_tensors` found; changed in place.
        mapping: How transformers renames and converts the tensors of this model.

    Returns:
        Name in the model, shape in the files and shape in the model of each, as transformers reports them.

    Raises:
        CheckpointError: If those that conversions join and split have more values than the model.
    """
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    misfits, values = set(), 0
    for name in [name for name, tensor in tensors.items() if isinstance(tensor, PackedSlice)]:
        target, converted = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, converted = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            continue  # nobody reads it
        shape = torch.Size(tensors[name].get_shape())
        if converted is None and shape != state[target].shape:
            misfits.add((target, shape, state[target].shape))
            del tensors[name]
        else:
            values += math.prod(shape)
    room = sum(tensor.numel() for tensor in state.values())
    if values > 2 * room:  # twice: some conversions might leave parts out
        raise CheckpointError(
            f"the packed weights stand for {values:,} values, and the model that the config describes has {room:,}: "
            f"they do not belong together; download or save the checkpoint again"
        )
    return misfits


def take_dense_tensors() -> None:
    """Have transformers take the tensors of a checkpoint from a quantizer that has ``dense_tensors``.

    A quantizer can add steps to the conversions by which transformers fuses, splits and renames the tensors of many
    model types while it loads them. Those go by names and shapes of a dense checkpoint, so for a packed one it takes
    steps before them: what transformers has for GGUF files, a state dict made by the quantizer, but only for these.
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
        if state_dict is None and checkpoint_files and make is not None:
            state_dict = make(checkpoint_files)
            if state_dict is not None:
                checkpoint_files = None  # or offloaded weights would be looked for in the files
                misfits = take_misfits(model, state_dict, load_config.weight_mapping or ())
        info, *others = load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        info.missing_keys -= {name for name, *_ in misfits}
        info.mismatched_keys |= misfits
        return info, *others

    load_dense.takes_dense_tensors = True  # type: ignore[attr-defined]
    PreTrainedModel._load_pretrained_model = staticmethod(load_dense)  # type: ignore[method-assign]


class PackedQuantizer(HfQuantizer):
    """Checks files of packed weights before anything is read of them, and unpacks those."""

    quantization_config: HfPruneConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        if self.quantization_config.structure:
            raise CheckpointError("the checkpoint is of a shrunk model: pip install hf_prune, and import it first")
        if self.quantization_config.compressed is not None and checkpoint_files is not None:
            check_files(checkpoint_files)
        take_dense_tensors()
        return model

    def dense_tensors(self, paths: Sequence[str]) -> dict[str, Any] | None:
        """The state dict to load, None to take the files as they are."""
        return dense_tensors(paths) if self.quantization_config.compressed is not None else None

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """That of the model, as without a quantizer."""
        return dtype

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """What is loaded is an ordinary model, which is saved as one."""
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


def as_packed(native: Any) -> Any:
    """A class of transformers as one that ``auto_map`` may name; what it loads is of the native class."""
    names = {"__module__": __name__, "native_class": native, "is_custom_code": classmethod(lambda cls: False)}
    return type(native.__name__, (native,), names)


def register(config: type, quantizer: Any) -> None:
    """Have transformers use them for our checkpoints, whatever it knew before."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = config
    AUTO_QUANTIZER_MAPPING[METHOD] = quantizer
