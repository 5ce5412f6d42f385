"""Experts that a model keeps as slabs of one parameter: which parameters, and how each slab lies in them.

transformers packs the experts of a layer into three-dimensional parameters, such as ``gate_up_proj`` of shape
(experts, 2 * intermediate, hidden). Its decorator says on each module how they lie; other modules are in the table
below, or are added by :func:`register_packed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_prune.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """How the slabs of one parameter lie in it.

    Args:
        attribute: The parameter's name in its module.
        layout: Of each slab: ``"linear"`` (out, in) or ``"conv1d"`` (in, out).
        bias: The name of the parameter with the biases, (slabs, out), if there are any.
        slabs: The attribute of the module that counts the slabs of a two-dimensional parameter; None where the first of
            three dimensions does, or where it is a single matrix.
        single: Whether three dimensions are one matrix, as where outputs are numbered by head and place in the head.
    """

    attribute: str
    layout: str = "linear"
    bias: str | None = None
    slabs: str | None = None
    single: bool = False


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A parameter that holds one matrix for each of several experts.

    Args:
        name: The parameter's name in the model.
        module_name: The name of the module that holds it.
        module: The module.
        attribute: The parameter's name in the module.
        experts: How many there are.
        layout: Of each slab: ``"linear"`` (out, in) or ``"conv1d"`` (in, out).
        bias: The name, in the module, of the parameter with the biases, (experts, out); None if there are none.
    """

    name: str
    module_name: str
    module: nn.Module
    attribute: str
    experts: int
    layout: str
    bias: str | None


_PACKED = (Layout("gate_up_proj"), Layout("down_proj"))
_LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "DbrxExpertGLU": tuple(
        Layout(name, layout, slabs="moe_num_experts")
        for name, layout in (("w1", "linear"), ("v1", "linear"), ("w2", "conv1d"))
    ),
    "FunnelRelMultiheadAttention": (Layout("r_kernel", "conv1d", single=True),),
    "GroupedLinearLayer": (Layout("weight", "conv1d"),),  # ConvBERT's feed-forward network in groups
    "Inkling2RelativeLogits": (Layout("proj", "conv1d"),),
    "InklingRelativeLogits": (Layout("proj", "conv1d"),),
    "InklingSharedExperts": (Layout("gate_proj"), Layout("up_proj"), Layout("down_proj")),
    "JetMoeParallelExperts": (Layout("weight"),),
    "Llama4TextExperts": (Layout("gate_up_proj", "conv1d"), Layout("down_proj", "conv1d")),
    "LongcatFlashExperts": _PACKED,
    "QuantLinear": (Layout("weight", bias="bias"),),  # of I-BERT
    "RecurrentGemmaRglru": (
        Layout("input_gate_weight", "conv1d", "input_gate_bias"),
        Layout("recurrent_gate_weight", "conv1d", "recurrent_gate_bias"),
    ),
    "MoshiFlexibleLinear": (Layout("weight"),),  # one matrix for each codebook
    "Step3p7Experts": _PACKED,
    "XLNetRelativeAttention": (
        *(Layout(name, "conv1d", single=True) for name in ("q", "k", "v", "r")),
        Layout("o", single=True),
    ),
}


def register_packed(class_name: str, *layouts: Layout) -> None:
    """Say how a class of modules packs the experts of a layer into parameters.

    Args:
        class_name: The name of the class.
        *layouts: One for each parameter.

    Raises:
        ConfigError: If the class is known already, or a layout is neither ``"linear"`` nor ``"conv1d"``.
    """
    if class_name in _LAYOUTS:
        raise ConfigError(f"the packed parameters of {class_name} are known already: each class is registered once")
    for entry in layouts:
        if entry.layout not in ("linear", "conv1d"):
            raise ConfigError(f"layout {entry.layout!r} of {class_name}.{entry.attribute}: expected linear or conv1d")
    _LAYOUTS[class_name] = layouts


def packed_weights(model: nn.Module) -> list[PackedWeight]:
    """The packed experts of a model, in the order of its modules; each parameter once.

    Args:
        model: Any torch module.
    """
    found: dict[int, PackedWeight] = {}
    for module_name, module in model.named_modules():
        for entry in _layouts_of(module):
            parameter = module._parameters.get(entry.attribute)
            if parameter is None or id(parameter) in found or parameter.dim() not in (2, 3):
                continue
            experts = len(parameter) if parameter.dim() == 3 and not entry.single else 1
            if entry.slabs is not None:
                experts = int(getattr(module, entry.slabs))
            name = f"{module_name}.{entry.attribute}" if module_name else entry.attribute
            bias = entry.bias if entry.bias is not None and module._parameters.get(entry.bias) is not None else None
            found[id(parameter)] = PackedWeight(name, module_name, module, entry.attribute, experts, entry.layout, bias)
    return list(found.values())


def _layouts_of(module: Any) -> tuple[Layout, ...]:
    if (known := _LAYOUTS.get(type(module).__name__)) is not None:
        return known
    if not all(hasattr(module, flag) for flag in ("is_transposed", "has_bias", "has_gate", "is_concatenated")):
        return ()
    layout = "conv1d" if module.is_transposed else "linear"
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    return tuple(Layout(name, layout, f"{name}_bias" if module.has_bias else None) for name in names)
