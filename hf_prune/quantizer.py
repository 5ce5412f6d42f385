"""Loads checkpoints of shrunk models by plain ``from_pretrained``: transformers calls this before it reads the weights.

transformers has one way for a checkpoint to say "my modules are not what the config alone makes of them":
``quantization_config``. Ours says how many heads and neurons each layer has; nothing is quantized, and the model that
comes out is an ordinary one, of which nothing else knows.

transformers imports this module while it is being imported itself, at times on behalf of another module of ours: what
imports transformers is therefore imported when it is needed.
"""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_prune.errors import CheckpointError
from hf_prune.structure import METHOD, VERSION, structure_config


@register_quantization_config(METHOD)
class HfPruneConfig(QuantizationConfigMixin):
    """The part of a config that describes a shrunk model.

    Args:
        structure: Numbers of units by site.
        format_version: Of this description.
        **kwargs: Nothing; what else there is comes from a newer version.

    Raises:
        CheckpointError: If it is of a newer version, or damaged.
    """

    def __init__(self, structure: Any = None, format_version: Any = VERSION, **kwargs: Any) -> None:
        kwargs.pop("quant_method", None)
        if format_version != VERSION or kwargs:
            raise CheckpointError(
                f"the checkpoint's quantization_config has format_version {format_version!r}"
                f"{' and the unknown keys ' + ', '.join(kwargs) if kwargs else ''}: this version of hf_prune reads "
                f"{VERSION}; update hf_prune"
            )
        structure = {} if structure is None else structure
        fits = isinstance(structure, dict) and all(
            isinstance(name, str) and isinstance(n, int) and not isinstance(n, bool) and n >= 0
            for name, n in structure.items()
        )
        if not fits:
            raise CheckpointError(
                f"the structure in the checkpoint's quantization_config is {structure!r}: expected numbers of heads "
                f"and neurons by module; save or download it again"
            )
        self.quant_method: Any = METHOD
        self.format_version = format_version
        self.structure = structure
        self.dequantize = True  # transformers then forgets about it once the weights are loaded: a plain model

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return structure_config(self.structure)


@register_quantizer(METHOD)
class HfPruneQuantizer(HfQuantizer):
    """Gives the modules of a model the sizes of the checkpoint, before its weights are read."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from hf_prune.shrinking import resize

        resize(model, self.quantization_config.structure)  # type: ignore[attr-defined]
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from hf_prune.mixin import prunable

        return prunable(model)  # saving it again has to describe its sizes as well

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether the model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the model can be trained."""
        return True
