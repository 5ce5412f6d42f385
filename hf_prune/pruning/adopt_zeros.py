"""Zeros that another tool left in plain weights, adopted as masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_prune.errors import MaskError
from hf_prune.planning.checks import check_sparsity
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.coverage import uncovered_matrices
from hf_prune.planning.targets import resolve_targets
from hf_prune.pruning.mask_store import MaskStore, warn_regrown
from hf_prune.utils.offloaded_weights import values_of
from hf_prune.utils.results import Result

MIN_SPARSITY = 0.01  # below it, zeros are those that rounding leaves


@dataclass(frozen=True, repr=False)
class AdoptionReport(Result):
    """Which zeros became masks. ``print(report)`` says it in words.

    Args:
        adopted: The share of zeros of each weight that has a mask now, by parameter name.
        zeros: How many zeros those are.
        weights: How many weights have those masks.
        left: Why other matrices that have zeros got no mask, by parameter name.
    """

    bars = ("zeros",)

    adopted: dict[str, float]
    zeros: int
    weights: int
    left: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dict(vars(self))

    def rows(self) -> list[dict[str, Any]]:
        """The weights that have a mask now, with their share of zeros."""
        return [{"weight": name, "zeros": share} for name, share in self.adopted.items()]

    def __str__(self) -> str:
        shares = self.adopted.values()
        lines = [
            f"Zeros that are masks now: {self.zeros:,} of {self.weights:,} weights "
            f"({100 * self.zeros / self.weights:.2f} %). Tensors: {len(self.adopted)}, with {100 * min(shares):.2f} to "
            f"{100 * max(shares):.2f} % zeros."
        ]
        return "\n".join(lines + [f"Left as it is: {name}, {why}." for name, why in self.left.items()])


def adopt_zeros(
    model: nn.Module,
    *,
    target_modules: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] = (),
    min_sparsity: float = MIN_SPARSITY,
) -> AdoptionReport:
    """Turn the zeros that another tool left in a model into masks, so that training and pruning further keep them.

    Only weights that can be pruned get masks, so zeros of biases, norms and embeddings stay free; so do those of a
    weight that is zero throughout, as layers begin that are yet to be trained, unless ``target_modules`` names it.
    Masks that the model has already stay: what either removes is removed.

    Args:
        model: Any torch module; its weights stay as they are.
        target_modules: Which modules, as in :class:`PruningConfig`. None: every Linear, Conv1D and convolution but the
            output embedding.
        exclude_modules: Modules left alone, named in the same way.
        min_sparsity: Weights with a smaller share of zeros get no mask: rounding leaves some as well.

    Returns:
        What was adopted, and what was not; print it.

    Raises:
        MaskError: If there are no such zeros, or masks of the model do not fit it.
        PlanError: If a name matches no module, or weights are not loaded, quantized, or masked by
            ``torch.nn.utils.prune``.
        ConfigError: If a setting is invalid.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> _ = layer.weight.data[:, 0].zero_()
        >>> print(adopt_zeros(layer))
        Zeros that are masks now: 2 of 8 weights (25.00 %). Tensors: 1, with 25.00 to 25.00 % zeros.
    """
    least = check_sparsity("min_sparsity", min_sparsity)
    every = target_modules is None
    config = PruningConfig.from_dict(
        {"target_modules": ".*" if every else target_modules, "exclude_modules": exclude_modules}
    )
    targets = resolve_targets(model, config)
    store = MaskStore.of(model) or MaskStore()
    store.check(model)
    warn_regrown(model, "they become zero now")
    parameters = dict(model.named_parameters())
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    tables |= set() if output is None else set(map(id, output.parameters()))
    shares, left, masks = {}, {}, {}
    for target in targets:
        weight = values_of(model, target.name, parameters[target.name])
        mask = weight != 0
        share = 1 - int(mask.count_nonzero()) / target.size
        if not share:
            continue
        if every and id(parameters[target.name]) in tables and target.name not in store.masks:
            if share >= least:
                left[target.name] = f"of which {100 * share:.2f} % is zero: embeddings are not taken unless named"
        elif share < least and target.name not in store.masks:
            left[target.name] = f"of which {100 * share:.3f} % is zero, less than min_sparsity={least:g}"
        elif share == 1 and every and target.name not in store.masks:
            left[target.name] = "which is zero throughout, as if it were yet to be trained: name it in target_modules"
        else:
            shares[target.name], masks[target.name] = share, mask
    if not masks:
        found = f": {next(iter(left))}, {next(iter(left.values()))}" if left else ", of which none has a zero"
        raise MaskError(
            f"there are no zeros to adopt in the {len(targets)} weights of this {type(model).__name__} that can be "
            f"pruned{found}; load the model that the other tool made sparse, or prune this one"
        )
    for name in uncovered_matrices(model) if every else ():
        share = 1 - int(values_of(model, name, parameters[name]).count_nonzero()) / parameters[name].numel()
        if share >= least > 0:
            left[name] = f"of which {100 * share:.2f} % is zero, and which is of no kind that can be pruned"
    store.update(model, masks, {}, store.config, keep_dense=False)
    size = sum(mask.numel() for mask in masks.values())
    zeros = size - sum(int(store.masks[name].count_nonzero()) for name in masks)
    return AdoptionReport(shares, zeros, size, left)
