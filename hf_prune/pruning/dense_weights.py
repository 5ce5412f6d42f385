"""Dense weights that a pruning with ``keep_dense=True`` keeps beside its masks, and gives back on request."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from hf_prune.errors import MaskError
from hf_prune.utils.offloaded_weights import refuse_accelerated, write_weight


def can_keep_dense(masks: Collection[str], dense: Collection[str]) -> None:
    """Make sure that dense weights can still be kept.

    Args:
        masks: Names of the weights that have masks.
        dense: Names of the weights whose dense values were kept.

    Raises:
        MaskError: If a weight was pruned without keeping its dense values.
    """
    if set(masks) - set(dense):
        raise MaskError(
            "keep_dense=True, but the model was pruned before without it, so its dense weights are gone: "
            "reload the model and pass keep_dense=True at the first pruning"
        )


def restore_dense(model: nn.Module, masks: Collection[str], dense: Mapping[str, Tensor] | None) -> None:
    """Give a model its dense weights back, bit for bit.

    Args:
        model: The model.
        masks: Names of the weights that have masks.
        dense: The dense weights by parameter name, None if they were not kept.

    Raises:
        MaskError: If dense weights were not kept.
    """
    if dense is None or set(masks) - dense.keys():
        raise MaskError(
            "the dense weights were not kept: pass keep_dense=True to prune(), or reload the model; "
            "make_permanent() drops the masks and leaves the zeros"
        )
    refuse_accelerated(model, "giving dense weights back")
    for name, weight in dense.items():
        write_weight(model, name, weight)
