"""AutoPrunedModelFor…: transformers' Auto classes, with pruning."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import transformers

from hf_prune.checkpoint.custom_code import is_trusted
from hf_prune.checkpoint.files import weight_files
from hf_prune.checkpoint.load import limited_to_files, load_pruned
from hf_prune.checkpoint.native import explained_loading, load_plain
from hf_prune.checkpoint.sources import check_model_source, model_class, sentence_class
from hf_prune.errors import DataError
from hf_prune.mixin import prunable
from hf_prune.utils.load_options import load_options, resolve_device
from hf_prune.utils.progress import working
from hf_prune.utils.wrapping import is_sentence_class


class AutoPrunedModel:
    """``AutoModel`` whose models can be pruned.

    It has a subclass for each task. None of them is instantiated: use ``from_pretrained()`` or ``from_config()``.

    Example:
        >>> AutoPrunedModelForCausalLM.__doc__
        '``AutoModelForCausalLM`` whose models can be pruned; see :class:`AutoPrunedModel`.'
    """

    _auto_class: ClassVar[str] = "AutoModel"

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} is not instantiated: use from_pretrained() or from_config()")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model, with its masks if the checkpoint has some.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            *args: As of the Auto class.
            **kwargs: As of the Auto class.

        Returns:
            A model of the native class, with the methods of :class:`hf_prune.PrunedModelMixin`.

        Raises:
            CheckpointError: If the masks are damaged or do not fit the weights.
        """
        kwargs.setdefault("trust_remote_code", False)  # else transformers asks on stdin, where a pipe may say yes
        auto = getattr(transformers, cls._auto_class)
        loaded = load_pruned(auto.from_pretrained, pretrained_model_name_or_path, *args, **kwargs)
        prunable(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A model with random weights from a transformers config."""
        kwargs.setdefault("trust_remote_code", False)
        return prunable(getattr(transformers, cls._auto_class).from_config(config, **kwargs))


@working("Loading the model")
def load_native(source: str) -> Any:
    """Load a checkpoint as the class that its config names, with its masks, ready to be pruned.

    Args:
        source: Folder or Hub id.

    Raises:
        DataError: If the source cannot be found, or its config names no class of transformers.
        CheckpointError: If the masks are damaged or do not fit the weights.
    """
    return prunable(load_plain(source))


@working("Loading the model")
def load_sentence_model(source: str) -> Any:
    """Load a checkpoint of sentence-transformers as the class that it is made for, with its masks.

    A sequence classifier without such a description is loaded as a ``CrossEncoder``, as that library does.

    Args:
        source: Folder or Hub id.

    Raises:
        DataError: If the source cannot be found or is no such checkpoint, or the library is missing.
        CheckpointError: If the masks are damaged or do not fit the weights, or the files hold another model.
    """
    offline = check_model_source(source)
    name = sentence_class(source) or (
        "CrossEncoder" if model_class(source).endswith("ForSequenceClassification") else ""
    )
    if not name:
        raise DataError(
            f"{source!r} is a {model_class(source) or 'model'} without modules.json: expected a model of "
            f"sentence-transformers, which says how its outputs are pooled"
        )
    try:
        import sentence_transformers
    except ImportError as error:
        raise DataError(
            f"{source!r} is a {name} of sentence-transformers, which is not installed and knows how it reads texts: "
            f"pip install 'hf_prune[sentences]'"
        ) from error
    cls = getattr(sentence_transformers, name, None)
    if not (isinstance(cls, type) and is_sentence_class(cls)):
        raise DataError(
            f"{source!r} is made for {name!r}: expected a class of sentence-transformers, such as SentenceTransformer"
        )
    local, options = offline or os.path.isdir(source), load_options()
    settings: dict[str, Any] = options.hub(source)
    if options.dtype != "auto":
        settings["model_kwargs"] = {"dtype": options.dtype}
    with explained_loading(source), limited_to_files(source, weight_files(source, {"local_files_only": local})):
        load: Any = prunable(cls)
        return load(
            source,
            device=str(resolve_device(options.device)),
            local_files_only=local,
            trust_remote_code=is_trusted(),
            **settings,
        )


def _for(task: str) -> type[AutoPrunedModel]:
    auto = f"AutoModelFor{task}"
    return type(
        f"AutoPrunedModelFor{task}",
        (AutoPrunedModel,),
        {
            "__module__": __name__,
            "__doc__": f"``{auto}`` whose models can be pruned; see :class:`AutoPrunedModel`.",
            "_auto_class": auto,
        },
    )


AutoPrunedModelForAudioClassification = _for("AudioClassification")
AutoPrunedModelForCausalLM = _for("CausalLM")
AutoPrunedModelForCTC = _for("CTC")
AutoPrunedModelForImageClassification = _for("ImageClassification")
AutoPrunedModelForImageTextToText = _for("ImageTextToText")
AutoPrunedModelForMaskedLM = _for("MaskedLM")
AutoPrunedModelForMultipleChoice = _for("MultipleChoice")
AutoPrunedModelForObjectDetection = _for("ObjectDetection")
AutoPrunedModelForPreTraining = _for("PreTraining")
AutoPrunedModelForQuestionAnswering = _for("QuestionAnswering")
AutoPrunedModelForSemanticSegmentation = _for("SemanticSegmentation")
AutoPrunedModelForSeq2SeqLM = _for("Seq2SeqLM")
AutoPrunedModelForSequenceClassification = _for("SequenceClassification")
AutoPrunedModelForSpeechSeq2Seq = _for("SpeechSeq2Seq")
AutoPrunedModelForTokenClassification = _for("TokenClassification")
