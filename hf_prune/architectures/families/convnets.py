"""Convolutional models: ResNet, MobileNet v1 and v2, ConvNeXt."""

from __future__ import annotations

from hf_prune.architectures.base import Channels, register_architecture


def _convolution(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{module}" for name in names for module in ("convolution", "normalization"))


register_architecture(
    "resnet",
    Channels(
        "encoder.stages.*.layers.*",
        tuple((_convolution(f"layer.{i}"), f"layer.{i + 1}.convolution") for i in range(2)),
    ),
)

register_architecture(
    "mobilenet_v1",  # pairs of a depthwise and a 1x1 convolution, from the stem to the classifier
    Channels("", ((_convolution("conv_stem", "layer.0"), "layer.1.convolution"),)),
    Channels(
        "", tuple((_convolution(f"layer.{i}", f"layer.{i + 1}"), f"layer.{i + 2}.convolution") for i in range(1, 25, 2))
    ),
)

_INVERTED = (_convolution("expand_1x1", "conv_3x3"), "reduce_1x1.convolution")
register_architecture("mobilenet_v2", Channels("layer.*", (_INVERTED,)), Channels("conv_stem", (_INVERTED,)))

register_architecture("convnext", Channels("encoder.stages.*.layers.*", ((("pwconv1",), "pwconv2"),)))
