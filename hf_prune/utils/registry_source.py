"""Class attributes of registered entries, read from their source: a list of names needs no PyTorch."""

from __future__ import annotations

import ast
import importlib.util
import operator
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hf_prune.utils.files import read_text


def read_entries(package: str, attributes: Collection[str]) -> dict[str, dict[str, Any]]:
    """Attributes of each registered class of a package, sorted by name, without importing the package.

    They may be literals, frozen sets, unions of these, constants of its module ``base``, or calls of dataclasses
    there, which become dicts. Inherited ones are included.

    Args:
        package: Such as ``"hf_prune.criteria"``.
        attributes: Which to read; classes lack those that they do not have.

    Raises:
        ValueError: If an attribute is anything else.

    Example:
        >>> read_entries("hf_prune.criteria", {"units"})["taylor"]["units"]["needs"]
        'texts'
    """
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    files = sorted(Path(next(iter(spec.submodule_search_locations))).glob("*.py"), key=lambda file: file.stem != "base")
    shared: dict[str, Any] = {}  # constants as they are written, and the attributes of classes, by name
    entries: dict[str, dict[str, Any]] = {}
    for file in files:
        names = dict(shared)
        for node in ast.parse(read_text(file)).body:
            if isinstance(node, ast.ClassDef):
                names[node.name] = _attributes(node, names)
                for name in _registered_as(node):
                    written = {key: value for key, value in names[node.name].items() if key in attributes}
                    entries[name] = {key: value and _value(value, names) for key, value in written.items()}
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                names |= _assigned(node)
        if file.stem == "base":
            shared = names
    return dict(sorted(entries.items()))


def _registered_as(node: ast.ClassDef) -> list[str]:
    """The names under which decorators register a class."""
    calls = [call for call in node.decorator_list if isinstance(call, ast.Call)]
    return [
        str(ast.literal_eval(call.args[0]))
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "register"
    ]


def _attributes(node: ast.ClassDef, names: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base in reversed(node.bases):
        found |= names.get(base.id, {}) if isinstance(base, ast.Name) else {}
    for line in node.body:
        if isinstance(line, ast.Assign | ast.AnnAssign):
            found |= _assigned(line)
    return found


def _assigned(node: ast.Assign | ast.AnnAssign) -> dict[str, ast.expr | None]:
    """What one line assigns; a line that only declares a type gives the name of a field, with None."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {target.id: node.value for target in targets if isinstance(target, ast.Name)}


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name) and isinstance(names.get(node.id), ast.expr):
        return _value(names[node.id], names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return operator.or_(_value(node.left, names), _value(node.right, names))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        arguments = [_value(argument, names) for argument in node.args]
        if node.func.id == "frozenset":
            return frozenset(*arguments)
        fields = names.get(node.func.id)
        if isinstance(fields, dict):
            defaults = {name: value and _value(value, names) for name, value in fields.items()}
            given = {keyword.arg: _value(keyword.value, names) for keyword in node.keywords}
            return {**defaults, **dict(zip(fields, arguments, strict=False)), **given}
    return ast.literal_eval(node)  # raises ValueError
