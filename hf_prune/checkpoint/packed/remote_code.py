"""Write a Python file that loads packed weights and shrunk models without hf_prune, for ``trust_remote_code=True``.

The file is concatenated from the modules that read the format here, so that there is only one reader. All of them
share one namespace: no two of them may define the same name.
"""

from __future__ import annotations

import ast
import importlib.resources
import pprint
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_prune import __version__
from hf_prune.checkpoint.packed.quantization_config import MODELING, is_ours
from hf_prune.errors import CheckpointError

FILE = f"{MODELING}.py"
_MODULES = (
    "utils/quantization_method",
    "checkpoint/packed/quantization_config",
    "checkpoint/packed/format",
    "checkpoint/packed/seal",
    "checkpoint/packed/values",
    "checkpoint/packed/unpack",
    "checkpoint/packed/resized",
    "checkpoint/packed/quantizer",
)
_BEGIN = '''"""Loads this packed or shrunk checkpoint: AutoModelFor….from_pretrained(path, trust_remote_code=True).

Written by hf_prune {version}, Apache-2.0. With hf_prune installed and imported, nothing of this is needed.
"""

from __future__ import annotations

{imports}


class CheckpointError(RuntimeError):
    """Files on disk are damaged, foreign, or do not fit the model."""
'''
_END = """
if not getattr(AUTO_QUANTIZER_MAPPING.get(METHOD), "__module__", "").startswith("hf_prune."):
    register(HfPruneConfig, PackedQuantizer)
"""


def auto_classes(config: Mapping[str, Any]) -> dict[str, str]:
    """The class that each AutoModel class of transformers loads for a checkpoint, both by name.

    Args:
        config: The content of ``config.json``.

    Raises:
        CheckpointError: If the checkpoint has code of its own, or no AutoModel class loads it.
    """
    from transformers.models.auto import configuration_auto, modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    if config.get("auto_map") and not is_ours(config["auto_map"]):
        raise CheckpointError("remote_code=True: the checkpoint has its own remote code (auto_map), expected none")
    kind = str(config.get("model_type"))
    chosen: dict[str, str] = {}
    if kind in configuration_auto.CONFIG_MAPPING:
        config_class = configuration_auto.CONFIG_MAPPING[kind]
        for name, auto in vars(modeling_auto).items():
            mapping = auto._model_mapping if isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass) else None
            if mapping is not None and config_class in mapping:
                classes = mapping[config_class]
                names = [cls.__name__ for cls in (classes if isinstance(classes, tuple) else (classes,))]
                named = [cls for cls in names if cls in (config.get("architectures") or [])]
                chosen[name] = (named or names)[0]
    if not set(config.get("architectures") or []) & set(chosen.values()):
        raise CheckpointError(
            f"remote_code=True: no AutoModel of transformers loads {config.get('architectures')} of type {kind!r}; "
            f"leave remote_code out"
        )
    return chosen


def add_remote_code(
    folder: Path, config: dict[str, Any], classes: Mapping[str, str], changes: Mapping[str, Any]
) -> None:
    """Write the file into a checkpoint, and name it in the config.

    Args:
        folder: The checkpoint.
        config: The content of the future ``config.json``; changed in place.
        classes: The result of :func:`auto_classes`.
        changes: What a shrunk model needs, see :func:`hf_prune.checkpoint.packed.resized.resize_modules`; or empty.
    """
    # Sizes are of the class that was saved: a base model, or one with another head, has other modules.
    saved = set(config["architectures"]) if changes else set(classes.values())
    classes = {auto: name for auto, name in classes.items() if name in saved}
    config["auto_map"] = {auto: f"{MODELING}.{name}" for auto, name in classes.items()}
    (folder / FILE).write_text(modeling_source(sorted(set(classes.values())), changes), encoding="utf-8")


def modeling_source(classes: list[str], changes: Mapping[str, Any] | None = None) -> str:
    """The source code of the file.

    Args:
        classes: Names of transformers classes.
        changes: As for :func:`add_remote_code`.
    """
    imports, bodies = {"import transformers"}, []
    for name in _MODULES:
        found, body = _parts(importlib.resources.files("hf_prune").joinpath(f"{name}.py").read_text(encoding="utf-8"))
        imports |= found
        bodies.append(body)
    listed = f"CHANGES = {pprint.pformat(changes, width=120, sort_dicts=False)}\n" if changes else ""
    more = ", CHANGES" if changes else ""
    models = listed + "\n".join(f"{name} = as_packed(transformers.{name}{more})" for name in classes)
    begin = _BEGIN.format(version=__version__, imports="\n".join(sorted(imports)))
    return "\n\n".join([begin, *(f"{body}\n" for body in bodies), f"{models}\n{_END}"])


def _parts(text: str) -> tuple[set[str], str]:
    """The imports of a module except those from hf_prune, and its code without docstring and imports."""
    lines: list[str | None] = list(text.splitlines())
    imports = set()
    for number, node in enumerate(ast.parse(text).body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            if not (isinstance(node, ast.ImportFrom) and str(node.module).startswith(("hf_prune", "__future__"))):
                imports.add(ast.unparse(node))
        elif number or not isinstance(node, ast.Expr):
            continue
        lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)  # type: ignore[operator]
    return imports, "\n".join(line for line in lines if line is not None).strip()
