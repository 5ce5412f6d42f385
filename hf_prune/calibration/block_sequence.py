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
    """Blocks that run one after the other.

    Args:
        blocks: In the order of their calls.
        targets: Names of the parameters in each block that are to be pruned.
        kinds: Which kinds of batches call them; the others call none.
        samples: Batches of these kinds, on which it is tried whether blocks may be replayed.
        outputs: Where what the last of the blocks that are not computed any more puts out is kept, for each batch.

    Attributes:
        replayed: How many blocks are not computed any more.
        alike: For each block, whether it and those before it may be replayed; None as long as nobody has checked.
        used: By target, the first block that returns after the target's weight was used in any way, as by a tied
            embedding; known once it has been checked.
        recorded: How often a run in progress has recorded each batch.
        called: Which of the blocks that are not computed any more the running batch has called.
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
        self.alike: list[bool] | None = None
        self.used: dict[str, int] = {}
        self.recorded: dict[int, int] = {}
        self.called: list[int] = []
        self._waiting = [set(names) for names in targets]  # targets without their final weights, by block
        self._finished = 0  # blocks, of which none is waiting

    def finish(self, finished: Collection[str]) -> None:
        """Say which targets have their final weights in all."""
        while self._finished < len(self.blocks) and self._waiting[self._finished].issubset(finished):
            self._finished += 1

    @property
    def goal(self) -> int:
        """How many blocks may be replayed by now."""
        if self.alike is None:
            return self._finished
        return next((n for n in range(self._finished, 0, -1) if self.alike[n - 1]), 0)

    def wait_for(self, called: Mapping[str, int]) -> None:
        """Say what else is called before blocks return, and must have its final weights before they are replayed.

        Args:
            called: By target, the first block that returns afterwards.
        """
        for name, block in called.items():
            self._waiting[block].add(name)
        self._finished = 0

    def compute(self) -> None:
        """Compute every block from now on."""
        self.alike = [False] * len(self.blocks)
        self.forget()

    def forget(self) -> None:
        """Compute every block until they have been recorded again."""
        self.outputs.close()
        self.recorded.clear()
        self.replayed = 0

    @contextmanager
    def replaying(self, number: int, output: Callable[[], Any]) -> Iterator[None]:
        """Inside, the first blocks return what the last of them put out, and tainted tensors.

        Args:
            number: How many.
            output: Reads what the last of them put out for the batch that is running.
        """
        stand_ins: list[Any] = []  # one for all blocks: a deep model reads it once for each batch

        def replay(i: int, *_: Any, **__: Any) -> Any:
            self.called.append(i)
            if i == number - 1:
                return output()
            if i == 0:  # a batch begins; in another order nothing counts
                stand_ins[:] = [tree_map(tainted, output())]
            return stand_ins[0]

        replaced = self.blocks[:number]
        own = [block.__dict__.get("forward") for block in replaced]
        try:
            for i, block in enumerate(replaced):
                block.__dict__["forward"] = partial(replay, i)
            yield
        finally:
            for block, forward in zip(replaced, own, strict=True):
                _set_forward(block, forward)


def outer_lists(model: nn.Module, targets: set[int]) -> list[list[nn.Module]]:
    """The elements of every ModuleList that holds targets and lies in no other such list."""
    found: list[list[nn.Module]] = []
    inside: set[int] = set()
    for module in model.modules():  # parents come first
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            below = {id(part) for part in module.modules()}
            if below & targets:
                found.append(list(module))
                inside |= below
    return found


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Call another forward inside, and leave the module as it was."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        _set_forward(module, own)


def _set_forward(module: nn.Module, own: Callable[..., Any] | None) -> None:
    if own is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = own
