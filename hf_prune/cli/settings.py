"""The settings of a PruningConfig as options: a line in a table here makes a setting an option of every command.

Commands say with :func:`takes_settings` which tables they take and where these stand in the help.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prune.cli.options import split_names, split_numbers
from hf_prune.cli.panels import criterion_names, one_of
from hf_prune.cli.run_file import pruning_settings, read_run_file, remember_config
from hf_prune.errors import ConfigError
from hf_prune.planning.choices import ALLOCATIONS, OBJECTIVES, POLISHES, REPAIRS, SCOPES
from hf_prune.planning.choices import BUDGETS as BUDGET_NAMES
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.presets import METHOD_SETTINGS, PRESETS, UNITS_FOR_SPEED, resolve_settings

Table = Mapping[str, Any]  # annotated types by the name of a field of PruningConfig, in the order of the help

_Text = str | None

SPARSITY: Table = {"sparsity": Annotated[float | None, typer.Option(help="Share to remove, 0 to 1. [default: 0.5]")]}


def preset_with(default: str) -> Table:
    """The option ``--preset`` of a command.

    Args:
        default: What holds where neither a preset nor a method is named, as the help says it.
    """
    what = "A method by name, for what other options leave open; see: hf-prune list presets."
    return {"preset": Annotated[_Text, one_of(tuple(PRESETS), f"{what} [default: {default}]")]}


CRITERION: Table = {
    "criterion": Annotated[
        _Text,
        typer.Option(
            help="How weights are scored; see: hf-prune list. [default: that of the preset: magnitude "
            "without --data, sparsegpt with it]",
            autocompletion=criterion_names,
        ),
    ]
}
#: Which weights are removed: prune, sweep and train take these.
SELECTION: Table = {
    "granularity": Annotated[
        _Text,
        typer.Option(
            help="unstructured, N:M (2:4), block:RxC (block:16x1), row, column, channel; or what is removed as a "
            "whole, one or several of head,neuron,layer."
        ),
    ],
    "scope": Annotated[_Text, one_of(SCOPES, "Which weights compete with each other.")],
    "allocation": Annotated[
        _Text,
        one_of(ALLOCATIONS, "How the sparsity is shared among layers; or pairs of module=sparsity: query=0.8,key=0.8."),
    ],
    "target_modules": Annotated[
        _Text, typer.Option(help="all-linear, module names separated by commas, or re:REGEX for whole module names.")
    ],
    "exclude_modules": Annotated[_Text, typer.Option(help="Modules to leave alone, in the same form.")],
    "repair": Annotated[_Text, one_of(REPAIRS, "Recompute the weights that stay.")],
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
        one_of(OBJECTIVES, "Whose error calibrated criteria and repairs minimise. [default: layer]"),
    ],
    "steps": Annotated[
        int | None,
        typer.Option(min=1, help="Prune in this many steps, with new gradients before each. [default: 1]"),
    ],
    "polish": Annotated[
        _Text,
        one_of(POLISHES, "Afterwards, train for a short while to reproduce the dense model's outputs."),
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
        typer.Option(
            help="Batch size x tokens that --target-flops and --target-speedup mean; 1x128+64 generates 64 tokens "
            "after a prompt of 128. [default: 1x128]"
        ),
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
        run.setting_names = tuple(names)  # type: ignore[attr-defined]
        return run

    return decorate


def read_config(
    path: Path | None, *, options: Collection[str] = (), has_data: bool = False, **settings: Any
) -> PruningConfig:
    """A config from a file and from options, which override the file; the file that repeats the run gets all of it.

    Args:
        path: A YAML or JSON file with settings of the command, if there is one; others than those of a
            :class:`PruningConfig` are not looked at.
        options: Settings in the file that are no setting but an option of the command, such as the list of criteria of
            a sweep.
        has_data: Whether the user gave data: where neither names a method, the preset is then ``"balanced"``.
        **settings: Texts and numbers as the options take them.

    Raises:
        ConfigError: If the file or a setting is invalid.
    """
    config = _read_config(path, options, has_data, settings)
    remember_config(config, options)
    return config


def _read_config(
    path: Path | None, options: Collection[str], has_data: bool, settings: Mapping[str, Any]
) -> PruningConfig:
    values = config_values(settings)
    if path is None:
        return PruningConfig.from_dict(resolve_settings(values, has_data=has_data))
    of_file = {key: v for key, v in pruning_settings(read_run_file(path)).items() if key not in options}
    amounts = ("sparsity", *BUDGET_NAMES)
    if any(name in values for name in amounts):  # an option overrides what the file says of the same thing
        of_file = {key: value for key, value in of_file.items() if key not in amounts}
    if "granularity" not in {**of_file, **values} and any(name in values for name in BUDGET_NAMES):
        values["granularity"] = UNITS_FOR_SPEED
    open_method = has_data and not (METHOD_SETTINGS | {"preset"}) & values.keys()
    read = PruningConfig.from_dict(resolve_settings(of_file, has_data=open_method))
    try:
        return read.replace(**values)
    except ConfigError as error:
        given = ", ".join(f"--{name.replace('_', '-')}" for name in settings)
        raise ConfigError(
            f"{error}. Options: {given or 'none'}; in --config {path}: {', '.join(of_file) or 'nothing'}"
        ) from error


def config_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Values of options as a :class:`PruningConfig` takes them.

    Args:
        settings: Texts and numbers as the options take them.
    """
    return {name: _READERS[name](value) if name in _READERS else value for name, value in settings.items()}


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


def read_workload(text: str) -> dict[str, int]:
    """A workload from a text such as ``32x64``, or ``1x128+64`` for a generation."""
    batch, _, tokens = text.partition("x")
    length, plus, new = tokens.partition("+")
    if not all(number.isdecimal() for number in (batch, length, *([new] if plus else []))):
        raise ConfigError(
            f"--workload is {text!r}: expected the batch size and the number of tokens, such as 32x64, or 1x128+64 for "
            f"64 new tokens after a prompt of 128"
        )
    if plus:
        return {"batch_size": int(batch), "prompt": int(length), "new_tokens": int(new)}
    return {"batch_size": int(batch), "length": int(length)}


_READERS: Mapping[str, Callable[[str], Any]] = {
    "granularity": _read_granularity,
    "allocation": _read_allocation,
    "target_modules": _read_modules,
    "exclude_modules": _read_modules,
    "only": split_names,
    "workload": read_workload,
}
