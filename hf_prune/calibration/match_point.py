"""Where the output of a target is compared with that of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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


def find_match_points(reader: InputReader, names: Iterable[str]) -> dict[str, MatchPoint | None]:
    """For each target the first norm's input, or the block's output, that is its output plus something else.

    No table says where the residual stream of an architecture is. So it is found by trying: noise is added to the
    output of the target on the first batch, and the place is right where exactly that noise arrives. A norm in between,
    a gate or another linear map would change it.

    Args:
        reader: Runs the dense model.
        names: The targets.

    Returns:
        By target the place, the same in all processes, or None to compare the target's own output.
    """
    points: dict[str, MatchPoint | None] = dict.fromkeys(names)
    blocks: dict[nn.Module, dict[str, nn.Module]] = {}
    for name in points:
        holders, block = reader.holders[name], reader.block_of(name)
        if block is not None and len(holders) == 1 and id(holders[0]) in reader.once:
            blocks.setdefault(block, {})[name] = holders[0]
    for block, modules in blocks.items():
        norms = [m for m in block.modules() if "norm" in type(m).__name__.lower() and id(m) in reader.once]
        candidates = [*(MatchPoint(norm, output=False) for norm in norms), MatchPoint(block, output=True)]
        plain = _seen(reader, modules, candidates)
        for name, module in modules.items():
            chosen = int(broadcast(torch.tensor(_arrival(reader, name, module, candidates, plain))))
            points[name] = None if chosen < 0 else candidates[chosen]
    return points


def _arrival(reader: InputReader, name: str, module: nn.Module, candidates: Sequence[MatchPoint], plain: _Seen) -> int:
    """The number of the first place where noise at a target's output arrives unchanged; -1 if there is none."""
    places = plain.after(name)
    fits = any(tensor.shape == plain.shapes[name] for tensor in places.values())
    if not bool(broadcast(torch.tensor(fits))):
        return -1
    disturbed = _seen(reader, {name: module}, candidates, disturb=True)
    after = disturbed.after(name)
    return next((i for i in places if i in after and _arrives(places[i], after[i], disturbed.noise)), -1)


def _arrives(plain: Tensor, disturbed: Tensor, noise: Tensor | None) -> bool:
    """Whether two runs differ by the noise, up to rounding."""
    if noise is None or not plain.shape == disturbed.shape == noise.shape:
        return False
    change, expected = (disturbed - plain).float(), noise.float()
    return bool((change - expected).abs().mean() <= _CLOSE * expected.abs().mean()) and bool(expected.any())


class _Seen:
    """What this process's first batch has at some places, in the order in which it comes to them.

    Attributes:
        noise: What was added to the output of a target.
        shapes: By target, that of its output.
    """

    def __init__(self) -> None:
        self.noise: Tensor | None = None
        self.shapes: dict[str, torch.Size] = {}
        self._tensors: dict[str | int, Tensor | None] = {}  # of the places by number; targets have none

    def note(self, key: str | int, tensor: Tensor | None = None) -> None:
        """Note a place, or a target; the last call of several counts."""
        self._tensors.pop(key, None)
        self._tensors[key] = None if tensor is None else tensor.detach().clone()

    def after(self, name: str) -> dict[int, Tensor]:
        """The tensors at the places that came after a target."""
        keys = list(self._tensors)
        later = keys[keys.index(name) :] if name in self._tensors else []
        return {key: tensor for key in later if isinstance(key, int) and (tensor := self._tensors[key]) is not None}


def _seen(
    reader: InputReader, modules: Mapping[str, nn.Module], candidates: Sequence[MatchPoint], disturb: bool = False
) -> _Seen:
    """Run this process's first batch, and look at some places.

    Args:
        reader: Runs the model.
        modules: The modules of targets, by name.
        candidates: The places.
        disturb: Add noise to the outputs of the modules.
    """
    seen = _Seen()

    def at_module(name: str) -> Callable[..., Tensor | None]:
        def see(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            seen.note(name)
            seen.shapes[name] = output.shape
            return add_noise(output) if disturb else None

        return see

    def add_noise(output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        size = output.float().std() if output.numel() > 1 else torch.ones(())
        seen.noise = (torch.randn(output.shape, generator=generator).to(output.device) * size).to(output.dtype)
        return output + seen.noise

    def at_candidate(i: int) -> Callable[[Tensor], None]:
        return lambda x: seen.note(i, x) if isinstance(x, Tensor) else None

    watchers = [Watcher(module, at_module(name), after=True, waits=False) for name, module in modules.items()]
    watchers += [point.watcher(at_candidate(i)) for i, point in enumerate(candidates)]
    firsts = range(min(rank_and_world_size()[1], len(reader.batches)))
    reader.run(watchers, firsts, record=False)
    return seen
