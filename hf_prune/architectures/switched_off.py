"""Have a layer run without some of its units, exactly as if they had been cut out of it.

Zero weights do not always do that: a router sends tokens to an expert of zeros as well, and shares its weights with it.
While the layer runs, what belongs to such units is therefore taken out of its tensors, buffers, lists and counts, and
put back afterwards. The weights stay where they are, and a training or a copy of the model sees all of them. A state
dict cannot say what is switched off, so there is none until ``shrink()``.

A layer whose activations are checkpointed runs once more in the backward pass, after all was put back. What is run
again takes the units out by itself, in the first run too: both have to do the same, for the same gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_prune.architectures.modules import attribute_holder
from hf_prune.architectures.moe_block import MoeBlock
from hf_prune.architectures.moe_blocks import removable_blocks
from hf_prune.architectures.settings import config_of_setting
from hf_prune.architectures.unit_groups import UnitGroup, UnitSlice, numbered
from hf_prune.errors import ArchitectureError, CheckpointError

_ATTRIBUTE = "_hf_prune_without"  # of layers: (group with names relative to the layer, units that stay), by its name
_FORMER = "_hf_prune_former_forward"
_CHANGES = "_hf_prune_changes"  # of layers, while they run: what was done to them
_CHECKPOINT = "_gradient_checkpointing_func"  # by which modules of transformers checkpoint what they run
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()  # no copy shares one
_ALL_LOCKS = threading.Lock()


def switch_off(model: nn.Module, group: UnitGroup, kept: Tensor) -> None:
    """Have the layer of a group run with some units only; the mark stays with it in copies and pickles.

    Args:
        model: The model.
        group: A group in one layer.
        kept: (n,) int64, the units that stay, in rising order.
    """
    layer, name = _layer_of(model, group)
    inside = _relative(group, name)
    state = layer.__dict__.setdefault(_ATTRIBUTE, {})
    state[_key(inside)] = inside, kept.cpu().clone()
    if not _is_replaced(layer):
        layer.__dict__[_FORMER] = layer.__dict__.get("forward")
        layer.__dict__["forward"] = functools.partial(_forward_without, layer)
        layer.register_state_dict_pre_hook(_refuse_state)
    count_running(model)


def switch_on(model: nn.Module, group: UnitGroup) -> None:
    """Have a layer run with all units of a group again."""
    layer, name = _layer_of(model, group)
    state = layer.__dict__.get(_ATTRIBUTE, {})
    state.pop(_key(_relative(group, name)), None)
    if not state:
        _restore(layer)
    count_running(model)


def switch_all_on(model: nn.Module) -> None:
    """Have all layers of a model run with all their units again."""
    without = layers_without_units(model)
    for layer in model.modules():
        _restore(layer)
    if without:
        count_running(model)


def units_that_run(model: nn.Module, group: UnitGroup) -> Tensor | None:
    """(n,) int64: the units of a group that its layer runs with; None if those are all."""
    if len(group.layers) != 1:
        return None
    layer, name = _layer_of(model, group)
    entry = layer.__dict__.get(_ATTRIBUTE, {}).get(_key(_relative(group, name)))
    return None if entry is None else entry[1]


def layers_without_units(model: nn.Module) -> list[str]:
    """Names of the layers that run without some of their units."""
    return [name for name, module in model.named_modules() if module.__dict__.get(_ATTRIBUTE)]


def _layer_of(model: nn.Module, group: UnitGroup) -> tuple[nn.Module, str]:
    ((stack, number),) = group.layers
    name = f"{stack}.{number}"
    return model.get_submodule(name), name


def _key(group: UnitGroup) -> str:
    return f"{group.kind} {group.slices[0].name}"


def _relative(group: UnitGroup, layer: str) -> UnitGroup:
    """A group whose names are those inside its layer."""

    def inside(name: str) -> str:
        return name.removeprefix(layer).removeprefix(".")

    def pieces(slices: tuple[UnitSlice, ...]) -> tuple[UnitSlice, ...]:
        return tuple(dataclasses.replace(piece, name=inside(piece.name)) for piece in slices)

    return dataclasses.replace(
        group,
        producers=pieces(group.producers),
        consumers=pieces(group.consumers),
        values=(),
        buffers=pieces(group.buffers),
        lists=tuple(map(inside, group.lists)),
        counts=tuple((inside(module), attribute) for module, attribute in group.counts),
    )


def _is_replaced(layer: nn.Module) -> bool:
    forward = layer.__dict__.get("forward")
    return isinstance(forward, functools.partial) and forward.func is _forward_without


def _restore(layer: nn.Module) -> None:
    layer.__dict__.pop(_ATTRIBUTE, None)
    former = layer.__dict__.pop(_FORMER, None)
    if _is_replaced(layer):
        for key, hook in list(layer._state_dict_pre_hooks.items()):
            if hook is _refuse_state:
                del layer._state_dict_pre_hooks[key]
        del layer.__dict__["forward"]
        if former is not None:
            layer.__dict__["forward"] = former


def _refuse_state(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Of functions that take the state of a layer: without this one, a saved model would be another one, silently."""
    raise CheckpointError(
        f"experts are switched off in {prefix.rstrip('.') or type(layer).__name__}, which a state dict cannot express: "
        f"a model with its weights would send tokens to them again; call shrink() first, which removes them"
    )


def running_experts(model: nn.Module, block: MoeBlock) -> Tensor:
    """(n,) int64: the experts that a block runs with."""
    name = f"{block.layer[0]}.{block.layer[1]}"
    router = block.router.removeprefix(f"{name}.")
    for group, kept in model.get_submodule(name).__dict__.get(_ATTRIBUTE, {}).values():
        if any(piece.name == router for piece in group.slices):
            running: Tensor = kept
            return running
    return torch.arange(model.get_parameter(block.router).shape[0], device="cpu")


def count_running(model: nn.Module) -> None:
    """Have attributes outside of the layers say how many experts run, such as that of a loss that balances routers.

    Where layers run with different numbers of them, no number is right, and that of the config is written.
    """
    numbers: dict[tuple[str, str], set[int]] = {}
    settings: dict[tuple[str, str], str] = {}
    for block in removable_blocks(model):
        for place in block.outer_counts:
            numbers.setdefault(place, set()).add(len(running_experts(model, block)))
            settings[place] = block.config
    for (name, attribute), found in numbers.items():
        holder, key = config_of_setting(model.config, settings[name, attribute])
        setattr(model.get_submodule(name), attribute, found.pop() if len(found) == 1 else getattr(holder, key))


def _forward_without(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    former = layer.__dict__.get(_FORMER)
    with _lock_of(layer), _cut(layer):  # another thread would find the layer without units, and cut it once more
        return former(*args, **kwargs) if former is not None else type(layer).forward(layer, *args, **kwargs)


def _lock_of(layer: nn.Module) -> threading.RLock:
    """Held while a layer runs without some of its units."""
    with _ALL_LOCKS:
        return _LOCKS.setdefault(layer, threading.RLock())


@contextmanager
def _cut(layer: nn.Module) -> Iterator[None]:
    """The layer without the units that are switched off; gradients flow into its weights through what stays."""
    changes: list[_Change] = []
    layer.__dict__[_CHANGES] = changes
    try:
        for change in _changes(layer):
            change.make()
            changes.append(change)
        yield
    finally:
        for change in reversed(changes):
            change.undo()
        layer.__dict__.pop(_CHANGES, None)


@contextmanager
def _whole(layer: nn.Module) -> Iterator[None]:
    """The layer as it is outside of :func:`_cut`, also within."""
    changes: list[_Change] | None = layer.__dict__.pop(_CHANGES, None)
    for change in reversed(changes or []):
        change.undo()
    try:
        yield
    finally:
        for change in changes or []:
            change.make()
        if changes is not None:
            layer.__dict__[_CHANGES] = changes


class _Change(NamedTuple):
    """Something of a layer that is another thing while it runs."""

    write: Callable[[Any], None]
    before: Any
    after: Any

    def make(self) -> None:
        self.write(self.after)

    def undo(self) -> None:
        self.write(self.before)


def _changes(layer: nn.Module) -> Iterator[_Change]:
    """What there is to change so that a layer runs without some units."""
    for group, kept in layer.__dict__.get(_ATTRIBUTE, {}).values():
        for piece in (*group.slices, *group.buffers):
            holder, _, key = piece.name.rpartition(".")
            module = layer.get_submodule(holder)
            tensors: dict[str, Any] = module._buffers if key in module._buffers else module._parameters
            if (tensor := tensors.get(key)) is None:
                raise ArchitectureError(
                    f"experts are switched off in a {type(layer).__name__}, and {piece.name} is no longer in its "
                    f"module (a {type(module).__name__}): expected plain experts; remove the adapters on them, and "
                    f"call shrink() before they are added"
                )
            selected = tensor.index_select(piece.dim, piece.index(kept.to(tensor.device)))
            yield _Change(functools.partial(tensors.__setitem__, key), tensor, selected)
        for name in group.lists:
            module = layer.get_submodule(name)
            write = functools.partial(setattr, module, "_modules")
            yield _Change(write, module._modules, selected_modules(module, kept))
        for name, attribute in group.counts:
            owner, key = attribute_holder(layer, name, attribute)
            number = getattr(owner, key)
            yield _Change(functools.partial(setattr, owner, key), number, number * len(kept) // group.units)
    for module in layer.modules():
        if (checkpoint := module.__dict__.get(_CHECKPOINT)) is not None:
            again = functools.partial(_checkpoint_cut, layer, checkpoint)
            yield _Change(functools.partial(setattr, module, _CHECKPOINT), checkpoint, again)


def _checkpoint_cut(layer: nn.Module, checkpoint: Callable[..., Any], function: Any, *args: Any, **kwargs: Any) -> Any:
    """Checkpoint a function of a layer that runs without some of its units, and does so again when it is recomputed."""

    @functools.wraps(function, updated=())
    def cut(*inputs: Any, **named: Any) -> Any:
        with _lock_of(layer), _whole(layer), _cut(layer):
            return function(*inputs, **named)

    return checkpoint(cut, *args, **kwargs)


def selected_modules(container: nn.Module, kept: Tensor) -> dict[str, nn.Module | None]:
    """Some modules of a list or dict, renumbered: under the first of its keys."""
    keys = numbered(container)
    chosen = {key: container._modules[keys[unit]] for key, unit in zip(keys, kept.tolist(), strict=False)}
    return chosen | {key: module for key, module in container._modules.items() if key not in keys}


@torch.no_grad()
def cut_lists(model: nn.Module, group: UnitGroup, kept: Tensor) -> dict[str, str]:
    """Take modules out of the lists of a group, in place.

    Returns:
        The new names of the modules that stay, by the old ones.
    """
    renamed: dict[str, str] = {}
    for name in group.lists:
        container = model.get_submodule(name)
        keys = numbered(container)
        renamed |= {f"{name}.{keys[old]}": f"{name}.{keys[new]}" for new, old in enumerate(kept.tolist())}
        container._modules = selected_modules(container, kept)
    return renamed
