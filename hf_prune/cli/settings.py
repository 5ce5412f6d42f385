"""The settings of a PruningConfig as options: a line in a table here makes a setting an option of every command.

Commands say with :func:`takes_settings` which tables they take and where these stand in the help.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prune.cli.options import split_names, split_numbers
from hf_prune.errors import ConfigError
from hf_prune.planning.choices import ALLOCATIONS, OBJECTIVES, POLISHES, REPAIRS, SCOPES
from hf_prune.planning.config import PruningConfig

Table = Mapping[str, Any]  # annotated types by the name of a field of PruningConfig, in the order of the help

_Text = str | None

SPARSITY: Table = {"sparsity": Annotated[float | None, typer.Option(help="Share to remove, 0 to 1. [default: 0.5]")]}
CRITERION: Table = {"criterion": Annotated[_Text, typer.Option(help="See: hf-prune list. [default: magnitude]")]}
#: Which weights are removed: prune, sweep and train take these.
SELECTION: Table = {
    "granularity": Annotated[
        _Text,
        typer.Option(
            help="unstructured, N:M (2:4), block:RxC (block:16x1), row, column, channel; or what is removed as a "
            "whole, one or several of head,neuron,layer."
        ),
    ],
    "scope": Annotated[_Text, typer.Option(help=f"{', '.join(SCOPES)}: which weights compete.")],
    "allocation": Annotated[
        _Text, typer.Option(help=f"{', '.join(ALLOCATIONS)}, or module=sparsity pairs: query=0.8,key=0.8.")
    ],
    "target_modules": Annotated[
        _Text, typer.Option(help="all-linear, module names separated by commas, or re:REGEX for whole module names.")
    ],
    "exclude_modules": Annotated[_Text, typer.Option(help="Modules to leave alone, in the same form.")],
    "repair": Annotated[_Text, typer.Option(help=f"{', '.join(REPAIRS)}: recompute the weights that stay.")],
    "only": Annotated[
        _Text,
        typer.Option(
            help="The part of a composite model to prune, such as language_model or vision_tower; several are "
            "separated by commas. [default: all of it]"
        ),
    ],
}
#: How a model that is not trained is pruned: prune and sweep take these.
METHOD: Table = {
    "objective": Annotated[
        _Text,
        typer.Option(help=f"{', '.join(OBJECTIVES)}: what calibrated criteria and repairs minimise. [default: layer]"),
    ],
    "steps": Annotated[
        int | None,
        typer.Option(min=1, help="Prune in this many steps, with new gradients before each. [default: 1]"),
    ],
    "polish": Annotated[
        _Text,
        typer.Option(
            help=f"{', '.join(POLISHES)}: afterwards, train for a short while to reproduce the dense model's outputs."
        ),
    ],
}
SEED: Table = {"seed": Annotated[int | None, typer.Option(help="Seed of what is random.")]}
BUDGETS: Table = {
    "target_params": Annotated[
        float | None, typer.Option(help="Instead of --sparsity, for head, neuron, layer: the share of parameters left.")
    ],
    "target_flops": Annotated[
        float | None, typer.Option(help="The same for the operations of a forward pass on the workload.")
    ],
    "target_speedup": Annotated[
        float | None, typer.Option(help="The same: how many times as fast on the workload, measured on this machine.")
    ],
    "workload": Annotated[
        _Text,
        typer.Option(help="Batch size x tokens that --target-flops and --target-speedup mean. [default: 1x128]"),
    ],
}
ROUNDING: Table = {
    "round_to": Annotated[
        int | None,
        typer.Option(min=1, help="Numbers of heads and neurons left are multiples of this. [default: 1]"),
    ]
}


def takes_settings(**tables: Table) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options for settings, all of them None by default.

    The command gets those that the user gave, by name, as the argument ``settings``.

    Args:
        **tables: Options by the name of the parameter that they follow in the help.

    Example:
        >>> @takes_settings(model=SPARSITY | SEED)
        ... def show(model: str, out: str = "", *, settings: dict[str, Any]) -> None:
        ...     print(settings)
        >>> list(inspect.signature(show).parameters)
        ['model', 'sparsity', 'seed', 'out']
        >>> show(model="bert", sparsity=0.5, seed=None)
        {'sparsity': 0.5}
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        parameters: list[Parameter] = []
        for name, parameter in signature.parameters.items():
            if name != "settings":
                parameters.append(parameter)
            for setting, option in tables.get(name, {}).items():
                parameters.append(Parameter(setting, parameter.kind, default=None, annotation=option))
        names = [setting for table in tables.values() for setting in table]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            settings = {name: values.pop(name, None) for name in names}
            command(**values, settings={name: value for name, value in settings.items() if value is not None})

        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def read_config(path: Path | None, **settings: Any) -> PruningConfig:
    """A config from a file and from options, which override the file.

    Args:
        path: A JSON file with a :class:`PruningConfig`, if there is one.
        **settings: Texts and numbers as the options take them.

    Raises:
        ConfigError: If the file or a setting is invalid.
    """
    values = {name: _READERS[name](value) if name in _READERS else value for name, value in settings.items()}
    if path is None:
        return PruningConfig.from_dict(values)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not a text file: {error}") from error
    return PruningConfig.from_json(text).replace(**values)


def _read_granularity(text: str) -> str | tuple[str, ...]:
    return split_names(text) if "," in text else text


def _read_allocation(text: str) -> str | dict[str, float]:
    if "=" not in text:
        return text
    pairs = [pair.partition("=") for pair in split_names(text)]
    return {name: split_numbers(f"--allocation {name}", value)[0] for name, _, value in pairs}


def _read_modules(text: str) -> str | tuple[str, ...]:
    """Modules as a config takes them: a regular expression begins with ``re:``."""
    if text.startswith("re:"):
        return text.removeprefix("re:")
    return text if text == "all-linear" else split_names(text)


def _read_workload(text: str) -> dict[str, int]:
    """A workload from a text such as ``32x64``."""
    batch, _, length = text.partition("x")
    if not (batch.isdigit() and length.isdigit()):
        raise ConfigError(f"--workload is {text!r}: expected the batch size and the number of tokens, such as 32x64")
    return {"batch_size": int(batch), "length": int(length)}


_READERS: Mapping[str, Callable[[str], Any]] = {
    "granularity": _read_granularity,
    "allocation": _read_allocation,
    "target_modules": _read_modules,
    "exclude_modules": _read_modules,
    "only": split_names,
    "workload": _read_workload,
}
