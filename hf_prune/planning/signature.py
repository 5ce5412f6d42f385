"""Settings as arguments: what shells, notebooks and editors complete."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Callable
from inspect import Parameter
from typing import Any, TypeVar

from hf_prune.planning.config import PruningConfig
from hf_prune.planning.presets import PRESETS

Function = TypeVar("Function", bound=Callable[..., Any])


class _OfPreset:
    """Stands in a signature for a default that depends on the preset, and thereby on whether there is data."""

    def __repr__(self) -> str:
        return "<of the preset>"


_OF_PRESET = _OfPreset()
_SET_BY_DEFAULT = {
    name for preset in ("fast", "balanced") for name in (*PRESETS[preset].weights, *PRESETS[preset].units)
}


def with_settings(function: Function) -> Function:
    """Have a function that takes settings as ``**settings`` show each of them in its signature and in its help.

    What the preset decides where no method is named, ``"balanced"`` with data and ``"fast"`` without, is shown as such.

    Args:
        function: Passes ``**settings`` on to a :class:`PruningConfig`.

    Example:
        >>> @with_settings
        ... def prune(model: object, **settings: Any) -> dict[str, Any]:
        ...     return settings
        >>> list(inspect.signature(prune).parameters)[:4]
        ['model', 'sparsity', 'criterion', 'granularity']
        >>> prune("bert", sparsity=0.5)
        {'sparsity': 0.5}
        >>> inspect.signature(prune).parameters["criterion"].default
        <of the preset>
    """
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    names = {p.name for p in parameters}
    for field in dataclasses.fields(PruningConfig):
        if field.name not in names:
            default = None if field.default is dataclasses.MISSING else field.default
            default = _OF_PRESET if field.name in _SET_BY_DEFAULT else default
            parameters.append(Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=field.type))
    if "preset" not in names:
        parameters.append(Parameter("preset", Parameter.KEYWORD_ONLY, default=None, annotation="str | None"))
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    before, mark, after = (function.__doc__ or "").partition("**settings:")
    if mark:
        rest, end, last = after.partition("\n\n")
        indent = before[before.rindex("\n") + 1 :]
        function.__doc__ = f"{before}{mark}{rest}\n{textwrap.indent(_documented_fields(), indent)}{end}{last}"
    return function


def _documented_fields() -> str:
    """The arguments of a PruningConfig, as its docstring explains them."""
    arguments = inspect.cleandoc(PruningConfig.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    return textwrap.dedent(arguments)
