"""Checks that commands make before heavy libraries are loaded."""

from __future__ import annotations

from collections.abc import Sequence

from hf_prune.checkpoint.sources import check_model_source
from hf_prune.evaluation.data.sources import check_data_source, check_text_source


def start(models: Sequence[str], data: str | None = None) -> None:
    """Check that models and labelled data can be found, then load transformers and silence its progress bars.

    Args:
        models: Folders or Hub ids.
        data: Where labelled texts are, if some are needed.
    """
    for model in models:
        check_model_source(model)
    if data is not None:
        check_texts(models, data, labelled=True)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_texts(models: Sequence[str], data: str, *, labelled: bool) -> None:
    """Check that models read texts, and then that the texts can be found.

    Args:
        models: Folders or Hub ids.
        data: Where the texts are.
        labelled: Whether their labels are needed.
    """
    from hf_prune.cli.workflows.loading import check_reads_texts

    for model in models:
        check_reads_texts(model, labelled=labelled)
    (check_data_source if labelled else check_text_source)(data)
