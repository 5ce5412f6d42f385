"""Load a checkpoint as the transformers class that its config names, and its tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from hf_prune.checkpoint.custom_code import custom_class, is_trusted, refuse_untrusted
from hf_prune.checkpoint.files import find_file
from hf_prune.checkpoint.load import load_pruned
from hf_prune.checkpoint.sources import check_model_source, class_of_transformers, sentence_class
from hf_prune.errors import CheckpointError, DataError, HfPruneError
from hf_prune.utils.json_files import read_config
from hf_prune.utils.load_options import load_options, resolve_device

# Models whose heads sentence-transformers does not load, and its classes that do not.
_WITH_HEADS = ("ForMaskedLM", "ForPreTraining", "ForCausalLM", "LMHeadModel")
_HEADLESS = ("SentenceTransformer", "MultiVectorEncoder")
# What transformers and PyTorch raise for configs that no model can be built from.
_CONFIG_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)


def load_plain(source: str) -> Any:
    """Load a checkpoint with its masks, as the transformers class that its config names.

    Dtype, device and revision are those of :func:`hf_prune.utils.load_options.loading_with`.

    Args:
        source: Folder or Hub id.

    Raises:
        DataError: If the source cannot be found, or its config names no transformers class.
        CheckpointError: If the masks are damaged or do not fit the weights, or the files hold another model than the
            config describes.
    """
    options = load_options()
    device = resolve_device(options.device)
    native, offline = native_class(source), check_model_source(source)
    with explained_loading(source):
        model, info = load_pruned(
            native.from_pretrained,
            source,
            local_files_only=offline,
            trust_remote_code=is_trusted(),
            output_loading_info=True,
            **options.loading(source),
        )
    _refuse_other_weights(source, model, info)
    return model if device.type == "cpu" else model.to(device)


def _refuse_other_weights(source: str, model: Any, info: Mapping[str, Any]) -> None:
    """Refuse files that hold another model than the config describes; transformers fills up with random weights."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    missing = sorted(set(info["missing_keys"]) & sizes.keys())
    unexpected = sorted(info["unexpected_keys"])
    if 2 * sum(sizes[name] for name in missing) > sum(sizes.values()) or len(unexpected) > len(sizes) - len(missing):
        examples = f" such as {missing[0]}," if missing else ""
        raise CheckpointError(
            f"the files of {source!r} hold another model than its config describes: {len(missing)} of the "
            f"{len(sizes)} weights of {type(model).__name__} are not in them,{examples} and would be random, and "
            f"{len(unexpected)} in them are of no use{f', such as {unexpected[0]}' if unexpected else ''}; restore the "
            f"config.json that was saved with them"
        )


@contextlib.contextmanager
def explained_loading(source: str) -> Iterator[None]:
    """Turn errors of transformers and PyTorch about a config that does not fit its weights into our own.

    Args:
        source: Folder or Hub id, for messages.

    Raises:
        CheckpointError: In place of theirs.
    """
    try:
        yield
    except HfPruneError:
        raise
    except ImportError as error:  # of what reads quantized weights, or of what a model's own code needs
        raise CheckpointError(f"{source!r} cannot be loaded: {_first_line(error)}") from error
    except (*_CONFIG_ERRORS, RuntimeError) as error:
        raise CheckpointError(f"the weights of {source!r} do not fit its config: {_first_line(error)}") from error


def load_config(source: str) -> Any:
    """The config of a checkpoint, as the class of its model type, which is one of its own where its code is trusted.

    Args:
        source: Folder or Hub id.

    Raises:
        DataError: If the source cannot be found, needs code that is not trusted, or transformers knows no such model.
    """
    offline = check_model_source(source)
    if (path := find_file(source, "config.json", {"local_files_only": offline})) is not None:
        refuse_untrusted(source, read_config(path, DataError))
    try:
        return transformers.AutoConfig.from_pretrained(
            source, local_files_only=offline, trust_remote_code=is_trusted(), **load_options().hub(source)
        )
    except (KeyError, ValueError) as error:
        raise DataError(
            f"the config of {source!r} describes no model that transformers knows: {_first_line(error)}"
        ) from error
    except (*_CONFIG_ERRORS, StrictDataclassError) as error:  # valid JSON with unexpected types
        raise DataError(
            f"the config.json of {source!r} is not one that save_pretrained wrote: {_first_line(error)}"
        ) from error


def native_class(source: str) -> Any:
    """The class that a checkpoint's config names: one of transformers, or of its own code where that is trusted.

    Args:
        source: Folder or Hub id.

    Raises:
        DataError: If the source cannot be found, or its config names no transformers class.
    """
    config, offline = load_config(source), check_model_source(source)
    architectures = config.architectures or []
    if (custom := custom_class(source, config, offline)) is not None:
        return custom
    named = isinstance(architectures, list | tuple) and bool(architectures) and isinstance(architectures[0], str)
    native = class_of_transformers(architectures[0]) if named else None
    if native is not None and native.__name__.endswith(_WITH_HEADS) and sentence_class(source) in _HEADLESS:
        native = transformers.MODEL_MAPPING.get(type(config), native)  # whose weights alone the files hold
    if native is None:
        raise DataError(
            f"the config of {source!r} names the class {architectures or '(none)'}: expected a transformers model such "
            f"as BertForSequenceClassification; load it with an AutoPrunedModelFor… class instead"
        )
    return native


def load_tokenizer(source: str, *, local_files_only: bool = False) -> Any:
    """Load the tokenizer of a checkpoint, without running code from it, unless that is trusted.

    Args:
        source: Folder or Hub id.
        local_files_only: Use only local files and the cache, not the Hub.

    Raises:
        DataError: If it needs such code, or cannot be read.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(
            source,
            local_files_only=local_files_only,
            trust_remote_code=is_trusted(),
            **load_options().hub(source),
        )
    except OSError:
        raise  # which says what is not there
    except Exception as error:  # tokenizers knows no class of its own
        raise DataError(
            f"the tokenizer of {source!r} cannot be loaded: {_first_line(error)}; if it needs code of its "
            f"own, which you trust, set trust_remote_code"
        ) from error


def load_processor(source: str, *, local_files_only: bool = False) -> Any:
    """Load the processor of images of a checkpoint.

    Args:
        source: Folder or Hub id.
        local_files_only: Use only local files and the cache, not the Hub.

    Raises:
        DataError: If there is none, or it cannot be read.
    """
    try:
        return transformers.AutoImageProcessor.from_pretrained(
            source,
            local_files_only=local_files_only,
            trust_remote_code=is_trusted(),
            **load_options().hub(source),
        )
    except (*_CONFIG_ERRORS, ImportError, OSError) as error:
        raise DataError(
            f"{source!r} has no processor of images that can be loaded ({_first_line(error)}): save it beside the "
            f"model with processor.save_pretrained({source!r})"
        ) from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), repr(error))
