"""How far the outputs of each target are from those of the dense model, on the inputs that the pruned model gives it.

Usually a layer-wise method has each layer reproduce what its own dense weights would make of the outputs of the pruned
layers before it. Here a layer is to reproduce the outputs of the dense model for the same tokens, so that it makes up
for errors of the layers before it. Where a target's output is only added to a residual stream, the sum is compared: the
layer then corrects the stream as well. Tokens count as much as the predictions depend on them, see
:mod:`~hf_prune.calibration.sensitivity`.

The outputs of the dense model are recorded one block at a time, just before the block is pruned, and the output of that
block is kept for the next one. So there is no second copy of the weights. Where blocks cannot be told apart or
replayed, everything is recorded at the start.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from hf_prune.calibration.accumulators import SlabAccumulators
from hf_prune.calibration.batches import Batches
from hf_prune.calibration.hooks import Watcher
from hf_prune.calibration.input_matching import gather_changes, is_plain_linear
from hf_prune.calibration.input_reader import InputReader, Statistics, check_finite
from hf_prune.calibration.match_point import MatchPoint, find_match_points
from hf_prune.calibration.padding import first_input
from hf_prune.calibration.replay import Trials
from hf_prune.calibration.sensitivity import Sensitivity
from hf_prune.calibration.slabs import slab_number
from hf_prune.errors import CalibrationError
from hf_prune.kernels.matrix import Target, output_rows
from hf_prune.utils.offload_cache import OffloadCache

TOKEN_SHARE = 0.5  # of a token's weight that follows the sensitivity; the other half is the same for every token
_NEEDS = frozenset({"input_gram", "input_norm", "input_mean"})


class OutputMatcher:
    """The outputs of the dense model, and what those of the pruned model lack: a context.

    Args:
        model: The model, dense, in eval mode.
        targets: The weights that are pruned.
        batches: Calibration batches.
        sensitivity: Weights of the tokens.
        cache_bytes: How much is kept in memory of the outputs of blocks, and again of the outputs of targets; the rest
            goes to a temporary folder.
        reuse: Whether finished blocks may return what they returned before.
        folder: Where that temporary folder is made; None for the system's.
        trials: See :class:`InputReader`.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        batches: Batches,
        sensitivity: Sensitivity,
        cache_bytes: int,
        reuse: bool = True,
        folder: str | os.PathLike[str] | None = None,
        trials: Trials | None = None,
    ) -> None:
        self._batches = list(batches)
        self._sensitivity = sensitivity
        self._dense = InputReader(model, targets, self._batches, reuse, cache_bytes, folder, trials)
        self._dense.order(warn=False)
        self._dense.replay.enabled = reuse and self._dense.verify()
        self._outputs = OffloadCache(cache_bytes, folder)  # of the dense model, by target and batch
        self._points: dict[str, MatchPoint | None] = {}
        self._sources: dict[str, str] = {}  # targets that are matched by their inputs, and whose inputs were recorded

    def __enter__(self) -> OutputMatcher:
        self._dense.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._outputs.close()
        self._dense.tokens.clear()
        self._dense.__exit__(*error)

    def segments(self, steps: Sequence[list[Target]]) -> Iterator[list[list[Target]]]:
        """Steps that are recorded together, in order; each segment is recorded when it is asked for.

        Args:
            steps: As :meth:`InputReader.order` returns them.

        Raises:
            NotAlikeError: If a block could not be replayed after all.
        """

        def block(step: list[Target]) -> int:
            blocks = {id(self._dense.block_of(t.name)) for t in step}
            return blocks.pop() if len(blocks) == 1 else id(None)

        groups = [(key, list(group)) for key, group in itertools.groupby(steps, block)]
        keys = [key for key, _ in groups]
        # While one block is pruned, every later one must still be dense, and every earlier one replayed from its dense
        # outputs. That fails for a weight with several users, which changes in all of them at once; for a block whose
        # steps come in several runs; and for a target outside of the blocks, which is computed in every run: with steps
        # in blocks after it, it would be pruned before those are recorded.
        shared = any(len(users) != 1 for users in self._dense.users.values())
        outside = id(None) in keys[:-1]
        replays = self._dense.replay.enabled and self._dense.replay.sequences
        if not replays or len(set(keys)) != len(keys) or shared or outside:
            groups = [(id(None), list(steps))]
            self._dense.replay.enabled = False  # there is no later run
        for _, group in groups:
            self._record([t for step in group for t in step])
            yield group

    def _record(self, targets: Sequence[Target]) -> None:
        names = {t.name for t in targets} & self._dense.inputs.keys() - self._sensitivity.misplaced
        known = [t for t in targets if t.name in names]
        self._outputs.close()
        self._points |= find_match_points(self._dense, [t.name for t in known])
        for t in known:
            if self._points[t.name] is None and self._sensitivity.tokens_alike and self._is_plain(t):
                same = (name for name in self._sources if self._dense.inputs[name] == self._dense.inputs[t.name])
                self._sources[t.name] = next(same, t.name)
        rows: dict[str, list[Tensor]] = {}
        self._dense.finish(targets)

        def keep(name: str, _: int, __: Tensor, z: Tensor) -> None:
            rows.setdefault(name, []).append(z.clone())

        def end_batch() -> bool:
            for name in list(rows):
                self._outputs.put((name, self._dense.current), rows.pop(name))
            return True

        def keep_inputs(name: str, layout: str) -> Callable[..., None]:
            def see(module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
                x = first_input(args, kwargs)
                rows.setdefault(name, []).append(self._dense.padding.rows(module, x, layout).clone())

            return see

        by_input = [t for t in known if self._sources.get(t.name) == t.name]
        by_output = [t for t in known if t.name not in self._sources]
        watchers = [w for t in by_output for w in self._watchers(self._dense, t, keep)]
        watchers += [w for t in by_input for w in self._dense.watchers(t.name, keep_inputs(t.name, t.layout))]
        self._dense.run(watchers, range(len(self._batches)), after_batch=end_batch)

    def _watchers(
        self, reader: InputReader, target: Target, call: Callable[[str, int, Tensor, Tensor], None]
    ) -> list[Watcher]:
        """Hooks that hand on each call of a target: its inputs (tokens, in) and its output, or the sum (tokens, out).

        Args:
            reader: Runs the model.
            target: The target.
            call: Gets the name of the target, the number of its matrix, the inputs and the outputs.
        """
        name, layout = target.name, target.layout
        point = self._points[name]
        pending: list[tuple[int, Tensor, Tensor | None]] = []

        def hand_on(slab: int, x: Tensor, mask: Tensor | None, z: Tensor) -> None:
            z = output_rows(z, layout)
            call(name, slab, x, z if mask is None else z[mask])

        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = first_input(args, kwargs)
            mask = None if layout == "conv" else reader.padding.mask(module, x)
            rows = reader.padding.rows(module, x, layout)
            if point is None:
                hand_on(slab_number(module), rows, mask, output)
            else:
                rows = rows.clone()  # what comes in between may change it in place
                pending.append((slab_number(module), rows, mask))

        watchers = reader.watchers(name, see, after=True)
        if point is not None:
            watchers.append(point.watcher(lambda z: hand_on(*pending.pop(), z)))
        return watchers

    def gather(self, reader: InputReader, targets: Sequence[Target], progress: bool | None = None) -> Statistics:
        """Statistics of some targets of the segment that was recorded last, on the pruned model.

        Args:
            reader: Runs the pruned model.
            targets: Targets that still have their dense weights.
            progress: Show a progress bar.

        Returns:
            ``input_gram``, ``input_norm``, ``input_mean``, ``output_change``, ``change_products`` and
            ``output_weight`` of :class:`~hf_prune.criteria.base.WeightStats`; for targets that cannot be compared,
            without ``output_change`` and ``change_products``.

        Raises:
            CalibrationError: If one is not finite.
        """
        by_input = [t for t in targets if t.name in self._sources]
        matched = [t for t in targets if t.name in self._points and t.name not in self._sources]
        rest = [t for t in targets if t.name not in self._points]
        accumulators = reader.repeated(lambda: self._accumulate(reader, matched, progress)) if matched else {}
        statistics = reader.gather(rest, _NEEDS, progress) if rest else {}
        statistics |= gather_changes(reader, by_input, _NEEDS, self._recorded_input, progress)
        for t in by_input:
            check_finite(t.name, statistics[t.name])
        for t in matched:
            accumulator = accumulators[t.name]
            accumulator.add_others(reader.device)
            statistics[t.name] = {
                **accumulator.statistics(_NEEDS, reader.device),
                **accumulator.changes(reader.device),
            }
            reader.tokens[t.name] = accumulator.tokens
            check_finite(t.name, statistics[t.name])
        for name, values in statistics.items():
            values["output_weight"] = self._sensitivity.outputs[name]
        return statistics

    def _accumulate(
        self, reader: InputReader, targets: Sequence[Target], progress: bool | None
    ) -> dict[str, SlabAccumulators]:
        accumulators = {t.name: SlabAccumulators(_NEEDS, t, changes=True) for t in targets}
        calls: dict[tuple[str, int], int] = {}

        def add(name: str, slab: int, x: Tensor, z: Tensor) -> None:
            key = (name, reader.current)
            call = calls[key] = calls.get(key, -1) + 1
            dense = self._recorded(key, call, z)
            weight = self._sensitivity.weights(*key, call)
            if weight is not None:
                weight = 1 - TOKEN_SHARE + TOKEN_SHARE * weight.to(x.device)
            accumulators[name].add(x, weight, dense.float() - z.float(), slab)

        watchers = [w for t in targets for w in self._watchers(reader, t, add)]
        reader.run(watchers, range(len(self._batches)), progress)
        return accumulators

    def _is_plain(self, target: Target) -> bool:
        holders = self._dense.holders[target.name]
        return len(holders) == 1 and is_plain_linear(holders[0], target)

    def _recorded_input(self, name: str, batch: int, call: int, x: Tensor) -> Tensor:
        return self._recorded((self._sources[name], batch), call, x)

    def _recorded(self, key: tuple[str, int], call: int, like: Tensor) -> Tensor:
        """What the dense model had in the place of a tensor."""
        dense: list[Tensor] = self._outputs.get(key) if key in self._outputs else []
        if call >= len(dense) or dense[call].shape != like.shape:
            before = tuple(dense[call].shape) if call < len(dense) else "nothing"
            raise CalibrationError(
                f"{key[0]} returned {tuple(like.shape)} for a calibration batch, and {before} when the model was "
                f"dense: objective='loss' needs a model that treats every token alike; use objective='layer'"
            )
        return dense[call]
