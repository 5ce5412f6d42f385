"""Masks as one process needs them: whole, or its own part where FSDP has sharded the parameters."""

from __future__ import annotations

from collections.abc import Iterator, Set

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_prune.errors import MaskError
from hf_prune.kernels.packed_masks import PackedMask
from hf_prune.kernels.zeroing import zero_removed_
from hf_prune.pruning.held_masks import mask_of, take_trained_by
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.utils.offloaded_weights import refuse_offloaded


class LocalMasks:
    """This process's parts of the masks of a model, as masks and parameters are at the time of asking.

    Args:
        model: The model; FSDP replaces its parameters now and then, so they are looked up each time.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._parts: dict[str, tuple[PackedMask, PackedMask]] = {}  # masks, and this process's parts of them

    def parameters(self, others: Set[str] = frozenset()) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that have a mask, and others by their names.

        Raises:
            MaskError: If the model no longer has a parameter that has a mask.
        """
        store = MaskStore.of(self.model)
        masked: Set[str] = set() if store is None else store.masks.keys()
        names = masked | others
        if not names:
            return
        present = {name: parameter for name, parameter in self.model.named_parameters() if name in names}
        if missing := sorted((masked - present.keys()) | (store.replaced if store is not None else set())):
            raise MaskError(
                f"{missing[0]} has a mask, and the model has no such weight: it was changed after pruning, and its "
                f"weights would be trained without their masks; drop_masks({missing[0]!r}) leaves the others"
            )
        yield from present.items()

    def of(self, name: str, parameter: nn.Parameter) -> PackedMask | None:
        """This process's part of a mask, as bits; None if the parameter has none."""
        if (mask := mask_of(self.model, name)) is None:
            return None
        local = local_tensor(parameter)
        if local.is_meta:
            refuse_offloaded(self.model, "a training")
        known, part = self._parts.get(name, (None, mask))
        if known is not mask or part.shape != local.shape or part.device != local.device:
            if mask.shape != parameter.shape and (store := MaskStore.of(self.model)) is not None:
                store.check(self.model)
            if isinstance(parameter, DTensor):
                part = PackedMask.of(local_part(mask.unpacked(), parameter))
            else:
                part = mask.to(parameter.device)
            self._parts[name] = mask, part
        return part

    def apply(self) -> None:
        """Set every removed weight to zero, in a training that knows of masks."""
        for name, parameter in self.parameters():
            mask = self.of(name, parameter)
            if mask is not None:
                zero_removed_(local_tensor(parameter.detach()), mask)
        take_trained_by(self.model)


def local_tensor(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor that lies as a parameter does, on the parameter's device."""
    whole = whole.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local()


def gather_parts(part: Tensor, parameter: Tensor) -> Tensor:
    """The inverse of :func:`local_part`: put together what all processes hold; every process has to call this."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    ).full_tensor()


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP has spread the parameters of a model over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
