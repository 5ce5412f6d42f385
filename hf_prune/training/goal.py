"""What a calibrated method chose to remove by the end of a schedule, and the masks on the way there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hf_prune.calibration.batches import Batches
from hf_prune.kernels.packed_masks import PackedMask, PackedMasks
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.utils.forward import eval_mode
from hf_prune.utils.wrapping import plain_name

_CHOSEN = "goal"  # key in the state, and before the names of parameters


class Goal:
    """The masks at the end of a schedule.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        #: By parameter name; None before they are chosen.
        self.masks: dict[str, PackedMask] | None = None

    def masks_at(
        self, share: float, config: PruningConfig, batches: Batches, weight_of: Callable[[str], Tensor]
    ) -> dict[str, Tensor]:
        """Whole masks by parameter name, True = keep; at first, those at the end are chosen.

        Args:
            share: Share of what goes in the end that is removed now, 0 to 1.
            config: The settings.
            batches: What to calibrate on.
            weight_of: Returns a whole weight by its name.
        """
        if self.masks is None:
            self.masks = self._chosen(config, batches)
        store = MaskStore.of(self.model) or MaskStore()
        return close_masks(store.masks, self.masks, {name: weight_of(name) for name in self.masks}, share)

    def _chosen(self, config: PruningConfig, batches: Batches) -> dict[str, PackedMask]:
        """Prune to the end, and open the masks again: weights that go are zero, and may be trained until they do."""
        before = PackedMasks() if (store := MaskStore.of(self.model)) is None else PackedMasks(store.masks)
        with eval_mode(self.model), torch.enable_grad():
            prune(self.model, config.replace(schedule=None), calibration=batches)
        store = MaskStore.of(self.model)
        assert store is not None
        found = store.masks.packed.items()
        chosen = {n: mask for n, mask in found if n not in before or not mask.equals(before.packed[n])}
        for name, mask in chosen.items():
            whole = torch.ones(mask.shape, dtype=torch.bool, device=mask.device)
            store.masks[name] = before[name] if name in before else whole
        store.attach(self.model)
        return chosen

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint; none before masks are chosen."""
        if self.masks is None:
            return {}
        named = {f"{_CHOSEN}:{plain_name(name)}": mask.bits.cpu() for name, mask in self.masks.items()}
        return {_CHOSEN: torch.tensor(len(named)), **named}

    def restore(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Go on from what :meth:`state` returned, among other tensors; returns the others."""
        self.masks = {} if _CHOSEN in state else None
        for name, parameter in self.model.named_parameters() if _CHOSEN in state else ():
            if (bits := state.get(f"{_CHOSEN}:{plain_name(name)}")) is not None:
                assert self.masks is not None
                self.masks[name] = PackedMask(bits, parameter.shape)
        return {key: tensor for key, tensor in state.items() if key.partition(":")[0] != _CHOSEN}


def close_masks(
    masks: Mapping[str, Tensor], goal: Mapping[str, PackedMask], weights: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Masks on the way to those that were chosen before: of what goes in the end, the smallest weights go first.

    Args:
        masks: The present masks; what they remove stays removed.
        goal: The masks at the end.
        weights: The whole weights.
        share: Share of what the goal removes that is to be removed now, 0 to 1.

    Returns:
        Whole masks by parameter name, True = keep.
    """
    closed = {}
    for name in sorted(goal):
        mask, removed = masks[name].flatten(), ~goal[name].unpacked().flatten().to(masks[name].device)
        still_open = (mask & removed).nonzero().squeeze(1)
        number = round(share * int(removed.sum())) - int((removed & ~mask).sum())
        weight = weights[name].flatten()
        order = weight[still_open.to(weight.device)].abs().sort(stable=True).indices.to(mask.device)
        mask[still_open[order[: max(number, 0)]]] = False
        closed[name] = mask.view(masks[name].shape)
    return closed
