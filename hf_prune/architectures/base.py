"""The vocabulary of the table of architectures, and the table itself.

An entry names modules and attributes as transformers does. Sizes are read off the weights, so an entry also describes
a model whose layers differ, or one that was shrunk before.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass

from hf_prune.errors import ArchitectureError


@dataclass(frozen=True)
class Heads:
    """An attention in each layer of a stack.

    With grouped queries, a unit is a group: one key head and its query heads.

    Args:
        module: The attention module, relative to the layer.
        query: Its query projection, relative to the attention. If ``query``, ``key`` and ``value`` name the same
            module, its outputs are the three projections one after the other.
        key: Its key projection.
        value: Its value projection.
        out: The projection that reads the concatenated outputs of the heads.
        size: The attribute of the attention that holds the size of one head.
        counts: Attributes of the attention that are proportional to the number of heads. Missing ones are skipped.
        minimum: The smallest number of heads that the code of the model can run with.
        config: Attributes of the model's config that give the number of heads, where a config may have fewer heads of
            the same size: first the query heads, then the key heads if they are counted separately.
        config_size: The attribute of the config that holds the size of a head in that case.
        shared: Whether all layers must keep the same heads, because one table of position biases is added to the
            scores in every layer.
        bias: That table, relative to the attention of the first layer, with a column for each head; None if there is
            none.
    """

    module: str
    query: str
    key: str
    value: str
    out: str
    size: str = "head_dim"
    counts: tuple[str, ...] = ()
    minimum: int = 0
    config: tuple[str, ...] = ()
    config_size: str | None = None
    shared: bool = False
    bias: str | None = None


@dataclass(frozen=True)
class Neurons:
    """A feed-forward network in each layer of a stack.

    Args:
        up: The matrices whose outputs are the neurons; a gated network has two. Those that a layer lacks are skipped.
        down: The matrix that reads the neurons.
        config: The attribute of the model's config that gives the number of neurons.
    """

    up: tuple[str, ...]
    down: str
    config: str


@dataclass(frozen=True)
class Piece:
    """A parameter or buffer with a slice for each of some :class:`Units`.

    Args:
        name: Its name relative to the layer, or to the base model if it lies outside of the layers.
        dim: The dimension along which the units lie.
        wide: The parts that lie one after another along it, each with a slice of every unit: whether such a slice is as
            wide as what the consumer reads of a unit. All other parts have slices of one width.
        outside: Whether it lies outside of the layer.
        fixed: Before which part, or behind all, lie further positions that belong to no unit, such as the one key that
            all queries share; all parts are wide then. None if there are none.
    """

    name: str
    dim: int
    wide: tuple[bool, ...] = (True,)
    outside: bool = False
    fixed: int | None = None


@dataclass(frozen=True)
class Units:
    """Units that discovery found in the layers of a stack, such as the heads of an attention.

    Args:
        kind: The name of the kind of unit.
        producers: The parameters whose outputs the units are.
        consumers: The weights that read them.
        buffers: Buffers with a slice for each unit.
        size: The attribute, relative to the layer, that holds the width of one slice of ``sized``; None if each of the
            features that the consumer reads is a unit, or if nothing holds it.
        sized: The name of the producer or consumer that ``size`` speaks of; None if ``number`` is given.
        number: The attribute, relative to the layer, that holds the number of units.
        counts: Attributes, relative to the layer, that are proportional to the number of units.
        values: Names of producers; a unit computes zero once its slices of all of them are zero.
        config: Attributes of the model's config that can tell another number of units, with dots for configs in it.
        narrow: For each of these, whether there is one for each slice as wide as ``size`` of what the consumer reads
            (query heads of a group), and not one for each unit.
        config_size: The attribute of the config that holds the size then.
        shared: Whether all layers must keep the same units, because a table outside of them has a slice for each.
    """

    kind: str
    producers: tuple[Piece, ...]
    consumers: tuple[Piece, ...]
    buffers: tuple[Piece, ...] = ()
    size: str | None = None
    sized: str | None = None
    number: str | None = None
    counts: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    config: tuple[str, ...] = ()
    narrow: tuple[bool, ...] = ()
    config_size: str | None = None
    shared: bool = False


@dataclass(frozen=True)
class Stack:
    """Layers that run one after the other.

    Args:
        layers: The ``ModuleList`` that holds them, relative to the base model. Modules that stand in no list are named
            one by one, with ``*`` for a number, if ``is_list`` is false.
        attentions: The attentions of a layer.
        neurons: The feed-forward network of a layer; None if ``units`` has it, or there is none.
        config: The attribute of the model's config that gives the number of layers; empty if none does, so that no
            layer can be removed.
        fixed: How many layers at the start cannot be removed.
        per_layer: Attributes of the config that are lists with an entry for each layer.
        first_heads: Whether the first layer must keep a head, because a cache counts tokens there.
        not_below: Another list of layers that must not become longer than this one, because transformers makes caches
            for as many layers as this list has.
        units: What discovery found in the layers; those that a layer lacks are skipped.
        is_found: Whether discovery found it.
        is_list: Whether ``layers`` names a list; if not, none of what it names can be removed as a layer.
    """

    layers: str
    attentions: tuple[Heads, ...]
    neurons: Neurons | None
    config: str
    fixed: int = 0
    per_layer: tuple[str, ...] = ()
    first_heads: bool = False
    not_below: str | None = None
    units: tuple[Units, ...] = ()
    is_found: bool = False
    is_list: bool = True


@dataclass(frozen=True)
class Channels:
    """Channels inside the blocks of a convolutional model, read only by the next module of the same block.

    Channels that a block adds to its input are not inside it: they can be masked, but not cut.

    Args:
        blocks: The blocks, relative to the base model; ``*`` stands for a number. Empty for the base model itself.
        links: Chains of modules that compute channels, each with the module that reads them, relative to the block. The
            first module of a chain decides which channels are pruned; the norms and depthwise convolutions after it
            follow. A link is skipped in a block that lacks its first module or its reader; other missing modules are
            left out of the chain.
    """

    blocks: str
    links: tuple[tuple[tuple[str, ...], str], ...]


_TABLE: dict[str, tuple[Stack | Channels, ...]] = {}
_FAMILIES = "hf_prune.architectures.families"


def register_architecture(model_type: str | Iterable[str], *parts: Stack | Channels) -> None:
    """Say where the units of an architecture are.

    Args:
        model_type: ``config.model_type``, or several of them.
        *parts: The stacks of layers of the architecture, or the channels in the blocks of a convolutional model.

    Raises:
        ArchitectureError: If one of the model types is registered already.

    Example:
        >>> heads = Heads("attn", "q", "k", "v", "o")
        >>> register_architecture("mine", Stack("layers", (heads,), Neurons(("up",), "down", "d_ff"), "n_layers"))
    """
    table = _loaded_table()
    names = [model_type] if isinstance(model_type, str) else list(model_type)
    for name in names:
        if name in table:
            raise ArchitectureError(f"the architecture {name!r} is registered already: choose another model_type")
    for name in names:
        table[name] = parts


def list_architectures() -> tuple[str, ...]:
    """All registered model types, sorted."""
    return tuple(sorted(_loaded_table()))


def architecture_of(model_type: str, model_name: str) -> tuple[Stack | Channels, ...]:
    """The table's entry for an architecture.

    Args:
        model_type: ``config.model_type``.
        model_name: The model's class, for the message.

    Raises:
        ArchitectureError: If there is none.
    """
    table = _loaded_table()
    if model_type not in table:
        raise ArchitectureError(
            f"the table of architectures has no entry for {model_type or 'a model without config.model_type'!r} "
            f"({model_name}): expected one of {', '.join(list_architectures())}; say where its layers, heads and "
            f"neurons are with hf_prune.register_architecture({model_type!r}, Stack(...)), or its channels with "
            f"Channels(...), or prune it with another granularity"
        )
    return table[model_type]


_families_loaded = False


def _loaded_table() -> dict[str, tuple[Stack | Channels, ...]]:
    """The table with the entries of all files in ``families/``, which register themselves when they are imported."""
    global _families_loaded
    if not _families_loaded:
        _families_loaded = True  # before the imports: each family asks for the table
        for module in pkgutil.iter_modules(importlib.import_module(_FAMILIES).__path__):
            importlib.import_module(f"{_FAMILIES}.{module.name}")
    return _TABLE
