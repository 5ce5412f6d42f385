"""Remove layers one after another, each time the one whose absence changes the predictions least."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.bypass import bypass, is_bypassed, restore
from hf_prune.calibration.batches import Batches, count_examples, small_batches, without_labels
from hf_prune.calibration.block_sequence import replaced_forward
from hf_prune.calibration.predictions import named_logits, token_mask
from hf_prune.planning.config import PruningConfig
from hf_prune.structured.gate_statistics import prediction_change
from hf_prune.utils.distributed import all_reduce_sum, fail_together, rank_items
from hf_prune.utils.forward import batch_to_device, eval_mode, no_cache, run_model
from hf_prune.utils.offload_cache import OffloadCache
from hf_prune.utils.progress import Bar

TOKENS = 2048  # that the search looks at: it runs the model once for each layer that may be the next
EXAMPLES = 128  # that it looks at where the model predicts one thing for each
_SHORTLIST = 12  # layers that may be the next, after the first: those that cost least when last tried
_CLOSE = 1e-3  # share by which a change may differ where layers return what they returned before


def losses_without_data(
    config: PruningConfig, layers: Mapping[str, nn.Module], squares: Callable[[nn.Parameter], float]
) -> dict[str, float]:
    """What removing each layer costs by the criterion "random", or by the size of its weights.

    Args:
        config: The settings.
        layers: The layers, by name.
        squares: The sum of squares of a parameter.
    """
    if config.criterion == "random":
        generator = torch.Generator().manual_seed(config.seed)
        draws = torch.rand(len(layers), generator=generator).tolist()
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers.values()]
        return {name: draw * size for name, draw, size in zip(layers, draws, sizes, strict=True)}
    return {name: sum(map(squares, layer.parameters())) for name, layer in layers.items()}


@torch.no_grad()
def greedy_layer_losses(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Batches,
    most: int,
    progress: bool | None = None,
    cache_bytes: int = 2**28,
) -> dict[str, float]:
    """Remove the layer without which the predictions change least, again and again, and measure the change each time.

    The greedy search of SLEB (Song et al. 2024, arXiv:2402.09025) with the divergence from the dense model's
    predictions in place of the loss, so that no labels are needed.

    Args:
        model: The model; as before afterwards.
        layers: Layers of it that may go, by name.
        batches: Calibration batches, of which a sample is used: about :data:`TOKENS` tokens, or :data:`EXAMPLES`
            examples if the model predicts one thing for each, as classifiers do.
        most: How many layers to remove.
        progress: Show a progress bar.
        cache_bytes: How much of the dense predictions is kept in memory; the rest goes to a temporary folder.

    Returns:
        By layer, what its removal adds to the change, in the units of the gates' Fisher matrix. It never falls in the
        order of removal, and is larger for layers that stay. Of layers that are bypassed already it is 0.
    """
    gone = [name for name, layer in layers.items() if is_bypassed(layer)]
    dense = OffloadCache(cache_bytes)
    with eval_mode(model), fail_together(), ExitStack() as undo:
        undo.callback(dense.close)
        sample = list(enumerate(sample_batches(model, batches)))
        parts = list(rank_items(sample))
        for number, part in parts:
            dense.put(number, [y.float().cpu() for y in named_logits(run_model(model, {**no_cache(model), **part}))])
        steps = sum(candidates(len(layers) - len(gone), most - len(gone))) * len(parts)
        bar = undo.enter_context(Bar[object](total=steps, desc="Layers", progress=progress))
        reuses = True

        def changes(tried: Sequence[str], removed: Sequence[str]) -> dict[str, float]:
            nonlocal reuses
            for name in removed[-1:]:
                undo.callback(restore, layers[name])
                bypass(layers[name])
            among = {name: layers[name] for name in tried}
            new = _changes(model, among, layers, parts, dense, reuses, bar)
            if removed:
                return new
            # The last but one tells whether the last layer reads more than what its neighbour returns.
            seen = {name: layers[name] for name in list(tried)[-2:-1] or tried}
            plain = _changes(model, seen, layers, parts, dense, False)
            if any(not math.isclose(plain[name], new[name], rel_tol=_CLOSE, abs_tol=1e-7) for name in seen):
                reuses, new = False, _changes(model, among, layers, parts, dense, False)
            return new

        examples = max(1, sum(count_examples(part) for _, part in sample))
        return greedy_losses(list(layers), gone, most, examples, changes)


def candidates(layers: int, most: int) -> list[int]:
    """How many layers are tried in each turn of a greedy search.

    Args:
        layers: How many may go.
        most: How many of them to remove.
    """
    turns = max(1, min(most, layers - 1))
    return [layers, *(min(_SHORTLIST, layers - turn) for turn in range(1, turns))]


def greedy_losses(
    layers: Sequence[str],
    gone: Collection[str],
    most: int,
    examples: int,
    changes: Callable[[Sequence[str], Sequence[str]], dict[str, float]],
) -> dict[str, float]:
    """The order of a greedy search, as :func:`greedy_layer_losses` returns it.

    Args:
        layers: Names of the layers that may go.
        gone: Those of them that are gone before the search.
        most: How many to remove, these included.
        examples: How many there are in the sample.
        changes: Takes the layers that are tried and those that the search has removed, in its order, and returns how
            much the predictions change without each of the first and all of the second, summed over the examples.
    """
    losses = dict.fromkeys(gone, 0.0)
    removed: list[str] = []
    tried = [name for name in layers if name not in losses]
    added, total = 0.0, 0.0
    latest: dict[str, float] = {}  # of each layer, when it was last tried
    for _ in candidates(len(tried), most - len(losses)):
        latest |= changes(tried, removed)
        least = min(tried, key=latest.__getitem__)
        # Strictly rising, so that a budget removes the first layers of the order and no more.
        added, total = max(1.001 * added + 1e-12, (latest[least] - total) / examples), latest[least]
        losses[least] = added
        removed.append(least)
        staying = sorted((name for name in latest if name not in losses), key=latest.__getitem__)
        tried = [name for name in layers if name in staying[:_SHORTLIST]]
    worst = max([added, *(change / examples for change in latest.values())])
    return {name: losses.get(name, worst + latest.get(name, 0.0) / examples) for name in layers}


def sample_batches(model: nn.Module, batches: Batches) -> Iterator[dict[str, Any]]:
    """About :data:`TOKENS` tokens of calibration batches, or :data:`EXAMPLES` examples, evenly drawn."""
    batches = list(batches)
    first = next(iter(small_batches(model, without_labels(model, batch_to_device(model, batches[0])))))
    of_tokens = any(logits.dim() > 2 for logits in named_logits(run_model(model, {**no_cache(model), **first})))
    if of_tokens and isinstance(first.get("input_ids"), Tensor):
        step = max(1, math.ceil(sum(map(_tokens, batches)) / TOKENS))
    else:
        step = max(1, sum(map(count_examples, batches)) // EXAMPLES)
    within = min(step, max(map(count_examples, batches)))
    for batch in batches[:: math.ceil(step / within)]:
        examples = count_examples(batch)
        some = {
            k: v[::within] if isinstance(v, Tensor) and v.dim() > 0 and len(v) == examples else v
            for k, v in batch.items()
        }
        yield from small_batches(model, without_labels(model, batch_to_device(model, some)))


def _tokens(batch: Mapping[str, Any]) -> int:
    """The tokens of a batch, without padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    return int(mask.sum()) if isinstance(mask, Tensor) and mask.shape == ids.shape else ids.numel()


def _changes(
    model: nn.Module,
    tried: Mapping[str, nn.Module],
    layers: Mapping[str, nn.Module],
    parts: Iterable[tuple[int, Mapping[str, Any]]],
    dense: OffloadCache,
    reuses: bool,
    bar: Bar[object] | None = None,
) -> dict[str, float]:
    """How much the predictions change, summed over the examples, if one layer more is bypassed, for each of some."""
    totals = torch.zeros(len(tried), dtype=torch.float64)
    for number, part in parts:
        inputs, mask, expected = {**no_cache(model), **part}, token_mask(model, part), dense.get(number)
        outputs = _layer_outputs(model, layers.values(), inputs)
        for i, layer in enumerate(tried.values()):
            with _without(layer, outputs, reuses):
                logits = named_logits(run_model(model, inputs))
            totals[i] += sum(prediction_change(a, b.float().cpu(), mask) for a, b in zip(expected, logits, strict=True))
            if bar is not None:
                bar.update()
    return dict(zip(tried, all_reduce_sum(totals).tolist(), strict=True))


def _layer_outputs(model: nn.Module, layers: Collection[nn.Module], inputs: Mapping[str, Any]) -> dict[nn.Module, Any]:
    """What each layer returns, in the order of their calls; without those that are called several times."""
    outputs: dict[nn.Module, Any] = {}
    calls: dict[nn.Module, int] = {}

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        outputs[module] = output
        calls[module] = calls.get(module, 0) + 1

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(keep).remove)
        run_model(model, inputs)
    return {layer: output for layer, output in outputs.items() if calls[layer] == 1}


@contextmanager
def _without(layer: nn.Module, outputs: Mapping[nn.Module, Any], reuses: bool) -> Iterator[None]:
    """Bypass one layer more. Layers before it return what they did, and those that are bypassed compute nothing."""
    was_bypassed, is_before = is_bypassed(layer), layer in outputs and reuses
    with ExitStack() as stack:
        if not was_bypassed:
            bypass(layer)
            stack.callback(restore, layer)
        for other, output in outputs.items():
            is_before = is_before and other is not layer
            if is_before:
                stack.enter_context(replaced_forward(other, lambda *_, _output=output, **__: _output))
            elif is_bypassed(other) and isinstance(output, Tensor):
                stack.enter_context(replaced_forward(other, _first))
        yield


def _first(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else kwargs["hidden_states"]
