"""Write a Python file that loads packed weights without hf_prune, for ``trust_remote_code=True``.

The file is concatenated from the modules that read the format here, so that there is only one reader. All of them
share one namespace: no two of them may define the same name.
"""

from __future__ import annotations

import ast
import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_prune import __version__
from hf_prune.checkpoint.packed.quantization_config import MODELING
from hf_prune.errors import CheckpointError

FILE = f"{MODELING}.py"
_MODULES = (
    "utils/quantization_method",
    "checkpoint/packed/quantization_config",
    "checkpoint/packed/format",
    "checkpoint/packed/unpack",
    "checkpoint/packed/quantizer",
)
_BEGIN = '''"""Loads the packed weights of this checkpoint: AutoModelFor….from_pretrained(path, trust_remote_code=True).

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
        CheckpointError: If the checkpoint needs more than a transformers class and its config.
    """
    from transformers.models.auto import configuration_auto, modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    if config.get("auto_map"):
        raise CheckpointError("remote_code=True: the checkpoint has its own remote code (auto_map), expected none")
    if (config.get("quantization_config") or {}).get("structure"):
        raise CheckpointError(
            "remote_code=True: the layers of this shrunk model have sizes that only hf_prune can build; leave "
            "remote_code out"
        )
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


def add_remote_code(folder: Path, config: dict[str, Any], classes: Mapping[str, str]) -> None:
    """Write the file into a checkpoint, and name it in the config.

    Args:
        folder: The checkpoint.
        config: The content of the future ``config.json``; changed in place.
        classes: The result of :func:`auto_classes`.
    """
    config["auto_map"] = {auto: f"{MODELING}.{name}" for auto, name in classes.items()}
    (folder / FILE).write_text(modeling_source(sorted(set(classes.values()))), encoding="utf-8")


def modeling_source(classes: list[str]) -> str:
    """The source code of the file.

    Args:
        classes: Names of transformers classes.
    """
    imports, bodies = {"import transformers"}, []
    for name in _MODULES:
        more, body = _parts(importlib.resources.files("hf_prune").joinpath(f"{name}.py").read_text(encoding="utf-8"))
        imports |= more
        bodies.append(body)
    models = "\n".join(f"{name} = as_packed(transformers.{name})" for name in classes)
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
