"""What is known of a model's architecture: its entry in the table, or else what discovery finds and proves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from hf_prune.architectures.base import Channels, Stack, architecture_of, list_architectures
from hf_prune.architectures.discovery.find import discover
from hf_prune.architectures.modules import model_type_of
from hf_prune.architectures.moe_blocks import moe_blocks, unusable_experts
from hf_prune.errors import ArchitectureError

Entry = TypeVar("Entry", Stack, Channels)


def entries_of(model: nn.Module, entry_class: type[Entry]) -> list[Entry]:
    """What is known of a model, as far as it is of one class.

    Raises:
        ArchitectureError: If the table has no entry for the model, and discovery finds nothing that it can prove.
    """
    entries: Sequence[Stack | Channels]
    if is_in_table(model) or not _is_of_transformers(model):
        entries = architecture_of(model_type_of(model), type(model).__name__)
    else:
        try:
            entries = discover(model).stacks
        except ArchitectureError:
            if not (moe_blocks(model) or unusable_experts(model)):
                raise
            entries = ()  # experts are found in another way
    return [entry for entry in entries if isinstance(entry, entry_class)]


def is_in_table(model: nn.Module) -> bool:
    """Whether the table has an entry for a model."""
    return model_type_of(model) in list_architectures()


def _is_of_transformers(model: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)
