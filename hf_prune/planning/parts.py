"""The parts of a composite model, such as the towers of a vision–language model, and what ``only`` chooses of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hf_prune.errors import PlanError
from hf_prune.planning.config import PruningConfig
from hf_prune.utils.wrapping import plain_name, unadapted_name


def is_chosen(model: nn.Module, config: PruningConfig) -> Callable[[str], bool]:
    """Whether a module lies in one of the parts that are to be pruned, by its name.

    Args:
        model: Any torch module.
        config: Its ``only``: names of modules in the model, whole or without their beginnings; None for all of it.

    Returns:
        A function of the name of a module.

    Raises:
        PlanError: If a name is that of no module; the message lists the parts that there are.
    """
    only = config.only
    if only is None:
        return lambda name: True
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    chosen: list[str] = []
    for part in only:
        matches = [name for name in names if f".{_plain(name)}".endswith(f".{part}")]
        if not matches:
            raise PlanError(f"only={part!r} names no module of {type(model).__name__}: expected {_known_parts(model)}")
        chosen += matches
    prefixes = tuple(f"{name}." for name in chosen)
    return lambda name: f"{name}.".startswith(prefixes)


def in_parts(config: PruningConfig) -> str:
    """What messages say of the parts that are chosen; nothing if it is all of a model."""
    return "" if config.only is None else f" and only={config.only!r}"


def part_names(model: nn.Module) -> dict[str, str]:
    """The parts of a model that are models themselves, the innermost ones, with the names of their classes.

    Args:
        model: Any torch module.

    Example:
        >>> part_names(llava)  # doctest: +SKIP
        {'model.vision_tower': 'CLIPVisionModel', 'model.language_model': 'LlamaModel'}
    """
    from transformers import PreTrainedModel

    inside = {name: part for name, part in model.named_modules() if name and isinstance(part, PreTrainedModel)}
    return {
        name: type(part).__name__
        for name, part in inside.items()
        if not any(other is not part and isinstance(other, PreTrainedModel) for other in part.modules())
    }


def _known_parts(model: nn.Module) -> str:
    parts = {_plain(name): kind for name, kind in part_names(model).items()}
    children = {name: type(child).__name__ for name, child in model.named_children()}
    return "one or several of " + ", ".join(f"{name!r} ({kind})" for name, kind in (parts or children).items())


def _plain(name: str) -> str:
    return unadapted_name(plain_name(name))
