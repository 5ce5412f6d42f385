"""What to expect of a language model that is pruned, as it was measured."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

from hf_prune.planning.presets import METHOD_SETTINGS, expectation
from hf_prune.utils.notices import QualityWarning, warn_user
from hf_prune.utils.progress import is_interactive

if TYPE_CHECKING:
    from hf_prune.planning.config import PruningConfig

_LOG = logging.getLogger(__name__)
#: At 50 % zeros, on 24 windows of 512 tokens; docs/guides/language-models.md has the table.
MAGNITUDE_COST = "the perplexity of SmolLM2-135M on WikiText-2 rose from 32.6 to 562, and to 57 by sparsegpt"


def warn_of_magnitude(model_class: str, config: PruningConfig) -> None:
    """Warn that a language model is pruned by magnitude, with what that was measured to cost.

    Args:
        model_class: The name of the model's class.
        config: The settings.
    """
    if is_language_model(model_class) and config.criterion == "magnitude" and not config.removes_units:
        warn_user(
            f"{model_class} is pruned by magnitude, which language models bear badly: at 50 % zeros, {MAGNITUDE_COST}. "
            f"With texts (calibration=, --data) and no criterion named, the preset is 'balanced'",
            QualityWarning,
        )


def note_expectation(config: PruningConfig, given: Collection[str], *, has_data: bool) -> None:
    """Say what to expect of the preset that holds since the caller named no method, as the command line does.

    Without data, whoever works interactively is warned, since data is what would help most; else it is logged.

    Args:
        config: The settings.
        given: The names of those that the caller gave.
        has_data: Whether there is calibration data.
    """
    if (METHOD_SETTINGS | {"preset"}).intersection(given):
        return
    text = expectation("balanced" if has_data else "fast", removes_units=config.removes_units)
    if is_interactive() and not has_data:
        warn_user(text, QualityWarning)
    else:
        _LOG.info(text)


def is_language_model(class_name: str) -> bool:
    """Whether the name of a transformers class is that of a causal language model."""
    return class_name.endswith(("ForCausalLM", "LMHeadModel"))
