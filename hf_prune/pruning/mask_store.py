"""MaskStore: each mask lives beside its weight, in the module that holds it; weights stay plain parameters with zeros.

State-dict keys therefore never change, and ``save_pretrained``, ``deepcopy``, tied weights and ``torch.compile`` work
as on any model. It does not matter either by what a model was pruned: itself, a wrapper or a holder around it, or a
part of it. Whoever looks at a module sees the masks of all weights inside it, under the names that it gives them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_prune.errors import MaskError
from hf_prune.kernels.zeroing import zero_removed_
from hf_prune.planning.config import PruningConfig
from hf_prune.pruning.bypass import bypassed_layers, restore
from hf_prune.utils.notices import warn_user
from hf_prune.utils.offloaded_weights import refuse_offloaded, values_of
from hf_prune.utils.registry import unknown_name
from hf_prune.utils.wrapping import check_is_model, plain_name

if TYPE_CHECKING:
    from hf_prune.pruning.records import PolishRecord, SpeedRecord

_ATTRIBUTE = "_hf_prune_masks"  # of modules that hold weights with masks
_ROSTER = "_hf_prune_roster"  # of what was pruned: the masks that were inside it, to notice if one has gone


@dataclass(eq=False)
class _Pruning:
    """How masks came about, shared by all of them."""

    config: PruningConfig | None
    polishes: tuple[PolishRecord, ...]
    speed: SpeedRecord | None
    time: int = field(default_factory=time.time_ns)  # the last one counts where parts of a model had different ones


@dataclass(eq=False)
class _Held:
    """What a module has of it: masks and dense weights by the names of its own parameters."""

    pruning: _Pruning
    masks: dict[str, Tensor] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)


_Holders = list[tuple[_Held, str]]  # of one mask, with the name that each has for its weight


@dataclass
class MaskStore:
    """The masks of one model, or of a part or a holder of one: what :meth:`of` gathers and :meth:`attach` hands out.

    Args:
        masks: Bool masks shaped like their parameters, by parameter name; True = keep.
        dense: The weights as they were before pruning, where they were kept.
        config: The settings of the last pruning, None if the masks came from elsewhere.
        polishes: What each training after a pruning did, the first one first.
        speed: The speed-up that the last pruning was to bring, and what was measured.
        replaced: Names of masks whose module is not part of the model any more; they fit nothing.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    dense: dict[str, Tensor] | None = None
    config: PruningConfig | None = None
    polishes: tuple[PolishRecord, ...] = ()
    speed: SpeedRecord | None = None
    replaced: frozenset[str] = frozenset()

    @staticmethod
    def of(model: nn.Module) -> MaskStore | None:
        """The masks of the weights inside a module, by the names that it gives them; None if there are none.

        Raises:
            ModelTypeError: If it is no model.
        """
        check_is_model(model)
        _renew(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        masks: dict[str, Tensor] = {}
        dense: dict[str, Tensor] = {}
        prunings: dict[int, _Pruning] = {}
        rosters: dict[str, _Holders] = {}
        found = set()
        for prefix, module in model.named_modules():
            roster: dict[str, _Holders] = module.__dict__.get(_ROSTER, {})
            rosters |= {f"{prefix}.{name}".removeprefix("."): holders for name, holders in roster.items()}
            held: _Held | None = module.__dict__.get(_ATTRIBUTE)
            if held is None:
                continue
            found.add(id(held))
            if held.masks:
                prunings[id(held.pruning)] = held.pruning
            for own, gathered in ((held.masks, masks), (held.dense, dense)):
                for key, tensor in own.items():
                    name = names.get(id(module._parameters.get(key)), f"{prefix}.{key}".removeprefix("."))
                    old = gathered.get(name, tensor)  # of a tied weight that was pruned by another holder as well
                    gathered[name] = tensor if old is tensor or gathered is dense else tensor & old.to(tensor.device)
        lost: dict[str, Tensor] = {}
        for name, holders in rosters.items():
            held, key = holders[0]
            if name not in masks and key in held.masks and not any(id(holder) in found for holder, _ in holders):
                lost[name] = held.masks[key]
                dense |= {name: held.dense[key]} if key in held.dense else {}
        if not masks and not lost:
            return None
        last: list[_Pruning] = sorted(prunings.values(), key=lambda pruning: pruning.time)
        return MaskStore(
            masks | lost,
            dense or None,
            config=last[-1].config if last else None,
            polishes=tuple(dict.fromkeys(record for pruning in last for record in pruning.polishes)),
            speed=last[-1].speed if last else None,
            replaced=frozenset(lost),
        )

    def attach(self, model: nn.Module) -> None:
        """Hand the masks out to the modules that hold the weights; those inside the model have no others afterwards.

        They are plain attributes, invisible to state dicts.

        Args:
            model: Whose names the masks go by; wrappers inside it may be left out of them.

        Raises:
            MaskError: If there is no parameter of that name.
        """
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        known = set(names.values()) | {plain_name(name) for name in names.values()}
        if missing := [name for name in self.masks if name not in known and name not in self.replaced]:
            raise MaskError(f"{missing[0]!r} has a mask, and {type(model).__name__} has no such parameter")
        self._clear(model)
        pruning = _Pruning(self.config, self.polishes, self.speed)
        roster: dict[str, _Holders] = {}
        for name in self.replaced & self.masks.keys():
            key = name.rpartition(".")[2]
            roster[name] = [(_Held(pruning, {key: self.masks[name]}), key)]
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if (name := names.get(id(parameter), "")) in self.replaced:
                    continue
                keep, dense = _named(self.masks, name), _named(self.dense or {}, name)
                if keep is None and dense is None:
                    continue
                held: _Held = module.__dict__.setdefault(_ATTRIBUTE, _Held(pruning))
                held.pruning = pruning
                if keep is not None:
                    held.masks[key] = keep
                    roster.setdefault(name, []).append((held, key))  # several, where a weight is tied
                if dense is not None:
                    held.dense[key] = dense
        model.__dict__[_ROSTER] = roster

    @staticmethod
    def _clear(model: nn.Module) -> None:
        _renew(model)
        for module in model.modules():
            module.__dict__.pop(_ROSTER, None)
            if (held := module.__dict__.get(_ATTRIBUTE)) is not None:
                held.masks.clear()
                held.dense.clear()

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Leave a model without masks; its weights stay as they are."""
        MaskStore._clear(model)
        for module in model.modules():
            module.__dict__.pop(_ATTRIBUTE, None)

    def update(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        config: PruningConfig | None,
        keep_dense: bool,
        dense: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Add masks, attach the store, and zero what they remove.

        Args:
            model: The model.
            masks: New masks; where one exists already, only what both keep stays.
            weights: New values of weights that the criterion repaired.
            config: The settings that made them.
            keep_dense: Keep a copy of the dense weights, so that :meth:`discard` works.
            dense: Those that the model does not hold any more.

        Raises:
            MaskError: If ``keep_dense`` is asked for but a weight was pruned before without it.
        """
        parameters = dict(model.named_parameters())
        if keep_dense:
            self.check_dense()
        if keep_dense or self.dense is not None:
            self.dense = self.dense or {}
            for name in dict.fromkeys([*masks, *weights, *dense]):
                if name not in self.dense and name not in self.masks:
                    self.dense[name] = dense[name] if name in dense else parameters[name].detach().clone()
        for name, mask in masks.items():
            old = self.masks.get(name)
            self.masks[name] = mask if old is None else mask & old.to(mask.device)
        self.config = config

        @torch.no_grad()
        def commit() -> None:
            self.attach(model)
            for name, weight in weights.items():
                parameters[name].copy_(weight)
            self.apply(model)

        to_the_end(commit)

    def check_dense(self) -> None:
        """Make sure that dense weights can still be kept.

        Raises:
            MaskError: If a weight was pruned without keeping its dense values.
        """
        if self.masks.keys() - (self.dense or {}).keys():
            raise MaskError(
                "keep_dense=True, but the model was pruned before without it, so its dense weights are gone: "
                "reload the model and pass keep_dense=True at the first pruning"
            )

    def check(self, model: nn.Module) -> None:
        """Make sure that the masks fit the model.

        Raises:
            MaskError: If a masked parameter is gone or has another shape.
        """
        parameters = dict(model.named_parameters())
        misfits = [
            name
            for name, mask in self.masks.items()
            if name in self.replaced or name not in parameters or parameters[name].shape != mask.shape
        ]
        if misfits:
            name = misfits[0]
            found = f"shape {tuple(parameters[name].shape)}" if name in parameters else "no parameter"
            if name in parameters and parameters[name].shape == self.masks[name].shape:
                found = "another module"
            raise MaskError(
                f"the mask of {name!r} has shape {tuple(self.masks[name].shape)}, but the model has {found} there: the "
                f"model was changed after pruning; drop_masks({', '.join(map(repr, misfits))}) leaves the other masks"
            )

    def apply(self, model: nn.Module) -> None:
        """Set every removed weight to exact zero; needed after anything that writes weights, such as a training step.

        Weights that accelerate has offloaded cannot be written, nor does a training reach them: it is made sure that
        theirs are zero.

        Raises:
            MaskError: If a masked parameter is gone or has another shape, or is offloaded and not zero where it should.
        """
        self.check(model)
        parameters = dict(model.named_parameters())
        moved: dict[int, Tensor] = {}
        for name, mask in self.masks.items():
            if parameters[name].is_meta and bool(values_of(model, name, parameters[name]).cpu()[~mask.cpu()].any()):
                raise MaskError(
                    f"{name} is offloaded, and has non-zero weights that its mask removes: load the model without "
                    f"offloading, and apply the masks there"
                )
        for name, mask in self.masks.items():
            if parameters[name].is_meta:
                continue
            if mask.device != parameters[name].device:
                moved[id(mask)] = self.masks[name] = mask.to(parameters[name].device)
            zero_removed_(parameters[name], self.masks[name])
        for module in model.modules() if moved else ():
            if (held := module.__dict__.get(_ATTRIBUTE)) is not None:
                held.masks = {key: moved.get(id(mask), mask) for key, mask in held.masks.items()}

    def make_permanent(self, model: nn.Module) -> None:
        """Drop the masks and leave the zeros; warns if some are not zero any more."""
        self.check(model)
        warn_regrown(model, "they become zero now")
        self.apply(model)
        self.detach(model)

    def drop(self, model: nn.Module, names: Collection[str]) -> None:
        """Drop the masks and dense values of some weights, which stay as they are.

        Args:
            model: The model.
            names: Of parameters; they need not be there any more.

        Raises:
            UnknownNameError: If one has no mask.
        """
        if unknown := [name for name in names if name not in self.masks]:
            raise unknown_name("mask", unknown[0], self.masks)
        for tensors in (self.masks, self.dense or {}):
            for name in names:
                tensors.pop(name, None)
        if self.masks:
            self.attach(model)
        else:
            self.detach(model)

    def follow_resize(self, model: nn.Module, before: Mapping[str, torch.Size]) -> None:
        """Have masks follow weights that grew or became shorter at the end: what is new there is kept.

        Args:
            model: The model.
            before: The shapes of its parameters when the masks fitted them.
        """
        for name, parameter in model.named_parameters():
            added = torch.ones_like(parameter, dtype=torch.bool)
            for tensors, new in ((self.masks, added), (self.dense or {}, parameter)):
                if name in tensors and tensors[name].shape == before.get(name) != parameter.shape:
                    common = tuple(slice(min(sizes)) for sizes in zip(parameter.shape, before[name], strict=True))
                    old, tensors[name] = tensors[name], new.detach().clone()
                    tensors[name][common] = old[common].to(new.device)
                    self.replaced -= {name}
        self.attach(model)

    def discard(self, model: nn.Module) -> None:
        """Drop the masks and give the dense weights back, bit for bit.

        Raises:
            MaskError: If the dense weights were not kept, or the masks no longer fit the model.
            PlanError: If weights are offloaded.
        """
        self.check(model)
        if self.dense is None or self.masks.keys() - self.dense.keys():
            raise MaskError(
                "the dense weights were not kept: pass keep_dense=True to prune(), or reload the model; "
                "make_permanent() drops the masks and leaves the zeros"
            )
        refuse_offloaded(model, "giving dense weights back")
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in self.dense.items():
                parameters[name].copy_(weight)
        for layer in bypassed_layers(model):
            restore(model.get_submodule(layer))
        self.detach(model)

    def view(self) -> Mapping[str, Tensor]:
        """The masks, read-only as a mapping."""
        return MappingProxyType(self.masks)


def checked_masks(model: nn.Module) -> Mapping[str, Tensor]:
    """The masks that a model has, by parameter name; none if it was not pruned.

    Raises:
        MaskError: If they no longer fit the model.
    """
    store = MaskStore.of(model)
    if store is None:
        return {}
    store.check(model)
    return store.masks


def drop_masks(model: nn.Module, *names: str) -> None:
    """Drop the masks of some weights, as after one of them was replaced; the others stay.

    The weights keep their values, and are weights like any other from then on: what was removed of them may be trained.

    Args:
        model: Any module with masks.
        *names: Of parameters, as in ``model.masks``.

    Raises:
        MaskError: If there are no masks.
        UnknownNameError: If one has no mask.

    Example:
        >>> from hf_prune import prune
        >>> model = prune(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), 0.5)
        >>> model[1] = nn.Linear(4, 3)
        >>> drop_masks(model, "1.weight")
        >>> list(MaskStore.of(model).masks)
        ['0.weight']
    """
    if (store := MaskStore.of(model)) is None:
        raise MaskError(f"this {type(model).__name__} has no masks, so there are none to drop")
    store.drop(model, names)


def mask_of(model: nn.Module, name: str) -> Tensor | None:
    """The mask of one parameter, without looking at the whole model."""
    holder, _, key = name.rpartition(".")
    held: _Held | None = model.get_submodule(holder).__dict__.get(_ATTRIBUTE)
    return None if held is None else held.masks.get(key)


def _renew(model: nn.Module) -> None:
    """Hand out the masks of models that earlier versions pickled: there the whole store was an attribute of one."""
    old = [
        (m, m.__dict__.pop(_ATTRIBUTE)) for m in model.modules() if isinstance(m.__dict__.get(_ATTRIBUTE), MaskStore)
    ]
    for module, store in reversed(old):  # parts come after what they are parts of
        inner = MaskStore.of(module)
        store.masks = {**(inner.masks if inner is not None else {}), **store.masks}
        store.replaced = frozenset(store.masks) - {name for name, _ in module.named_parameters()}
        store.attach(module)


def _named(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    return tensors.get(name, tensors.get(plain_name(name)))


def to_the_end(do: Callable[[], None]) -> None:
    """Do what may be done again; what interrupts it, as Ctrl-C does, is raised when it is done."""
    try:
        do()
    except KeyboardInterrupt:
        to_the_end(do)  # it may be pressed again
        raise
    except BaseException:
        do()
        raise


@torch.no_grad()
def warn_regrown(model: nn.Module, consequence: str, weights: Mapping[str, Tensor] | None = None) -> None:
    """Warn if weights that the masks remove are not zero any more, as after a training that knows nothing of masks.

    Args:
        model: The model; one without masks is passed over.
        consequence: What that means for what is done to the model now.
        weights: What to look at in place of the model's own parameters, by their names. Weights that are spread over
            processes are passed over.
    """
    if (store := MaskStore.of(model)) is None:
        return
    grown = removed = 0
    for name, weight in dict(model.named_parameters() if weights is None else weights).items():
        mask = store.masks.get(name)
        if mask is None or mask.shape != weight.shape or weight.is_meta or isinstance(weight, DTensor):
            continue
        removed += mask.numel() - int(mask.count_nonzero())
        grown += int((weight.detach().ne(0) > mask.to(weight.device)).count_nonzero())
    if grown:
        warn_user(
            f"{grown:,} of the {removed:,} weights that the masks remove ({100 * grown / removed:.2f} %) are not zero "
            f"any more, since an optimizer or something else wrote to them: {consequence}. apply_masks() sets them to "
            f"zero again; keep_sparse(optimizer) before a training keeps them zero"
        )
