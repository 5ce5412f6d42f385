"""Describe the units of a checkpoint from its config alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_prune.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from hf_prune.evaluation.unit_description import UnitDescription

_MOST_MODULES = 1_000_000
_MOST_BUFFER_BYTES = 4 << 30


def describe_checkpoint(source: str) -> UnitDescription:
    """What can be removed as a whole from the model of a checkpoint, whose weights are not read.

    Args:
        source: Folder or Hub id.

    Raises:
        DataError: If the source cannot be found, or its config describes no model of transformers.
        CheckpointError: If the sizes of a shrunk model are damaged, or do not fit its config.
    """
    import torch

    from hf_prune.checkpoint.building import limited_building
    from hf_prune.checkpoint.native import explained_loading, load_config
    from hf_prune.checkpoint.packed.quantization_config import is_structure
    from hf_prune.evaluation.unit_description import describe_units
    from hf_prune.structured.shrink import resize
    from hf_prune.utils.number_formats import EXPECTED, method_of_config
    from hf_prune.utils.quantization_method import METHOD

    config = load_config(source)
    ours: Any = getattr(config, "quantization_config", None) or {}
    if (method := method_of_config(config)) is not None:
        raise DataError(f"{source!r} is quantized with {method!r}: {EXPECTED}")
    native = _class_of(source, config)
    structure = ours.get("structure") or {} if ours.get("quant_method") == METHOD else {}
    if not is_structure(structure):
        raise CheckpointError(
            f"the structure in the quantization_config of {source!r} is {structure!r}: expected numbers of heads and "
            f"neurons by module; save or download it again"
        )
    with (
        explained_loading(source),
        limited_building(
            f"{source!r}", "inspect another checkpoint", modules=_MOST_MODULES, buffer_bytes=_MOST_BUFFER_BYTES
        ),
        torch.device("meta"),
    ):
        model = native._from_config(config)
        if structure:
            resize(model, structure)
    return describe_units(model)


def _class_of(source: str, config: Any) -> Any:
    """The class that a config names, or else the one that AutoModel takes for it."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    from hf_prune.checkpoint.native import native_class

    if config.architectures:
        return native_class(source)
    if type(config) not in MODEL_MAPPING:
        raise DataError(
            f"the config of {source!r} names no class, and AutoModel knows none for {config.model_type!r}: expected "
            f"the config of a transformers model"
        )
    native = MODEL_MAPPING[type(config)]
    return native[0] if isinstance(native, tuple) else native
