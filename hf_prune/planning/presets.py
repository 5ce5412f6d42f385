"""Presets: methods by name. Each is a row of ordinary settings, every one of which can be overridden.

``docs/presets.md`` has what each of them was measured to cost. A config records the settings, not the name of the row
that they came from: :func:`hf_prune.planning.traits.preset_of` finds it again.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from hf_prune.architectures.kinds.registry import kind_named
from hf_prune.granularities.registry import parse_granularity
from hf_prune.planning.checks import unit_kinds
from hf_prune.planning.choices import BUDGETS
from hf_prune.utils.registry import unknown_name

Config = TypeVar("Config", bound=type)

#: Who sets one of these chooses a method, and no preset is then chosen for them.
METHOD_SETTINGS = frozenset(
    {"criterion", "scope", "allocation", "calibration_order", "repair", "objective", "steps", "polish", "schedule"}
)
#: The same of a training, whose schedule says when to prune, and not by what.
TRAINING_METHOD_SETTINGS = METHOD_SETTINGS - {"schedule"} | {"preset"}
TRAINING_PRESET = "best"  # of a training whose settings name no method, calibrated on its own examples
TRAINING_EXAMPLES = 512  # of them, at most
UNITS_FOR_SPEED = ("head", "neuron")  # what a target_… removes if no granularity is named


@dataclass(frozen=True)
class Preset:
    """A row of the table.

    Args:
        summary: What it is for, in a line.
        needs: ``"no data"`` or ``"texts"``: calibration data; labels are never needed.
        weights: Settings where single weights or groups of them become zeros.
        units: Settings where whole heads and neurons are removed, for speed.
        measured: What it cost, for ``"zeros"`` and for ``"heads and neurons"``; see ``MEASURED_HOW``.
    """

    summary: str
    needs: str
    weights: Mapping[str, Any]
    units: Mapping[str, Any]
    measured: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


MEASURED_HOW = (
    "Points of accuracy lost (± standard error), and CPU time: MiniLM with 6 layers on SST-2, 80 % zeros, or 60 % of "
    "all parameters left; 10,000 held-out training sentences, calibrated on 128 others, seed 0, one thread. "
    "docs/presets.md has more."
)
_SOLVED = {"allocation": "fisher", "objective": "loss"}
_REPAIRED = {"criterion": "fisher", "repair": "least_squares"}

PRESETS: Mapping[str, Preset] = {
    "fast": Preset(
        summary="seconds, without data: the largest weights stay",
        needs="no data",
        weights={"criterion": "magnitude"},
        units={"criterion": "magnitude"},
        measured={"zeros": "19.8 ± 0.4 points, 0 s", "heads and neurons": "39.1 ± 0.5 points, 0 s"},
    ),
    "balanced": Preset(
        summary="the default with data: close to the best, in less time",
        needs="texts",
        weights={"criterion": "sparsegpt", **_SOLVED},
        units=_REPAIRED,
        measured={"zeros": "2.5 ± 0.2 points, 15 s", "heads and neurons": "7.5 ± 0.3 points, 18 s"},
    ),
    "best": Preset(
        summary="the most accurate without training",
        needs="texts",
        weights={"criterion": "alps", "repair": "least_squares", **_SOLVED},
        units=_REPAIRED,
        measured={"zeros": "1.6 ± 0.2 points, 32 s", "heads and neurons": "7.5 ± 0.3 points, 18 s"},
    ),
    "best+polish": Preset(
        summary="best, then a short training on the same kind of texts, without labels: for high sparsities",
        needs="texts",
        weights={"criterion": "alps", "repair": "least_squares", **_SOLVED, "polish": "distill"},
        units={**_REPAIRED, "polish": "distill"},
        measured={"zeros": "0.9 ± 0.4 points with 512 texts (best: 1.4), 264 s", "heads and neurons": "not measured"},
    ),
}


def resolve_settings(settings: Mapping[str, Any], *, has_data: bool = False) -> dict[str, Any]:
    """Replace a preset by its settings, beneath those that are given, and complete a goal.

    A ``target_…`` without a granularity removes heads and neurons, since masks of single weights reach none.

    Args:
        settings: What a caller gave, by the names of fields of a :class:`hf_prune.PruningConfig`, and ``preset``.
        has_data: Whether there is calibration data; then ``"balanced"`` is the preset where no method is named.

    Returns:
        Settings without ``preset``.

    Raises:
        UnknownNameError: If the preset is unknown.

    Example:
        >>> resolve_settings({"sparsity": 0.8, "preset": "best", "repair": None})["criterion"]
        'alps'
        >>> resolve_settings({"target_speedup": 2})["granularity"]
        ('head', 'neuron')
    """
    values = dict(settings)
    if "granularity" not in values and any(values.get(name) is not None for name in BUDGETS):
        values["granularity"] = UNITS_FOR_SPEED
    name = values.pop("preset", None)
    if name is None and has_data and not any(setting in values for setting in METHOD_SETTINGS):
        name = "balanced"
    return values if name is None else {**preset_settings(name, values), **values}


def expectation(name: str, *, removes_units: bool) -> str:
    """What to expect of a preset, in a sentence or two.

    Args:
        name: The preset.
        removes_units: Whether whole units are removed, rather than weights set to zero.
    """
    goal, what = ("heads and neurons", "60 % of the parameters") if removes_units else ("zeros", "80 % zeros")
    text = (
        f"preset {name!r}: {PRESETS[name].summary}; at {what}, a small classifier lost {PRESETS[name].measured[goal]}"
    )
    other, why = {"fast": ("balanced", "which needs --data or calibration=, "), "balanced": ("best", "")}.get(
        name, ("", "")
    )
    if other and PRESETS[other].measured[goal] != PRESETS[name].measured[goal]:
        text += f", and with preset {other!r}, {why}{PRESETS[other].measured[goal]}"
    return text + "; see: hf-prune list presets"


def preset_settings(name: object, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a preset that go with those that are given.

    Args:
        name: The preset.
        given: Other settings, by the names of fields; of these, granularity, scope and calibration order count.

    Raises:
        UnknownNameError: If the preset is unknown.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise unknown_name("preset", name, list(PRESETS))
    preset, granularity = PRESETS[name], given.get("granularity", "unstructured")
    if kinds := unit_kinds(granularity):
        return _for_kinds(preset, kinds)
    settings = dict(preset.weights)
    pools = given.get("scope") == "global" or parse_granularity(granularity).fixed_sparsity is not None
    if pools:  # which decides by itself how much each tensor loses
        settings.pop("allocation", None)
    if given.get("scope") == "global" or given.get("calibration_order") == "one_pass":
        settings.pop("objective", None)  # it follows the layers as they are pruned, one after the other
    return settings


def _for_kinds(preset: Preset, kinds: tuple[str, ...]) -> dict[str, Any]:
    """The settings of a preset for kinds of units: experts have criteria of their own, and not all can be repaired."""
    settings = dict(preset.units)
    own = [kind_named(kind) for kind in kinds]
    if preset.needs == "texts" and len(own) == 1 and own[0].preferred is not None:
        settings["criterion"] = own[0].preferred
    for kind in own:
        if kind.criteria is not None and settings["criterion"] not in kind.criteria:
            settings["criterion"] = "reap" if "reap" in kind.criteria else "magnitude"
    if not all(kind.repairs for kind in own):
        for name in ("repair", "polish", "objective"):
            settings.pop(name, None)
    return settings


def takes_preset(cls: Config) -> Config:
    """Class decorator of a dataclass of settings: ``preset=`` stands for settings that are not given.

    What a caller gave is known only here: in ``__post_init__``, a default looks like a choice.
    """
    plain: Any = cls.__dict__["__init__"]
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def __init__(self: Any, *args: Any, **settings: Any) -> None:
        given = dict(signature.bind(self, *args, **settings).arguments)
        del given["self"]
        plain(self, **resolve_settings(given))
        named = TRAINING_METHOD_SETTINGS & {name for name in given if given[name] is not None}
        object.__setattr__(self, "names_method", bool(named))

    cls.__init__ = __init__  # type: ignore[misc]
    return cls
