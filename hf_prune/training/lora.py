"""LoRA on a sparse model: adapters are trained beside weights that stay sparse, and merged without filling zeros."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_prune.errors import MaskError
from hf_prune.kernels.packed_masks import PackedMasks
from hf_prune.mixin import prunable
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.utils.results import Result
from hf_prune.utils.wrapping import adapters, unadapted_name, unload_adapters, without_wrappers


@dataclass(frozen=True, repr=False)
class MergeReport(Result):
    """What merging adapters into a sparse model cost.

    Args:
        model: The merged model, with its masks.
        sparsity: The share of the masked weights that are zero.
        kept: The share of the adapters' change, as a sum of squares, that falls on weights that stay; the rest is lost.
        before: Score with the adapters beside the weights, if ``evaluate`` was given.
        after: Score of the merged model.
    """

    bars = ("sparsity", "kept")

    model: Any = field(repr=False)
    sparsity: float
    kept: float
    before: float | None = None
    after: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the model."""
        return {name: value for name, value in vars(self).items() if name != "model"}

    def __str__(self) -> str:
        text = (
            f"Merged: {100 * self.sparsity:.2f} % of the masked weights are zero as before; {100 * self.kept:.1f} % of "
            f"what the adapters had learned fell on weights that stay."
        )
        if self.before is None or self.after is None:
            return f"{text} The cost was not measured: pass evaluate=."
        return (
            f"{text} Score with adapters {self.before:.4f}, merged {self.after:.4f} ({self.after - self.before:+.4f})."
        )


@torch.no_grad()
def merge_lora(model: Any, *, evaluate: Callable[[Any], float] | None = None) -> MergeReport:
    """Merge LoRA adapters into a sparse model, and apply its masks again (plain merging fills the zeros).

    Args:
        model: A model that has masks and adapters: a ``PeftModel``, whether its base model was pruned before or after
            wrapping, or a model with adapters from ``add_adapter``. It is changed in place, as by
            ``merge_and_unload``.
        evaluate: Scores a model, larger is better; called before and after, so that the cost is known.

    Returns:
        The merged model and what the merge cost; print it.

    Raises:
        MaskError: If the model has no adapters that can be merged, no masks, or masks that do not fit.

    Example:
        >>> report = merge_lora(peft_model, evaluate=accuracy)  # doctest: +SKIP
        >>> report.model.save_pretrained("merged")  # doctest: +SKIP
    """
    model = without_wrappers(model)
    wrapped = hasattr(model, "merge_and_unload") and hasattr(model, "get_base_model")
    if not wrapped and (not adapters(model) or hasattr(model, "get_base_model")):
        raise MaskError(
            f"expected a PeftModel with LoRA adapters, or a model with adapters from add_adapter(), found a "
            f"{type(model).__name__} with none that can be merged"
        )
    base = model.get_base_model() if wrapped else model
    present = MaskStore.of(base)
    if present is None:
        raise MaskError(
            "the model inside the adapters has no masks: prune it, or load it with AutoPrunedModelFor…, which loads "
            "them too; without masks call merge_and_unload() of a PeftModel"
        )
    present.check(base)
    before = None if evaluate is None else float(evaluate(model))
    store = dataclasses.replace(present, masks=PackedMasks(), dense=None)
    for name, mask in present.masks.items():
        name = unadapted_name(name)  # modules_to_save has two masks for one weight: original and copy
        store.masks[name] = mask & store.masks.get(name, mask).to(mask.device)
    if present.dense is not None:
        store.dense = {unadapted_name(name): weight for name, weight in reversed(present.dense.items())}
    sparse: dict[str, Tensor] = {}
    for name, parameter in base.named_parameters():
        if (name := unadapted_name(name)) in store.masks and name not in sparse:
            sparse[name] = parameter.detach().clone()
    if wrapped:
        merged = model.merge_and_unload()
    else:
        unload_adapters(merged := model)
    change, kept = 0.0, 0.0
    for name, weight in sparse.items():
        square = (merged.get_parameter(name).detach().float() - weight.float()).square()
        change += float(square.sum())
        kept += float(square[store.masks[name].to(square.device)].sum())
    store.attach(merged)
    store.apply(merged)
    if isinstance(merged, PreTrainedModel):
        prunable(merged)  # so that it is saved with its masks
    total = sum(mask.numel() for mask in store.masks.packed.values())
    zeros = sum(int((merged.get_parameter(name) == 0).sum()) for name in store.masks)
    return MergeReport(
        model=merged,
        sparsity=zeros / total,
        kept=kept / change if change else 1.0,
        before=before,
        after=None if evaluate is None else float(evaluate(merged)),
    )
