"""What calibration tells of the units of a model: how much its predictions change when one goes, without labels."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.calibration.accumulators import accumulate_dtype
from hf_prune.calibration.gradients import batched, differentiable
from hf_prune.calibration.hooks import Watcher
from hf_prune.calibration.input_reader import Batches
from hf_prune.calibration.padding import first_input
from hf_prune.calibration.sensitivity import named_logits, prediction, token_mask
from hf_prune.errors import CalibrationError
from hf_prune.pruning.bypass import bypass, restore
from hf_prune.utils.distributed import all_reduce_sum, fail_together, rank_items
from hf_prune.utils.forward import batch_to_device, eval_mode, run_model
from hf_prune.utils.progress import Bar

MOST_PAIRS = 8192  # units of a site up to which pairs of them are looked at


@dataclass(frozen=True)
class GateStatistics:
    """Gradients of the predictions with respect to gates of 1 on what the units of a site compute.

    Args:
        fisher: (units, units) mean product over the examples; of very many units only its diagonal (units,).
        absolute: (units,) mean absolute value.
    """

    fisher: Tensor
    absolute: Tensor


def gate_statistics(
    model: nn.Module, sites: Sequence[UnitGroup], batches: Batches, seed: int = 0, progress: bool = False
) -> dict[str, GateStatistics]:
    """Gradients of gates, one backward pass for each batch.

    Each example has a gradient of its own, since it is the only one that its gates act on. What is differentiated is
    :func:`hf_prune.calibration.sensitivity.prediction`.

    Args:
        model: The model; its weights, gradients and modes are as before afterwards.
        sites: Sites of it.
        batches: Calibration batches.
        seed: Of labels and directions.
        progress: Show a progress bar.

    Raises:
        CalibrationError: If a gradient is not finite, or the predictions depend on no site.
    """
    dtype = accumulate_dtype(next(model.parameters()).device)
    products: dict[str, Tensor] = {}
    absolute: dict[str, Tensor] = {}
    examples = 0
    found: dict[str, Tensor] = {}
    size = [0]  # examples in the batch that is running

    def watch(site: UnitGroup, width: int) -> Any:
        def gate(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> Any:
            x = first_input(args, kwargs)
            own = x if x.requires_grad else x.detach().requires_grad_()
            own = own.clone()  # a later operation in place does not change what the gradient is of
            values = own.detach()

            def read(gradient: Tensor) -> None:
                product = gradient.float() * values.float()
                product = product.reshape(size[0], -1, product.shape[-1]).sum(
                    1
                )  # (batch, in), of some models flat before
                each = product.view(len(product), -1, width).sum(2)  # (batch, units)
                found[site.name] = found[site.name] + each if site.name in found else each

            own.register_hook(read)
            return ((own, *args[1:]), kwargs) if args else (args, {**kwargs, _first_key(kwargs): own})

        return gate

    with ExitStack() as context:
        context.enter_context(differentiable(model, ()))
        for site in sites:
            for part in site.consumers:
                module = model.get_submodule(part.name.rpartition(".")[0])
                Watcher(module, watch(site, part.width)).install(context, None)
        context.enter_context(fail_together())
        numbered = rank_items(list(enumerate(batches)))
        for index, batch in Bar(numbered, desc="Units", progress=progress):
            found.clear()
            inputs = without_labels(batch_to_device(model, batch))
            size[0] = len(batched(inputs))
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{index}".encode()))
            with torch.enable_grad():
                value = prediction(run_model(model, inputs), token_mask(model, inputs), generator)
            if not value.requires_grad:
                raise CalibrationError(
                    "what the model puts out for a calibration batch depends on none of the units to be pruned"
                )
            value.backward()
            for name, each in found.items():
                pairs = each.t() @ each if each.shape[1] <= MOST_PAIRS else each.square().sum(0)
                products[name] = products.get(name, 0) + pairs.to(dtype)
                absolute[name] = absolute.get(name, 0) + each.abs().sum(0, dtype=dtype)
            examples += size[0]
    every = max(1, int(all_reduce_sum(torch.tensor(examples))))
    statistics = {}
    for site in sites:
        shape = (site.units,) * (2 if site.units <= MOST_PAIRS else 1)
        fisher = all_reduce_sum(products.get(site.name, torch.zeros(shape, dtype=dtype))) / every
        mean = all_reduce_sum(absolute.get(site.name, torch.zeros(site.units, dtype=dtype))) / every
        if not bool(torch.isfinite(fisher).all()):
            raise CalibrationError(
                f"the gradient of the predictions at {site.name} is not finite: expected finite values; calibrate in "
                f"float32 or bfloat16, and check the batches"
            )
        statistics[site.name] = GateStatistics(fisher, mean)
    return statistics


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as the model is run on it: what it predicts is asked for, not how far that is from labels."""
    return {key: value for key, value in batch.items() if key != "labels" or "decoder_input_ids" not in batch}


def _first_key(kwargs: Mapping[str, Any]) -> str:
    return next(key for key, value in kwargs.items() if isinstance(value, Tensor))


@torch.no_grad()
def layer_losses(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches, progress: bool = False
) -> dict[str, float]:
    """How much the predictions change when a layer is bypassed, measured, in the units of the gates' Fisher matrix.

    Args:
        model: The model; as before afterwards.
        layers: Layers of it, by name.
        batches: Calibration batches.
        progress: Show a progress bar.
    """
    totals = torch.zeros(len(layers), dtype=torch.float64)
    examples = 0
    with eval_mode(model), fail_together():
        for batch in Bar(rank_items(list(batches)), desc="Layers", progress=progress):
            inputs = without_labels(batch_to_device(model, batch))
            mask = token_mask(model, inputs)
            dense = [y.float().cpu() for y in named_logits(run_model(model, inputs))]
            examples += len(dense[0])
            for i, layer in enumerate(layers.values()):
                bypass(layer)
                try:
                    without = named_logits(run_model(model, inputs))
                finally:
                    restore(layer)
                totals[i] += sum(
                    prediction_change(a, b.float().cpu(), mask) for a, b in zip(dense, without, strict=True)
                )
    totals = all_reduce_sum(totals) / max(1, int(all_reduce_sum(torch.tensor(examples))))
    return dict(zip(layers, totals.tolist(), strict=True))


def prediction_change(dense: Tensor, changed: Tensor, mask: Tensor | None) -> float:
    """What :func:`prediction` would foretell of a change of the logits, summed over a batch.

    Args:
        dense: (batch, classes), (batch, seq, classes), or another output.
        changed: Of the same shape.
        mask: (batch, seq), 0 for the tokens whose predictions do not count.
    """
    if dense.dim() == 3 and dense.shape[-1] > 1:  # labels drawn from the model: twice the Kullback-Leibler divergence
        each = 2 * nn.functional.kl_div(
            changed.log_softmax(-1), dense.log_softmax(-1), reduction="none", log_target=True
        )
        each = each.sum(-1)  # (batch, seq)
        return float((each if mask is None or mask.shape != each.shape else each * mask.cpu()).sum())
    change = (changed - dense).flatten(1)
    if dense.dim() == 2 and dense.shape[-1] > 1:
        change = change - change.mean(1, keepdim=True)
        return float(change.square().sum()) / (dense.shape[1] - 1)
    return float(change.square().sum()) / change.shape[1]
