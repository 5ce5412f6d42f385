"""A file with the settings of a run: read with ``--config``, and written into the output so that it can be repeated."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hf_prune import __version__
from hf_prune.errors import ConfigError, DataError
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.presets import METHOD_SETTINGS
from hf_prune.planning.traits import preset_of
from hf_prune.utils.files import read_text, write_text
from hf_prune.utils.folders import RUN_FILE
from hf_prune.utils.front_matter import dump_yaml, read_yaml
from hf_prune.utils.json_files import read_json_object
from hf_prune.utils.registry import unknown_name

SETTINGS = (*(field.name for field in dataclasses.fields(PruningConfig)), "preset")
_NOTES = ("command", "hf_prune", "format_version")  # keys that are no settings
# What does not belong to a result: secrets, what is printed, and consents that a repetition asks for again.
_NOT_REPEATED = ("token", "verbose", "quiet", "config", "as_json", "overwrite", "restart", "dry_run")

_UNNAMED = ("help", "json", "config", "verbose", "quiet")  # options that a file takes, and nobody looks for in one
_NUMBERS = {field.name for field in dataclasses.fields(PruningConfig) if re.match("(int|float)", str(field.type))}
_CHOSEN: ContextVar[dict[str, Any] | None] = ContextVar("hf_prune_chosen_settings", default=None)


@contextmanager
def choosing() -> Iterator[dict[str, Any]]:
    """Within this context, :func:`remember` fills the dict that it gives."""
    chosen: dict[str, Any] = {}
    token = _CHOSEN.set(chosen)
    try:
        yield chosen
    finally:
        _CHOSEN.reset(token)


def remember(**values: Any) -> None:
    """Note what a run uses, given or not, for the file that repeats it.

    Args:
        **values: Values of settings, or of options as the command takes them.
    """
    if (chosen := _CHOSEN.get()) is not None:
        chosen.update(values)


def remember_config(config: PruningConfig, options: Collection[str] = ()) -> None:
    """Note all settings of a run, with the preset whose method they are, for the file that repeats it.

    Args:
        config: The settings.
        options: Those that an option of the command decides.
    """
    values = {name: value for name, value in config.to_dict().items() if name in SETTINGS and name not in options}
    if (preset := preset_of(config)) is not None:
        values["preset"] = preset
    remember(**values)


def read_run_file(path: Path) -> dict[str, Any]:
    """The settings in a YAML or JSON file, by name.

    Raises:
        ConfigError: If it cannot be read, or holds something else.
    """
    try:
        if path.suffix == ".json":
            return {
                _as_name(name): value
                for name, value in read_json_object(path, ConfigError, "a file of settings").items()
            }
        values = read_yaml(read_text(path), str(path), "correct it, or leave --config out") or {}
    except (DataError, OSError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"--config {path} holds a {type(values).__name__}: expected settings, such as sparsity: 0.5")
    return {_as_name(name): value for name, value in values.items()}


def pruning_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a :class:`PruningConfig` among those of a file; numbers may be written as texts, as 1e-1 is."""
    found = {name: values[name] for name in (*SETTINGS, "format_version") if name in values}
    return {name: _number(value) if name in _NUMBERS else value for name, value in found.items()}


def _number(value: Any) -> Any:
    """The number that a text is; what is none stays, and is refused where it is checked."""
    for kind in (int, float) if isinstance(value, str) else ():
        with suppress(ValueError):
            return kind(value)
    return value


def option_values(args: Sequence[str], command: str, params: Sequence[Any], settings: Sequence[str]) -> dict[str, Any]:
    """The values of options and arguments in the file that ``--config`` names, by the name of the parameter.

    Args:
        args: The command line.
        command: The name of the command.
        params: What it takes.
        settings: Those of its parameters that are settings of a :class:`PruningConfig`, which it reads itself.

    Raises:
        ConfigError: If the file cannot be read, or is of another command.
        UnknownNameError: If the command has no such setting.
    """
    path = named_file(args)
    if path is None:
        return {}
    names = {name: p for p in params for name in (p.name, *(_as_name(option) for option in p.opts))}
    known = {*names, *(SETTINGS if settings else ())}
    values = read_run_file(path)
    other = values.get("command", command)
    if other != command:
        raise ConfigError(
            f"--config {path} is of hf-prune {other}: expected one of hf-prune {command}; to repeat that run: "
            f"hf-prune {other} --config {path}"
        )
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in _NOTES or value is None:
            continue
        if name not in known:
            shown = {_as_name(max(p.opts, key=len)) for p in params} | (known - names.keys())
            raise unknown_name(f"setting in {path}", name, sorted(shown - {*_UNNAMED}))
        if name in settings or name not in names or (name in SETTINGS and isinstance(value, Mapping)):
            continue  # the command reads it as a setting; a schedule may be an option, or a mapping
        param = names[name]
        several = param.nargs != 1 or getattr(param, "multiple", False)
        found[param.name] = ",".join(map(str, value)) if isinstance(value, list) and not several else value
    return found


def named_file(args: Sequence[str]) -> Path | None:
    """The file that ``--config`` names on a command line, if it is there."""
    path = None
    for position, arg in enumerate(args):
        if arg == "--":
            break
        name, equals, value = arg.partition("=")
        if name == "--config" and (equals or position + 1 < len(args)):
            path = Path(value if equals else args[position + 1])
    return path


def _as_name(option: str) -> str:
    return option.lstrip("-").replace("-", "_")


def shown_command(args: Sequence[str] | None = None) -> str:
    """The command line of this process, as cards show it: without the value of ``--token``.

    Args:
        args: Its arguments; by default those of the process.
    """
    shown: list[str] = []
    hide = False
    for arg in sys.argv[1:] if args is None else args:
        if hide:
            hide = False
        elif arg == "--token":
            hide = True
        elif not arg.startswith("--token="):
            shown.append(arg)
    return shlex.join(["hf-prune", *shown])


def write_run_file(
    folder: Path, command: str, values: Mapping[str, Any], defaults: Mapping[str, Any], settings: Mapping[str, Any]
) -> Path:
    """Write the settings of a run, so that ``hf-prune COMMAND --config FILE`` repeats it.

    Args:
        folder: The output of the run.
        command: The command.
        values: Values of its options and arguments, by name.
        defaults: Their defaults.
        settings: The settings of its :class:`PruningConfig`.
    """
    kept: dict[str, Any] = {"command": command, "hf_prune": __version__}
    for name, value in values.items():
        switched_off = value is False and defaults.get(name) is False
        if value is not None and not switched_off and name not in _NOT_REPEATED:
            kept[name] = _plain(value)
    # A preset adds nothing to a file that says of each setting of a method what it is, be it none.
    said = {
        name: v for name, v in settings.items() if v is not None or (name in METHOD_SETTINGS and "preset" in settings)
    }
    kept |= {name: _plain(value) for name, value in said.items() if name in SETTINGS}
    return write_text(folder / RUN_FILE, dump_yaml(kept))


def _plain(value: Any) -> Any:
    """A value as YAML has it."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if isinstance(value, bool | int | float | str | None) else str(value)
