"""What pruning does at each step of a training: watch gradients, keep zeros zero, change masks when it is time.

Independent of the Trainer, see trainer.py. Parameters are looked up at each step, since FSDP replaces them. Where FSDP
has sharded them, masks are kept whole, and each process works on its own part.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.read import CalibrationData, read_calibration
from hf_prune.criteria.base import LABELLED
from hf_prune.errors import ConfigError, MaskError
from hf_prune.kernels.packed_masks import PackedMasks
from hf_prune.kernels.zeroing import zero_removed_
from hf_prune.planning.choices import MOVEMENT
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.schedule import Schedule
from hf_prune.pruning.local_masks import LocalMasks, local_tensor
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.training.check_settings import averages_gradients, check_settings
from hf_prune.training.goal import Goal
from hf_prune.training.gradient_scores import GradientScores
from hf_prune.training.mask_updates import choose_masks, config_of_update, exchange_masks, pruned_parameters
from hf_prune.training.shrink_optimizer import shrink_with_optimizer
from hf_prune.utils.distributed import broadcast, fail_together

_ROUNDING = 0.005  # of a sparsity, in small pools
_SHRUNK = "sparsity when shrunk"  # key in the state


class TrainingPruner:
    """Prunes one model while it is trained.

    Args:
        model: The model, not wrapped by DDP.
        config: The settings; without a schedule everything is pruned before the first step. None: keep the masks that
            the model has.
        steps: Optimizer steps of the whole training.
        calibration: Data for criteria and repairs that look at some, as for :func:`hf_prune.prune`. Such a method
            decides once, at the first update, what is gone in the end, and gives the weights that stay their new
            values; the schedule then says how fast the masks close.
        tokenizer: What reads it; by default the tokenizer or processor beside the model.
        threshold: Of ``soft_movement``: weights with ``sigmoid(score)`` below it are removed.
        regularization: Of ``soft_movement``: how hard scores are pulled down, relative to the typical size of a
            gradient's pull.

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
        calibration: CalibrationData | None = None,
        tokenizer: Any = None,
        threshold: float = 0.1,
        regularization: float = 1.0,
    ) -> None:
        self.model = model
        self.config = config
        self.steps = steps
        self.schedule = Schedule.parse("one_shot" if config is None or config.schedule is None else config.schedule)
        labels = config is not None and bool(config.needs & LABELLED)
        with fail_together():
            self.calibration = read_calibration(model, calibration, tokenizer, labels=labels)
        self.threshold = threshold
        #: Names of the parameters that are pruned.
        self.targets: frozenset[str] = frozenset()
        self._masks = LocalMasks(model)
        self._sparsity_when_shrunk: float | None = None
        self._gradients: dict[str, Tensor] = {}  # absolute ones of the last step, where an update exchanges weights
        self._min_sparsity = 0.0  # what an earlier pruning left
        self._expected_removed: int | None = None  # weights that the last update left masked
        self._goal = Goal(model)  # of a calibrated method
        self._moves = config is not None and config.criterion in MOVEMENT
        averages = averages_gradients(config, calibrates=calibration is not None)
        if config is not None:
            check_settings(config, self.schedule, steps, calibrates=calibration is not None)
            self.targets = pruned_parameters(model, config)
            self._min_sparsity = self._check_masks(config)
        #: What is learned from gradients, by criteria that watch the training.
        self.learned = GradientScores(
            model,
            averages=averages,
            soft=config is not None and config.criterion == "soft_movement",
            last_update=self.schedule.span(steps)[1],
            regularization=regularization,
        )
        self._watched: Set[str] = self.targets if self._moves or averages else frozenset()

    def _check_masks(self, config: PruningConfig) -> float:
        """The sparsity of the targets by earlier masks, which must not be above the one that is asked for."""
        store = MaskStore.of(self.model)
        if store is not None and store.dense is not None:
            raise ConfigError(
                "the model was pruned with keep_dense=True, and a training would make the dense weights that it keeps "
                "outdated: prune it without keep_dense"
            )
        present = self.sparsity
        if config.sparsity is not None and present > config.sparsity + _ROUNDING:
            raise ConfigError(
                f"sparsity={config.sparsity:g} is below the {present:.4f} that earlier masks remove of these targets: "
                f"ask for more, or call discard_masks() first"
            )
        return present

    # --- each step ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def after_backward(self, step: int, scale: float = 1.0) -> None:
        """Learn from the gradients, and clear those of removed weights, so that neither clipping nor moments see them.

        Args:
            step: The optimizer step that comes next, counted from 1.
            scale: What the loss was multiplied by, as for float16. Nothing is learned from gradients that overflowed.
        """
        observed = self._watched | (self.targets if self.schedule.exchanges else frozenset())
        exchanges = self._exchanges_after(step)
        for name, parameter in self._masks.parameters(observed):
            if parameter.grad is not None:
                self._receive(name, parameter, exchanges, scale)

    @torch.no_grad()
    def receive(self, name: str, parameter: nn.Parameter, step: int) -> None:
        """:meth:`after_backward` for one parameter, whose gradient has just arrived."""
        self._receive(name, parameter, self._exchanges_after(step))

    def _exchanges_after(self, step: int) -> bool:
        return self.schedule.exchanges and self.schedule.is_due(step, self.steps)

    def _receive(self, name: str, parameter: nn.Parameter, exchanges: bool, scale: float = 1.0) -> None:
        assert parameter.grad is not None
        gradient, mask = local_tensor(parameter.grad), self._masks.of(name, parameter)
        if exchanges and name in self.targets:
            self._gradients[name] = gradient.detach().abs()
        if name in self._watched and (scale == 1.0 or bool(gradient.isfinite().all())):
            kept = None if mask is None else mask.unpacked()
            self.learned.learn(name, local_tensor(parameter), gradient.float() / scale, kept)
        if mask is not None:
            zero_removed_(gradient, mask)

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
            self.apply()  # what the optimizer did to removed weights must not influence the update
            self._update(step)
        self.apply()
        if due:
            self.check()
        return due

    @torch.no_grad()
    def shrink(self, optimizer: Any) -> None:
        """Remove what is pruned as a whole from the model, and cut the optimizer's state to match.

        Args:
            optimizer: The optimizer of the model's parameters.

        Raises:
            ConfigError: If the optimizer's state is not shaped like the weights.
            ArchitectureError: If the architecture of the model is not registered.
        """
        sparsity = self.sparsity
        self.learned.cut(shrink_with_optimizer(self.model, optimizer))
        self._sparsity_when_shrunk = sparsity

    def apply(self) -> None:
        """Set every removed weight to zero."""
        self._masks.apply()

    @property
    def sparsity(self) -> float:
        """The share of the targets' weights that the masks remove, or removed before the model was shrunk."""
        if self._sparsity_when_shrunk is not None:
            return self._sparsity_when_shrunk
        store = MaskStore.of(self.model)
        if store is None:
            return 0.0
        names = self.targets if self.config is not None else store.masks.keys()
        sizes = {name: p.numel() for name, p in self.model.named_parameters() if name in names}
        return count_removed(store.masks, sizes) / max(1, sum(sizes.values()))

    def check(self) -> None:
        """Make sure that every removed weight is zero, and that there are as many as there should be.

        Raises:
            MaskError: If not.
        """
        for name, parameter in self._masks.parameters():
            mask = self._masks.of(name, parameter)
            if mask is not None and bool(local_tensor(parameter.detach()).masked_select(~mask.unpacked()).any()):
                raise MaskError(
                    f"{name} has non-zero weights that its mask removes: something wrote to it after the step"
                )
        store = MaskStore.of(self.model)
        removed = 0 if store is None else count_removed(store.masks)
        if self._sparsity_when_shrunk is None and self._expected_removed not in (None, removed):
            raise MaskError(
                f"the masks remove {removed:,} weights, and the last update left {self._expected_removed:,}"
            )

    # --- when masks change -------------------------------------------------------------------------------------

    def _update(self, step: int) -> None:
        assert self.config is not None
        store = MaskStore.of(self.model) or MaskStore()
        if self.schedule.exchanges and step > self.schedule.span(self.steps)[0]:
            share = self.schedule.exchange(step, self.steps)
            masks = {n: m for n, m in store.masks.items() if n in self.targets and n in self._gradients}
            self._set_masks(store, exchange_masks(masks, self._gradients, self.learned, share))
            self._gradients.clear()
            return
        sparsity = 0.0
        if self.config.sparsity is not None:
            sparsity = max(self._min_sparsity, self.schedule.sparsity(step, self.steps, self.config.sparsity))
        if self.calibration is not None and self.config.needs_data:
            share = sparsity / self.config.sparsity if self.config.sparsity else 1.0
            masks = self._goal.masks_at(share, self.config, self.calibration, self.learned.whole_weight)
            self._set_masks(MaskStore.of(self.model) or store, masks)
            return
        config = config_of_update(self.config, sparsity)
        if config.sparsity == 0:
            return
        masks = choose_masks(self.model, config, store.masks, self.learned, self._watched)
        if self.config.criterion == "soft_movement" and self.schedule.progress(step, self.steps) < 1:
            # Before its end, the schedule is an upper limit: only weights below the threshold are removed.
            above = {n: torch.sigmoid(score) > self.threshold for n, score in self.learned.whole_scores().items()}
            masks = {name: mask | above[name] for name, mask in masks.items()}
        if not self._moves:
            masks = {n: m & store.masks[n].to(m.device) if n in store.masks else m for n, m in masks.items()}
        self._set_masks(store, masks)

    def _set_masks(self, store: MaskStore, masks: Mapping[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, mask in masks.items():
            mask = broadcast(mask)
            if self._moves:
                old = self._masks.of(name, parameters[name])
                self.learned.swap_values(name, parameters[name], None if old is None else old.unpacked(), mask)
            store.masks[name] = mask
        store.config = self.config
        store.attach(self.model)
        self._expect_masks()

    def _expect_masks(self) -> None:
        """Remember how many weights the masks remove, for :meth:`check`."""
        store = MaskStore.of(self.model)
        self._expected_removed = None if store is None else count_removed(store.masks)

    # --- to and from a checkpoint ------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """What a training that goes on needs besides weights and masks; every process has to call this."""
        state = self.learned.state()
        if self._sparsity_when_shrunk is not None:
            state[_SHRUNK] = torch.tensor(self._sparsity_when_shrunk, dtype=torch.float64)
        return state | self._goal.state()

    def restore(self, state: Mapping[str, Tensor], store: MaskStore | None) -> None:
        """Go on from a checkpoint.

        Args:
            state: What :meth:`state` returned.
            store: The masks; None if nothing was pruned yet.
        """
        others = self._goal.restore(state)
        self.learned.restore({key: tensor for key, tensor in others.items() if key != _SHRUNK})
        self._sparsity_when_shrunk = float(state[_SHRUNK]) if _SHRUNK in state else None
        if store is None:
            MaskStore.detach(self.model)
        else:
            store.attach(self.model)
        self._expected_removed = None


def count_removed(masks: PackedMasks, names: Container[str] | None = None) -> int:
    """How many weights masks remove, of all or of some of them."""
    counted = (mask for name, mask in masks.packed.items() if names is None or name in names)
    return sum(mask.numel() - mask.kept() for mask in counted)
