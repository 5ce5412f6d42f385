"""Has transformers read packed weights in ``from_pretrained``.

transformers has one way for a checkpoint to say "my weights are not what they seem": ``quantization_config``. Here is
what it then calls. Nothing here needs the rest of the package, since this file travels with checkpoints that load
without it, see ``remote_code.py``; ``quantizer.py`` adds what does, and is what to import: transformers imports it
while it is being imported itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, _IdentityOp
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_prune.errors import CheckpointError
from hf_prune.packed_format import SUFFIX, check_files
from hf_prune.structure import COMPRESSED, METHOD, VERSION, compressed_config, is_ours, is_structure, structure_config
from hf_prune.unpacking import unpack


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


class Unpack(ConversionOps):
    """Puts packed weights in the place of the empty ones beside them; weights that are not packed pass."""

    dtype: torch.dtype | None = None  # of the parameter, see PackedQuantizer.get_new_dtype

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What the checkpoint has for one parameter, by pattern, as dense weights under the patterns of weights."""
        lists = {name: found if isinstance(found, list) else [found] for name, found in input_dict.items()}
        result = {}
        for name, weights in lists.items():
            if name.endswith(SUFFIX) and name.removesuffix(SUFFIX) in lists:
                continue
            packed = lists.get(name + SUFFIX, [])
            if sum(not weight.numel() for weight in weights) != len(packed) and packed:
                raise CheckpointError(f"{len(packed)} packed weights do not fit {len(weights)} weights of {name}")
            waiting = (each.cpu().numpy() for each in packed)  # transformers may have put them on another device
            result[name] = [
                unpack(next(waiting)).to(weight.device, self.dtype) if packed and not weight.numel() else weight
                for weight in weights
            ]
        return result

    @property
    def reverse_op(self) -> ConversionOps:
        """Saved weights are dense, and compressed afterwards if at all."""
        return _IdentityOp()


def _without_unpacking(conversion: Any) -> Any:
    """What transformers goes back through when it saves the model: its own steps, since nothing is packed then."""
    operations = getattr(conversion, "operations", ())
    if not any(isinstance(operation, Unpack) for operation in operations):
        return conversion
    if not (own := [operation for operation in operations if not isinstance(operation, Unpack)]):
        return None
    sources = [name for name in conversion._original_source_patterns if not name.endswith(SUFFIX)]
    return conversion.copy(sources, conversion._original_target_patterns.copy(), operations=own)


class PackedQuantizer(HfQuantizer):
    """Checks files of packed weights before anything is read of them, and unpacks those."""

    quantization_config: HfPruneConfig
    serialized_names = {"weight": ["weight", "weight_packed"]}  # noqa: RUF012 # as the base class has it

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        if self.quantization_config.structure:
            raise CheckpointError("the checkpoint is of a shrunk model: pip install hf_prune, and import it first")
        if self.quantization_config.compressed is not None and checkpoint_files is not None:
            check_files(checkpoint_files)
        return model

    def get_load_operations(self) -> dict[str, Any]:
        """What transformers runs on the tensors of ``serialized_names``."""
        return {} if self.quantization_config.compressed is None else {"dequantize": lambda quantizer: Unpack()}

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Plain weights are cast as always; packed ones when they are unpacked."""
        kind = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)
        if kind in ("U8", "torch.uint8"):
            for operation in getattr(converter, "operations", ()):
                if isinstance(operation, Unpack):
                    operation.dtype = dtype
            return None
        return dtype if kind.startswith(("F", "BF", "torch.f", "torch.bf")) else None

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """What is loaded is an ordinary model, which is saved as one."""
        used = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [kept for each in used if (kept := _without_unpacking(each)) is not None]
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
