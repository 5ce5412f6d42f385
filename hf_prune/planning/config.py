"""PruningConfig: everything that decides what is removed, validated on construction."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from typing import Any

from hf_prune.architectures.kinds.registry import kind_named, unit_descriptions
from hf_prune.criteria.registry import CRITERIA, unit_rankings
from hf_prune.errors import ConfigError, UnknownNameError
from hf_prune.granularities.registry import GRANULARITIES, parse_granularity
from hf_prune.planning.checks import (
    check_allocation,
    check_budget,
    check_modules,
    check_parts,
    check_polish,
    check_positive,
    check_sparsity,
    check_steps,
    check_workload,
    resolve_sparsity,
    unit_kinds,
)
from hf_prune.planning.choices import (
    BUDGETS,
    CALIBRATED_ALLOCATIONS,
    CALIBRATION_ORDERS,
    DEFAULT_SPARSITY,
    FORMAT_VERSION,
    MOVEMENT,
    OBJECTIVES,
    REPAIRS,
    SCOPES,
    UNIT_SCOPES,
)
from hf_prune.planning.presets import METHOD_SETTINGS, resolve_settings, takes_preset
from hf_prune.planning.schedule import Schedule
from hf_prune.utils.registry import unknown_name


@takes_preset
@dataclass(frozen=True)
class PruningConfig:
    """What to remove from a model, and how it is chosen.

    Args:
        sparsity: Share of the target weights to remove, 0 to 1. None means 0.5, or what an N:M granularity fixes (0.5
            for 2:4). For heads, neurons, experts and layers: the share of the parameters of all units that may go.
        criterion: Name of the score, larger = keep; ``hf-prune list`` shows all names, with a list of their own for
            heads, neurons, experts and layers.
        granularity: What is removed together: ``"unstructured"``, ``"N:M"`` (at most N non-zeros in
            every M consecutive inputs), ``"block:RxC"`` (R outputs by C inputs), ``"row"`` or ``"column"`` (whole
            outputs or inputs) or ``"channel"`` (output channels of convolutions, also in the norm and the depthwise
            convolution that follow); or one or several of ``"head"`` (with grouped queries, the whole group),
            ``"neuron"`` (of feed-forward networks and packed experts), ``"expert"`` (with its rows of the router) and
            ``"layer"``, such as ``("head", "neuron")``, which ``shrink()`` removes from the model.
        scope: Who competes with whom: the weights of one output (``"row"``), of one tensor
            (``"layer"``) or of all targets (``"global"``). An N:M granularity brings its own pools. Heads and neurons
            compete across the whole model (``"global"``), or every layer loses the same share (``"layer"``). None means
            ``"layer"``, and ``"global"`` for heads, neurons and layers under a ``target_…`` or where layers may go.
        allocation: How a sparsity is shared out between tensors in scope row or layer: ``"uniform"``,
            ``"erk"`` (Erdős–Rényi kernel, Evci et al. 2020, arXiv:1911.11134: larger tensors lose a
            larger share), or ``{module: sparsity}`` for chosen modules, named by suffix, of which the
            longest counts; modules not named get ``sparsity``. Two learn from calibration data, without labels:
            ``"fisher"`` minimises the change of the model's predictions that its gradients predict, and ``"owl"``
            (Yin et al. 2024, arXiv:2310.05175) removes less from blocks with many outliers among weights times inputs.
            ``"fisher"`` gives each packed expert a sparsity of its own; the others give all in a tensor the same.
        target_modules: ``"all-linear"`` (everything that multiplies: Linear, Conv1D, convolutions, recurrent layers,
            the projections of ``nn.MultiheadAttention`` and packed experts, but no output embedding, router, depthwise
            convolution, or convolution of at most 4 channels, which reads pixels or samples), a list of suffixes of
            names of modules or packed parameters, or a regular expression for whole names.
        exclude_modules: Modules that are not pruned, named in the same way.
        seed: Seed of everything that is random.
        calibration_order: For a criterion or a repair that learns from the inputs of a weight: ``"sequential"`` prunes
            layer by layer, so that each layer sees the outputs of the pruned layers before it; ``"one_pass"`` runs the
            dense model once, which is faster and less accurate. Gradients are always those of the dense model.
        repair: ``"least_squares"`` gives the weights that stay new values after any criterion, so that each layer's
            outputs on the calibration inputs change least; None leaves them as they are.
        objective: What a criterion or a repair that learns from inputs minimises. ``"layer"``: the change of each
            layer's outputs on the inputs that it gets, as in the papers. ``"loss"``: the distance to the outputs of the
            model before this pruning, with tokens and outputs weighted by how much the model's predictions depend on
            them. Needs no labels; more accurate, and slower by about half. None means ``"layer"``, but ``"loss"`` for
            the repair after heads or neurons were removed, unless whole layers may be removed as well.
        steps: The number of steps in which a criterion that learns from gradients prunes: each step removes the same
            share of the remaining weights, and computes new gradients on the partly pruned model. Slower in proportion.
        polish: ``"distill"`` briefly trains the remaining weights of the targets, their biases and the norms beside
            them, with fixed masks, to reproduce the outputs of the model before this pruning on unlabelled batches;
            ``{"epochs": 2, "learning_rate": 2e-4}`` are its settings, either of which may be omitted. None, the
            default, trains nothing.
        target_params: In place of ``sparsity``, for heads, neurons and layers: the share of the model's parameters that
            remains.
        target_flops: The same for the operations of the ``workload``.
        target_speedup: How many times as fast the model is to be on the ``workload``, on this machine: the times of a
            handful of sizes are measured, and the best units that are as fast remain.
        workload: ``{"batch_size": 1, "length": 128}``, the inputs that ``target_flops`` and ``target_speedup`` are for;
            either may be omitted. ``"length"`` is in tokens. ``{"prompt": 128, "new_tokens": 64}`` is the generation of
            a causal language model with a cache. Device, dtype and number of threads are the current ones.
        round_to: The remaining numbers of heads and neurons are multiples of this, which some kernels need to be fast.
        schedule: For a :class:`PruningTrainer`: at which steps it prunes, and how much; a :class:`Schedule`, its name,
            or a mapping of its settings. None prunes everything at once.
        only: The part of a composite model that is pruned, or several, such as ``"language_model"`` or
            ``("vision_tower", "text_model")``: names of modules, whole or without their beginnings. Everything outside
            of them stays. None means all of the model.
        preset: A method by name, for the settings that are not given: ``"fast"``, ``"balanced"``, ``"best"`` or
            ``"best+polish"``, see ``hf-prune list presets``. What is recorded is the settings.

    Raises:
        ConfigError: If a value is unknown, out of range, or contradicts another one.

    Example:
        >>> PruningConfig(sparsity=0.3).criterion
        'magnitude'
        >>> PruningConfig(granularity="2:4").sparsity
        0.5
        >>> PruningConfig.from_json(PruningConfig(sparsity=0.3).to_json()) == PruningConfig(sparsity=0.3)
        True
    """

    sparsity: float | None = None
    criterion: str = "magnitude"
    granularity: str | tuple[str, ...] = "unstructured"
    scope: str | None = None
    allocation: str | Mapping[str, float] = "uniform"
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: str | tuple[str, ...] = ()
    seed: int = 0
    calibration_order: str = "sequential"
    repair: str | None = None
    objective: str | None = None
    steps: int = 1
    polish: str | Mapping[str, float] | None = None
    target_params: float | None = None
    target_flops: float | None = None
    target_speedup: float | None = None
    workload: Mapping[str, int] | None = None
    round_to: int = 1
    schedule: Schedule | Mapping[str, Any] | str | None = None
    only: str | tuple[str, ...] | None = None
    preset: InitVar[str | None] = None

    # Not a field: whether the caller chose a method, or has that of the defaults because none was named.
    names_method = True

    def __post_init__(self, preset: str | None) -> None:
        if self.schedule is not None:
            self._set("schedule", Schedule.parse(self.schedule))
        named = [self.granularity] if isinstance(self.granularity, str) else self.granularity
        if "hidden" in named:
            raise ConfigError(
                "granularity 'hidden': dimensions of the hidden states are removed everywhere at once, and have no "
                "masks; call hf_prune.trim_hidden before pruning"
            )
        if "vocab" in named:
            raise ConfigError(
                "granularity 'vocab': tokens are removed by the texts that use them, not by a sparsity; call "
                "hf_prune.trim_vocabulary (hf-prune trim-vocab), before or after pruning"
            )
        if kinds := unit_kinds(self.granularity):
            self._set("granularity", kinds)
            self._check_units()
            return
        self._check_no_budget()
        criterion = CRITERIA.get(self.criterion)
        try:
            granularity = parse_granularity(self.granularity)
        except UnknownNameError:
            usages = [GRANULARITIES.get(name).usage for name in GRANULARITIES.names()]
            raise unknown_name("granularity", self.granularity, [*usages, *unit_descriptions()]) from None
        self._set("granularity", granularity.spec)
        default = "layer" if "layer" in criterion.scopes else min(criterion.scopes)
        self._set("scope", default if self.scope is None else self.scope)
        if self.scope not in SCOPES:
            raise unknown_name("scope", self.scope, SCOPES)
        self._set("sparsity", resolve_sparsity(self.sparsity, granularity))
        self._set("allocation", check_allocation(self.allocation))
        self._check_modules()
        if self.scope not in granularity.scopes:
            raise ConfigError(
                f"scope={self.scope!r} contradicts granularity={granularity.spec!r}, which brings its own "
                f"pools: leave scope at {sorted(granularity.scopes)[0]!r}"
            )
        if self.scope not in criterion.scopes:
            raise ConfigError(
                f"criterion {self.criterion!r} cannot rank in scope {self.scope!r}: "
                f"expected one of {', '.join(sorted(criterion.scopes))}"
            )
        self._check_calibration()
        if self.objective == "loss":
            self._check_loss_objective()
        learns = any(need == "fisher" or need.endswith("gradient") for need in criterion.needs)
        check_steps(self.steps, self.criterion if not learns else None, self.repair)
        allocates = self.scope == "global" or granularity.fixed_sparsity is not None
        if allocates and self.allocation != "uniform":
            why = "scope='global'" if self.scope == "global" else f"granularity={granularity.spec!r}"
            raise ConfigError(
                f"allocation={self.allocation!r} contradicts {why}, which decides by itself how much each "
                f"tensor loses: leave allocation at 'uniform'"
            )

    def _check_modules(self) -> None:
        self._set("target_modules", check_modules("target_modules", self.target_modules))
        self._set("exclude_modules", check_modules("exclude_modules", self.exclude_modules))
        self._set("only", check_parts(self.only))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"seed is {self.seed!r}: expected an integer of at least 0")
        if not self.target_modules:
            raise ConfigError("target_modules is empty: name at least one module, or use 'all-linear'")

    def _check_calibration(self) -> None:
        if self.objective is None:
            repaired = self.removes_units and self.repair is not None and self.calibration_order == "sequential"
            self._set("objective", "loss" if repaired and not self._kinds_without("objectives", "loss") else "layer")
        if self.calibration_order not in CALIBRATION_ORDERS:
            raise unknown_name("calibration_order", self.calibration_order, CALIBRATION_ORDERS)
        if self.repair is not None and self.repair not in REPAIRS:
            raise unknown_name("repair", self.repair, REPAIRS)
        if self.objective not in OBJECTIVES:
            raise unknown_name("objective", self.objective, OBJECTIVES)
        self._set("polish", check_polish(self.polish))

    def _check_units(self) -> None:
        """The settings of heads, neurons and layers."""
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(budgets) + (self.sparsity is not None) > 1:
            names = ", ".join([*(["sparsity"] if self.sparsity is not None else []), *budgets])
            raise ConfigError(f"{names} are all set, and each decides how much to remove: expected one of them")
        if not budgets:
            self._set(
                "sparsity", check_sparsity("sparsity", DEFAULT_SPARSITY if self.sparsity is None else self.sparsity)
            )
        for name in budgets:
            self._set(name, check_budget(name, getattr(self, name)))
        self._set("workload", check_workload(self.workload))
        check_positive("round_to", self.round_to)
        everywhere = budgets or self._kinds_without("scopes", "layer")
        self._set("scope", ("global" if everywhere else "layer") if self.scope is None else self.scope)
        if self.scope not in UNIT_SCOPES:
            raise unknown_name("scope of heads, neurons and layers", self.scope, UNIT_SCOPES)
        if self.criterion not in (rankings := unit_rankings()):
            raise unknown_name("criterion of heads, neurons and layers", self.criterion, rankings)
        for kind in self.granularity:
            able = [name for name, ranking in rankings.items() if ranking.kinds is None or kind in ranking.kinds]
            criteria = kind_named(kind).criteria
            able = able if criteria is None else [name for name in able if name in criteria]
            if self.criterion not in able:
                raise ConfigError(
                    f"criterion {self.criterion!r} cannot rank {kind}s: expected one of {', '.join(sorted(able))}"
                )
        for name in ("repair", "polish"):
            kinds = [kind for kind in self.granularity if not kind_named(kind).repairs]
            if kinds and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} contradicts granularity {kinds[0]!r}: what is left of a mixture "
                    f"of {kinds[0]}s is not repaired; leave {name} out, and train the shrunk model instead"
                )
        if self._kinds_without("scopes", self.scope):
            raise ConfigError(
                f"granularity {self.granularity} contradicts scope='layer', in which every layer loses the same share: "
                f"use scope='global'"
            )
        self._check_modules()
        self._check_calibration()
        if self.target_modules != "all-linear":
            raise ConfigError(
                f"target_modules={self.target_modules!r} contradicts granularity {self.granularity}, whose units are "
                f"found by the architecture: leave target_modules out, or name layers to keep in exclude_modules"
            )
        for name, plain in (("allocation", "uniform"), ("steps", 1)):
            if getattr(self, name) != plain:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} contradicts granularity {self.granularity}: leave it at {plain!r}"
                )
        if self.objective == "loss":
            self._check_loss_objective()
        if self.objective == "loss" and (kinds := self._kinds_without("objectives", "loss")):
            raise ConfigError(
                f"objective='loss' contradicts granularity {kinds[0]!r}: it compares layers with those of the dense "
                f"model, some of which no longer exist; leave objective at 'layer'"
            )

    def _kinds_without(self, attribute: str, value: str | None) -> list[str]:
        """The kinds of units of the granularity that do not allow a scope or an objective."""
        if not self.removes_units:
            return []
        return [kind for kind in self.granularity if value not in getattr(kind_named(kind), attribute)]

    def _check_no_budget(self) -> None:
        kinds = ", ".join(map(repr, unit_descriptions()))
        for name in (*BUDGETS, "workload"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} contradicts granularity={self.granularity!r}, which makes no "
                    f"tensor smaller: choose one or several of {kinds}, or give a sparsity"
                )
        if self.round_to != 1:
            raise ConfigError(f"round_to={self.round_to!r} is for heads and neurons, not for {self.granularity!r}")

    def _check_loss_objective(self) -> None:
        if not any(need.startswith("input_") for need in self.needs):
            raise ConfigError(
                f"objective='loss' contradicts criterion {self.criterion!r} without a repair, which does not look at "
                f"the inputs of layers: add repair='least_squares', or leave objective at 'layer'"
            )
        if (self.scope == "global" and not self.removes_units) or self.calibration_order != "sequential":
            by_scope = self.scope == "global" and not self.removes_units
            why = "scope='global'" if by_scope else f"calibration_order={self.calibration_order!r}"
            raise ConfigError(
                f"objective='loss' contradicts {why}: it compares layers with the dense model as they are pruned, one "
                f"after the other; leave objective at 'layer'"
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that the criterion and the repair need from calibration."""
        if self.removes_units:
            return frozenset({"input_gram", "input_mean"} if self.repair is not None else ())
        return CRITERIA.get(self.criterion).needs | ({"input_gram", "input_mean"} if self.repair is not None else set())

    @property
    def needs_data(self) -> bool:
        """Whether anything depends on calibration data."""
        return bool(self.needs) or self.learns_allocation or self.learns_units or self.polish is not None

    @property
    def removes_units(self) -> bool:
        """Whether whole units, such as heads, neurons or layers, are removed, so that ``shrink()`` applies."""
        return isinstance(self.granularity, tuple)

    @property
    def learns_units(self) -> bool:
        """Whether the choice of units depends on calibration data."""
        return self.removes_units and unit_rankings()[self.criterion].needs == "texts"

    @property
    def learns_in_training(self) -> bool:
        """Whether the criterion learns during a training, so that only a :class:`PruningTrainer` can use it."""
        return self.criterion in MOVEMENT or bool(self.needs & {"training_score"})

    @property
    def learns_allocation(self) -> bool:
        """Whether the allocation depends on calibration data."""
        return isinstance(self.allocation, str) and self.allocation in CALIBRATED_ALLOCATIONS

    def __hash__(self) -> int:
        return hash(self.to_json())

    def replace(self, **changes: Any) -> PruningConfig:
        """A copy with some settings changed, validated like a new one.

        If the new granularity or the old one fixes the sparsity, the sparsity is chosen again.
        """
        if changes.get("preset") is not None:
            plain = {f.name: f.default for f in dataclasses.fields(self) if f.name in METHOD_SETTINGS - {"schedule"}}
            row = {**plain, **resolve_settings({"granularity": self.granularity, **changes})}
            changes = {name: value for name, value in row.items() if name in changes or name != "granularity"}
        units = isinstance(self.granularity, tuple) or bool(unit_kinds(changes.get("granularity")))
        if units and "granularity" in changes:
            changes = {**dict.fromkeys(("scope", "objective", "workload")), "round_to": 1, **changes}
        if units and {"granularity", "sparsity", *BUDGETS} & set(changes):
            changes = {**dict.fromkeys(("sparsity", *BUDGETS)), **changes}
        elif "granularity" in changes and "sparsity" not in changes:
            either = (parse_granularity(self.granularity), parse_granularity(changes["granularity"]))
            if any(granularity.fixed_sparsity is not None for granularity in either):
                changes["sparsity"] = None
        return self.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the version of the format."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.only is None:  # earlier versions do not know it
            del values["only"]
        for name, value in values.items():
            if isinstance(value, tuple):
                values[name] = list(value)
            elif isinstance(value, Mapping):
                values[name] = dict(value)
            elif isinstance(value, Schedule):
                values[name] = value.to_dict()
        return {"format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PruningConfig:
        """The config that :meth:`to_dict` returned as a dict.

        Raises:
            ConfigError: If a key is unknown, the version is newer than this library, or a value is invalid.
        """
        values = dict(values)
        version = values.pop("format_version", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"format_version is {version!r}: this version of hf_prune reads {FORMAT_VERSION}; update hf_prune"
            )
        names = [*(f.name for f in dataclasses.fields(cls)), "preset"]
        for key in values:
            if key not in names:
                raise unknown_name("setting", key, names)
        return cls(**values)

    def to_json(self) -> str:
        """JSON text, keys sorted."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> PruningConfig:
        """The config that :meth:`to_json` wrote.

        Raises:
            ConfigError: If the text is not a JSON object, or as in :meth:`from_dict`.
        """
        try:
            values = json.loads(text)
        except (RecursionError, ValueError) as error:
            raise ConfigError(f"not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"found a JSON {type(values).__name__}: expected an object of settings")
        return cls.from_dict(values)
