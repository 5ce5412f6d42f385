"""Small configs: a model of the same class and structure as another, but of a few layers and small sizes.

Everything structural stays: which kinds of blocks alternate, grouped keys, gates, biases, tied weights, routing, and
the ratios between widths. Fields are recognized by their names, since transformers' configs share a vocabulary of them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from hf_prune.architectures.config_sizes import hidden_size, whole_number
from hf_prune.architectures.config_values import is_config, values_of, with_values
from hf_prune.architectures.model_inputs import text_config
from hf_prune.architectures.small_numbers import Scale, Shared

_HIDDEN = (64, 96, 128, 160, 192)  # small hidden sizes, a different one for each size in a composite model
# Of a backbone, made from out_indices and the number of stages; what transformers keeps for itself; and our record.
_DERIVED = {"_out_features", "stage_names", "transformers_version", "per_layer_config", "pruned_structure"}

_EFFICIENTNET: dict[str, Any] = {  # whose code fixes the width of the first convolution
    "in_channels": [32, 16, 24],
    "out_channels": [16, 24, 40],
    "kernel_sizes": [3, 3, 5],
    "strides": [1, 2, 2],
    "num_block_repeats": [1, 1, 1],
    "expand_ratios": [1, 6, 6],
    "width_coefficient": 1.0,
    "depth_coefficient": 1.0,
    "hidden_dim": 1280,
}
_EXCEPTIONS: dict[str, dict[str, Any]] = {  # by model_type: sizes that the rules cannot tell
    "align": {"projection_dim": 640},
    "align_vision_model": {**_EFFICIENTNET, "hidden_dim": 640, "width_coefficient": 1.0},
    "efficientnet": _EFFICIENTNET,
    "depth_pro": {"patch_size": 56},
    "dots3_note_text": {"head_dim": 20},  # of sliding layers the sum of two sizes that become 12 and 8
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "seggpt": {"num_hidden_layers": 4, "merge_index": 0, "intermediate_hidden_state_indices": [1, 2, 3]},
    "tvp": {"max_img_size": 64, "visual_prompt_size": 16},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
}


def small_config(config: Any, most_layers: int | None = None, widths: bool = False) -> Any:
    """A config of the same class, of few layers and small sizes, with every kind of block that the config describes.

    Args:
        config: A transformers config; it stays as it is.
        most_layers: Keep all layers, up to this number of them, rather than a few.
        widths: Keep the widths and the numbers of heads and experts.

    Returns:
        The small config: hidden sizes of 64 to 192, 4 heads (keys grouped as before), 2 layers or as many as it takes
        to have each kind of layer, 256 tokens, 4 experts.
    """
    shared = Shared()
    for part in _parts(config):
        hidden = hidden_size(part)
        if hidden is not None:
            # Boxes are embedded in sixths of the hidden size, and 96 is a multiple of 6.
            number = len(shared.hidden) + (hasattr(part, "max_2d_position_embeddings") and not shared.hidden)
            shared.hidden.setdefault(hidden, _HIDDEN[min(number, len(_HIDDEN) - 1)])
    _join_towers(config, shared, widths)
    return _shrunk(config, shared, most_layers, widths)


def _join_towers(config: Any, shared: Shared, widths: bool) -> None:
    """Have towers fit together that do not in a config of defaults: what images become, and which tokens they take."""
    text = text_config(config)
    shared.vocabulary = min(shared.vocabulary, whole_number(text, "vocab_size") or shared.vocabulary)
    small = hidden_size(text) if widths else shared.hidden.get(hidden_size(text) or 0)
    for part in _parts(config):
        width = whole_number(part, "out_hidden_size")
        if part is not text and width is not None and small is not None:
            if width == hidden_size(part) != hidden_size(text):
                shared.joined = small
            shared.hidden.setdefault(width, small)


def _parts(config: Any) -> list[Any]:
    """A config and all configs in it."""
    inner = [v for v in vars(config).values() if is_config(v)]
    return [config, *(part for child in inner for part in _parts(child))]


def _shrunk(config: Any, shared: Shared, most_layers: int | None, widths: bool) -> Any:
    if any(name.endswith(("block_configs", "stage_configs")) for name in vars(config)):
        return copy.deepcopy(config)  # small, and of a structure of its own
    values = {name: value for name, value in values_of(config).items() if not is_config(value) and name not in _DERIVED}
    scale = Scale.of(config, values, shared, most_layers, widths)
    small = {name: scale.value(name, value) for name, value in values.items()}
    inner = {
        name: _shrunk(value, shared, most_layers, widths) for name, value in vars(config).items() if is_config(value)
    }
    if shared.joined is not None and "out_hidden_size" in small:
        small["out_hidden_size"] = shared.joined
    small |= _EXCEPTIONS.get(config.model_type, {})
    if "_out_indices" in small:
        small["out_indices"] = small.pop("_out_indices")
    if getattr(config, "is_heterogeneous", False):
        small["per_layer_config"] = _own_sizes(config, scale.kept, values, small)
    return with_values(config, {**small, **inner})


def _own_sizes(
    config: Any, kept: Sequence[int], values: Mapping[str, Any], small: Mapping[str, Any]
) -> dict[int, dict[str, Any]]:
    """What some of the kept layers have in another size, by their new number; in the same ratio to the other layers."""

    def scaled(name: str, value: Any) -> Any:
        base = values.get(name)
        is_size = isinstance(value, int) and not isinstance(value, bool) and isinstance(base, int) and base > 0
        return max(1, small[name] * value // base) if is_size else value

    own = {int(number): sizes for number, sizes in config.to_dict()["per_layer_config"].items()}
    return {
        new: {name: scaled(name, value) for name, value in own[old].items()}
        for new, old in enumerate(kept)
        if old in own
    }
