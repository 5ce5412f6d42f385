"""Make a config of a class with given values, whichever way the class takes them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

# What transformers keeps for itself, and what a config is given when its model is built.
_INTERNAL = {
    "_name_or_path",
    "_commit_hash",
    "_output_attentions",
    "_attn_implementation_internal",
    "_experts_implementation_internal",
    "_heterogeneity_spec",
    "per_layer_config",
    "_post_init_done",
}


def values_of(config: Any) -> dict[str, Any]:
    """What a config says, by attribute, and by argument of its class where that is kept under another name."""
    arguments = inspect.signature(type(config).__init__).parameters.keys() - vars(config).keys()
    by_property = {name for name in arguments if isinstance(getattr(type(config), name, None), property)}
    return {**vars(config), **{name: getattr(config, name) for name in sorted(by_property)}}


def with_values(config: Any, values: Mapping[str, Any]) -> Any:
    """A config of the same class with given values.

    Classes take settings as arguments by name, hand ``**kwargs`` on to a parent, pop them, or derive one from others.
    Whatever is not as asked after that is set, but for sizes that the class derives from others.

    Args:
        config: A config, which stays as it is.
        values: What the new one is to say, by attribute.

    Raises:
        ValueError: If the new config says something else after all.
    """
    made = _made(config, values)
    wrong = {n: v for n, v in values.items() if n not in _INTERNAL and not _is_same(made, n, v)}
    if type(config).__module__.startswith("transformers."):  # whose classes take all by name, and correct misfits
        for name, value in wrong.items():
            if name not in vars(made) and not name.startswith("_"):
                setattr(made, name, value)  # of a sub-config, which its parent has added
        return made
    old = {n: v for n, v in values_of(config).items() if n in values}
    again = _made(config, old) if wrong else config  # what the class makes of the old values
    for name, value in wrong.items():
        # A size that follows from others does so in the old config as well; a word or a switch has to stay as it is.
        is_handled = name in old and _is_same(again, name, old[name])
        is_kept = not _has_number(value) and _is_same(config, name, value)
        if hasattr(made, name) and (is_config(value) or (is_handled and not is_kept)):
            continue
        setattr(made, name, value)
        if not is_config(value) and not _is_same(made, name, value):
            raise ValueError(f"its {name} would be {getattr(made, name, None)!r} in place of {value!r}")
    return made


def _made(config: Any, values: Mapping[str, Any]) -> Any:
    """A config that is given all values that its class may take."""
    parameters = inspect.signature(type(config).__init__).parameters
    own = {f.name for f in dataclasses.fields(config)} | parameters.keys()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    own |= {"out_indices", "per_layer_config"}  # which classes take that do not name them
    given = {n: v for n, v in values.items() if n in own or (takes_all and not n.startswith("_"))}
    return type(config)(**given)


def _is_same(config: Any, name: str, value: Any) -> bool:
    """Whether a config has a value, as an attribute of its own or by a property."""
    missing = object()
    try:
        found = vars(config)[name] if name in vars(config) else getattr(config, name, missing)
        return found is not missing and bool(found == value)
    except (RuntimeError, ValueError):  # arrays
        return False


def is_config(value: Any) -> bool:
    """Whether a value is a config, such as that of one part of a model."""
    from transformers import PreTrainedConfig

    return isinstance(value, PreTrainedConfig)


def _has_number(value: Any) -> bool:
    """Whether a value is a number, or holds one."""
    if isinstance(value, Mapping):
        return any(map(_has_number, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_number, value))
    return isinstance(value, int | float) and not isinstance(value, bool)
