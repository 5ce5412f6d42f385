"""Load the models and tokenizers that commands work on."""

from __future__ import annotations

import inspect
import os
from typing import Any

from hf_prune.auto import load_native, load_sentence_model
from hf_prune.checkpoint.companions import has_tokenizer
from hf_prune.checkpoint.native import load_processor, load_tokenizer
from hf_prune.checkpoint.sources import check_model_source, class_of_transformers, model_class
from hf_prune.errors import DataError
from hf_prune.evaluation.examples.kinds import find_kind
from hf_prune.evaluation.tasks import ClassificationTask, ExampleTask, RawTask, SentenceTask, Task
from hf_prune.utils.distributed import rank_and_world_size

_OTHER_INPUTS = {
    "pixel_values": "images",
    "pixel_values_videos": "videos",
    "input_features": "audio",
    "input_values": "audio",
    "input_points": "points",
}


def load_for_task(source: str, task: Task, *, labelled: bool = True) -> tuple[Any, Any]:
    """A model for a task, and its tokenizer.

    Of a checkpoint of sentence-transformers, the model is that library's, with the transformers model in it.

    Args:
        source: Folder or Hub id.
        task: What the model is for.
        labelled: Whether labels are needed; without them, any model that reads texts can be calibrated on the texts
            of a classification task.

    Raises:
        DataError: If it cannot be found or is of another kind.
    """
    if isinstance(task, SentenceTask):
        sentence_model = load_sentence_model(source)
        return sentence_model, sentence_model.tokenizer
    if isinstance(task, RawTask):
        return load_native(source), None  # its processor is found when something is read
    if isinstance(task, ExampleTask) and find_kind(task.kind).reads_media:
        return load_native(source), load_processor(source, local_files_only=check_model_source(source))
    task.check_model_class(source, model_class(source), labelled=labelled)
    model, tokenizer = load_checked(source)
    task.check_model_class(source, type(model).__name__, labelled=labelled)  # configs need not name a class
    return model, tokenizer


def load_checked(source: str) -> tuple[Any, Any]:
    """Model and tokenizer of a checkpoint that reads texts.

    Raises:
        DataError: If it cannot be found, has no tokenizer, or reads something else.
    """
    offline = check_model_source(source)
    refuse_other_inputs(source)
    if not has_tokenizer(source, local_files_only=offline):
        raise DataError(
            f"{source!r} has no tokenizer: save it beside the model with tokenizer.save_pretrained({source!r})"
        )
    return load_native(source), load_tokenizer(source, local_files_only=offline)


def check_reads_texts(source: str, *, labelled: bool) -> None:
    """Check that a checkpoint reads texts, before any are looked for.

    Args:
        source: Folder or Hub id.
        labelled: Whether it has to be a classifier, since labels are needed.

    Raises:
        DataError: If it cannot be found, reads something else, or is not a classifier.
    """
    refuse_other_inputs(source)
    if labelled:
        ClassificationTask().check_model_class(source, model_class(source))


def refuse_other_inputs(source: str) -> None:
    """Check that a model reads texts and nothing else."""
    name = model_class(source)
    if others := other_inputs(source):
        raise DataError(
            f"{source!r} is a {name}, which learns from {' and '.join(others)}, and the commands read only texts: "
            f"prune and score it in Python, with calibration=batches, a list of dicts as its processor returns them, "
            f"or choose a criterion without data, such as magnitude"
        )


def other_inputs(source: str) -> list[str]:
    """What a model reads besides texts, or instead of them; empty for one that classifies texts."""
    name = model_class(source)
    cls = class_of_transformers(name)
    if cls is None:  # custom code, or no model at all: checked when it is loaded
        return []
    takes = inspect.signature(cls.forward).parameters
    others = [f"{what} ({key})" for key, what in _OTHER_INPUTS.items() if key in takes]
    return others if "input_ids" not in takes or not name.endswith("ForSequenceClassification") else []


def join_processes() -> None:
    """Under ``accelerate launch`` or ``torchrun``, meet the other processes, so that they calibrate together."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and rank_and_world_size()[1] == 1:
        from accelerate import PartialState

        PartialState(cpu=True)  # the device that commands load models on
