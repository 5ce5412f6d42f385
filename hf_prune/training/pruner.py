"""What pruning does at each step of a training: watch gradients, keep zeros zero, change masks when it is time.

It knows nothing of the Trainer, see trainer.py, and finds the parameters anew at each step, since FSDP replaces them.
Where FSDP has sharded them, masks are kept whole, and each process works on its own part.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_prune.architectures.channels import propagate_channel_masks
from hf_prune.architectures.find_unit_groups import find_channel_groups
from hf_prune.calibration.input_reader import Batches
from hf_prune.criteria.base import LABELLED, TRAINED, WeightStats
from hf_prune.criteria.registry import CRITERIA
from hf_prune.errors import ConfigError, MaskError
from hf_prune.granularities.registry import parse_granularity
from hf_prune.kernels.zeroing import zero_removed_
from hf_prune.pipeline import prune
from hf_prune.planning.choices import MOVEMENT
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import coverage_notes, make_plan, warn_of
from hf_prune.planning.schedule import Schedule
from hf_prune.planning.targets import divisible, resolve_targets
from hf_prune.pruning.compute_masks import compute_masks
from hf_prune.pruning.local_masks import LocalMasks, local_part, local_tensor
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.structured.choose_units import choose_units
from hf_prune.structured.prune_units import unit_masks
from hf_prune.structured.shrink import shrink_modules
from hf_prune.structured.unit_plan import unit_groups_of
from hf_prune.utils.distributed import broadcast
from hf_prune.utils.forward import as_batches, eval_mode
from hf_prune.utils.wrapping import plain_name

_ROUNDING = 0.005  # of a sparsity, in small pools
_SHRUNK = "sparsity when shrunk"  # in the state
_MEMORY = 0.9  # of running averages, by a step
_SCORE_PATH = 6.6  # how far soft movement can pull a score in a whole schedule: far enough in half of it


class TrainingPruner:
    """Prunes one model while it is trained.

    Args:
        model: The model, not wrapped by DDP.
        config: The settings; without a schedule everything is pruned before the first step. None: keep the masks that
            the model has.
        steps: Optimizer steps of the whole training.
        calibration: Batches for criteria and repairs that look at data.
        threshold: Of ``soft_movement``: weights with ``sigmoid(score)`` below it are removed.
        regularization: Of ``soft_movement``: how hard scores are pulled down, against the usual size of what pulls them
            up.

    Raises:
        ConfigError: If the settings contradict one another, or the schedule does not fit the training.
        PlanError: If they do not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruningConfig | None,
        steps: int,
        *,
        calibration: Batches | None = None,
        threshold: float = 0.1,
        regularization: float = 1.0,
    ) -> None:
        self.model = model
        self.config = config
        self.steps = steps
        self.schedule = Schedule.parse("one_shot" if config is None or config.schedule is None else config.schedule)
        self.calibration = None if calibration is None else list(as_batches(calibration))
        self.threshold, self.regularization = threshold, regularization
        #: What was learned of each weight, and the values of removed weights that may come back.
        self.learned: dict[str, dict[str, Tensor]] = {"score": {}, "latent": {}}
        self._masks = LocalMasks(model)
        self._gone: float | None = None  # sparsity when the model was shrunk
        self._gradients: dict[str, Tensor] = {}
        self._moves = config is not None and config.criterion in MOVEMENT
        self._averages = config is not None and config.criterion == "taylor" and self.calibration is None
        self._targets: frozenset[str] = frozenset()
        self._least = 0.0  # sparsity that an earlier pruning left
        self._removed: int | None = None  # weights that the last update left masked
        self._watched: frozenset[str] = frozenset()
        if config is not None:
            self._check(config, self.schedule)
            self._targets = frozenset(self._names(config))
            self._least = self._check_masks(config)
            self._watched = self._targets if self._moves or self._averages else frozenset()

    def _check(self, config: PruningConfig, schedule: Schedule) -> None:
        schedule.span(self.steps)
        kinds = config.granularity if config.removes_units else ()
        if "layer" in kinds:
            raise ConfigError(
                "granularity 'layer' changes what a model computes at once: prune layers before the training, with "
                "hf_prune.prune, or leave 'layer' out"
            )
        if config.sparsity is None and schedule.name != "one_shot":
            raise ConfigError(
                f"schedule {schedule.name!r} needs a sparsity to grow to: give sparsity=, or schedule='one_shot'"
            )
        if schedule.exchanges and (config.criterion != "magnitude" or config.granularity != "unstructured"):
            raise ConfigError(
                f"schedule {schedule.name!r} exchanges single weights by magnitude and gradient: expected "
                f"criterion 'magnitude' and granularity 'unstructured', found {config.criterion!r} and "
                f"{config.granularity!r}"
            )
        if config.sparsity is not None and schedule.initial > config.sparsity:
            raise ConfigError(
                f"the schedule begins with a sparsity of {schedule.initial:g} and ends with {config.sparsity:g}: "
                f"expected one that grows"
            )
        if config.polish is not None:
            raise ConfigError("polish is a training of its own: leave it out, and train for longer")
        learns = config.needs - TRAINED - (LABELLED if self._averages else frozenset())
        if (learns or config.learns_allocation or (config.learns_units and not self._averages)) and (
            self.calibration is None
        ):
            raise ConfigError(
                f"criterion {config.criterion!r} with repair={config.repair!r} and allocation={config.allocation!r} "
                f"looks at data: pass calibration=batches, or choose 'magnitude', 'taylor' or 'movement' and no repair"
            )
        if self._moves and (config.repair is not None or config.learns_allocation):
            raise ConfigError(f"criterion {config.criterion!r} keeps the values of the training: leave repair out")

    def _check_masks(self, config: PruningConfig) -> float:
        """The sparsity of the targets by earlier masks, which must not be above what is asked for."""
        store = MaskStore.of(self.model)
        if store is not None and store.dense is not None:
            raise ConfigError(
                "the model was pruned with keep_dense=True, and its dense weights would no longer be those of what is "
                "trained: prune it without keep_dense"
            )
        present = self.sparsity
        if config.sparsity is not None and present > config.sparsity + _ROUNDING:
            raise ConfigError(
                f"sparsity={config.sparsity:g} is below the {present:.4f} that earlier masks remove of these targets: "
                f"ask for more, or call discard_masks() first"
            )
        return present

    def _names(self, config: PruningConfig) -> list[str]:
        """Parameters whose zeros are counted: the targets, or the matrices of heads and neurons."""
        if config.removes_units:
            return [part.name for site in unit_groups_of(self.model, config) for part in site.parts]
        targets, left_out = divisible(resolve_targets(self.model, config, loaded=not self.is_sharded), config)
        warn_of(coverage_notes(self.model, config, targets, left_out))
        return [target.name for target in targets]

    # --- each step ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def after_backward(self, step: int, scale: float = 1.0) -> None:
        """Learn from the gradients, and clear those of removed weights, so that neither clipping nor moments see them.

        Args:
            step: The optimizer step that comes next, counted from 1.
            scale: What the loss was multiplied by, as for float16. Gradients that overflowed teach nothing.
        """
        exchanged = self.schedule.exchanges and self.schedule.is_due(step, self.steps)
        for name, parameter in self._masks.parameters(self._seen):
            if parameter.grad is None:
                continue
            self._receive(name, parameter, exchanged, scale)

    @torch.no_grad()
    def receive(self, name: str, parameter: nn.Parameter, step: int) -> None:
        """:meth:`after_backward` for one parameter, whose gradient has just arrived."""
        self._receive(name, parameter, self.schedule.exchanges and self.schedule.is_due(step, self.steps))

    def _receive(self, name: str, parameter: nn.Parameter, exchanged: bool, scale: float = 1.0) -> None:
        assert parameter.grad is not None
        gradient, mask = local_tensor(parameter.grad), self._masks.of(name, parameter)
        if exchanged and name in self._targets:
            self._gradients[name] = gradient.detach().abs()
        if name in self._watched and (scale == 1.0 or bool(gradient.isfinite().all())):
            self._learn(name, local_tensor(parameter), gradient.float() / scale, mask)
        if mask is not None:
            zero_removed_(gradient, mask)

    def _learn(self, name: str, weight: Tensor, gradient: Tensor, mask: Tensor | None) -> None:
        scores = self.learned["score"]
        score = scores.setdefault(name, torch.zeros_like(weight, dtype=torch.float32))
        if self._averages:
            score.lerp_(gradient.abs(), 1 - _MEMORY)
            return
        latent = self.learned["latent"].get(name)
        value = weight if latent is None or mask is None else torch.where(mask, weight, latent)
        change = value.float() * gradient
        assert self.config is not None
        if self.config.criterion == "soft_movement":
            size = _SCORE_PATH / max(1, self.schedule.span(self.steps)[1])
            change.div_(change.square().mean().sqrt().clamp_min(1e-30)).mul_(size)
            chance = torch.sigmoid(score)
            change.add_(chance * (1 - chance), alpha=4 * size * self.regularization)
        score.sub_(change)

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        """Keep removed weights at zero, and change the masks if it is time.

        Args:
            step: Optimizer steps done.

        Returns:
            Whether the masks changed.

        Raises:
            MaskError: If the sparsity is not what it should be.
        """
        due = self.config is not None and self.schedule.is_due(step, self.steps)
        if due:
            self.apply()  # what the optimizer did to removed weights is not looked at
            self._update(step)
        self.apply()
        if due:
            self.check()
        return due

    @torch.no_grad()
    def shrink(self, optimizer: Any) -> None:
        """Take out what is pruned as a whole, and have the optimizer go on with what is left of its state.

        Args:
            optimizer: That of the model's parameters.

        Raises:
            ArchitectureError: If nobody has said where the units of such a model are.
        """
        for parameter, state in optimizer.state.items():
            odd = [k for k, v in state.items() if isinstance(v, Tensor) and v.dim() and v.shape != parameter.shape]
            if odd:
                raise ConfigError(
                    f"the state {odd[0]!r} of {type(optimizer).__name__} is not shaped like its weight, and cannot be "
                    f"carried over when the model is shrunk: train with AdamW or SGD, or leave shrink_at out"
                )
        self._gone = self.sparsity
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        found: list[tuple[str, int, Tensor]] = []
        shrink_modules(self.model, found)
        cuts: dict[str, list[tuple[int, Tensor]]] = {}
        for name, dim, index in found:
            cuts.setdefault(name, []).append((dim, index))
        parameters = dict(self.model.named_parameters())

        def cut(name: str, tensor: Tensor) -> Tensor:
            for dim, index in cuts.get(name, ()):
                tensor = tensor.index_select(dim, index.to(tensor.device))
            return tensor.contiguous()

        for group in optimizer.param_groups:
            for i, old in enumerate(group["params"]):
                name = names[id(old)]
                if name in cuts:
                    group["params"][i] = parameters[name]
                    state = optimizer.state.pop(old, {})
                    optimizer.state[parameters[name]] = {
                        key: cut(name, value) if isinstance(value, Tensor) and value.shape == old.shape else value
                        for key, value in state.items()
                    }
        for tensors in self.learned.values():
            tensors.update({name: cut(name, tensor) for name, tensor in tensors.items()})

    def apply(self) -> None:
        """Set every removed weight to zero."""
        self._masks.apply()

    @property
    def sparsity(self) -> float:
        """The share of the targets' weights that the masks remove, or removed before they were taken out."""
        if self._gone is not None:
            return self._gone
        store = MaskStore.of(self.model)
        if store is None:
            return 0.0
        names = self._targets if self.config is not None else store.masks.keys()
        sizes = {name: p.numel() for name, p in self.model.named_parameters() if name in names}
        gone = sum(int((~mask).sum()) for name, mask in store.masks.items() if name in sizes)
        return gone / max(1, sum(sizes.values()))

    def check(self) -> None:
        """Make sure that every removed weight is zero, and that there are as many as there should be.

        Raises:
            MaskError: If not.
        """
        store = MaskStore.of(self.model)
        for name, parameter in self._masks.parameters():
            mask = self._masks.of(name, parameter)
            if mask is not None and bool(local_tensor(parameter.detach()).masked_select(~mask).any()):
                raise MaskError(
                    f"{name} has non-zero weights that its mask removes: something wrote to it after the step"
                )
        found = 0 if store is None else sum(int((~mask).sum()) for mask in store.masks.values())
        if self._gone is None and self._removed not in (None, found):
            raise MaskError(f"the masks remove {found:,} weights, and the last update left {self._removed:,}")

    # --- when masks change -----------------------------------------------------------------------------------

    def _update(self, step: int) -> None:
        assert self.config is not None
        store = MaskStore.of(self.model) or MaskStore()
        config = self._config_at(step)
        if self.schedule.exchanges and step > self.schedule.span(self.steps)[0]:
            self._set_masks(store, self._exchanged(store, step))
            return
        if config.sparsity == 0:
            return
        if self.calibration is not None and config.needs_data:
            with eval_mode(self.model):
                with torch.enable_grad():
                    prune(self.model, config, calibration=self.calibration)
            self._count()
            return
        masks = self._chosen(config, store)
        if self.config.criterion == "soft_movement" and self.schedule.progress(step, self.steps) < 1:
            least = {n: torch.sigmoid(self._whole(s, n)) > self.threshold for n, s in self.learned["score"].items()}
            masks = {name: mask | least[name] for name, mask in masks.items()}  # the schedule is the most that goes
        if not self._moves:
            masks = {n: m & store.masks[n].to(m.device) if n in store.masks else m for n, m in masks.items()}
        self._set_masks(store, masks)

    def _config_at(self, step: int) -> PruningConfig:
        """The config for one update: less sparse than the final one, and without a schedule."""
        assert self.config is not None
        config = self.config.replace(schedule=None)
        if config.sparsity is None:
            return config
        sparsity = max(self._least, self.schedule.sparsity(step, self.steps, config.sparsity))
        if config.removes_units:
            return config.replace(sparsity=sparsity)
        granularity = parse_granularity(config.granularity)
        if granularity.fixed_sparsity is None:
            return config.replace(sparsity=sparsity)
        assert granularity.pool is not None
        gone = round(granularity.pool * sparsity)  # of 2:4: 3:4 first
        if not gone:
            return config.replace(granularity="unstructured", sparsity=0.0)
        return config.replace(granularity=f"{granularity.pool - gone}:{granularity.pool}")

    def _chosen(self, config: PruningConfig, store: MaskStore) -> dict[str, Tensor]:
        """Masks by magnitude, at random, or by what was learned."""
        scores = {name: self._whole(score, name) for name, score in self.learned["score"].items()}
        if unseen := sorted(self._watched - scores.keys()):
            raise ConfigError(
                f"criterion {config.criterion!r} has seen no gradient of {unseen[0]} yet: begin the schedule after the "
                f"first step, and train that weight, or list its module in exclude_modules"
            )
        if config.removes_units:
            if self.is_sharded:
                raise ConfigError("heads and neurons are not pruned under FSDP: train with DDP, or prune them before")
            if self._averages:
                scores = {n: s * self.model.get_parameter(n).detach().abs() for n, s in scores.items()}
            units, _ = choose_units(self.model, config, scores=scores if self._moves or self._averages else None)
            return unit_masks(self.model, units)
        plan = make_plan(self.model, config, loaded=not self.is_sharded, masks={} if self._moves else store.masks)
        needs = CRITERIA.get(config.criterion).needs
        stats = {}
        for tensor in plan.tensors:
            name = tensor.target.name
            seed = zlib.crc32(f"{config.seed}:{name}".encode())
            found = {need: tensor.target.matrix(scores[name]) for need in needs}
            stats[name] = dataclasses.replace(WeightStats(seed=seed), **found)  # type: ignore[arg-type]
        whole = {t.target.name: self._whole_weight(t.target.name) for t in plan.tensors}
        masks, _ = compute_masks(self.model, plan, stats, {} if self._moves else store.masks, whole=whole)
        removed = sum(int((~mask).sum()) for mask in masks.values())
        if plan.is_exact and removed != plan.removed_parameters:
            raise MaskError(
                f"the masks remove {removed:,} weights, the plan {plan.removed_parameters:,}: nothing was set"
            )
        if config.granularity == "channel":
            masks = propagate_channel_masks(masks, find_channel_groups(self.model), self.model)
        return masks

    def _exchanged(self, store: MaskStore, step: int) -> dict[str, Tensor]:
        """Masks of the same size: the smallest weights go, and those with the largest gradients come (RigL)."""
        share = self.schedule.exchange(step, self.steps)
        masks = {}
        for name in sorted(self._targets & store.masks.keys() & self._gradients.keys()):
            old = store.masks[name].flatten()
            weight, gradient = self._whole_weight(name).flatten(), self._whole(self._gradients[name], name).flatten()
            gone, alive = (~old).nonzero().squeeze(1), old.nonzero().squeeze(1)
            number = min(math.floor(share * len(alive)), len(gone))
            leave = weight[alive].abs().sort(stable=True).indices[:number]
            come = gradient[gone].sort(descending=True, stable=True).indices[:number]
            new = old.clone()
            new[alive[leave]], new[gone[come]] = False, True
            masks[name] = new.view(store.masks[name].shape)
        self._gradients.clear()
        return masks

    def _set_masks(self, store: MaskStore, masks: Mapping[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, mask in masks.items():
            mask = broadcast(mask)
            if self._moves:
                self._move(name, parameters[name], mask)
            store.masks[name] = mask
        store.config = self.config
        store.attach(self.model)
        self._count()

    def _count(self) -> None:
        store = MaskStore.of(self.model)
        self._removed = None if store is None else sum(int((~mask).sum()) for mask in store.masks.values())

    def _move(self, name: str, parameter: nn.Parameter, mask: Tensor) -> None:
        """Put the values of weights that go aside, and give back those of weights that come."""
        weight, old = local_tensor(parameter.detach()), self._masks.of(name, parameter)
        new = local_part(mask, parameter)
        latent = self.learned["latent"].setdefault(name, torch.zeros_like(weight))
        value = weight if old is None else torch.where(old, weight, latent)
        weight.copy_(value.masked_fill(~new, 0))
        latent.copy_(value.masked_fill(new, 0))

    # --- parameters, whole and in part -----------------------------------------------------------------------

    @property
    def _seen(self) -> Set[str]:
        """Parameters whose gradients are looked at."""
        return self._watched | (self._targets if self.schedule.exchanges else frozenset())

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP has spread the parameters over processes."""
        return any(isinstance(p, DTensor) for p in self.model.parameters())

    def _whole_weight(self, name: str) -> Tensor:
        parameter = self.model.get_parameter(name).detach()
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        latent = self.learned["latent"].get(name)
        return whole if latent is None else whole + self._whole(latent, name)

    def _whole(self, part: Tensor, name: str) -> Tensor:
        """All processes' parts of a tensor that lies as a parameter does."""
        parameter = self.model.get_parameter(name)
        if not isinstance(parameter, DTensor):
            return part
        return DTensor.from_local(
            part, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        ).full_tensor()

    # --- to and from a checkpoint --------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """What a training that goes on needs besides weights and masks; every process has to call this."""
        # wrappers inside the model need not be there when the training goes on
        shrunk = {} if self._gone is None else {_SHRUNK: torch.tensor(self._gone, dtype=torch.float64)}
        return shrunk | {
            f"{kind}:{plain_name(name)}": self._whole(tensor, name).cpu().contiguous()
            for kind, tensors in self.learned.items()
            for name, tensor in tensors.items()
        }

    def restore(self, state: Mapping[str, Tensor], store: MaskStore | None) -> None:
        """Go on from there.

        Args:
            state: What :meth:`state` gave.
            store: The masks; None if nothing was pruned yet.
        """
        parameters = dict(self.model.named_parameters())
        names = {plain_name(name): name for name in parameters}
        self.learned = {"score": {}, "latent": {}}
        self._gone = float(state[_SHRUNK]) if _SHRUNK in state else None
        for key, tensor in state.items():
            if key == _SHRUNK:
                continue
            kind, _, plain = key.partition(":")
            name = names[plain]
            self.learned[kind][name] = local_part(tensor, parameters[name])
        if store is None:
            MaskStore.detach(self.model)
        else:
            store.attach(self.model)
        self._removed = None
