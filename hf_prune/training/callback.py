"""Prune while any Trainer trains."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.calibration.read import CalibrationData
from hf_prune.errors import ConfigError, MaskError
from hf_prune.mixin import prunable
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.resolve import resolve_config
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.training.check_settings import refuse_deepspeed
from hf_prune.training.default_method import with_method
from hf_prune.training.pruner import TrainingPruner
from hf_prune.training.run_record import data_facts, model_facts, run_facts
from hf_prune.training.state import check_same_run, check_training, load_training, save_training
from hf_prune.utils.distributed import rank_and_world_size

_HANDLES = "_hf_prune_hooks"  # where a model keeps the handles of hooks while it is trained


class PruningCallback(TrainerCallback):
    """Prunes the model of any ``Trainer`` while it is trained, and keeps removed weights at zero.

    After every optimizer step the masks are applied; gradients of removed weights are cleared before clipping. Masks
    change as the config's schedule says. Checkpoints hold all that is needed to resume bit for bit. Every entry of
    ``trainer.state.log_history`` contains the sparsity.

    Settings that name no method have that of preset ``"best"``, calibrated on examples of the training. Such methods
    decide at the first update what is gone in the end; the schedule says how fast the masks close over these zeros.

    Args:
        pruning_config: The settings, or a sparsity; None keeps the masks that the model has.
        calibration: Data, as for :func:`hf_prune.prune`, for criteria and repairs that look at some, such as
            ``sparsegpt``. The ``processing_class`` of the Trainer reads it.
        shrink_at: Step, or share of all steps, after which pruned heads, neurons and channels are removed from the
            model, which makes the rest of the training faster; not before the schedule ends.
        threshold: Of ``soft_movement``: a weight is removed if the sigmoid of its score is below.
        regularization: Of ``soft_movement``: how hard scores are pulled down.
        allow_changes: Resume from a checkpoint even if the settings, the data or the model differ from those that the
            training started with; by default that is refused. What is pruned, and how, can never change on the way.

    Example:
        >>> config = PruningConfig(sparsity=0.8, schedule="cubic")
        >>> trainer = Trainer(model=model, args=args, callbacks=[PruningCallback(config)])  # doctest: +SKIP
    """

    def __init__(
        self,
        pruning_config: PruningConfig | float | None = None,
        *,
        calibration: CalibrationData | None = None,
        shrink_at: int | float | None = None,
        threshold: float = 0.1,
        regularization: float = 1.0,
        allow_changes: bool = False,
    ) -> None:
        self.shrink_at = shrink_at
        self.allow_changes = allow_changes
        self.run: dict[str, Any] | None = None  # facts that identify this training
        self.config = None if pruning_config is None else resolve_config(pruning_config, {})
        self.pruner: TrainingPruner | None = None
        self.resume_from: str | None = None
        self.is_needed = True  # False: a model without masks may be trained, without pruning
        self._watches = True  # False: a PruningTrainer says when gradients are complete
        self._settings = {"threshold": threshold, "regularization": regularization}
        self._calibration = calibration

    # --- the events ------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Check the settings, then resume from a checkpoint, or prune if the schedule starts before the first step."""
        refuse_deepspeed(args)
        for handle in model.__dict__.pop(_HANDLES, ()):  # of a training that was interrupted
            handle.remove()
        self.pruner = None
        config = self.config
        if config is not None and hasattr(model, "peft_config"):
            raise ConfigError(
                "the model is a PeftModel, whose own weights are not trained, so there is nothing to prune step by "
                "step: call hf_prune.prune(model, …) first, train without a pruning_config, and merge with "
                "hf_prune.merge_lora"
            )
        if config is None and MaskStore.of(model) is None and self.resume_from is None:
            if self.is_needed:
                raise ConfigError(
                    "no pruning_config, and the model has no masks: pass a config, or prune the model first"
                )
            return
        if isinstance(model, PreTrainedModel):
            prunable(model)
        reading: dict[str, Any] = {"calibration": self._calibration, "tokenizer": kwargs.get("processing_class")}
        if config is not None and not config.names_method:
            config, reading["calibration"] = with_method(
                config, self._calibration, kwargs.get("train_dataloader"), model
            )
        self.pruner = TrainingPruner(model, config, state.max_steps, **reading, **self._settings)
        self.check_shrinking(state)
        folder = Path(self.resume_from or _checkpoint_folder(args, state)) if state.global_step else None
        if self._watches:
            self._check_plain_trainer(args, state)
            data, tokenizer = getattr(kwargs.get("train_dataloader"), "dataset", None), kwargs.get("processing_class")
            self.run = run_facts(args, model, data, tokenizer=tokenizer, **self.own_facts())
            if folder is not None:  # whose weights are in the model already
                self.check_run(folder, check_training(folder)[1])
        if folder is not None:
            self._restore(folder)
        elif self.pruner.config is not None and self.pruner.schedule.span(state.max_steps)[0] == 0:
            self.pruner.after_step(0)
        self.pruner.apply()
        if self._watches:
            self._watch(model, state)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Zero removed weights again, change the masks if it is time, and shrink the model if that is due."""
        if self.pruner is None:
            return
        step = state.global_step + 1
        self.pruner.after_step(step)
        if step == self.shrinking_step(state):
            self.pruner.shrink(getattr(optimizer, "optimizer", optimizer))
            if self._watches:
                self._watch(model, state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the sparsity to what is logged."""
        if self.pruner is None or logs is None:
            return
        logs["sparsity"] = self.pruner.sparsity
        if state.log_history:
            state.log_history[-1]["sparsity"] = logs["sparsity"]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Complete a checkpoint of the Trainer."""
        if self._watches and self.pruner is not None:
            self.save(Path(_checkpoint_folder(args, state)), args.should_save)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the masks of the best checkpoint, if the Trainer loaded that one, and check that all zeros are there."""
        if self.pruner is None:
            return
        for handle in self.pruner.model.__dict__.pop(_HANDLES, ()):
            handle.remove()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._restore(Path(state.best_model_checkpoint))
        self.pruner.check()

    # --- what they need --------------------------------------------------------------------------------------

    def save(self, folder: Path, writes: bool) -> None:
        """Write masks and learned scores into a checkpoint; every process calls this, one writes.

        Args:
            folder: The checkpoint.
            writes: Whether this process is the one that writes.
        """
        assert self.pruner is not None
        state = self.pruner.state()
        now = {"run": self.run, "weights_now": model_facts(self.pruner.model)}
        if writes:
            if not folder.is_dir():
                raise MaskError(
                    f"{folder} is not a folder: expected the Trainer's checkpoint there; use a PruningTrainer"
                )
            save_training(folder, MaskStore.of(self.pruner.model), state, {**self._facts(), **now})

    def own_facts(self) -> dict[str, Any]:
        """Facts that identify a training, besides those of any ``Trainer``."""
        return {"calibration": data_facts(self._calibration), "shrink_at": self.shrink_at}

    def check_run(self, folder: Path, before: dict[str, Any]) -> None:
        """Refuse to resume from a checkpoint of another training, unless changes are allowed.

        Args:
            folder: The checkpoint.
            before: The facts stored in it.

        Raises:
            CheckpointError: If settings, data or model differ.
        """
        assert self.run is not None
        if not self.allow_changes:
            self.run = check_same_run(folder, before, self.run)

    def shrinking_step(self, state: TrainerState) -> int | None:
        """The step after which the model is shrunk; None for never."""
        if self.shrink_at is None or isinstance(self.shrink_at, int):
            return self.shrink_at
        return round(self.shrink_at * state.max_steps)

    def check_shrinking(self, state: TrainerState) -> None:
        """Refuse a ``shrink_at`` outside the training or before the end of the schedule."""
        step = self.shrinking_step(state)
        if step is None:
            return
        assert self.pruner is not None
        end = self.pruner.schedule.span(state.max_steps)[1]
        if not (first := max(1, end)) <= step <= state.max_steps:
            raise ConfigError(
                f"shrink_at={self.shrink_at!r} is step {step}: expected one from {first}, where the schedule ends, to "
                f"{state.max_steps}, where the training does"
            )
        if rank_and_world_size()[1] > 1:
            raise ConfigError(
                "shrink_at with several processes: DDP and FSDP keep the parameters that they started with; shrink "
                "after the training, or between two trainings"
            )
        find_unit_groups(self.pruner.model)  # raises before any training

    def _restore(self, folder: Path) -> None:
        assert self.pruner is not None
        store, state = load_training(folder, self._facts())
        self.pruner.restore(state, store)
        self.pruner.check()

    def _facts(self) -> dict[str, Any]:
        assert self.pruner is not None
        config = self.pruner.config
        return {
            "pruning_config": None if config is None else config.to_dict(),
            "schedule": list(self.pruner.schedule.span(self.pruner.steps)),
            **self._settings,
        }

    def _check_plain_trainer(self, args: TrainingArguments, state: TrainerState) -> None:
        """Refuse what only a :class:`PruningTrainer` can do."""
        assert self.pruner is not None
        config, schedule = self.pruner.config, self.pruner.schedule
        if config is None:
            return
        if args.load_best_model_at_end and schedule.span(state.max_steps)[1] > 0:
            raise ConfigError(
                "load_best_model_at_end could load a checkpoint from before the end of the schedule, which is less "
                "sparse: use a PruningTrainer, which considers only checkpoints after its end"
            )
        parallel = rank_and_world_size()[1] > 1
        learns = config.learns_in_training or config.criterion == "taylor"
        if learns and parallel:
            raise ConfigError(
                f"criterion {config.criterion!r} needs the gradients of all processes: use a PruningTrainer"
            )
        if learns and args.fp16:
            raise ConfigError(
                f"criterion {config.criterion!r} with fp16 needs the scale of the loss: use a PruningTrainer, or bf16"
            )
        if schedule.exchanges and parallel:
            raise ConfigError(
                "a schedule that exchanges weights needs the gradients of all processes: use a PruningTrainer"
            )

    def _watch(self, model: nn.Module, state: TrainerState) -> None:
        """Pass each gradient of a step to the pruner as soon as it is complete."""
        from accelerate.state import GradientState

        gradients = GradientState()

        def receive(name: str, parameter: Any) -> None:
            if gradients.sync_gradients and self.pruner is not None and _HANDLES in model.__dict__:
                with torch.no_grad():
                    self.pruner.receive(name, parameter, state.global_step + 1)

        for handle in model.__dict__.pop(_HANDLES, ()):
            handle.remove()
        model.__dict__[_HANDLES] = [
            parameter.register_post_accumulate_grad_hook(partial(receive, name))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> str:
    return os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")
