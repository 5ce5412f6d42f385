"""Registries of classes by name, such as criteria and granularities, and hints for unknown names.

An entry is one file with one decorator. A registry imports its package when it is first used, so a new file in
``hf_prune/criteria/`` is found without a central list.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from hf_prune.errors import UnknownNameError

T = TypeVar("T")
Entry = TypeVar("Entry", bound=type)
_UNITS = "'head', 'neuron' or 'layer'"
_ROWS = "'row', 'column' or 'channel'"
_PRUNING = re.compile(r"^(pruning|prune|pruner)_|_(pruning|prune|pruner|sparsity)$")
# Names in other libraries, and what they are called here, by kind of name.
_NAMES_ELSEWHERE: dict[str, dict[str, str]] = {
    "criterion": {
        **dict.fromkeys(("l1", "l2", "ln", "norm", "abs", "absolute", "weight", "l1_unstructured"), "'magnitude'"),
        **dict.fromkeys(("random_unstructured", "rand"), "'random'"),
        **dict.fromkeys(("ln_structured", "l1_structured", "l2_structured"), f"'magnitude' with granularity {_ROWS}"),
        "random_structured": f"'random' with granularity {_ROWS}",
        "global_unstructured": "'magnitude' with scope='global'",
        **dict.fromkeys(("gradient", "grad", "sensitivity", "first_order"), "'taylor' or 'snip'"),
        **dict.fromkeys(
            ("hessian", "obs", "obert", "second_order", "optimal_brain_surgeon"), "'sparsegpt' or 'fisher'"
        ),
        **dict.fromkeys(("obd", "optimal_brain_damage"), "'fisher_diagonal'"),
        "owl": "'wanda' with allocation='owl'",
    },
    "granularity": {
        **dict.fromkeys(("structured", "structural", "unit", "units"), _UNITS),
        **dict.fromkeys(("head", "heads", "attention", "attention_head", "attention_heads"), "'head'"),
        **dict.fromkeys(("neuron", "neurons", "ffn", "mlp", "intermediate"), "'neuron'"),
        **dict.fromkeys(("layers", "depth", "transformer_block"), "'layer'"),
        "width": "'head' and 'neuron'",
        **dict.fromkeys(("ln_structured", "l1_structured", "random_structured", "rows", "columns"), _ROWS),
        **dict.fromkeys(("filter", "filters", "channels", "kernel", "out_channels"), "'channel'"),
        **dict.fromkeys(("semi_structured", "semistructured", "sparse24", "n:m", "nm"), "'2:4'"),
        **dict.fromkeys(
            ("l1_unstructured", "random_unstructured", "global_unstructured", "element", "weight", "fine", "none"),
            "'unstructured'",
        ),
        **dict.fromkeys(("block", "blocks", "blockwise", "block_sparse"), "'block:16x1'"),
    },
    "scope": {
        **dict.fromkeys(("local", "per_layer", "layerwise", "uniform"), "'layer'"),
        **dict.fromkeys(("model", "network", "global_unstructured", "all"), "'global'"),
        **dict.fromkeys(("output", "per_output", "neuron"), "'row'"),
    },
    "setting": {
        **dict.fromkeys(
            ("amount", "ratio", "pruning_ratio", "prune_ratio", "fraction", "percentage", "target_sparsity"),
            "'sparsity'",
        ),
        **dict.fromkeys(("final_sparsity", "sparsity_level", "sparsity_ratio", "prune_amount"), "'sparsity'"),
        **dict.fromkeys(("density", "keep_ratio"), "'sparsity', 1 less that share"),
        **dict.fromkeys(("method", "importance", "metric", "score", "pruning_method", "algorithm"), "'criterion'"),
        **dict.fromkeys(("pattern", "mask_structure", "structure", "pruning_type", "sparsity_type"), "'granularity'"),
        "dim": f"'granularity', {_ROWS}",
        **dict.fromkeys(("n", "m"), "'granularity', such as '2:4'"),
        **dict.fromkeys(("targets", "modules", "layers", "include", "module_names", "parameters"), "'target_modules'"),
        **dict.fromkeys(("ignore", "exclude", "ignored_layers", "excluded_modules", "skip"), "'exclude_modules'"),
        **dict.fromkeys(("tower", "towers", "part", "parts", "submodule", "submodel"), "'only'"),
        **dict.fromkeys(("global_pruning", "pruning_scope"), "'scope'"),
        **dict.fromkeys(("iterations", "num_steps", "iterative_steps", "pruning_steps"), "'steps'"),
        **dict.fromkeys(("random_state", "random_seed"), "'seed'"),
        **dict.fromkeys(("dataset", "data", "dataloader", "calibration_data"), "calibration=, an argument of prune()"),
    },
}


def meant_by(kind: str, name: object, valid: Iterable[str]) -> str | None:
    """What an unknown name of another library is called here, or the closest valid name; None if nothing is close.

    Args:
        kind: What the name stands for, such as ``"criterion"``.
        name: The unknown name.
        valid: The valid names.
    """
    words = next((words for key, words in _NAMES_ELSEWHERE.items() if key in kind), {})
    known = {**words, **{entry: repr(entry) for entry in valid}}
    word = str(name).strip().lower().replace("-", "_").replace(" ", "_") if words else str(name)
    bare = _PRUNING.sub("", word) if words else word  # structured_pruning, pruning_scope
    close = difflib.get_close_matches(bare, known, n=1)
    return next((known[candidate] for candidate in (word, bare, *close) if candidate in known), None)


def unknown_name(kind: str, name: object, valid: Iterable[str]) -> UnknownNameError:
    """The error for an unknown name, with the valid names and a suggestion."""
    valid = list(valid)
    meant = meant_by(kind, name, valid)
    hint = "" if meant is None else f" Did you mean {meant}?"
    return UnknownNameError(f"unknown {kind} {name!r}: expected one of {', '.join(valid)}.{hint}")


class Registry(Generic[T]):
    """Classes by name.

    Args:
        kind: What an entry is, for messages: ``"criterion"``.
        package: The package whose modules define the entries; imported at the first look-up.
        listed: Which entries :meth:`names` and :meth:`get` know; the others are only in :meth:`entries`. None for all.
    """

    def __init__(self, kind: str, package: str, listed: Callable[[type], bool] | None = None) -> None:
        self.kind = kind
        self._package = package
        self._listed = listed
        self._entries: dict[str, type[Any]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Class decorator that adds an entry.

        Raises:
            ValueError: If the name is taken; nothing is ever replaced silently.
        """

        def add(entry: Entry) -> Entry:
            if name in self._entries:
                raise ValueError(
                    f"{self.kind} {name!r} is already registered by "
                    f"{self._entries[name].__module__}: choose another name"
                )
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> type[T]:
        """The entry called ``name``.

        Raises:
            UnknownNameError: If there is none; the message lists the valid names.
        """
        entry = self.entries().get(name) if isinstance(name, str) else None
        if entry is None or not self._is_listed(entry):
            raise unknown_name(self.kind, name, self.names())
        return entry

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(name for name, entry in self.entries().items() if self._is_listed(entry))

    def entries(self) -> dict[str, type[Any]]:
        """Every entry by its name, sorted, also those that are not listed."""
        self._load()
        return dict(sorted(self._entries.items()))

    def _is_listed(self, entry: type[Any]) -> bool:
        return self._listed is None or self._listed(entry)

    def _load(self) -> None:
        if not self._loaded:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._loaded = True
