"""Calibration batches: whether the settings need them, and which of them stand for the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hf_prune.criteria.base import LABELLED
from hf_prune.errors import CalibrationError
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.traits import criterion_learns
from hf_prune.utils.distributed import check_same_batches, fail_together, rank_and_world_size
from hf_prune.utils.forward import is_encoder_decoder

Batches = Iterable[Mapping[str, Any]]
NO_BATCHES = "calibration has no batches: expected at least one; a used-up generator yields none"
IGNORED = -100  # a label that does not count, such as that of padding
_MOST_LOGITS = 2**25  # of a language model in one backward pass, which holds several copies of them


def require_batches(config: PruningConfig, calibration: Batches | None) -> Batches:
    """Return the batches, and make sure that every process has the same ones.

    Args:
        config: The settings that need them, for the message.
        calibration: The batches; in several processes they are read into a list.

    Raises:
        CalibrationError: If there are none, or the processes have different ones.
    """
    with fail_together():
        if calibration is None:
            labels = " and labels" if config.needs & LABELLED else ""
            raise CalibrationError(
                f"{data_user(config) or 'pruning'} needs calibration data, and got none: pass calibration=, a list of "
                f"texts, a datasets.Dataset, a DataLoader or batches (dicts with the model's inputs{labels})"
            )
        batches: Batches = calibration
        if rank_and_world_size()[1] > 1:
            batches = list(batches)
    check_same_batches(batches)
    return batches


def needed_batches(
    config: PruningConfig, calibration: Batches | None, polish_data: Batches | None = None
) -> list[Mapping[str, Any]] | None:
    """Read the batches into a list if anything in the settings learns from them; None if nothing does.

    Args:
        config: The settings.
        calibration: The batches.
        polish_data: Batches of the polish alone, which then needs no others.

    Raises:
        CalibrationError: If they are needed and there are none, or the processes have different ones.
    """
    if not data_user(config, polish_data):
        return None
    batches = list(require_batches(config, calibration))
    if not batches:
        raise CalibrationError(NO_BATCHES)
    return batches


def data_user(config: PruningConfig, polish_data: Batches | None = None) -> str:
    """What in the settings learns from calibration data, as a message names it; "" if nothing does.

    Args:
        config: The settings.
        polish_data: Batches of the polish alone, which then needs no others.
    """
    if criterion_learns(config):
        return f"criterion {config.criterion!r}"
    if config.repair is not None:
        return f"repair={config.repair!r}"
    if config.learns_allocation:
        return f"allocation={config.allocation!r}"
    return "polish" if config.polish is not None and polish_data is None else ""


def without_labels(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the labels of a batch: predictions are asked for, not how far they are from labels.

    A decoder beside an encoder reads its labels, shifted to the right: they become its inputs, and labels of -100
    padding. Where the model has no method for that, the batch stays as it is.

    Args:
        model: The model that is to run the batch.
        batch: Its inputs by name.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch.get("labels")
    if (
        labels is None
        or not is_encoder_decoder(model)
        or {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys()
    ):
        return inputs
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:  # the model shifts them itself, or reads something else: its predictions are as they are
        return dict(batch)
    inputs["decoder_input_ids"] = shift(labels=labels)
    if "decoder_attention_mask" not in inputs and bool((labels == IGNORED).any()):
        inputs["decoder_attention_mask"] = (labels != IGNORED).long()
    return inputs


def count_examples(batch: Mapping[str, Any]) -> int:
    """The number of examples in a batch: the first dimension of its labels, or else of its first tensor.

    Raises:
        CalibrationError: If it holds no tensor with a dimension.
    """
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.dim() > 0}
    if not tensors:
        raise CalibrationError(
            f"a calibration batch holds no tensors (found: {', '.join(batch) or 'nothing'}): expected model inputs"
        )
    return len(tensors.get("labels", next(iter(tensors.values()))))


def small_batches(model: nn.Module, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Split a batch of a language model whose logits would fill the memory; other batches stay whole.

    Args:
        model: The model.
        batch: Its inputs by name.

    Returns:
        Batches of fewer examples in the same order, of one at least.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim() > 0]
    examples = count_examples(batch)
    tokens = max((value.numel() for value in tensors if value.dim() == 2 and not value.is_floating_point()), default=0)
    if (
        not isinstance(weight, Tensor)
        or tokens * len(weight) <= _MOST_LOGITS
        or any(len(t) != examples for t in tensors)
    ):
        return [dict(batch)]
    size = max(1, _MOST_LOGITS * examples // (tokens * len(weight)))
    return [
        {k: v[i : i + size] if isinstance(v, Tensor) and v.dim() > 0 else v for k, v in batch.items()}
        for i in range(0, examples, size)
    ]


def batch_kinds(batches: Sequence[Mapping[str, Any]]) -> list[int]:
    """For each batch the number of the first batch of its kind.

    Batches of a kind have the same names, dtypes and numbers of dimensions, so a model probably treats them alike.
    """
    kinds = [_kind(batch) for batch in batches]
    return [kinds.index(kind) for kind in kinds]


def sample_batches(batches: Sequence[Mapping[str, Any]], kinds: Sequence[int]) -> list[int]:
    """The first, the smallest and the largest batch of every kind: some models treat long inputs in another way.

    Args:
        batches: All batches.
        kinds: As :func:`batch_kinds` returns them.

    Returns:
        Their numbers, in rising order.
    """
    sizes = [sum(v.numel() for v in batch.values() if isinstance(v, Tensor)) for batch in batches]
    samples: set[int] = set()
    for kind in set(kinds):
        numbers = [i for i, other in enumerate(kinds) if other == kind]
        samples |= {kind, min(numbers, key=sizes.__getitem__), max(numbers, key=sizes.__getitem__)}
    return sorted(samples)


def _kind(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(
        (name, type(value), (value.dtype, value.dim()) if isinstance(value, Tensor) else None)
        for name, value in sorted(batch.items())
    )
