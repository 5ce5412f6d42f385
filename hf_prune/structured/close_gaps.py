"""Make up for removed layers: the matrix before each gap is solved for again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_prune.architectures.bypass import bypass, is_bypassed, restore
from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.architectures.layers import layer_lists
from hf_prune.calibration.batches import Batches, without_labels
from hf_prune.calibration.padding import first_tensor
from hf_prune.calibration.predictions import token_mask
from hf_prune.kernels.least_squares import cholesky_factor
from hf_prune.utils.distributed import all_reduce_sum, broadcast, fail_together, rank_items
from hf_prune.utils.forward import batch_to_device, eval_mode, no_cache, run_model
from hf_prune.utils.notices import warn_user
from hf_prune.utils.offload_cache import OffloadCache
from hf_prune.utils.progress import Bar

_RIDGE = 1e-2  # of the mean square of an input: how much it costs to leave the dense weights
_CLOSE = 1e-3  # share by which a change of the matrix's output may differ from that of its layer


@dataclass(frozen=True)
class Gap:
    """A run of removed layers.

    Args:
        before: The layer before it, whose output is to be that of the last removed one.
        last: The last removed layer.
        weight: The name of the weight that the layer before ends with, of a Linear or Conv1D.
    """

    before: nn.Module
    last: nn.Module
    weight: str


def find_gaps(model: nn.Module, removed: Collection[str]) -> list[Gap]:
    """The gaps that removed layers leave, where the layer before ends with a Linear or Conv1D that reads its neurons.

    Args:
        model: The model.
        removed: Names of layers that this pruning removes; those that are bypassed already stay so.
    """
    ends = {}
    for group in find_unit_groups(model):
        if group.kind == "neuron" and len(group.layers) == 1 and len(group.consumers) == 1 and not group.choices:
            ends[group.layers[0]] = group.consumers[0].name
    gaps = []
    for layers in layer_lists(model):
        before: int | None = None
        for number, (name, layer) in enumerate(zip(layers.layer_names(), layers.layers, strict=True)):
            follows = number + 1 < len(layers.layers) and layers.layer_names()[number + 1] in removed
            if name in removed and not follows and before is not None:
                weight = ends.get((layers.name, before))
                if weight is not None and type(model.get_submodule(weight.rpartition(".")[0])) in (nn.Linear, Conv1D):
                    gaps.append(Gap(layers.layers[before], layer, weight))
            elif name not in removed and not is_bypassed(layer):
                before = number
    return gaps


@torch.no_grad()
def close_gaps(
    model: nn.Module,
    removed: Collection[str],
    batches: Batches,
    write: Callable[[Mapping[str, Tensor]], object],
    progress: bool | None,
    cache_bytes: int,
) -> list[str]:
    """Solve for the matrix before each gap, so that what follows gets the hidden states that the dense model had there.

    Least squares on the calibration tokens, on the hidden states that the model has with the gaps before it closed.
    ReplaceMe (Shopkhoev et al. 2025, arXiv:2505.02819) estimates a linear map of what this matrix computes instead,
    which is one of the solutions that are possible here.

    Args:
        model: The model, with the layers bypassed.
        removed: Their names.
        batches: Calibration batches.
        write: Writes new weights, by name.
        progress: Show a progress bar.
        cache_bytes: How much of the dense hidden states is kept in memory; the rest goes to a temporary folder.

    Returns:
        The names of the weights that were solved for; not those whose layer does something else with their outputs than
        to add them to its own, as where a norm follows.
    """
    gaps = find_gaps(model, removed)
    if not gaps:
        return []
    solved = []
    with eval_mode(model), fail_together(), ExitStack() as stack:
        dense = OffloadCache(cache_bytes)
        stack.callback(dense.close)
        parts = [(i, without_labels(model, batch_to_device(model, batch))) for i, batch in enumerate(batches)]
        mine = list(rank_items(parts))
        bar = stack.enter_context(Bar[object](total=len(mine) * (1 + len(gaps)), desc="Gaps", progress=progress))
        layers = [model.get_submodule(name) for name in removed]
        for layer in layers:
            restore(layer)
        try:
            for number, inputs in mine:
                states = _outputs(model, inputs, [gap.last for gap in gaps])
                dense.put(number, [token_rows(model, inputs, first_tensor(states[gap.last])) for gap in gaps])
                bar.update()
        finally:
            for layer in layers:
                bypass(layer)
        for place, gap in enumerate(gaps):
            new = _solution(model, gap, place, mine, dense, bar)
            if new is not None:
                write({gap.weight: new})
                solved.append(gap.weight)
    return solved


def _solution(
    model: nn.Module,
    gap: Gap,
    place: int,
    parts: Sequence[tuple[int, Mapping[str, Any]]],
    dense: OffloadCache,
    bar: Bar[object],
) -> Tensor | None:
    """The weight with which the layer before a gap gives what the dense model has behind it; None if that cannot be."""
    linear = model.get_submodule(gap.weight.rpartition(".")[0])
    sums = GapSums(linear)
    for number, inputs in parts:
        states = _outputs(model, inputs, [gap.before], linear)
        before = first_tensor(states[gap.before])
        if number == parts[0][0]:
            sums.adds = adds_only(before, linear, partial(_output, model, inputs, gap.before))
        x, returned = token_rows(model, inputs, states[linear]), token_rows(model, inputs, before)
        sums.add(x, dense.get(number)[place], returned)
        bar.update()
    return sums.solution(model.get_parameter(gap.weight))


class GapSums:
    """Sums over the tokens from which the weight before a gap is solved for.

    Args:
        linear: The Linear or Conv1D that has the weight.

    Attributes:
        adds: Whether the layer adds what the weight computes to its output, and does nothing else with it.
    """

    def __init__(self, linear: Any) -> None:
        self._is_transposed = type(linear) is Conv1D  # (in, out)
        out, inputs = reversed(linear.weight.shape) if self._is_transposed else linear.weight.shape
        self._gram = torch.zeros(inputs, inputs, dtype=torch.float64)
        self._products = torch.zeros(inputs, out, dtype=torch.float64)
        self.adds = True

    def add(self, x: Tensor, wanted: Tensor, returned: Tensor) -> None:
        """Add the tokens of a batch.

        Args:
            x: (tokens, in) what the weight reads.
            wanted: (tokens, out) what the dense model has behind the gap.
            returned: (tokens, out) what the layer returns.
        """
        x = x.double().cpu()
        self._gram += x.t() @ x
        self._products += x.t() @ (wanted.double().cpu() - returned.double().cpu())

    def solution(self, stored: Tensor) -> Tensor | None:
        """The new weight; None where the layer does more than to add what it computes.

        Args:
            stored: The weight as it is.
        """
        if int(all_reduce_sum(torch.tensor(int(not self.adds)))):
            return None
        weight = stored.t() if self._is_transposed else stored
        gram, products = all_reduce_sum(self._gram), all_reduce_sum(self._products)
        change = torch.cholesky_solve(products, cholesky_factor(gram, _RIDGE)).t()  # (out, in)
        new = broadcast((weight.double().cpu() + change).to(weight))
        return new.t().contiguous() if self._is_transposed else new


def adds_only(before: Tensor, linear: nn.Module, run: Callable[[], Tensor]) -> bool:
    """Whether a layer adds what its last matrix computes to its output, and does nothing else with it.

    Args:
        before: What it returns.
        linear: Has the matrix.
        run: Runs the layer once more, and gives what it returns.
    """
    offset = []

    def shift(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        offset.append(output * torch.linspace(-0.5, 0.5, output.shape[-1], device=output.device, dtype=output.dtype))
        return output + offset[-1]

    handle = linear.register_forward_hook(shift)
    try:
        after = run()
    finally:
        handle.remove()
    if len(offset) != 1 or offset[0].numel() != after.numel():
        return False
    error = (after - before).reshape(-1) - offset[0].reshape(-1)
    return float(error.abs().max()) <= _CLOSE * float(offset[0].abs().max()) + 1e-6 * float(before.abs().max())


def _output(model: nn.Module, inputs: Mapping[str, Any], layer: nn.Module) -> Tensor:
    """What a layer returns for a batch."""
    return first_tensor(_outputs(model, inputs, [layer])[layer])


def _outputs(
    model: nn.Module, inputs: Mapping[str, Any], layers: Sequence[nn.Module], linear: nn.Module | None = None
) -> dict[nn.Module, Any]:
    """What some layers return for a batch, and what a Linear gets; the model is run no further than needed."""
    seen: dict[nn.Module, Any] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen[module] = args[0] if module is linear else output
        if all(layer in seen for layer in layers):
            raise _DoneError

    with ExitStack() as hooks:
        for module in (*layers, *(() if linear is None else (linear,))):
            hooks.callback(module.register_forward_hook(keep).remove)
        try:
            run_model(model, {**no_cache(model), **inputs})
        except _DoneError:
            pass
    return seen


def warn_of_open_gaps(model: nn.Module, repair: str | None) -> None:
    """Warn that no gap could be closed.

    Args:
        model: The model.
        repair: What was asked for.
    """
    warn_user(
        f"repair={repair!r} changed nothing: in {type(model).__name__}, what the layer before a gap computes is not "
        f"simply added, as where a norm follows, or nothing stands before the gap"
    )


class _DoneError(Exception):
    """All that is looked at was computed."""


def token_rows(model: nn.Module, inputs: Mapping[str, Any], states: Tensor) -> Tensor:
    """(tokens, features), without padding."""
    mask = token_mask(model, inputs)
    rows = states.reshape(-1, states.shape[-1])
    if mask is None or states.dim() not in (2, 3) or len(rows) != mask.numel():
        return rows
    return rows[mask.bool().flatten()]  # some models have flattened (batch, seq)
