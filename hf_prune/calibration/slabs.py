"""The experts of a packed parameter as modules of their own, so that hooks see what flows into each.

A model with packed experts multiplies with a view of a parameter, and no hook sees that. So while batches run, each
product with a packed parameter goes through a small module, which returns what the product returns: hooks on it see the
tokens routed to that expert and its outputs, and may replace these, as with any module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_prune.calibration.routed_rows import RoutedRows
from hf_prune.errors import CalibrationError
from hf_prune.kernels.matrix import Target
from hf_prune.planning.prunable import PrunableWeight, prunable_weights

_PRODUCTS = frozenset("linear matmul __matmul__ mm bmm".split())


class Slab(nn.Module):
    """One matrix of a packed parameter: calling it multiplies.

    Args:
        number: Which one.
        owner: The module that holds the parameter.

    Attributes:
        product: Multiplies the input that the module is called with; set for each call.
    """

    product: Callable[[Tensor], Tensor]

    def __init__(self, number: int, owner: nn.Module) -> None:
        super().__init__()
        self.number = number
        self.__dict__["owner"] = owner  # no submodule: it would be in itself

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the input with the matrix."""
        return self.product(x)


def slab_number(module: nn.Module) -> int:
    """Which matrix of its target a module multiplies with."""
    return module.number if isinstance(module, Slab) else 0


def owner_of(module: nn.Module) -> nn.Module:
    """The module of the model that a call belongs to."""
    owner: nn.Module = module.__dict__["owner"] if isinstance(module, Slab) else module
    return owner


def packed_targets(model: nn.Module, targets: Collection[Target]) -> dict[str, PackedTarget]:
    """The targets whose modules multiply without being called, by name.

    Args:
        model: The model.
        targets: Some of its weights.
    """
    by_name = {t.name: t for t in targets}
    names = {id(parameter): name for name, parameter in model.named_parameters() if name in by_name}
    packed: dict[str, PackedTarget] = {}
    for weight in prunable_weights(model):
        if not weight.called and (name := names.get(id(weight.weight))) is not None:
            packed.setdefault(name, PackedTarget(by_name[name], weight))
    return packed


class PackedTarget:
    """A target of several matrices, and the modules that stand for them.

    Args:
        target: The target.
        weight: Where the model holds it.
    """

    def __init__(self, target: Target, weight: PrunableWeight) -> None:
        self.target, self.owner, self.attribute = target, weight.module, weight.attribute
        self.slabs = [Slab(number, weight.module) for number in range(target.slabs)]
        self._shape = target.slab_shape

    def slab_of(self, parameter: Tensor, matrix: Tensor) -> Slab:
        """The slab that a matrix is.

        Args:
            parameter: The whole parameter.
            matrix: (out, in) a view of it.

        Raises:
            CalibrationError: If it is not one of the slabs as they are declared.
        """
        start = int(matrix.storage_offset()) - int(parameter.storage_offset())
        number, rest = divmod(start, matrix.numel() or 1)
        out, inputs = self._shape
        stride = (1, out) if self.target.layout == "conv1d" else (inputs, 1)
        if tuple(matrix.shape) != self._shape or matrix.stride() != stride or rest or number >= len(self.slabs):
            raise CalibrationError(
                f"{type(self.owner).__name__} multiplies with a part of {self.target.name} of shape "
                f"{tuple(matrix.shape)} and strides {matrix.stride()}, as (outputs, inputs): expected {self._shape} "
                f"and {stride}, one of its {len(self.slabs)} experts as they are declared; choose a criterion without "
                f"data, or list it in exclude_modules"
            )
        return self.slabs[number]


class SlabCalls(TorchFunctionMode):
    """While this mode is on, products with packed parameters go through their slabs.

    Args:
        packed: The packed targets.
        rows: Follows which tokens a router has gathered.
    """

    def __init__(self, packed: Collection[PackedTarget], rows: RoutedRows) -> None:
        super().__init__()
        self._by_owner: dict[nn.Module, list[PackedTarget]] = {}
        for entry in packed:
            self._by_owner.setdefault(entry.owner, []).append(entry)
        self._rows = rows
        self._current: dict[int, tuple[Tensor, PackedTarget]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The model runs one batch inside."""
        self._rows.clear()
        with ExitStack() as context:
            for owner in self._by_owner:  # weights that are loaded when they are needed are there by then
                context.callback(owner.register_forward_pre_hook(self._look_up).remove)
            context.enter_context(eager_experts(list(self._by_owner)))
            context.enter_context(self)
            try:
                yield
            finally:
                self._current.clear()
                self._rows.clear()

    def _look_up(self, module: nn.Module, _: Any) -> None:
        for entry in self._by_owner[module]:
            parameter = module._parameters[entry.attribute]
            assert parameter is not None
            self._current[id(parameter)] = parameter, entry

    def _find(self, matrix: Any) -> tuple[Tensor, PackedTarget] | None:
        """The packed parameter that a tensor is a view of."""
        if not isinstance(matrix, Tensor) or matrix.dim() < 2:
            return None
        base = matrix._base if matrix._base is not None else matrix
        found = self._current.get(id(base))
        return found if found is not None and found[0] is base else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, through a slab if it multiplies with one."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "linear" and len(args) == 1 and "weight" in kwargs:
            args = (*args, kwargs.pop("weight"))
        if name in _PRODUCTS and len(args) > 1 and (found := self._find(args[1])) is not None:
            return self._multiply(func, name, args, kwargs, *found)
        if name == "multi_head_attention_forward" and any(self._find(x) for x in (*args, *kwargs.values())):
            return self._attend(func, args, kwargs)
        result = func(*args, **kwargs)
        self._rows.follow(name, args, kwargs, result)
        return result

    def _attend(self, func: Any, args: Any, kwargs: Any) -> Any:
        """``nn.MultiheadAttention``, whose projections it multiplies with itself: through their slabs, then by ones.

        What lies between the projections is computed by the same function, with unit matrices in their place.
        """
        call = inspect.signature(func).bind(*args, **kwargs)
        call.apply_defaults()
        values = call.arguments
        shared = not values["use_separate_proj_weight"]
        weights = [values["in_proj_weight"]] * 3 if shared else [values[f"{part}_proj_weight"] for part in "qkv"]
        biases = [None] * 3 if values["in_proj_bias"] is None else values["in_proj_bias"].chunk(3)
        owner: Any = None
        for number, (name, weight, bias) in enumerate(zip(("query", "key", "value"), weights, biases, strict=True)):
            if (found := self._find(weight)) is None:
                part = weight.chunk(3)[number] if shared else weight
                values[name] = nn.functional.linear(values[name], part, bias)
                continue
            owner = found[1].owner
            part = weight.chunk(3)[number] if shared else weight
            slab = found[1].slabs[number if shared else 0]
            values[name] = self._call(slab, values[name], partial(nn.functional.linear, weight=part, bias=bias))
        ones = torch.eye(values["embed_dim_to_check"]).to(values["query"])
        values |= {f"{part}_proj_weight": ones for part in "qkv"}
        values |= {"use_separate_proj_weight": True, "in_proj_weight": None, "in_proj_bias": None}
        project = owner.out_proj
        values |= {"out_proj_weight": ones, "out_proj_bias": None}
        output, maps = func(*call.args, **call.kwargs)
        return project(output), maps

    def _multiply(self, func: Any, name: str, args: Any, kwargs: Any, parameter: Tensor, entry: PackedTarget) -> Tensor:
        x, weight, *more = args
        if not x.numel():
            return func(*args, **kwargs)
        if weight.dim() == 2:
            slab = entry.slab_of(parameter, weight if name == "linear" else weight.mT)
            output = self._call(slab, x, lambda x: func(x, weight, *more, **kwargs))
            if (known := self._rows.of(x)) is not None:
                self._rows.note(output, *known)
            return output
        # All experts at once: rows of zeros were not routed to an expert, and add nothing to its output.
        whole = func(*args, **kwargs)
        parts = []
        for number, matrix in enumerate(weight):
            slab = entry.slab_of(parameter, matrix.mT)
            routed = x[number].ne(0).any(-1)
            if bool(routed.all()):
                parts.append(self._call(slab, x[number], partial(_constant, whole[number])))
            elif bool(routed.any()):
                places = routed.nonzero().squeeze(1)
                rows = x[number][places]
                self._rows.note(rows, x.shape[1], places)
                output = self._call(slab, rows, partial(_constant, whole[number][places]))
                parts.append(whole[number].index_copy(0, places, output))
            else:
                parts.append(whole[number])
        return torch.stack(parts)

    def _call(self, slab: Slab, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        slab.product = product
        output: Tensor = slab(x)
        del slab.product
        return output


def _constant(output: Tensor, _: Tensor) -> Tensor:
    return output


@contextmanager
def eager_experts(owners: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, experts of transformers are multiplied one by one, as their class is written; afterwards as before.

    Args:
        owners: The modules that hold them.
    """
    attribute = "_experts_implementation_internal"
    configs: dict[int, Any] = {}
    for owner in owners:
        config = getattr(owner, "config", None)
        if config is not None and attribute in vars(config):
            configs.setdefault(id(config), config)
    previous: Mapping[int, Any] = {key: vars(config)[attribute] for key, config in configs.items()}
    try:
        for config in configs.values():
            vars(config)[attribute] = "eager"
        yield
    finally:
        for key, config in configs.items():
            vars(config)[attribute] = previous[key]
