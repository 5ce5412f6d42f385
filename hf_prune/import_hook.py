"""Import hooks that ``import hf_prune`` installs.

One makes plain ``from_pretrained`` of transformers recognise our checkpoints. transformers is heavy and
``import hf_prune`` is not, so our quantizer is registered when transformers imports its own list of quantizers, or at
once if it has already done so. The other finds modules under the names they had in earlier versions, which pickled
models contain.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AFTER = "transformers.quantizers.auto"
_REGISTERS = "hf_prune.quantizer"
# Modules that pickles of pruned models name, and where their classes are now.
_MOVED = {
    "hf_prune.masking": "hf_prune.pruning.mask_store",
    "hf_prune.polish": "hf_prune.pruning.records",
    "hf_prune.speed": "hf_prune.pruning.records",
    "hf_prune.bypass": "hf_prune.pruning.bypass",
    "hf_prune.config": "hf_prune.planning.config",
    "hf_prune.schedules": "hf_prune.planning.schedule",
}


class _QuantizersFinder(importlib.abc.MetaPathFinder):
    """Finds transformers' list of quantizers as usual, and imports ours after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AFTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(_REGISTERS)


class _MovedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules by their former names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        def moved(name: str) -> Any:
            return getattr(importlib.import_module(_MOVED[module.__name__]), name)

        module.__dict__["__getattr__"] = moved


def install() -> None:
    """Register the quantizer now if transformers is loaded, or as soon as it is; find moved modules."""
    if not any(isinstance(finder, _MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(_MovedFinder())
    if _AFTER in sys.modules:
        importlib.import_module(_REGISTERS)
    elif not any(isinstance(finder, _QuantizersFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _QuantizersFinder())
