"""Where the output of a target is compared with that of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.hooks import Watcher
from hf_prune.calibration.input_reader import InputReader
from hf_prune.calibration.padding import first_input, first_tensor
from hf_prune.utils.distributed import broadcast, rank_and_world_size

_CLOSE = 0.05  # mean difference, relative to the noise, up to which it has arrived unchanged


@dataclass(frozen=True)
class MatchPoint:
    """A place after a target where its output is part of a sum: a module's input or output.

    Args:
        module: The module.
        output: Whether its output is meant, and not its input.
    """

    module: nn.Module
    output: bool

    def watcher(self, call: Callable[[Tensor], None]) -> Watcher:
        """A hook that hands on the tensor at this place."""

        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call(first_tensor(output) if self.output else first_input(args, kwargs))

        return Watcher(self.module, see, after=self.output)


def find_match_point(reader: InputReader, name: str) -> MatchPoint | None:
    """The first norm's input, or the block's output, that is the output of a target plus something else.

    No table says where the residual stream of an architecture is. So it is found by trying: noise is added to the
    output of the target on the first batch, and the place is right where exactly that noise arrives. A norm in between,
    a gate or another linear map would change it.

    Args:
        reader: Runs the dense model.
        name: The target.

    Returns:
        The place, the same in all processes, or None to compare the target's own output.
    """
    holders, block = reader.holders[name], reader.block_of(name)
    if block is None or len(holders) != 1 or id(module := holders[0]) not in reader.once:
        return None
    norms = [m for m in block.modules() if "norm" in type(m).__name__.lower() and id(m) in reader.once]
    candidates = [*(MatchPoint(norm, output=False) for norm in norms), MatchPoint(block, output=True)]
    noise: list[Tensor] = []
    shapes: list[torch.Size] = []

    def disturb(output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        size = output.float().std() if output.numel() > 1 else torch.ones(())
        noise[:] = [(torch.randn(output.shape, generator=generator).to(output.device) * size).to(output.dtype)]
        return output + noise[0]

    def look(output: Tensor) -> None:
        shapes.append(output.shape)

    plain = _seen_after(reader, module, candidates, look)
    fits = bool(broadcast(torch.tensor(any(seen.shape in shapes for seen in plain.values()))))
    disturbed = _seen_after(reader, module, candidates, disturb) if fits else {}
    chosen = next((i for i in plain if i in disturbed and noise and _arrives(plain[i], disturbed[i], noise[0])), -1)
    chosen = int(broadcast(torch.tensor(chosen)))
    return None if chosen < 0 else candidates[chosen]


def _arrives(plain: Tensor, disturbed: Tensor, noise: Tensor) -> bool:
    """Whether two runs differ by the noise, up to rounding."""
    if not plain.shape == disturbed.shape == noise.shape:
        return False
    change, expected = (disturbed - plain).float(), noise.float()
    return bool((change - expected).abs().mean() <= _CLOSE * expected.abs().mean()) and bool(expected.any())


def _seen_after(
    reader: InputReader,
    module: nn.Module,
    candidates: Sequence[MatchPoint],
    change: Callable[[Tensor], Tensor | None],
) -> dict[int, Tensor]:
    """The tensors at some places after a module's call, on this process's first batch, in the order of the calls.

    Args:
        reader: Runs the model.
        module: Places count from its call on.
        candidates: The places.
        change: Replaces the module's output; returns None to leave it.
    """
    tensors: dict[int, Tensor] = {}
    called: list[bool] = []

    def at_module(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        called.append(True)
        return change(output)

    def at_candidate(i: int) -> Callable[[Tensor], None]:
        def keep(x: Tensor) -> None:
            if called and isinstance(x, Tensor):
                tensors[i] = x.detach().clone()

        return keep

    watchers = [Watcher(module, at_module, after=True)]
    watchers += [point.watcher(at_candidate(i)) for i, point in enumerate(candidates)]
    firsts = range(min(rank_and_world_size()[1], len(reader.batches)))
    reader.run(watchers, firsts, record=False)
    return tensors
