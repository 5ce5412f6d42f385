"""The weights of a model that can be pruned, which of them stay dense by choice, and its output embeddings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrizations, parametrize

from hf_prune.architectures.experts import packed_weights
from hf_prune.kernels.matrix import Target
from hf_prune.utils.wrapping import adapters, copied_modules

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | Transposed
WEIGHT_NORM = "parametrizations.weight.original1"  # the direction of a weight, beside its length
_ROUTER = re.compile(r"Router|Gate$|TopKGating$|Hyper(Connection|Head)")
_HOLDS_ROUTER = re.compile(r"Router(MLP)?$|MoE\w*Gate$|TopKGating$")  # the weights of other gates are as large as any
_TABLE = re.compile(  # parameters that are added, looked up or scaled with, and never multiplied as a matrix
    r"(?![Ww]_|(?:.*_)?(?:weight|proj|projection|kernel|matrix)s?(?:_|$))(?:.*_)?(?:"
    r"(?:position(?:s|al)?|(?:pos|position)?emb(?:ed(?:s|ding|dings)?)?|time_(?:mix|decay|first|maa))(?:_.*)?"
    r"|(?:tokens?|query|queries|probe|bias(?:es)?|A_log|scale|gamma)(?:_[a-z]|_\d+)?)"
)
_RAW_CHANNELS = 4  # a convolution of at most so many channels reads pixels or samples


@dataclass(frozen=True, eq=False)
class PrunableWeight:
    """A parameter that inputs are multiplied with.

    Args:
        module_name: The name of the module that holds it.
        module: The module.
        layout: See :class:`~hf_prune.kernels.matrix.Target`.
        attribute: The parameter's name in the module; of a weight that weight norm computes, its direction.
        slabs: See :class:`~hf_prune.kernels.matrix.Target`.
        bias: The name, in the module, of the parameter that is added to its outputs, if it has one.
        called: Whether calling the module multiplies its first argument with the weight.
        routes: Whether the module is part of a router, which :func:`is_router` does not see in itself.
    """

    module_name: str
    module: nn.Module
    layout: str
    attribute: str = "weight"
    slabs: int = 1
    bias: str | None = "bias"
    called: bool = True
    routes: bool = False

    @property
    def weight(self) -> nn.Parameter:
        """The parameter."""
        return self.module.get_parameter(self.attribute)

    @property
    def path(self) -> str:
        """The parameter's name, as its module goes."""
        return f"{self.module_name}.{self.attribute}" if self.module_name else self.attribute

    @property
    def names(self) -> tuple[str, ...]:
        """What users may call it: its module, and the parameter itself where that is not simply its weight."""
        return (self.module_name,) if self.attribute == "weight" else (self.module_name, self.path)

    def target(self, name: str) -> Target:
        """The weight as a target.

        Args:
            name: The parameter's name in ``model.named_parameters()``.
        """
        transposed = isinstance(self.module, Transposed)
        return Target(name, self.module_name, self.layout, tuple(self.weight.shape), self.slabs, transposed)


def prunable_weights(model: nn.Module) -> Iterator[PrunableWeight]:
    """The weights of a model that can be pruned, in the order of its modules.

    These are the weights of Linear, Conv1D, convolutions and recurrent layers, the projections that
    ``nn.MultiheadAttention`` packs, and packed experts.

    Args:
        model: Any torch module.
    """
    from transformers.pytorch_utils import Conv1D

    passed_over = adapters(model).keys() | copied_modules(model).keys()
    routing = _parts_of_routers(model)
    packed: dict[nn.Module, list[PrunableWeight]] = {}
    for p in packed_weights(model):
        weight = PrunableWeight(p.module_name, p.module, p.layout, p.attribute, p.experts, p.bias, called=False)
        packed.setdefault(p.module, []).append(weight)
    for name, module in model.named_modules():
        if module in passed_over:
            continue
        if module in packed:
            yield from packed[module]
        elif isinstance(module, nn.MultiheadAttention):
            if isinstance(module._parameters.get("in_proj_weight"), nn.Parameter):
                yield PrunableWeight(name, module, "linear", "in_proj_weight", 3, "in_proj_bias", called=False)
            for attribute in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                if isinstance(module._parameters.get(attribute), nn.Parameter):
                    yield PrunableWeight(name, module, "linear", attribute, bias=None, called=False)
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase):
            for attribute in module._parameters:
                if attribute.startswith("weight_"):
                    bias = attribute.replace("weight", "bias", 1)
                    yield PrunableWeight(name, module, "linear", attribute, bias=bias, called=False)
        elif isinstance(getattr(module, "_parameters", {}).get("weight"), nn.Parameter):
            if isinstance(module, nn.Linear):
                yield PrunableWeight(name, module, "linear", routes=module in routing)
            elif isinstance(module, Conv1D):
                yield PrunableWeight(name, module, "conv1d")
            elif isinstance(module, Convolution):
                yield PrunableWeight(name, module, "conv", slabs=module.groups)
        elif isinstance(module, nn.Linear | Convolution) and _has_weight_norm(module):
            layout, groups = ("linear", 1) if isinstance(module, nn.Linear) else ("conv", module.groups)
            yield PrunableWeight(name, module, layout, WEIGHT_NORM, groups, bias=None)


def _has_weight_norm(module: nn.Module) -> bool:
    """Whether a module's weight is computed by ``torch.nn.utils.parametrizations.weight_norm`` alone."""
    if not parametrize.is_parametrized(module, "weight"):
        return False
    steps = list(module.parametrizations["weight"].children())  # type: ignore[index, union-attr]
    return len(steps) == 1 and type(steps[0]) is parametrizations._WeightNorm


def _parts_of_routers(model: nn.Module) -> set[nn.Module]:
    """The modules inside the routers of a model.

    A list of modules inside a router holds what it chooses among, such as experts, and a model inside it is no part.
    """
    from transformers import PreTrainedModel

    parts: set[nn.Module] = set()
    waiting = [m for m in model.modules() if m is not model and _HOLDS_ROUTER.search(type(m).__name__)]
    while waiting:
        module = waiting.pop()
        if not isinstance(module, nn.ModuleList | nn.ModuleDict | PreTrainedModel):
            parts.add(module)
            waiting += module.children()
    return parts


def stays_dense(weight: PrunableWeight) -> bool:
    """Whether a weight is left dense unless it is named: routers, depthwise convolutions, and those of raw inputs.

    They have few weights, and each of them matters: a depthwise convolution has one input for each output, and a first
    convolution sees the whole input through a handful of channels.
    """
    module = weight.module
    if weight.routes or is_router(module):
        return True
    if not isinstance(module, Convolution):
        return False
    return module.in_channels <= _RAW_CHANNELS or module.in_channels == module.groups


def router_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Matrices by which tokens choose experts or streams, where these are no plain Linear: by parameter name.

    They are left alone: they have next to no weights, and decide on what all others compute.
    """
    weights = {}
    for name, module in model.named_modules():
        if is_router(module):
            for attribute, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() == 2:
                    weights[f"{name}.{attribute}"] = parameter
    return weights


def tables(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of several dimensions that are added or looked up, such as positions, by name: no matrices."""
    weights = {id(weight.weight) for weight in prunable_weights(model)}
    looked_up = {
        id(parameter)
        for module in model.modules()
        if "Embedding" in type(module).__name__ and not isinstance(module, nn.Embedding)
        for parameter in module._parameters.values()
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if sum(size > 1 for size in parameter.shape) > 1
        and id(parameter) not in weights
        and (id(parameter) in looked_up or _TABLE.fullmatch(name.rpartition(".")[2]))
    }


def is_router(module: nn.Module) -> bool:
    """Whether a module is of a class that chooses experts or mixes streams.

    A plain Linear that does is pruned like any other, unless it is part of such a module.
    """
    return _ROUTER.search(type(module).__name__) is not None


def output_embeddings(model: nn.Module) -> set[nn.Module]:
    """The output embeddings of a model and of models inside it, with all modules in them, such as adapted layers."""
    heads: set[nn.Module] = set()
    for module in model.modules():
        try:
            head = getattr(module, "get_output_embeddings", lambda: None)()
        except (AttributeError, NotImplementedError):  # a model without one
            continue
        if isinstance(head, nn.Module):
            heads |= {head, *head.modules()}
    return heads
