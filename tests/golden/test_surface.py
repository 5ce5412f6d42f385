"""The public surface is what it was: names, signatures, commands with their options, settings, names of files.

``python -m tests.golden.test_surface`` writes ``surface.json`` anew; look at what changed before you commit it.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import hf_prune
from hf_prune import CRITERIA, GRANULARITIES, PruningConfig, compress_checkpoint, prunable, read_card_data, write_card
from tests.golden.builders import build
from tests.golden.record import differences, plain

FILE = Path(__file__).parent / "surface.json"
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def _default(value: Any) -> Any:
    """A default as JSON, or as text that says no address."""
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _signature(value: Any) -> str | None:
    try:
        signature = str(inspect.signature(value))
    except (TypeError, ValueError):
        return None
    return re.sub(r" at 0x[0-9a-f]+", "", signature)


def _of_class(cls: type) -> dict[str, Any]:
    """Bases, signature, and what its instances offer that is its own or inherited from here."""
    bases = [base for base in cls.__mro__[1:] if base is not object]
    found: dict[str, Any] = {"bases": [b.__name__ for b in bases if not b.__name__.startswith("_")]}
    if (signature := _signature(cls)) is not None:
        found["signature"] = signature
    if dataclasses.is_dataclass(cls):
        found["fields"] = {
            field.name: "required" if field.default is field.default_factory else _default(field.default)
            for field in dataclasses.fields(cls)
            if not field.name.startswith("_")
        }
    members = {}
    for owner in reversed([c for c in cls.__mro__ if c.__module__.split(".")[0] == "hf_prune"]):
        for name, value in vars(owner).items():
            if name.startswith("_"):
                continue
            if isinstance(value, property):
                members[name] = "property"
            elif isinstance(value, classmethod | staticmethod):
                members[name] = f"{type(value).__name__} {_signature(value.__func__)}"
            elif inspect.isfunction(value):
                members[name] = _signature(value)
    return {**found, "members": dict(sorted(members.items()))}


def public_names() -> dict[str, Any]:
    """Each name of the package with its signature and members."""
    found: dict[str, Any] = {}
    for name in hf_prune.__all__:
        value = getattr(hf_prune, name)
        found[name] = _of_class(value) if inspect.isclass(value) else _signature(value) or type(value).__name__
    return found


def entry_point() -> Any:
    """What the command ``hf-prune`` calls, as pyproject.toml says."""
    module, name = re.search(r'^hf-prune = "([\w.]+):(\w+)"$', PYPROJECT.read_text(), re.MULTILINE).groups()
    return getattr(importlib.import_module(module), name)


def commands() -> dict[str, Any]:
    """Each command with its arguments and options."""
    (app,) = {id(v): v for v in entry_point().__globals__.values() if isinstance(v, typer.Typer)}.values()
    group = typer.main.get_command(app)
    return {"": _options(group)} | {name: _options(command) for name, command in sorted(group.commands.items())}


def _options(command: Any) -> dict[str, Any]:
    """Of a command's arguments and options all but the words that explain them."""
    found = {}
    for option in command.params:
        kind = option.type_descriptor.annotation
        told = {"names": [*option.opts, *option.secondary_opts], "type": getattr(kind, "__name__", repr(kind))}
        told |= {"default": _default(option.default), "required": option.required, "multiple": option.multiple}
        found[option.name] = {**told, "from": option.min, "to": option.max}
    return found


def names_of_files(folder: Path) -> dict[str, list[str]]:
    """What a save writes."""
    model = prunable(build("bert")).prune(0.5)
    model.save_pretrained(folder / "dense")
    model.save_pretrained(folder / "packed", compressed=True)
    compress_checkpoint(folder / "dense", folder / "with its reader", remote_code=True)
    prunable(build("bert")).prune(0.5, granularity=("head", "neuron")).shrink().save_pretrained(folder / "shrunk")
    (folder / "dense" / "sparsity_report.json").write_text(model.sparsity_report().to_json())
    write_card(folder / "dense", read_card_data(folder / "dense", report=model.sparsity_report().to_dict()))
    return {path.name: sorted(file.name for file in path.iterdir()) for path in sorted(folder.iterdir())}


def surface(folder: Path) -> dict[str, Any]:
    """All of it."""
    granularities = {name: GRANULARITIES.get(name).usage for name in GRANULARITIES.names()}
    criteria = {name: sorted(CRITERIA.get(name).scopes) for name in CRITERIA.names()}
    registered = {"criteria": criteria, "granularities": granularities}
    settings = json.loads(PruningConfig().to_json())
    return plain(
        {
            "names": public_names(),
            "commands": commands(),
            "registered": registered,
            "PruningConfig().to_json()": settings,
            "files": names_of_files(folder),
        }
    )


@pytest.mark.filterwarnings("ignore")
def test_same_surface_as_before(tmp_path):
    expected, found = json.loads(FILE.read_text()), surface(tmp_path)
    assert list(differences(expected, found, 0.0)) == []


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        FILE.write_text(json.dumps(surface(Path(temporary)), indent=1, ensure_ascii=False) + "\n")
    sys.stdout.write(f"Saved {FILE}.\n")
