"""Models whose code is in their checkpoint: refused, unless a caller says that the code may run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from hf_prune.checkpoint.packed.quantization_config import is_ours
from hf_prune.errors import DataError
from hf_prune.utils.load_options import load_options

_trusts: ContextVar[bool] = ContextVar("trusts", default=False)


@contextmanager
def trust_remote_code(trusted: bool = True) -> Iterator[bool]:
    """Whether checkpoints that are loaded within the context may run code of their own.

    Args:
        trusted: Outside of such a context, none may.
    """
    token = _trusts.set(trusted)
    try:
        yield trusted
    finally:
        _trusts.reset(token)


def is_trusted() -> bool:
    """Whether checkpoints may run code of their own."""
    return _trusts.get()


def refuse_untrusted(source: str, described: Mapping[str, Any]) -> None:
    """Make sure that a checkpoint's model is part of transformers, or that its own code may run.

    Args:
        source: Folder or Hub id.
        described: The content of its ``config.json``.

    Raises:
        DataError: If neither is so.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    classes = described.get("auto_map")
    if is_trusted() or not isinstance(classes, Mapping) or is_ours(classes):
        return
    if described.get("model_type") not in CONFIG_MAPPING:  # else transformers takes the class of its own
        files = sorted({f"{name.rpartition('.')[0]}.py" for name in classes.values() if isinstance(name, str)})
        raise DataError(
            f"{source!r} is a model with code of its own ({', '.join(files)}), which runs only if you trust it: read "
            f"it, then set trust_remote_code"
        )


def custom_class(source: str, config: Any, local_files_only: bool = False) -> Any | None:
    """The model class that the code of a trusted checkpoint defines; None if its code is not trusted, or it has none.

    Args:
        source: Folder or Hub id.
        config: Its config.
        local_files_only: Use only local files and the cache, not the Hub.

    Raises:
        DataError: If its code has no such class, or cannot be run.
    """
    classes = getattr(config, "auto_map", None)
    if not is_trusted() or not isinstance(classes, Mapping) or is_ours(classes):
        return None
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    named = (config.architectures or [""])[0]
    models = {auto: str(reference) for auto, reference in classes.items() if auto.startswith("AutoModel")}
    fitting = [auto for auto, reference in models.items() if reference.rpartition(".")[2] == named]
    auto = next(iter([*fitting, *(["AutoModel"] if not named and "AutoModel" in models else [])]), None)
    if auto is None:
        return None
    try:
        hub = load_options().hub(source)
        cls: Any = get_class_from_dynamic_module(models[auto], source, local_files_only=local_files_only, **hub)
    except (AttributeError, ImportError, OSError, SyntaxError) as error:
        raise DataError(f"the code of {source!r} cannot be run: {error}") from error
    if hasattr(transformers, auto):
        cls.register_for_auto_class(auto)  # so that saving copies the code
    return add_generation_mixin_to_remote_model(cls)
