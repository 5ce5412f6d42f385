"""Two kinds of units that the package does not have, as a user would write them: one file, nothing else is touched."""

from __future__ import annotations

import dataclasses

from torch import nn

from hf_prune.architectures.kinds.base import UnitKind
from hf_prune.architectures.kinds.registry import KINDS, kind_named
from hf_prune.architectures.unit_groups import UnitGroup, UnitSlice


class NeuronPair(UnitKind):
    """Two neighbouring neurons, which stay or go together; shrink() cuts neurons."""

    name = "neuron_pair"
    description = "pairs of neighbouring neurons"
    cut_as = "neuron"

    def groups(self, model: nn.Module) -> list[UnitGroup]:
        """See :meth:`UnitKind.groups`."""
        return [
            dataclasses.replace(
                group,
                kind=self.name,
                units=group.units // 2,
                producers=tuple(dataclasses.replace(piece, width=2 * piece.width) for piece in group.producers),
                consumers=tuple(dataclasses.replace(piece, width=2 * piece.width) for piece in group.consumers),
                minimum=-(-group.minimum // 2),
                config=(),
                per_unit=(),
            )
            for group in kind_named("neuron").groups(model)
            if group.units % 2 == 0
        ]


class PooledFeature(UnitKind):
    """An output of BERT's pooler, and what the classifier does with it: parameters that no other kind cuts."""

    name = "pooled_feature"
    description = "features between the pooler and the classifier"

    def groups(self, model: nn.Module) -> list[UnitGroup]:
        """See :meth:`UnitKind.groups`."""
        pooler = getattr(getattr(model, "bert", None), "pooler", None)
        if not isinstance(pooler, nn.Module) or not isinstance(getattr(model, "classifier", None), nn.Linear):
            return []
        producers = (UnitSlice("bert.pooler.dense.weight", 0, 1), UnitSlice("bert.pooler.dense.bias", 0, 1))
        return [
            UnitGroup(
                name="classifier",
                kind=self.name,
                units=pooler.dense.out_features,
                producers=producers,
                consumers=(UnitSlice("classifier.weight", 1, 1),),
                values=producers,  # tanh(0) is 0
                minimum=1,
            )
        ]


TOYS: tuple[type[UnitKind], ...] = (NeuronPair, PooledFeature)


def register() -> None:
    """Add the toys to the registry."""
    for kind in TOYS:
        KINDS.register(kind.name)(kind)
