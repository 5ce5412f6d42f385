"""Lottery tickets: train, prune, rewind to early weights, and repeat (Frankle and Carbin 2019, arXiv:1803.03635).

For larger models, rewinding to the weights after some steps of training works better than to the initial ones
(Frankle et al. 2020, arXiv:1912.05671).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_prune.errors import ConfigError
from hf_prune.mixin import prunable
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.resolve import resolve_config
from hf_prune.planning.schedule import Schedule
from hf_prune.planning.targets import resolve_targets
from hf_prune.planning.traits import fixed_sparsity, removed_kinds
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.training.callback import PruningCallback
from hf_prune.training.pruner import count_removed
from hf_prune.training.trainer import PruningTrainer
from hf_prune.utils.formatting import format_table
from hf_prune.utils.results import Result


@dataclass(frozen=True)
class LotteryRound:
    """One round of a search for a lottery ticket.

    Args:
        sparsity: The share of the targets' weights that were removed while it trained.
        metrics: Metrics of the trained model; empty if the Trainer has no evaluation data.
    """

    sparsity: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class LotteryResult(Result):
    """The result of a search for a lottery ticket.

    Args:
        model: The model with the masks of the last round, trained.
        ticket: The weights that the last round started from: early values, and zeros.
        rounds: The rounds, the dense one first.
    """

    bars = ("sparsity",)

    model: Any = field(repr=False)
    ticket: dict[str, Tensor] = field(repr=False)
    rounds: tuple[LotteryRound, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without weights."""
        return {"rounds": [{"sparsity": r.sparsity, "metrics": r.metrics} for r in self.rounds]}

    def __str__(self) -> str:
        names = [name for name in self.rounds[0].metrics if name.startswith("eval_") and "per_second" not in name]
        names = [name for name in names if not name.endswith(("runtime", "time"))]
        rows = [
            [str(number), f"{100 * done.sparsity:.2f} %", *(f"{done.metrics[name]:.4f}" for name in names)]
            for number, done in enumerate(self.rounds)
        ]
        return format_table(["round", "sparsity", *(name.removeprefix("eval_") for name in names)], rows)


def find_ticket(
    model: nn.Module,
    make_trainer: Callable[[Any], Trainer],
    pruning_config: PruningConfig | float,
    *,
    rounds: int = 5,
    rewind_to: int = 0,
) -> LotteryResult:
    """Search for a sparse subnetwork that trains as well as the dense one: iterative pruning with rewinding.

    The dense model is trained. Then each round prunes the same share of the remaining weights, rewinds the others to
    their early values, and trains again with these masks.

    Args:
        model: The model with its initial weights; changed in place.
        make_trainer: Makes a Trainer for the model; called for each round, so that all rounds train alike.
        pruning_config: The settings after the last round.
        rounds: How many times to prune.
        rewind_to: Optimizer steps of the first training after which the early weights are taken; 0: before any.

    Returns:
        The trained sparse model, the ticket and how each round did.

    Raises:
        ConfigError: If the settings do not allow several rounds, or the training is shorter than ``rewind_to``.

    Example:
        >>> result = find_ticket(model, make_trainer, 0.8, rounds=5, rewind_to=100)  # doctest: +SKIP
        >>> print(result)  # doctest: +SKIP
    """
    config = resolve_config(pruning_config, {})
    _check(config, rounds, rewind_to)
    if isinstance(model, PreTrainedModel):
        prunable(model)
    if MaskStore.of(model) is not None:
        raise ConfigError("the model has masks: a search for a ticket starts from a dense model; load one")
    trainer = make_trainer(model)
    if isinstance(trainer, PruningTrainer):
        trainer.pruning.is_needed = False  # the first round is dense
    snapshot = _Snapshot(rewind_to)
    trainer.add_callback(snapshot)
    trained = [_train(trainer, 0.0)]
    assert snapshot.weights is not None
    early, ticket = snapshot.weights, snapshot.weights
    curve = Schedule("iterative", begin=0, end=rounds, every=1)
    for number in range(1, rounds + 1):
        assert config.sparsity is not None
        prune(model, config.replace(sparsity=curve.sparsity(number, rounds, config.sparsity)))
        store = MaskStore.of(model)
        assert store is not None
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(early[name])
        store.apply(model)
        ticket = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        names = {target.name for target in resolve_targets(model, config)}
        sizes = [mask.numel() for name, mask in store.masks.packed.items() if name in names]
        sparsity = count_removed(store.masks, names) / sum(sizes)
        trainer = make_trainer(model)
        _keep_masks(trainer)
        trained.append(_train(trainer, sparsity))
    return LotteryResult(model, ticket, tuple(trained))


def _check(config: PruningConfig, rounds: int, rewind_to: int) -> None:
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ConfigError(f"rounds is {rounds!r}: expected a whole number of at least 1")
    if isinstance(rewind_to, bool) or not isinstance(rewind_to, int) or rewind_to < 0:
        raise ConfigError(f"rewind_to is {rewind_to!r}: expected a number of steps of at least 0")
    grows = not removed_kinds(config) and fixed_sparsity(config) is None
    if not grows or config.needs_data or config.schedule is not None:
        raise ConfigError(
            f"granularity {config.granularity!r} with criterion {config.criterion!r} and schedule={config.schedule!r}: "
            f"lottery tickets need a sparsity that can grow from round to round, a criterion without data, and no "
            f"schedule"
        )


def _train(trainer: Trainer, sparsity: float) -> LotteryRound:
    trainer.train()
    metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    return LotteryRound(sparsity, {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)})


def _keep_masks(trainer: Trainer) -> None:
    if not isinstance(trainer, PruningTrainer):
        trainer.add_callback(PruningCallback())


class _Snapshot(TrainerCallback):
    """Copies the weights after a number of steps."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.weights: dict[str, Tensor] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Copy them before the first step, if that is asked for."""
        if self.step > state.max_steps:
            raise ConfigError(
                f"rewind_to={self.step}, and the training has {state.max_steps} steps: expected an earlier step"
            )
        if self.step == 0:
            self._take(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Copy them after the step that is asked for."""
        if state.global_step == self.step:
            self._take(model)

    def _take(self, model: nn.Module) -> None:
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
