"""Checks that commands make before heavy libraries are loaded."""

from __future__ import annotations

from collections.abc import Sequence

from hf_prune.checkpoint.sources import check_model_source, check_unquantized
from hf_prune.cli.console import is_verbose
from hf_prune.errors import ConfigError
from hf_prune.evaluation.data.sources import check_data_source, check_text_source


def start(models: Sequence[str], data: str | None = None, *, quantized: bool = False) -> None:
    """Check that models and labelled data can be found, then load transformers and silence its progress bars.

    Args:
        models: Folders or Hub ids.
        data: Where labelled texts are, if some are needed.
        quantized: Whether models may be quantized, as where they are only run.
    """
    for model in models:
        check_model_source(model)
        if not quantized:
            check_unquantized(model)
    if data is not None:
        check_texts(models, data, labelled=True)
    from transformers.utils import logging

    if not is_verbose():
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def check_texts(models: Sequence[str], data: str | None, *, labelled: bool, why: str = "", useful: str = "") -> str:
    """Check that models read texts, and then that the texts can be found.

    Args:
        models: Folders or Hub ids.
        data: Where the texts are.
        labelled: Whether their labels are needed.
        why: What data is needed for, for the message where there is none.
        useful: What would be of use, for the same.

    Returns:
        Where the texts are.

    Raises:
        ConfigError: If none are named.
        DataError: If they cannot be found, or a model reads something else.
    """
    from hf_prune.cli.workflows.loading import check_reads_texts

    for model in models:
        check_reads_texts(model, labelled=labelled)
    return check_data(data, labelled=labelled, why=why, useful=useful)


def check_task_data(
    models: Sequence[str], kind: str, data: str | None, *, labelled: bool, why: str, useful: str
) -> str:
    """Check that models can read what a kind of task has, and then that the data can be found.

    Args:
        models: Folders or Hub ids.
        kind: What they are for, see :func:`hf_prune.cli.options.task_kind`.
        data: Where it is.
        labelled: Whether labels are needed, so that a text file will not do.
        why: As for :func:`check_texts`.
        useful: The same.
    """
    if kind in ("classes", "language"):
        return check_texts(models, data, labelled=labelled, why=why, useful=useful)
    return check_data(data, labelled=labelled, why=why, useful=useful)


def check_data(data: str | None, *, labelled: bool, why: str = "", useful: str = "") -> str:
    """Check that data is named and can be found; arguments as of :func:`check_texts`."""
    if data is None:
        raise ConfigError(f"no --data, which {why} needs: pass {useful}; a folder, a file or a Hub data set")
    (check_data_source if labelled else check_text_source)(data)
    return data
