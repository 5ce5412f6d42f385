"""Observe where the routers of a model send tokens, and what its experts make of them.

Almost every class of experts in transformers takes the tokens, the numbers of the experts of each and their weights. It
is then called once more for each choice of a token, with one expert instead of several, whose outputs are what that
expert computes. The other classes are run with the weights of one expert at a time: what the block then computes,
beyond what it does without any expert, is the weighted output of that one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.discovery.proven_experts import proven_blocks
from hf_prune.architectures.modules import base_prefix
from hf_prune.architectures.moe_block import MoeBlock
from hf_prune.architectures.moe_blocks import moe_blocks
from hf_prune.architectures.settings import config_of_setting
from hf_prune.architectures.switched_off import running_experts, units_that_run
from hf_prune.architectures.unit_groups import UnitGroup, numbered
from hf_prune.calibration.batches import Batches, without_labels
from hf_prune.calibration.hooks import Watcher
from hf_prune.calibration.padding import Padding, first_tensor
from hf_prune.errors import CalibrationError, PlanError
from hf_prune.utils.distributed import all_reduce_sum, fail_together, rank_items
from hf_prune.utils.forward import batch_to_device, eval_mode, run_model
from hf_prune.utils.progress import Bar


@dataclass(frozen=True)
class Routing:
    """What was observed in one block.

    Args:
        tokens: (experts,) float64, how many tokens were sent to each expert.
        norms: (experts,) float64, the sum of the norms of its weighted outputs over these tokens.
        total: How many tokens came to the block.
    """

    tokens: Tensor
    norms: Tensor
    total: int

    @property
    def frequency(self) -> Tensor:
        """(experts,) the share of the tokens that are sent to an expert."""
        return self.tokens / max(1, self.total)

    @property
    def reap(self) -> Tensor:
        """(experts,) mean of g(x)·‖f(x)‖ over the tokens x that an expert f gets with weight g; 0 if it gets none."""
        return self.norms / self.tokens.clamp_min(1)


def refuse_unequal_routers(model: nn.Module, kept: Mapping[str, Tensor], removed: Collection[str]) -> None:
    """Refuse a plan that leaves layers with different numbers of experts, if the model needs the same in all.

    Args:
        model: The model.
        kept: The units that each smaller group is to keep, by its name.
        removed: Names of the layers that go as a whole.

    Raises:
        PlanError: If the code looks their number up in the config, or the config asks for the outputs of routers, and
            with them for the loss that balances these.
    """
    prefix = base_prefix(model)
    staying = [b for b in proven_blocks(model)[0] if f"{b.layer[0]}.{b.layer[1]}" not in removed]
    blocks = [block for block in staying if block.name.removeprefix(prefix) in kept]
    settings = {block.config for block in blocks}
    numbers: set[int] = set()
    for block in staying:
        running = running_experts(model, block)
        chosen = kept.get(block.name.removeprefix(prefix))
        if block.config in settings:
            numbers.add(len(running) if chosen is None else int(torch.isin(running, chosen.cpu()).sum()))
    if len(numbers) < 2:
        return
    said = f"layers would keep {' or '.join(map(str, sorted(numbers)))} experts, and "
    alike = "have all layers lose the same share, with scope='layer' and none of them excluded"
    if reading := next((block.config for block in blocks if block.reads_config), None):
        raise PlanError(f"{said}the code of {type(model).__name__} looks config.{reading} up while it runs: {alike}")
    for name in ("", *(f"{block.config.rpartition('.')[0]}." for block in blocks if "." in block.config)):
        holder, key = config_of_setting(model.config, f"{name}output_router_logits")
        if getattr(holder, key, False):
            raise PlanError(
                f"{said}config.{name}{key} is on: the loss that balances routers expects as many in all layers; set "
                f"it to False, or {alike}"
            )


@torch.no_grad()
def observe_routing(
    model: nn.Module, groups: Sequence[UnitGroup], batches: Batches, progress: bool | None = None
) -> dict[str, Routing]:
    """Run a model on batches, and count what its routers do. Padding does not count.

    Args:
        model: The model; as before afterwards.
        groups: Groups of experts.
        batches: Calibration batches.
        progress: Show a progress bar.

    Returns:
        What was observed in the block of each group, by its name, summed over all processes.

    Raises:
        CalibrationError: If no token came to a block, or an output is not finite.
    """
    blocks = blocks_by_group(model)
    sums = {group.name: new_sums(group) for group in groups}
    padding = Padding(model)
    with ExitStack() as context:
        context.enter_context(eval_mode(model))
        for group in groups:
            for watcher in routing_watchers(model, group, blocks[group.name], padding, sums[group.name]):
                watcher.install(context, None)
        context.enter_context(fail_together())
        for batch in Bar(rank_items(list(batches)), desc="Experts", progress=progress):
            inputs = without_labels(model, batch_to_device(model, batch))
            with padding.of(inputs):
                run_model(model, inputs)
    return {group.name: routing_of(group, all_reduce_sum(sums[group.name])) for group in groups}


def blocks_by_group(model: nn.Module) -> dict[str, MoeBlock]:
    """The mixtures of a model by the names of the groups of their experts."""
    prefix = base_prefix(model)
    return {block.name.removeprefix(prefix): block for block in moe_blocks(model)}


def new_sums(group: UnitGroup) -> Tensor:
    """(2, experts + 1) float64: how often each expert is chosen, and the norms of what it adds; then, all tokens."""
    return torch.zeros(2, group.units + 1, dtype=torch.float64)


def routing_of(group: UnitGroup, sums: Tensor) -> Routing:
    """What was observed in a block.

    Args:
        group: Its experts.
        sums: As :func:`new_sums` makes them, after all batches.

    Raises:
        CalibrationError: If no token came to the block, or an output is not finite.
    """
    total = int(sums[0, -1])
    if not total:
        raise CalibrationError(
            f"no token was seen on its way to {group.name}: expected a block of experts that a forward pass calls as a "
            f"module; choose criterion 'magnitude', or spare the block with exclude_modules"
        )
    if not bool(sums.isfinite().all()):
        raise CalibrationError(
            f"an output of {group.name} is not finite: expected finite values; calibrate in float32 or bfloat16, and "
            f"check the batches"
        )
    return Routing(sums[0, :-1], sums[1, :-1], total)


def routing_watchers(
    model: nn.Module, group: UnitGroup, block: MoeBlock, padding: Padding, sums: Tensor
) -> list[Watcher]:
    """Hooks that add up, whenever a block runs, how often each expert is chosen, and the norms of what it adds.

    Args:
        model: The model; while the block runs, all weights in it are there.
        group: The experts of the block.
        block: The block.
        padding: Knows the padding of the batch that is running.
        sums: Get what is observed, see :func:`new_sums`.
    """
    experts = model.get_submodule(block.name)
    whole = model.get_submodule(module_around(block))
    depth = [0]  # inside a call that is repeated for one expert, nothing is counted

    def add(chosen: Tensor, norms: Tensor, x: Tensor) -> None:
        """(tokens, choices) numbers of experts, below 0 for none, and norms of what they add."""
        mask = padding.mask(whole, x)
        if mask is not None and len(mask) == len(chosen):
            chosen, norms = chosen[mask], norms[mask]
        numbers, values = chosen.reshape(-1).cpu(), norms.reshape(-1).double().cpu()
        running = units_that_run(model, group)
        valid = (numbers >= 0) & (numbers < (group.units if running is None else len(running)))
        numbers, values = numbers[valid], values[valid]
        numbers = numbers if running is None else running[numbers]
        sums[0].index_add_(0, numbers, torch.ones_like(values))
        sums[1].index_add_(0, numbers, values)
        sums[0, -1] += len(chosen)

    def routed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        call = _routed_call(args, kwargs)
        if call is None or depth[0]:
            return
        x, chosen, weights, again = call
        parts = [again(chosen[:, [i]], torch.ones_like(weights[:, [i]])) for i in range(chosen.shape[1])]
        outputs = torch.stack([first_tensor(module.forward(*a, **k)).reshape(len(x), -1) for a, k in parts], 1)
        add(chosen, outputs.float().norm(dim=-1) * weights.float().abs(), x)
        seen.add("routed")

    def isolated(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if "routed" in seen or depth[0]:
            return
        depth[0] += 1
        try:
            x = args[0] if args else next(iter(kwargs.values()))

            def run(expert: int | None) -> Tensor:
                with _only(model, block, expert):
                    result = first_tensor(module.forward(*args, **kwargs))
                return result.detach().float().reshape(-1, result.shape[-1])

            nothing = run(None)
            running = units_that_run(model, group)
            number = group.units if running is None else len(running)
            norms = torch.stack([(run(expert) - nothing).norm(dim=-1) for expert in range(number)], 1)
        finally:
            depth[0] -= 1
        chosen = torch.where(norms > 0, torch.arange(number, device=norms.device), -1)
        add(chosen, norms, x)

    seen: set[str] = set()
    watchers = [Watcher(experts, routed)]
    if module_around(block) != f"{block.layer[0]}.{block.layer[1]}":  # a whole layer does more than add up its experts
        watchers.append(Watcher(whole, isolated, after=True))
    return watchers


def module_around(block: MoeBlock) -> str:
    """The module that runs the router and the experts."""
    return block.name if f"{block.router}.".startswith(f"{block.name}.") else block.name.rpartition(".")[0]


def _routed_call(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor, Tensor], tuple[tuple[Any, ...], dict[str, Any]]]] | None:
    """What a module of experts was called with: tokens, (tokens, choices) numbers of experts and weights.

    Returns:
        These three, and a function that gives the arguments of a call with other numbers and weights; None if the
        arguments are something else.
    """
    named: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    flat = {key: value for key, value in named.items() if isinstance(value, Tensor) and value.ndim == 2}
    numbers = [key for key, value in flat.items() if not value.is_floating_point() and value.dtype != torch.bool]
    if len(flat) != 3 or len(numbers) != 1:
        return None
    shape = flat[numbers[0]].shape
    x, weights = sorted((key for key in flat if key != numbers[0]), key=lambda key: flat[key].shape == shape)
    if flat[weights].shape != shape or len(flat[x]) != len(flat[weights]):
        return None

    def again(chosen: Tensor, factors: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = {**named, numbers[0]: chosen, weights: factors}
        return tuple(values[i] for i in range(len(args))), {key: values[key] for key in kwargs}

    return flat[x], flat[numbers[0]], flat[weights], again


@contextmanager
def _only(model: nn.Module, block: MoeBlock, expert: int | None) -> Iterator[None]:
    """A block in which all experts but one compute zero, or all of them for None."""
    large = [p.name for p in block.parameters if p.width > 1 or model.get_parameter(p.name).ndim > 2]
    holders = {name.rpartition(".")[0] for name in large}  # the others are what the router has for an expert
    with ExitStack() as undo:
        for piece in block.parameters:
            holder, _, key = piece.name.rpartition(".")
            if holder not in holders:
                continue
            module = model.get_submodule(holder)
            tensor = module._parameters[key]
            assert tensor is not None
            zeroed = torch.zeros_like(tensor)
            if expert is not None:
                index = piece.index(torch.tensor([expert], device=tensor.device))
                zeroed.index_copy_(piece.dim, index, tensor.detach().index_select(piece.dim, index))
            undo.callback(module._parameters.__setitem__, key, tensor)
            module._parameters[key] = zeroed  # type: ignore[assignment]
        for name in block.lists:
            container = model.get_submodule(name)
            for number, key in enumerate(numbered(container)):
                if number != expert:
                    hook = container._modules[key].register_forward_hook(_zeros)  # type: ignore[union-attr]
                    undo.callback(hook.remove)
        yield


def _zeros(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)
