"""Checks of the values of settings."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Any

from hf_prune.architectures.kinds.registry import unit_descriptions
from hf_prune.errors import ConfigError
from hf_prune.planning.choices import (
    ALLOCATIONS,
    DEFAULT_SPARSITY,
    GENERATION_DEFAULTS,
    POLISH_DEFAULTS,
    POLISHES,
    WORKLOAD_DEFAULTS,
)
from hf_prune.utils.registry import unknown_name

_LONGEST_PATTERN, _DEEPEST_PATTERN, _MOST_REPEATS = 2000, 11, 5  # of regular expressions for names of modules


def unit_kinds(granularity: object) -> tuple[str, ...]:
    """The kinds of units that a granularity names, in the order of ``hf-prune list``; empty for any other granularity.

    Raises:
        UnknownNameError: If it names a kind of unit together with something else.
    """
    names = (granularity,) if isinstance(granularity, str) else granularity
    kinds = tuple(unit_descriptions())
    if not isinstance(names, list | tuple) or not any(name in kinds for name in names):
        return ()
    for name in names:
        if name not in kinds:
            raise unknown_name("kind of unit in granularity", name, kinds)
    return tuple(kind for kind in kinds if kind in names)


def check_budget(name: str, value: object) -> float:
    """Check a target in parameters, operations or speed, and return it as a float.

    Raises:
        ConfigError: If it is not a number in range.
    """
    if name == "target_speedup":
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 1 <= float(value) < math.inf:
            raise ConfigError(
                f"target_speedup is {value!r}: expected a number of at least 1, such as 2 for twice as fast"
            )
        return float(value)
    share = check_sparsity(name, value)
    if share == 0:
        raise ConfigError(f"{name} is {value!r}: expected the share that remains, above 0")
    return share


def check_workload(workload: object) -> dict[str, int]:
    """Check the inputs that a speed-up is for, and fill in defaults.

    Raises:
        ConfigError: If a key or a value is invalid.
    """
    if workload is None:
        return dict(WORKLOAD_DEFAULTS)
    if not isinstance(workload, Mapping):
        raise ConfigError(f"workload is {workload!r}: expected a dict such as {dict(WORKLOAD_DEFAULTS)}")
    for key, value in workload.items():
        if key not in {**WORKLOAD_DEFAULTS, **GENERATION_DEFAULTS}:
            raise unknown_name("key of workload", key, list({**WORKLOAD_DEFAULTS, **GENERATION_DEFAULTS}))
        check_positive(f"workload[{key!r}]", value)
    if not workload.keys() & {"prompt", "new_tokens"}:
        return {**WORKLOAD_DEFAULTS, **workload}
    if "length" in workload:
        raise ConfigError(
            f"workload is {dict(workload)}: length is of one forward pass, prompt and new_tokens of a generation; "
            f"leave out one or the other"
        )
    return {**GENERATION_DEFAULTS, **workload}


def check_positive(name: str, value: object) -> None:
    """Make sure that a setting is a whole number of at least 1.

    Raises:
        ConfigError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} is {value!r}: expected an integer of at least 1")


def check_sparsity(name: str, value: object) -> float:
    """Check a sparsity, and return it as a float.

    Raises:
        ConfigError: If it is not a number from 0 to 1.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) <= 1:
        percent = isinstance(value, numbers.Real) and math.isfinite(float(value)) and 2 <= float(value) <= 100
        hint = f"; did you mean {float(value) / 100:g}?" if percent else ""  # type: ignore[arg-type]
        raise ConfigError(f"{name} is {value!r}: expected a share from 0 to 1{hint}")
    return float(value)


def resolve_sparsity(sparsity: object, granularity: Any) -> float:
    """The sparsity to reach: the one that is set, or the one that a pattern such as 2:4 fixes.

    Raises:
        ConfigError: If the two contradict each other.
    """
    fixed = granularity.fixed_sparsity
    if sparsity is None:
        return DEFAULT_SPARSITY if fixed is None else fixed
    value = check_sparsity("sparsity", sparsity)
    if fixed is not None and not math.isclose(value, fixed, abs_tol=1e-9):
        raise ConfigError(
            f"sparsity={value:g} contradicts granularity={granularity.spec!r}, which fixes it at {fixed:g}: "
            f"leave sparsity out"
        )
    return value if fixed is None else fixed


def check_allocation(allocation: object) -> str | dict[str, float]:
    """Check an allocation: a name, or sparsities by module.

    Raises:
        ConfigError: If it is neither.
    """
    if isinstance(allocation, str):
        if allocation not in ALLOCATIONS:
            raise unknown_name("allocation", allocation, [*ALLOCATIONS, "{module: sparsity}"])
        return allocation
    if not isinstance(allocation, Mapping) or not allocation:
        raise ConfigError(
            f"allocation is {allocation!r}: expected {', '.join(map(repr, ALLOCATIONS))} or a non-empty dict of "
            f"module name to sparsity"
        )
    for key in allocation:
        if not isinstance(key, str) or not key:
            raise ConfigError(f"allocation names the module {key!r}: expected a non-empty string")
    return {key: check_sparsity(f"allocation[{key!r}]", value) for key, value in allocation.items()}


def check_polish(polish: object) -> dict[str, float] | None:
    """Check the settings of a polish, and fill in defaults; None for no polish.

    Raises:
        ConfigError: If a key or a value is invalid.
    """
    if polish is None:
        return None
    if isinstance(polish, str):
        if polish not in POLISHES:
            raise unknown_name("polish", polish, POLISHES)
        return dict(POLISH_DEFAULTS)
    if not isinstance(polish, Mapping):
        raise ConfigError(
            f"polish is {polish!r}: expected None, 'distill', or settings such as {dict(POLISH_DEFAULTS)}"
        )
    for key in polish:
        if key not in POLISH_DEFAULTS:
            raise unknown_name("setting of polish", key, POLISH_DEFAULTS)
    settings = {**POLISH_DEFAULTS, **polish}
    check_positive("polish['epochs']", settings["epochs"])
    rate = settings["learning_rate"]
    if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 < float(rate) < 1:
        raise ConfigError(f"polish['learning_rate'] is {rate!r}: expected a number between 0 and 1, such as 1e-4")
    return {"epochs": settings["epochs"], "learning_rate": float(rate)}


def _check_pattern(name: str, pattern: str) -> None:
    """Make sure that a pattern is a regular expression and cannot take forever: configs come with models of strangers.

    Where a group with repetitions or alternatives is repeated, the matcher may try every way to divide a name among
    them. An optional part counts as a repetition. Patterns that pass and are slow all the same meet the time limit when
    they are matched.
    """
    if len(pattern) > _LONGEST_PATTERN:
        raise ConfigError(
            f"{name} is a regular expression of {len(pattern):,} characters: expected at most {_LONGEST_PATTERN:,}; "
            f"list the modules instead"
        )
    # Without escapes and sets, every parenthesis and every operator left is one.
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL)
    groups, repeats = [False], 0  # by depth, whether the open group has repetitions or alternatives
    for i, character in enumerate(plain):
        after = plain[i + 1 : i + 2]
        if character == "(":
            groups.append(False)
        elif character == ")" and len(groups) > 1:
            inner = groups.pop()
            if inner and after and after in "*+{":
                raise ConfigError(
                    f"{name}={pattern!r} repeats a group that has repetitions or alternatives, which can take forever "
                    f"to match: write it without, or list the modules"
                )
            groups[-1] = groups[-1] or inner
        elif character == "?" and plain[i - 1 : i] in ("(", "*", "+", "?", "}"):
            continue  # it is part of the operator before it, such as (?:…) or *?
        elif character in "*+?{|":
            groups[-1] = True
            repeats += character != "|"
        if len(groups) > _DEEPEST_PATTERN or repeats > _MOST_REPEATS:
            raise ConfigError(
                f"{name}={pattern[:60]!r} has more than {_DEEPEST_PATTERN - 1} groups inside one another or "
                f"{_MOST_REPEATS} repetitions, which can take forever to match: list the modules instead"
            )
    import regex  # matches names, since it has a time limit; re has the better error messages

    try:
        re.compile(pattern)
        regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"{name}={pattern!r} is not a regular expression: {error}") from error


def check_steps(steps: object, learns_nothing: str | None, repair: str | None) -> None:
    """Check the number of steps of a pruning.

    Args:
        steps: How many.
        learns_nothing: The criterion, if it learns nothing from gradients.
        repair: The repair, if there is one.

    Raises:
        ConfigError: If it is not a positive integer, or the criterion or the repair makes no use of more than one.
    """
    check_positive("steps", steps)
    if steps == 1:
        return
    if learns_nothing is not None:
        raise ConfigError(
            f"steps={steps} contradicts criterion {learns_nothing!r}, which learns nothing from gradients: "
            f"choose another criterion, or leave steps at 1"
        )
    if repair is not None:
        raise ConfigError(
            f"steps={steps} contradicts repair={repair!r}, which reproduces the outputs of dense layers: "
            f"leave one of them out"
        )


def check_parts(only: object) -> tuple[str, ...] | None:
    """Check the names of the parts of a model that are pruned.

    Raises:
        ConfigError: If it is neither a name nor a list of names.
    """
    if only is None:
        return None
    names = tuple(only) if isinstance(only, Iterable) and not isinstance(only, str) else (only,)
    if not names or not all(isinstance(name, str) and name.strip(".") == name != "" for name in names):
        raise ConfigError(
            f"only is {only!r}: expected the name of a part of the model, such as 'language_model', or a list of names"
        )
    return names


def check_modules(name: str, modules: object) -> str | tuple[str, ...]:
    """Check names of modules, or a pattern that matches them.

    Raises:
        ConfigError: If it is neither.
    """
    if modules is None or (isinstance(modules, str) and not modules):
        return ()
    if isinstance(modules, str):
        _check_pattern(name, modules)
        return modules
    names = tuple(modules) if isinstance(modules, Iterable) else (modules,)
    if not all(isinstance(entry, str) and entry for entry in names):
        raise ConfigError(
            f"{name} is {modules!r}: expected 'all-linear', a regular expression, or a list of module-name suffixes"
        )
    return names
