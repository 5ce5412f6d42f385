"""Makes plain ``from_pretrained`` of transformers know our checkpoints once ``hf_prune`` has been imported.

transformers is heavy and ``import hf_prune`` is not: so the quantizer that loads them is registered when transformers
imports its own list of quantizers, or at once if it has done so.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_AFTER = "transformers.quantizers.auto"
_REGISTERS = "hf_prune.quantizer"


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as anybody would, and has another one imported after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AFTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(_REGISTERS)


def install() -> None:
    """Register the quantizer now if transformers is there, or as soon as it is."""
    if _AFTER in sys.modules:
        importlib.import_module(_REGISTERS)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
