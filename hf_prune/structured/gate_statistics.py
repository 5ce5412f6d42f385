"""Measure how much the predictions of a model change when a unit or a layer is removed. Needs no labels."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.bypass import bypass, restore
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.calibration.accumulators import accumulate_dtype
from hf_prune.calibration.batches import Batches, count_examples, small_batches, without_labels
from hf_prune.calibration.gradients import differentiable
from hf_prune.calibration.hooks import Watcher
from hf_prune.calibration.output_head import HeadFinder, sampled_by
from hf_prune.calibration.padding import first_input
from hf_prune.calibration.predictions import named_logits, token_mask
from hf_prune.criteria.base import derived_seed
from hf_prune.errors import CalibrationError
from hf_prune.structured.expert_calls import ExpertCalls, sum_by_example
from hf_prune.utils.distributed import all_reduce_sum, fail_together, rank_items
from hf_prune.utils.forward import batch_to_device, device_of, eval_mode, run_model
from hf_prune.utils.progress import Bar

NO_UNITS = "the model's output for a calibration batch depends on none of the units to be pruned"
MOST_PAIRS = 4096  # units of a group up to which pairs of them are considered


@dataclass(frozen=True)
class GateStatistics:
    """Gradients of the predictions with respect to gates of 1 that multiply the outputs of the units of a group.

    Args:
        fisher: (units, units) mean product over the examples; only its diagonal (units,) if there are very many, and
            (choices, units) for packed experts.
        absolute: (units,) mean absolute value; (choices, units) for packed experts.
        missed: Numbers of the experts that no token reached; of a group in a single expert, 0 or none.
    """

    fisher: Tensor
    absolute: Tensor
    missed: tuple[int, ...] = ()


def gate_statistics(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    batches: Batches,
    seed: int = 0,
    progress: bool | None = None,
    pairs: bool = True,
) -> dict[str, GateStatistics]:
    """Measure the gradients of gates with one backward pass for each batch.

    Each example gets a gradient of its own, since no gate acts on two of them; in experts, of the tokens that a router
    sends there. What is differentiated is :func:`hf_prune.calibration.predictions.sampled_prediction`.

    Args:
        model: The model; its weights, gradients and modes are as before afterwards.
        groups: Groups of it.
        batches: Calibration batches.
        seed: Draws labels and directions.
        progress: Show a progress bar.
        pairs: Whether to keep the products of pairs of gates, and not only the squares of each.

    Returns:
        The statistics of each group, by name, averaged over the examples of all processes.

    Raises:
        CalibrationError: If a gradient is not finite, or the predictions depend on none of the groups.
        PlanError: If packed experts multiply in a way that nobody has told.
    """
    gates = Gates(model, groups, pairs)
    examples = 0
    find_head = HeadFinder(model)
    with ExitStack() as context:
        context.enter_context(differentiable(model, ()))
        gates.install(groups, context)
        context.enter_context(fail_together())
        numbered = rank_items(list(enumerate(batches)))
        for index, batch in Bar(numbered, desc="Units", progress=progress):
            generator = torch.Generator().manual_seed(derived_seed(seed, index))
            for part in small_batches(model, without_labels(model, batch_to_device(model, batch))):
                head = find_head(part)
                mask = token_mask(model, part)
                with gates.reading(part):
                    with torch.enable_grad():
                        value = sampled_by(head, partial(run_model, model), part, mask, generator)
                    if not value.requires_grad:
                        raise CalibrationError(NO_UNITS)
                    value.backward()
                examples += count_examples(part)
    return gates.statistics(groups, examples)


class Gates:
    """Gates of 1 that multiply the outputs of units, and the sums of their gradients.

    Args:
        model: The model.
        groups: Groups of it.
        pairs: As for :func:`gate_statistics`.

    Attributes:
        reached: Whether any gate got a gradient.

    Raises:
        PlanError: If packed experts multiply in a way that nobody has told.
    """

    def __init__(self, model: nn.Module, groups: Sequence[UnitGroup], pairs: bool) -> None:
        self._calls = ExpertCalls(model, groups)
        self._pairs = pairs
        self._packed = {group.name for group in groups if group.choices}
        self._tokens = {group.name: torch.zeros(max(1, group.choices)) for group in groups}
        self._dtype = accumulate_dtype(device_of(model))
        self._products: dict[str, Tensor] = {}
        self._absolute: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}  # (batch, choices, units) of the batch that is running, by group
        self._earlier: dict[tuple[str, Hashable], Tensor] = {}  # of stages before, by group and part
        self._size = 0  # examples in that batch; 0 where nobody reads
        self.reached = False

    def install(self, groups: Sequence[UnitGroup], hooks: ExitStack) -> None:
        """Put the gates of some groups before what consumes their units, until the end of a context."""
        for group in groups:
            for consumer in group.consumers:
                for number, module in enumerate(self._calls.modules(consumer)):
                    Watcher(module, self._gate(group, consumer.width, number)).install(hooks, None)

    def _gate(self, group: UnitGroup, width: int, number: int) -> Any:
        def gate(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> Any:
            x = first_input(args, kwargs)
            if not self._size:
                return None
            size = self._size
            gated = x if x.requires_grad else x.detach().requires_grad_()
            gated = gated.clone()  # so that a later in-place operation does not change whose gradient this is
            values = gated.detach()
            examples = self._calls.examples(group, x, size)
            self._tokens[group.name][number] += x.numel() // max(1, x.shape[-1])

            def read(gradient: Tensor) -> None:
                # The gradient of a gate of 1 is the sum of gradient times value over what it multiplies.
                product = sum_by_example(gradient.float() * values.float(), examples, size)
                by_unit = product.view(len(product), -1, width).sum(2)  # (batch, units)
                if group.name not in self._gradients:
                    shape = (len(by_unit), max(1, group.choices), by_unit.shape[1])
                    self._gradients[group.name] = by_unit.new_zeros(shape)
                # Several consumers may read the same units: then one gate acts on all of them.
                self._gradients[group.name][:, number] += by_unit

            gated.register_hook(read)
            return ((gated, *args[1:]), kwargs) if args else (args, {**kwargs, _first_key(kwargs): gated})

        return gate

    @contextmanager
    def reading(
        self, part: Mapping[str, Any], key: Hashable = None, unfinished: Collection[str] = ()
    ) -> Iterator[None]:
        """The model, or a stage of it, runs a part of a batch inside, forwards and backwards; gradients are added up.

        Args:
            part: The part.
            key: Tells it from others, where the model runs in stages.
            unfinished: Names of groups whose gates get more of the same part in a later stage.
        """
        self._gradients.clear()
        self._size = count_examples(part)
        try:
            with self._calls.watching(part):
                yield
        finally:
            self._size = 0
        self.reached = self.reached or bool(self._gradients)
        for name, gradient in self._gradients.items():  # (batch, choices, units)
            if (earlier := self._earlier.pop((name, key), None)) is not None:
                gradient = earlier + gradient
            if name in unfinished:
                self._earlier[name, key] = gradient
                continue
            gradient = gradient if name in self._packed else gradient[:, 0]
            in_pairs = self._pairs and gradient.dim() == 2 and gradient.shape[1] <= MOST_PAIRS
            product = gradient.t() @ gradient if in_pairs else gradient.square().sum(0)
            self._products[name] = self._products.get(name, 0) + product.to(self._dtype)
            self._absolute[name] = self._absolute.get(name, 0) + gradient.abs().sum(0, dtype=self._dtype)

    def statistics(self, groups: Sequence[UnitGroup], examples: int) -> dict[str, GateStatistics]:
        """The statistics of some groups, which are forgotten.

        Args:
            groups: The groups.
            examples: How many examples this process has run.

        Raises:
            CalibrationError: If a gradient is not finite.
        """
        total = max(1, int(all_reduce_sum(torch.tensor(examples))))
        statistics = {}
        for group in groups:
            each = (group.choices, group.units) if group.choices else (group.units,)
            in_pairs = self._pairs and len(each) == 1 and group.units <= MOST_PAIRS
            nothing = torch.zeros((group.units,) * 2 if in_pairs else each, dtype=self._dtype)
            fisher = all_reduce_sum(self._products.pop(group.name, nothing)) / total
            mean = all_reduce_sum(self._absolute.pop(group.name, torch.zeros(each, dtype=self._dtype))) / total
            if not bool(torch.isfinite(fisher).all()):
                raise CalibrationError(
                    f"the gradient of the predictions at {group.name} is not finite: expected finite values; calibrate "
                    f"in float32 or bfloat16, and check the batches"
                )
            seen = all_reduce_sum(self._tokens[group.name])
            missed = (seen == 0).nonzero().flatten().tolist() if self._calls.is_in_experts(group) else []
            statistics[group.name] = GateStatistics(fisher, mean, tuple(missed))
        return statistics


def _first_key(kwargs: Mapping[str, Any]) -> str:
    return next(key for key, value in kwargs.items() if isinstance(value, Tensor))


@torch.no_grad()
def layer_losses(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches, progress: bool | None = None
) -> dict[str, float]:
    """Measure how much the predictions change when a layer is bypassed, in the units of the gates' Fisher matrix.

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
            for inputs in small_batches(model, without_labels(model, batch_to_device(model, batch))):
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
    """What :func:`sampled_prediction` says of a change of the logits, summed over a batch.

    Args:
        dense: (batch, classes), (batch, seq, classes), or another output.
        changed: Of the same shape.
        mask: (batch, seq), 0 for the tokens whose predictions do not count.
    """
    if dense.dim() == 3 and dense.shape[-1] > 1:  # labels drawn from the model: twice the Kullback-Leibler divergence
        divergence = 2 * nn.functional.kl_div(
            changed.log_softmax(-1), dense.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)  # (batch, seq)
        if mask is not None and mask.shape == divergence.shape:
            divergence = divergence * mask.cpu()
        return float(divergence.sum())
    change = (changed - dense).flatten(1)
    if dense.dim() == 2 and dense.shape[-1] > 1:
        change = change - change.mean(1, keepdim=True)
        return float(change.square().sum()) / (dense.shape[1] - 1)
    return float(change.square().sum()) / change.shape[1]
