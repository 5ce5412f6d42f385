"""What outputs of plain linear layers lack, told by their inputs: ``W (x_dense - x)``.

Layers with the same inputs, such as query, key and value, then share all sums, which are those of their inputs: fewer
and smaller products than with the outputs of each. It takes that all tokens count the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from hf_prune.calibration.accumulators import InputAccumulator, SlabAccumulators
from hf_prune.calibration.input_groups import group_by_input
from hf_prune.calibration.input_reader import InputReader
from hf_prune.kernels.matrix import Target


class InputChanges(SlabAccumulators):
    """Sums over inputs of the pruned model, and of how far those of the dense model are from them.

    Args:
        needs: See :class:`~hf_prune.calibration.accumulators.InputAccumulator`.
        target: The target, with a single matrix.
        dense: Returns the inputs (tokens, in) of the dense model for those that are added.
    """

    def __init__(self, needs: Iterable[str], target: Target, dense: Callable[[Tensor], Tensor]) -> None:
        _, inputs = target.slab_shape
        self.parts = [InputAccumulator(needs, inputs, inputs)]
        self._dense = dense

    def add(self, x: Tensor, weight: Tensor | None = None, change: Tensor | None = None, slab: int = 0) -> None:
        """Add some tokens; see :meth:`SlabAccumulators.add`."""
        super().add(x, weight, self._dense(x).float() - x.float(), slab)


def is_plain_linear(module: nn.Module, target: Target) -> bool:
    """Whether the outputs of a module are its inputs times the target, plus a constant."""
    return type(module) is nn.Linear and target.name.rpartition(".")[2] == "weight" and target.slabs == 1


def gather_changes(
    reader: InputReader,
    targets: list[Target],
    needs: frozenset[str],
    dense: Callable[[str, int, int, Tensor], Tensor],
    progress: bool | None = None,
) -> Mapping[str, dict[str, Tensor]]:
    """Statistics of some targets as :meth:`OutputMatcher.gather` returns them, without ``output_weight``.

    Args:
        reader: Runs the pruned model.
        targets: Plain linear layers that still have their dense weights.
        needs: Statistics of the inputs.
        dense: Returns the dense model's inputs, by the target's name, the batch, the number of the call, and the inputs
            of the pruned model.
        progress: Show a progress bar.
    """

    def accumulate() -> dict[str, SlabAccumulators]:
        calls: dict[tuple[str, int], int] = {}

        def new(target: Target) -> SlabAccumulators:
            def recorded(x: Tensor) -> Tensor:
                key = (target.name, reader.current)
                calls[key] = calls.get(key, -1) + 1
                return dense(*key, calls[key], x)

            return InputChanges(needs, target, recorded)

        groups, accumulators, watchers = group_by_input(targets, new, reader.inputs, reader.watchers, reader.padding)

        def same_inputs() -> bool:
            return all([group.end_batch() for group in groups])

        reader.run(watchers, range(len(reader.batches)), progress, after_batch=same_inputs)
        for group in groups:
            group.accumulator.add_others(reader.device)
        return accumulators

    statistics = {}
    parameters = dict(reader.model.named_parameters())
    for name, sums in reader.repeated(accumulate).items() if targets else ():
        changes, weight = sums.changes(reader.device), parameters[name].detach().float()
        statistics[name] = {
            **sums.statistics(needs, reader.device),
            "output_change": weight @ changes["output_change"],
            "change_products": weight @ changes["change_products"],
        }
        reader.tokens[name] = sums.tokens
    return statistics
