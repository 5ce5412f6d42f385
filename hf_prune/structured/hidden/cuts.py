"""Where the hidden states lie in a model: what is smaller in one that its class builds with a smaller hidden size."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.growth import built
from hf_prune.architectures.settings import objection_to
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.errors import ArchitectureError, ConfigError
from hf_prune.planning.checks import check_positive
from hf_prune.structured.hidden.proof import Cuts
from hf_prune.structured.shrink import resize, structure_of

_REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


# --- sizes -----------------------------------------------------------------------------------------


def hidden_size(model: nn.Module) -> int:
    """How many dimensions the hidden states of a model have, as its config says.

    Raises:
        ArchitectureError: If it does not say.
    """
    from transformers import PreTrainedModel

    size = getattr(getattr(model, "config", None), "hidden_size", None)
    if not isinstance(model, PreTrainedModel) or not isinstance(size, int):
        raise ArchitectureError(
            f"{type(model).__name__} has no config.hidden_size, so nothing could tell a smaller one: expected a "
            f"transformers model with one hidden size, such as a Llama; merge adapters into it first"
        )
    return size


def checked_size(model: Any, size: object, before: int) -> int:
    """The number of dimensions that stay.

    Args:
        model: The model.
        size: This number, or a share of all.
        before: How many there are.

    Raises:
        ConfigError: If it is not below that, or the config does not accept it.
    """

    def objection(number: int) -> str | None:
        return objection_to(model.config, {"hidden_size": number})

    if isinstance(size, float):
        if not 0 < size < 1:
            raise ConfigError(f"size is {size}: expected a share between 0 and 1, or a whole number below {before}")
        least = -int(-before * size // 1)
        number = next((n for n in range(least, before) if objection(n) is None), before)
        if number == before:
            raise ConfigError(f"size is {size}, and from {least} on, the config accepts no number below {before}")
        return number
    check_positive("size", size)
    assert isinstance(size, int)
    if size >= before:
        raise ConfigError(f"size is {size}: expected less than the {before} dimensions that the hidden states have")
    if (why := objection(size)) is not None:
        accepted = [n for n in range(1, before) if objection(n) is None]
        near = sorted(sorted(accepted, key=lambda n: abs(n - size))[:2])
        hint = f"it accepts {' and '.join(map(str, near))}" if near else "it accepts no smaller one"
        raise ConfigError(f"the config refuses a hidden size of {size} ({why}): {hint}")
    return size


def new_settings(model: Any, groups: Sequence[UnitGroup], before: int, size: int) -> dict[str, int]:
    """The settings of a config with another hidden size whose heads have the size that they had."""
    config, values = model.config, {"hidden_size": size}
    number = getattr(config, "num_attention_heads", None)
    if isinstance(number, int) and number:
        head_size = getattr(config, "head_dim", None) or before // number
        left = {group.units for group in groups if group.kind == "head"}
        if hasattr(config, "head_dim") or _takes_head_dim(model, head_size):
            values["head_dim"] = head_size
        elif len(left) == 1 and left != {number} and size == head_size * min(left):  # heads were removed before
            values["num_attention_heads"] = min(left)
    return values


def _takes_head_dim(model: Any, head_size: int) -> bool:
    """Whether a class whose config does not name ``head_dim`` reads it nevertheless, as that of Qwen2 does."""
    config = copy.deepcopy(model.config)
    config.head_dim = 2 * head_size
    try:
        twice, plain = built(type(model), config), built(type(model), model.config)
    except _REFUSALS:
        return False
    return _shapes(twice) != _shapes(plain)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# --- a model of the smaller size -------------------------------------------------------------------


def built_models(model: Any, values: Mapping[str, int]) -> tuple[nn.Module, Any]:
    """Models that the class builds from the config as it is, on the meta device, and from one of the smaller size."""
    from transformers.initialization import no_init_weights

    size = values["hidden_size"]
    try:
        units = structure_of(model, lambda: built(type(model), model.config))
        old = built(type(model), model.config)
        resize(old, units)
    except _REFUSALS as error:
        raise refused(model, size, f"its config does not describe the model as it is ({error})") from error
    if _shapes(old) != _shapes(model):
        raise refused(model, size, "its config does not describe the model as it is")
    config = copy.deepcopy(model.config)
    for key, value in values.items():
        setattr(config, key, value)
    try:
        with torch.random.fork_rng(devices=[]), no_init_weights():
            smaller: Any = type(model)(config).eval()
        resize(smaller, units)
    except _REFUSALS as error:
        raise refused(model, size, f"its class cannot build such a model ({error})") from error
    return old, smaller


def find_cuts(model: Any, smaller: nn.Module, groups: Sequence[UnitGroup], before: int, size: int) -> Cuts:
    """The dimensions of parameters and buffers that are smaller in the smaller model."""
    shapes, found = _shapes(model), _shapes(smaller)
    heads = {(piece.name, piece.dim) for group in groups if group.kind == "head" for piece in group.slices}
    first = _first_names(model)
    cuts: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        new = found.get(name, ())
        dims = tuple(i for i, (a, b) in enumerate(zip(shape, new, strict=False)) if a != b)
        if any((first.get(name), dim) in heads for dim in dims):
            raise refused(
                model,
                size,
                f"its class divides the hidden size by the number of heads, so that the size of the heads would change "
                f"(at {name}); first remove heads to the same share, prune(model, share, granularity='head', "
                f"scope='layer') and shrink(model), and then trim to their number times their size",
            )
        if len(new) != len(shape) or any((shape[i], new[i]) != (before, size) for i in dims):
            raise refused(model, size, f"its class gives {name} the shape {new or 'of nothing'} in place of {shape}")
        if dims:
            cuts[first.get(name, name)] = dims
    return cuts


def _first_names(model: nn.Module) -> dict[str, str]:
    """For all names of each parameter the first of them."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def cut_tensors(model: Any, cuts: Cuts, kept: Tensor) -> dict[str, Tensor]:
    """Parameters and buffers by all of their names, without the dimensions that go."""
    first = _first_names(model)
    cut: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        own = first.get(name, name)
        if own not in cut:
            for dim in cuts.get(own, ()):
                tensor = tensor.index_select(dim, kept.to(tensor.device))
            cut[own] = tensor
        cut[name] = cut[own]
    return cut


def refused(model: nn.Module, size: int, why: str) -> ArchitectureError:
    """The error that a model cannot have a hidden size."""
    return ArchitectureError(f"the hidden states of {type(model).__name__} cannot get {size} dimensions: {why}")
