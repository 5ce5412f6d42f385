"""The experts of a packed parameter as modules of their own, so that hooks see what flows into each.

A model with packed experts multiplies with a view of a parameter, and no hook sees that. So while batches run, each
product with a packed parameter goes through a small module, which returns what the product returns: hooks on it see the
tokens routed to that expert and its outputs, and may replace these, as with any module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_prune.calibration.expert_implementation import experts_by
from hf_prune.calibration.routed_rows import RoutedRows
from hf_prune.errors import CalibrationError
from hf_prune.kernels.matrix import Target
from hf_prune.planning.prunable import PrunableWeight, prunable_weights

_PRODUCTS = {  # where the input is among the arguments; the matrix comes after it
    **dict.fromkeys("linear matmul __matmul__ mm bmm".split(), 0),
    **dict.fromkeys(("addmm", "baddbmm"), 1),
}


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


def attentions_of(model: nn.Module, targets: Collection[Target]) -> list[nn.MultiheadAttention]:
    """The attentions of torch whose output projection, which they read without calling it, is a target.

    Args:
        model: The model.
        targets: Some of its weights.
    """
    by_name = dict(model.named_parameters())
    wanted = {id(by_name[t.name]) for t in targets}
    attentions = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    return [attention for attention in attentions if id(getattr(attention.out_proj, "weight", None)) in wanted]


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
            raise self.refusal(
                f"with a part of {self.target.name} of shape {tuple(matrix.shape)} and strides {matrix.stride()}, as "
                f"(outputs, inputs): expected {self._shape} and {stride}, one of its {len(self.slabs)} experts as they "
                f"are declared"
            )
        return self.slabs[number]

    def refusal(self, what: str) -> CalibrationError:
        """The error for a product that cannot be followed.

        Args:
            what: What is multiplied, and what was expected.
        """
        return CalibrationError(
            f"{type(self.owner).__name__} multiplies {what}; choose a criterion without data, or list it in "
            f"exclude_modules"
        )


class SlabCalls(TorchFunctionMode):
    """While this mode is on, products with packed parameters go through their slabs.

    Args:
        packed: The packed targets.
        rows: Follows which tokens a router has gathered.
        attentions: Those of torch that are to call their output projections.
    """

    def __init__(
        self, packed: Collection[PackedTarget], rows: RoutedRows, attentions: Collection[nn.MultiheadAttention] = ()
    ) -> None:
        super().__init__()
        self._attentions = attentions
        self._projected: dict[int, nn.MultiheadAttention] = {}  # by the id of the output projection's weight
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
            for attention in self._attentions:
                context.callback(attention.register_forward_pre_hook(self._look_up_projection).remove)
            context.enter_context(experts_by("eager", list(self._by_owner)))
            context.enter_context(self)
            try:
                yield
            finally:
                self._current.clear()
                self._projected.clear()
                self._rows.clear()

    def _look_up(self, module: nn.Module, _: Any) -> None:
        for entry in self._by_owner[module]:
            parameter = module._parameters[entry.attribute]
            assert parameter is not None
            self._current[id(parameter)] = parameter, entry

    def _look_up_projection(self, module: Any, _: Any) -> None:
        self._projected[id(module.out_proj.weight)] = module

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
        place = _PRODUCTS.get(name)
        if place is not None and len(args) > place + 1 and (found := self._find(args[place + 1])) is not None:
            return self._multiply(func, name, args, kwargs, *found)
        if name == "multi_head_attention_forward":
            if any(self._find(x) or id(x) in self._projected for x in (*args, *kwargs.values())):
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
        owner: Any = self._projected.get(id(values["out_proj_weight"]))
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
        place = _PRODUCTS[name]
        first, (x, weight, *more) = args[:place], args[place:]
        if not x.numel():
            return func(*args, **kwargs)
        if weight.dim() == 2:
            slab = entry.slab_of(parameter, weight if name == "linear" else weight.mT)
            output = self._call(slab, x, lambda x: func(*first, x, weight, *more, **kwargs))
            if (known := self._rows.of(x)) is not None:
                self._rows.note(output, *known)
            return output
        # All experts at once: rows of zeros were not routed to an expert, and add nothing to its output.
        whole = func(*args, **kwargs)  # (..., experts, tokens, out)
        experts = weight.shape[-3]
        if x.dim() == 1 or weight[..., 0, 0].numel() != experts or whole.shape[-3] != experts:
            raise entry.refusal(
                f"an input of shape {tuple(x.shape)} with a part of {entry.target.name} of shape "
                f"{tuple(weight.shape)}: expected one input for each of its matrices, or one for all of them"
            )
        every = x.expand(*whole.shape[:-1], x.shape[-1])  # (..., experts, tokens, in)
        parts = []
        for number, matrix in enumerate(weight.reshape(weight.shape[-3:]) if weight.dim() > 3 else weight):
            slab, x, result = entry.slab_of(parameter, matrix.mT), every.select(-3, number), whole.select(-3, number)
            routed = x.ne(0).any(-1)  # (..., tokens)
            if bool(routed.all()):
                parts.append(self._call(slab, x, partial(_corrected, result, x, matrix)))
            elif bool(routed.any()):
                places = routed.flatten().nonzero().squeeze(1)
                rows, flat = x.flatten(0, -2)[places], result.flatten(0, -2)
                self._rows.note(rows, routed.numel(), places)
                output = self._call(slab, rows, partial(_corrected, flat[places], rows, matrix))
                parts.append(flat.index_copy(0, places, output).view_as(result))
            else:
                parts.append(result)
        return torch.stack(parts, -3)

    def _call(self, slab: Slab, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        slab.product = product
        output: Tensor = slab(x)
        del slab.product
        return output


def _corrected(output: Tensor, x: Tensor, matrix: Tensor, given: Tensor) -> Tensor:
    """What a product gives for another input, by what it gave for ``x``."""
    return output if given is x else output + (given - x) @ matrix
