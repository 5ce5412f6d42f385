"""How far the outputs of each target are from those of the dense model, on the inputs that the pruned model gives it.

A layer-wise method usually has each layer reproduce what its own dense weights would make of the inputs that the pruned
layers before it put out. Here the goal is what the dense model put out for the same tokens, so that a layer makes up
for errors of the layers before it. Where a target's output is only added to a residual stream, the goal is the sum:
the layer then corrects the stream as well. Tokens count as much as the predictions depend on them, see
``sensitivity.py``.

The dense model's outputs are recorded one block at a time, just before the block is pruned; what its blocks put out is
kept for the next one. So there is no second copy of the weights. Where blocks cannot be told apart or replayed,
everything is recorded at the start.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.accumulators import InputAccumulator
from hf_prune.calibration.hooks import Watcher
from hf_prune.calibration.input_reader import Batches, InputReader, Statistics, check_finite
from hf_prune.calibration.padding import first_input, first_tensor
from hf_prune.calibration.sensitivity import Sensitivity
from hf_prune.errors import CalibrationError
from hf_prune.kernels.matrix import output_rows
from hf_prune.planning.plan import PlannedTensor, PruningPlan
from hf_prune.utils.distributed import broadcast, rank_and_world_size
from hf_prune.utils.offload_cache import OffloadCache

TOKEN_SHARE = (
    0.5  # of a token's weight that goes by how much the predictions depend on it; the rest is the same for all
)


@dataclass(frozen=True)
class _MatchPoint:
    """Where the goal of a target is measured, if not at its own output: a module's input or output."""

    module: nn.Module
    output: bool

    def watcher(self, call: Callable[[Tensor], None]) -> Watcher:
        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call(first_tensor(output) if self.output else first_input(args, kwargs))

        return Watcher(self.module, see, after=self.output)


class OutputMatcher:
    """What the dense model puts out where targets are compared with it.

    Args:
        model: The model, dense, in eval mode.
        plan: Its targets.
        batches: Calibration batches.
        sensitivity: Weights of the tokens.
        cache_bytes: How much is kept in memory, of what blocks put out and of what targets put out; the rest goes to a
            temporary folder.
        reuse: Whether finished blocks may return what they put out before.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: PruningPlan,
        batches: Batches,
        sensitivity: Sensitivity,
        cache_bytes: int,
        reuse: bool = True,
    ) -> None:
        self._batches = list(batches)
        self._sensitivity = sensitivity
        self._dense = InputReader(model, plan, self._batches, reuse=reuse, cache_bytes=cache_bytes)
        self._dense.order(warned=False)
        self._dense.replay.enabled = reuse and self._dense.verify()
        self._cache_bytes = cache_bytes
        self._goals = OffloadCache(cache_bytes)
        self._anchors: dict[str, _MatchPoint | None] = {}

    def __enter__(self) -> OutputMatcher:
        self._dense.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._goals.close()
        self._dense.tokens.clear()
        self._dense.__exit__(*error)

    def segments(self, steps: Sequence[list[PlannedTensor]]) -> Iterator[list[list[PlannedTensor]]]:
        """Steps that are recorded together, in order; each segment is recorded when it is asked for.

        Args:
            steps: As of :meth:`InputReader.order`.

        Raises:
            NotAlikeError: If a block could not be replayed after all.
        """

        def block(step: list[PlannedTensor]) -> int:
            blocks = {id(self._dense.block_of(t.target.name)) for t in step}
            return blocks.pop() if len(blocks) == 1 else id(None)

        groups = [(key, list(found)) for key, found in itertools.groupby(steps, block)]
        keys = [key for key, _ in groups]
        shared = any(len(users) != 1 for users in self._dense.users.values())  # pruned in one, a weight changes in all
        # A target outside of the blocks is computed in every run: those before a block must be dense as long.
        early = id(None) in keys[:-1]
        replays = self._dense.replay.enabled and self._dense.replay.stacks
        if not replays or len(set(keys)) != len(keys) or shared or early:
            groups = [(id(None), list(steps))]
            self._dense.replay.enabled = False  # there is no later run
        for _, group in groups:
            self._record([t for step in group for t in step])
            yield group

    def _record(self, tensors: Sequence[PlannedTensor]) -> None:
        names = {t.target.name for t in tensors} & self._dense.signatures.keys() - self._sensitivity.misplaced
        known = [t for t in tensors if t.target.name in names]
        self._goals.close()
        for t in known:
            self._anchors[t.target.name] = self._anchor(t)
        rows: dict[str, list[Tensor]] = {}
        self._dense.finish(tensors)
        watchers = [
            w for t in known for w in self._watchers(t, lambda name, _, z: rows.setdefault(name, []).append(z.clone()))
        ]

        def keep(*_: Any) -> None:
            for name in list(rows):
                self._goals.put((name, self._dense.current), rows.pop(name))

        self._dense.run(watchers, range(len(self._batches)), after_batch=keep)

    def _watchers(
        self, tensor: PlannedTensor, found: Callable[[str, Tensor, Tensor], None], reader: InputReader | None = None
    ) -> list[Watcher]:
        """Hooks that hand on the inputs (tokens, in) of each call of a target, and the output or sum (tokens, out)."""
        reader = reader or self._dense
        name, layout = tensor.target.name, tensor.target.layout
        anchor = self._anchors[name]
        pending: list[tuple[Tensor, Tensor | None]] = []

        def hand_on(x: Tensor, mask: Tensor | None, z: Tensor) -> None:
            z = output_rows(z, layout)
            found(name, x, z if mask is None else z[mask])

        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = first_input(args, kwargs)
            mask = None if layout == "conv" else reader.padding.mask(module, x)
            rows = reader.padding.rows(module, x, layout)
            if anchor is None:
                hand_on(rows, mask, output)
            else:
                pending.append((rows.clone(), mask))  # what comes in between may change it in place

        watchers = [Watcher(module, see, after=True) for module in reader.holders[name]]
        if anchor is not None:
            watchers.append(anchor.watcher(lambda z: hand_on(*pending.pop(), z)))
        return watchers

    def gather(self, reader: InputReader, tensors: Sequence[PlannedTensor], progress: bool = False) -> Statistics:
        """Statistics of the inputs of some targets of the segment that was recorded last, on the pruned model.

        Args:
            reader: Runs the pruned model.
            tensors: Targets that have their dense weights yet.
            progress: Show a progress bar.

        Returns:
            ``input_gram``, ``input_norm``, ``input_mean``, ``output_change``, ``change_products`` and
            ``output_weight`` of :class:`~hf_prune.criteria.base.WeightStats`.

        Raises:
            CalibrationError: If one is not finite.
        """
        needs = frozenset({"input_gram", "input_norm", "input_mean"})
        matched = [t for t in tensors if t.target.name in self._anchors]
        rest = [t for t in tensors if t.target.name not in self._anchors]
        sums = reader.repeated(lambda: self._sums(reader, matched, needs, progress)) if matched else {}
        found = reader.gather(rest, needs, progress) if rest else {}
        for t in matched:
            name = t.target.name
            device = reader.device
            sums[name].add_others(device)
            means = sums[name].means(device)
            found[name] = {
                **sums[name].statistics(needs, device),
                "output_change": means["changes"],
                "change_products": means["change_products"],
            }
            reader.tokens[name] = sums[name].tokens
            check_finite(name, found[name])
        for name, values in found.items():
            values["output_weight"] = self._sensitivity.outputs[name]
        return found

    def _sums(
        self, reader: InputReader, tensors: Sequence[PlannedTensor], needs: frozenset[str], progress: bool
    ) -> dict[str, InputAccumulator]:
        sums = {t.target.name: InputAccumulator(needs, *reversed(t.target.matrix_shape)) for t in tensors}
        calls: dict[tuple[str, int], int] = {}

        def add(name: str, x: Tensor, z: Tensor) -> None:
            key = (name, reader.current)
            call = calls[key] = calls.get(key, -1) + 1
            goals = self._goals.get(key) if key in self._goals else []
            if call >= len(goals) or goals[call].shape != z.shape:
                then = tuple(goals[call].shape) if call < len(goals) else "nothing"
                raise CalibrationError(
                    f"{name} put out {tuple(z.shape)} for a calibration batch, and {then} when the model was dense: "
                    f"objective='loss' needs a model that treats every token alike; use objective='layer'"
                )
            weight = self._sensitivity.weights(*key, call).to(x.device)
            sums[name].add(x, 1 - TOKEN_SHARE + TOKEN_SHARE * weight, goals[call].float() - z.float())

        watchers = [w for t in tensors for w in self._watchers(t, add, reader)]
        reader.run(watchers, range(len(self._batches)), progress)
        return sums

    # --- where to compare ---------------------------------------------------------------------------

    def _anchor(self, tensor: PlannedTensor) -> _MatchPoint | None:
        """The first norm's input or the block's output that is the target's output plus something, if there is one.

        Found by trying: on the first batch, what is added to the output must arrive there unchanged.
        """
        name = tensor.target.name
        own, block = self._dense.holders[name][0], self._dense.block_of(name)
        if block is None or len(self._dense.holders[name]) > 1 or id(own) not in self._dense.once:
            return None
        norms = [module for module in block.modules() if "norm" in type(module).__name__.lower()]
        anchors = [_MatchPoint(module, False) for module in norms if id(module) in self._dense.once] + [
            _MatchPoint(block, True)
        ]
        plain = self._seen(own, anchors, None)
        noise = {}

        def push(output: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            size = output.float().std() if output.numel() > 1 else torch.ones(())
            noise[0] = (torch.randn(output.shape, generator=generator).to(output.device) * size).to(output.dtype)
            return output + noise[0]

        moved = self._seen(own, anchors, push)
        chosen = -1
        for i in plain:  # in the order of the calls
            if i in moved and noise and plain[i].shape == moved[i].shape == noise[0].shape:
                change, wanted = (moved[i] - plain[i]).float(), noise[0].float()
                if bool((change - wanted).abs().mean() <= 0.05 * wanted.abs().mean()) and bool(wanted.any()):
                    chosen = i
                    break
        chosen = int(broadcast(torch.tensor(chosen)))  # all processes compare in the same place
        return None if chosen < 0 else anchors[chosen]

    def _seen(
        self, own: nn.Module, anchors: Sequence[_MatchPoint], push: Callable[[Tensor], Tensor] | None
    ) -> dict[int, Tensor]:
        """What passes the anchors after the target's own call, on this process's first batch."""
        seen: dict[int, Tensor] = {}
        called: list[bool] = []

        def change(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            called.append(True)
            return None if push is None else push(output)

        def note(i: int) -> Callable[[Tensor], None]:
            def see(z: Tensor) -> None:
                if called and isinstance(z, Tensor):
                    seen[i] = z.detach().clone()

            return see

        watchers = [Watcher(own, change, after=True), *(a.watcher(note(i)) for i, a in enumerate(anchors))]
        firsts = range(min(rank_and_world_size()[1], len(self._batches)))
        self._dense.run(watchers, firsts, record=False)
        return seen
