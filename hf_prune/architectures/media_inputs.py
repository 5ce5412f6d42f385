"""Images, sounds and series to try on a model, in the shapes that models of transformers take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

BATCH = 2
_PIXELS = 64
_FRAMES = (64, 128, 256, 1024, 3000)  # of sounds
_SAMPLES = (7680, 16000)
_MEDIA = (
    "pixel_values",
    "pixel_values_videos",
    "hidden_states",
    "input_features",
    "input_values",
    "input_values_videos",
    "audio_mel",
    "spectrogram",
    "flattened_patches",
    "past_values",
    "states",
)


def media_inputs(model: Any, takes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Images, sounds or series in the shapes that models take; the main input first.

    Args:
        model: A transformers model.
        takes: The parameters of its forward pass, by name.
    """
    main = getattr(model, "main_input_name", None)
    for name in sorted((n for n in takes if n in _MEDIA), key=lambda n: n != main):
        if name in ("pixel_values", "pixel_values_videos", "hidden_states"):
            yield from _images(model.config, takes, name)
        elif name in ("past_values", "states"):
            yield from _series(model.config, name)
        else:
            yield from _sounds(model.config, takes, name)


def _images(config: Any, takes: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    channels = find(config, "num_channels", "in_channels", "in_chans") or 3
    patch = find(config, "patch_size") or 1
    grids = [
        n for n in takes if "grid_" in n or n in ("tgt_sizes", "target_sizes", "spatial_shapes", "image_position_ids")
    ]
    for grid_name in (n for n in grids if ("video" in n) == ("video" in name)):
        patch = patch if isinstance(patch, int) else patch[-1]
        frames = find(config, "temporal_patch_size", "patch_temporal") or 1
        for across in (4, 8):
            grid = torch.tensor([[1, across, across]] * BATCH)
            patches = BATCH * across * across
            for shape in ((channels * frames * patch**2,), (channels * patch**2,), (channels, patch, patch)):
                yield {name: noise(patches, *shape), grid_name: grid}
                yield {name: noise(patches, *shape), grid_name: grid[:, 1:]}
            yield {name: noise(1, patches, channels, patch, patch), grid_name: grid}
            yield {name: noise(BATCH, across * across, channels * patch**2), grid_name: grid[:, 1:]}
            yield {name: noise(BATCH, channels, patch, patch * across * across), grid_name: grid[:, 1:]}
    if name == "hidden_states":  # of a codec
        yield {name: noise(BATCH, find(config, "channels") or 1, _SAMPLES[0])}
    known = find(config, "image_size") or _PIXELS
    for size in dict.fromkeys([tuple(known) if isinstance(known, list | tuple) else known, 64, 128, 224]):
        height, width = size if isinstance(size, tuple) else (size, size)
        for lead in ((), (1,), (2,), (find(config, "num_frames") or 4,)):
            images = {name: noise(BATCH, *lead, channels, height, width)}
            if "image_sizes" in takes:
                yield {**images, "image_sizes": torch.tensor([[height, width]] * BATCH)}
            yield images
    yield {name: noise(BATCH, 16, channels * (patch if isinstance(patch, int) else patch[-1]) ** 2)}


def _sounds(config: Any, takes: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    if "decoder_input_values" in takes:  # vectors, as what comes before the model makes them of sound
        width = find(config, "hidden_size")
        yield {name: noise(BATCH, 16, width), "decoder_input_values": noise(BATCH, 4, width)}
    if name == "input_values":
        for samples in _SAMPLES:
            yield {name: noise(BATCH, samples)}
            yield {name: noise(BATCH, find(config, "audio_channels", "channels") or 1, samples)}
            yield {name: noise(BATCH, 1, samples)}
    names = (
        "num_mel_bins",
        "feature_size",
        "input_feat_per_channel",
        "n_mels",
        "input_size",
        "num_mels",
        "mel_bins",
        "input_feat_size",
    )
    bins = list(
        dict.fromkeys([find(config, n) for n in (*names, "feature_projection_input_dim", "input_dim")] + [80, 128])
    )
    frames = [2 * m for m in [find(config, "max_source_positions")] if m]
    frames += [t for t in (find(config, "max_length"), find(config, "spec_size")) if isinstance(t, int)]
    mask = next((n for n in takes if n.endswith("_mask") and name.split("_")[-1].rstrip("s") in n), None)
    if mask is None and "attention_mask" in takes and "input_ids" not in takes:
        mask = "attention_mask"
    for length in dict.fromkeys([*frames, *_FRAMES]):
        for width in (b for b in bins if b):
            for shape in ((width, length), (length, width)):
                sound = {name: noise(BATCH, *shape)}
                if mask is not None:
                    yield {**sound, mask: torch.ones(BATCH, length, dtype=torch.bool)}
                yield sound
            yield {name: noise(BATCH, 1, length, width)}


def _series(config: Any, name: str) -> Iterator[dict[str, Any]]:
    if name == "states":
        actions = find(config, "act_dim") or 4
        yield {
            "states": noise(BATCH, 4, find(config, "state_dim") or 17),
            "actions": noise(BATCH, 4, actions),
            "rewards": noise(BATCH, 4, 1),
            "returns_to_go": noise(BATCH, 4, 1),
            "timesteps": torch.arange(4).repeat(BATCH, 1),
        }
        return
    length = find(config, "context_length") or 32
    lags = find(config, "lags_sequence")
    past = length + max(lags) if isinstance(lags, list | tuple) and lags else length
    times = (find(config, "num_time_features") or 0) + 1
    yield {"past_values": noise(BATCH, length, find(config, "num_input_channels") or 1)}
    yield {"past_values": noise(BATCH, length), "past_values_padding": torch.zeros(BATCH, length, dtype=torch.long)}
    for features in (times, times - 1):
        yield {
            "past_values": noise(BATCH, past),
            "past_time_features": noise(BATCH, past, features),
            "past_observed_mask": torch.ones(BATCH, past),
            "future_values": noise(BATCH, find(config, "prediction_length") or 4),
            "future_time_features": noise(BATCH, find(config, "prediction_length") or 4, features),
        }


def find(config: Any, *names: str) -> Any:
    """The first value of some attributes in a config or the configs in it; None if there is none."""
    from transformers import PreTrainedConfig

    for name in names:
        value = vars(config).get(type(config).attribute_map.get(name, name))
        if value is not None and not isinstance(value, str | bool):
            return value
    for inner in vars(config).values():
        if isinstance(inner, PreTrainedConfig) and (value := find(inner, *names)) is not None:
            return value
    return None


def noise(*shape: int) -> Tensor:
    """Random numbers of a shape, always the same ones."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
