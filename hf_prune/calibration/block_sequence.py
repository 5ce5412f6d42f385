"""Blocks that run one after the other, each on what the one before returned."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map

from hf_prune.calibration.tainted import tainted
from hf_prune.utils.offload_cache import OffloadCache


class BlockSequence:
    """Blocks that run one after the other, the first of which may be replayed instead of computed.

    Args:
        blocks: In the order of their calls.
        targets: Names of the parameters in each block that are to be pruned.
        kinds: The kinds of batches that call the blocks; batches of other kinds call none of them.
        samples: Batches of these kinds, on which it is tried whether blocks may be replayed.
        outputs: Where the output of the last replayed block is kept, for each batch.

    Attributes:
        replayed: How many blocks are replayed.
        safe: For each block, whether it and those before it may be replayed; None until this was tried.
        first_use: By target, the first block that returns after any use of the target's weight, such as that of a tied
            embedding; known once it was tried.
        recorded: How often a run in progress has recorded each batch.
        called: The replayed blocks that the running batch has called.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        targets: Sequence[set[str]],
        kinds: frozenset[int],
        samples: Sequence[int],
        outputs: OffloadCache,
    ) -> None:
        self.blocks, self.kinds, self.samples, self.outputs = list(blocks), kinds, list(samples), outputs
        self.replayed = 0
        self.safe: list[bool] | None = None
        self.first_use: dict[str, int] = {}
        self.recorded: dict[int, int] = {}
        self.called: list[int] = []
        self._waiting = [set(names) for names in targets]  # by block, the targets without their final weights
        self._finished = 0  # how many of the first blocks wait for nothing

    def finish(self, finished: Collection[str]) -> None:
        """Say which targets have their final weights, all so far."""
        while self._finished < len(self.blocks) and self._waiting[self._finished].issubset(finished):
            self._finished += 1

    @property
    def replayable(self) -> int:
        """How many of the first blocks may be replayed by now."""
        if self.safe is None:
            return self._finished
        return next((n for n in range(self._finished, 0, -1) if self.safe[n - 1]), 0)

    def wait_for(self, called: Mapping[str, int]) -> None:
        """Add targets outside of the blocks that must have their final weights before a block is replayed.

        Args:
            called: By target, the first block that returns after its call.
        """
        for name, block in called.items():
            self._waiting[block].add(name)
        self._finished = 0

    def give_up(self) -> None:
        """Compute every block from now on."""
        self.safe = [False] * len(self.blocks)
        self.forget()

    def forget(self) -> None:
        """Compute every block until they have been recorded again."""
        self.outputs.close()
        self.recorded.clear()
        self.replayed = 0

    @contextmanager
    def replaying(self, number: int, output: Callable[[], Any]) -> Iterator[None]:
        """Inside, the last of the first ``number`` blocks returns a recorded output, those before it tainted tensors.

        Args:
            number: How many blocks.
            output: Reads the output of the last of them for the batch that is running.
        """
        stand_ins: list[Any] = []  # one for all blocks: made once for each batch, however deep the model is

        def replay(i: int, *_: Any, **__: Any) -> Any:
            self.called.append(i)
            if i == number - 1:
                return output()
            if i == 0:  # a batch begins; blocks called in another order fail the check of the run
                stand_ins[:] = [tree_map(tainted, output())]
            return stand_ins[0]

        replaced = self.blocks[:number]
        previous = [block.__dict__.get("forward") for block in replaced]
        try:
            for i, block in enumerate(replaced):
                block.__dict__["forward"] = partial(replay, i)
            yield
        finally:
            for block, forward in zip(replaced, previous, strict=True):
                _set_forward(block, forward)


def outer_lists(model: nn.Module, targets: set[int]) -> list[list[nn.Module]]:
    """The elements of every ModuleList that holds targets and does not lie in another such list.

    Args:
        model: The model.
        targets: Ids of modules.
    """
    lists: list[list[nn.Module]] = []
    inside: set[int] = set()
    for module in model.modules():  # parents come first
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            below = {id(part) for part in module.modules()}
            if below & targets:
                lists.append(list(module))
                inside |= below
    return lists


def find_sequence(
    blocks: Sequence[nn.Module],
    counts: Mapping[int, Mapping[int, int]],
    kinds: Sequence[int],
    names: Mapping[int, set[str]],
    new_cache: Callable[[], OffloadCache],
) -> BlockSequence | None:
    """The blocks of a list as a sequence, if batches call all of them once and in the same order.

    Args:
        blocks: The blocks.
        counts: By sample batch, how often it called each module (by id), in the order of the first calls.
        kinds: The kind of every batch.
        names: By the id of a module, the names of the targets that it multiplies with.
        new_cache: Makes the cache of the sequence.
    """
    by_id = {id(block): block for block in blocks}
    orders = {batch: [key for key in of_batch if key in by_id] for batch, of_batch in counts.items()}
    samples = [batch for batch, order in orders.items() if order]
    if not samples:
        return None
    order = orders[samples[0]]
    sample_kinds = frozenset(kinds[batch] for batch in samples)
    same_order = all(orders[batch] == order for batch in counts if kinds[batch] in sample_kinds)
    once = all(counts[batch][key] == 1 for batch in samples for key in orders[batch])
    if not same_order or not once or len(order) != len(by_id):
        return None
    ordered = [by_id[key] for key in order]
    targets = [set().union(*(names.get(id(module), set()) for module in block.modules())) for block in ordered]
    return BlockSequence(ordered, targets, sample_kinds, samples, new_cache())


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Call another forward inside, and leave the module as it was."""
    previous = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        _set_forward(module, previous)


def _set_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = forward
