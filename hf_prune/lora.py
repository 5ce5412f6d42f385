"""LoRA on a sparse model: adapters are trained beside weights that stay sparse, and merged without filling zeros."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_prune.errors import MaskError
from hf_prune.masking import MaskStore
from hf_prune.mixin import prunable

_INSIDE = (".base_layer.", ".original_module.")  # where PEFT keeps the weights that it adds to, or trains a copy of


@dataclass(frozen=True)
class MergeReport:
    """What merging adapters into a sparse model cost.

    Args:
        model: The merged model, with its masks.
        sparsity: The share of the masked weights that is zero.
        kept: The share of the adapters' change, in squared size, that falls on weights that stay; the rest is lost.
        before: Score with the adapters beside the weights, where a way to score was given.
        after: Score of the merged model.
    """

    model: Any = field(repr=False)
    sparsity: float
    kept: float
    before: float | None = None
    after: float | None = None

    def __str__(self) -> str:
        text = (
            f"Merged: {100 * self.sparsity:.2f} % of the masked weights are zero as before; {100 * self.kept:.1f} % of "
            f"what the adapters had learned fell on weights that stay."
        )
        if self.before is None or self.after is None:
            return f"{text} What that costs was not measured: pass evaluate=."
        return (
            f"{text} Score with adapters {self.before:.4f}, merged {self.after:.4f} ({self.after - self.before:+.4f})."
        )


@torch.no_grad()
def merge_lora(model: Any, *, evaluate: Callable[[Any], float] | None = None) -> MergeReport:
    """Merge LoRA adapters into a sparse model, and apply its masks again (plain merging fills the zeros).

    Args:
        model: A ``PeftModel`` around a model that has masks; it is used up, as by ``merge_and_unload``.
        evaluate: Scores a model, larger is better; called before and after, so that the cost is known.

    Returns:
        The model and what the merge cost; print it.

    Raises:
        MaskError: If the model is no ``PeftModel``, or the model inside has no masks.

    Example:
        >>> report = merge_lora(peft_model, evaluate=accuracy)  # doctest: +SKIP
        >>> report.model.save_pretrained("merged")  # doctest: +SKIP
    """
    if not hasattr(model, "merge_and_unload") or not hasattr(model, "get_base_model"):
        raise MaskError(f"expected a PeftModel with LoRA adapters, found a {type(model).__name__}")
    store = MaskStore.of(model.get_base_model())
    if store is None:
        raise MaskError(
            "the model inside the adapters has no masks: prune it before get_peft_model(), or load it with "
            "AutoPrunedModelFor…, which brings them back; without masks call merge_and_unload()"
        )
    before = None if evaluate is None else float(evaluate(model))
    dense = {}
    for name, parameter in model.get_base_model().named_parameters():
        for inside in _INSIDE:
            name = name.replace(inside, ".")
        if name in store.masks:
            dense[name] = parameter.detach().clone()
    if missing := sorted(store.masks.keys() - dense.keys()):
        raise MaskError(
            f"{missing[0]} has a mask, and the model inside the adapters no such weight: it was changed after pruning; "
            f"discard the masks, or prune it anew"
        )
    merged = model.merge_and_unload()
    store.check(merged)
    change, kept = 0.0, 0.0
    for name, weight in dense.items():
        square = (merged.get_parameter(name).detach().float() - weight.float()).square()
        change += float(square.sum())
        kept += float(square[store.masks[name].to(square.device)].sum())
    store.attach(merged)
    store.apply(merged)
    if isinstance(merged, PreTrainedModel):
        prunable(merged)  # so that it is saved with its masks
    total = sum(mask.numel() for mask in store.masks.values())
    zeros = sum(int((merged.get_parameter(name) == 0).sum()) for name in store.masks)
    return MergeReport(
        model=merged,
        sparsity=zeros / total,
        kept=kept / change if change else 1.0,
        before=before,
        after=None if evaluate is None else float(evaluate(merged)),
    )
