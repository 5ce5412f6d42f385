"""Pruning inside the Trainer of transformers: PruningCallback does the work, PruningTrainer connects it.

The callback handles the masks. The Trainer adds what only it can do: it observes gradients once they are summed over
all processes, adds a teacher to the loss, considers only fully pruned checkpoints for the best one, and deletes old
checkpoints only when the new one is complete.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import rotate_checkpoints

from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.calibration.read import CalibrationData
from hf_prune.errors import ConfigError
from hf_prune.hub.describe import describe_model
from hf_prune.mixin import prunable
from hf_prune.planning.config import PruningConfig
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.structured.shrink import resize
from hf_prune.structured.shrink_record import RECORD, simplify_config
from hf_prune.training.callback import PruningCallback
from hf_prune.training.check_settings import refuse_deepspeed
from hf_prune.training.distillation import Distillation
from hf_prune.training.dropout import without_dropout
from hf_prune.training.run_record import run_facts
from hf_prune.training.state import check_training, last_whole_checkpoint
from hf_prune.utils.forward import is_encoder_decoder
from hf_prune.utils.front_matter import read_card, split_card

_GENERATED = "<!-- This model card has been generated automatically"  # until the author removes it


class PruningTrainer(Trainer):
    """A ``Trainer`` that prunes, and can learn from a dense teacher.

    Args:
        *args: As of ``Trainer``.
        pruning_config: The settings, or a sparsity; None keeps the masks that the model has.
        teacher: A model for the same task, such as a copy of the dense model; it is frozen and not saved.
        distillation: Weights of the parts of the loss; ``Distillation()`` by default if there is a teacher.
        calibration: Data for criteria and repairs that look at some; see :class:`PruningCallback`.
        shrink_at: See :class:`PruningCallback`.
        threshold: See :class:`PruningCallback`.
        regularization: See :class:`PruningCallback`.
        allow_changes: See :class:`PruningCallback`.
        **kwargs: As of ``Trainer``.

    Raises:
        ConfigError: If the settings contradict one another.

    Example:
        >>> trainer = PruningTrainer(
        ...     model=model, args=args, train_dataset=data, teacher=dense,
        ...     pruning_config=PruningConfig(sparsity=0.8, schedule=Schedule("cubic", end=0.7, every=50)),
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        *args: Any,
        pruning_config: PruningConfig | float | None = None,
        teacher: nn.Module | None = None,
        distillation: Distillation | None = None,
        calibration: CalibrationData | None = None,
        shrink_at: int | float | None = None,
        threshold: float = 0.1,
        regularization: float = 1.0,
        allow_changes: bool = False,
        **kwargs: Any,
    ) -> None:
        if distillation is not None and teacher is None:
            raise ConfigError("found a distillation but no teacher: pass teacher=, a dense model for the same task")
        super().__init__(*args, **kwargs)
        if teacher is not None and teacher is self.model:
            raise ConfigError("the teacher is the model itself: pass a copy that stays dense, copy.deepcopy(model)")
        refuse_deepspeed(self.args)
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False).to(self.args.device)
        self.distillation = distillation or Distillation()
        self.pruning = PruningCallback(
            pruning_config,
            calibration=calibration,
            shrink_at=shrink_at,
            threshold=threshold,
            regularization=regularization,
            allow_changes=allow_changes,
        )
        self.pruning._watches = False
        self.pruning.is_needed = teacher is None and not hasattr(self.model, "peft_config")
        if isinstance(self.model, PreTrainedModel):
            prunable(self.model)
        self.add_callback(self.pruning)

    @property
    def _prunes(self) -> bool:
        assert isinstance(self.model, nn.Module)
        return self.pruning.config is not None or MaskStore.of(self.model) is not None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Train on one batch; once the gradients of a step are complete, clear those of removed weights."""
        learns = self.teacher is not None and not self.distillation.dropout
        with without_dropout(model) if learns else nullcontext():
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.pruning.pruner is not None and self.accelerator.sync_gradients:
            scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
            self.pruning.pruner.after_backward(self.state.global_step + 1, scale)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the sparsity."""
        if self.pruning.pruner is not None:
            logs["sparsity"] = self.pruning.pruner.sparsity
        super().log(logs, start_time)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss on the labels, and during training also the distillation loss.

        Every batch is weighted by its share of the step's labels, also if the model ignores ``num_items_in_batch``: the
        losses of most classifiers would otherwise grow with the number of batches and processes that share a step.
        """
        plain = self.compute_loss_func is None  # a loss function of the user does its own weighting
        counts = num_items_in_batch is not None and (self.model_accepts_loss_kwargs or not plain)
        if not model.training or (self.teacher is None and not (counts and plain)):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        hidden = {"output_hidden_states": True} if self.teacher is not None and self.distillation.hidden else {}
        batch = dict(inputs)
        loss, outputs = super().compute_loss(model, {**inputs, **hidden}, True, None if plain else num_items_in_batch)
        share: Any = 1.0
        if counts:
            share = self._get_num_labels(batch) / num_items_in_batch
            if self.args.average_tokens_across_devices:
                share = share * self.accelerator.num_processes
        elif not plain:
            share = 1 / self.current_gradient_accumulation_steps
        if plain:
            loss = loss.nan_to_num(nan=0.0) * share if counts else loss  # the mean over no labels is NaN
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                target = self.teacher(**self._for_teacher(batch), **hidden)
            extra = self.distillation.loss(outputs, target, batch, shifts=self._loss_shifts_labels)
            loss = self.distillation.task * loss + extra.to(loss.device) * share
        self.loss_is_scaled_for_ga = counts or not plain
        return (loss, outputs) if return_outputs else loss

    def _get_num_labels(self, batch: dict[str, Any]) -> Tensor:
        """Number of labels in a batch that are not ignored, counted as the Trainer counts those of a step."""
        labels = batch["labels"][..., 1:] if self._loss_shifts_labels else batch["labels"]
        return batch.get("shift_labels", labels).ne(-100).sum()

    def _for_teacher(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch without labels, except for encoder-decoder models, which make the decoder's inputs from them."""
        if is_encoder_decoder(self.teacher):
            return batch
        return {name: value for name, value in batch.items() if name != "labels"}

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; ``resume_from_checkpoint=True`` resumes from the newest complete checkpoint.

        Args:
            resume_from_checkpoint: As of ``Trainer.train``.
            trial: As of ``Trainer.train``.
            ignore_keys_for_eval: As of ``Trainer.train``.
        """
        if resume_from_checkpoint is True and self._prunes:
            last = last_whole_checkpoint(Path(str(self.args.output_dir)))
            resume_from_checkpoint = True if last is None else str(last)
        assert isinstance(self.model, nn.Module)
        # When resuming, the model is no longer the one that the training started with.
        if self.pruning.run is None or not resume_from_checkpoint:
            self.pruning.run = run_facts(
                self.args,
                self.model,
                self.train_dataset,
                tokenizer=self.processing_class,
                collator=self.data_collator,
                optimizer=self.optimizer,
                teacher=self.teacher,
                distillation=None if self.teacher is None else dataclasses.asdict(self.distillation),
                **self.pruning.own_facts(),
            )
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._prunes:
            self.pruning.check_run(Path(resume_from_checkpoint), check_training(Path(resume_from_checkpoint))[1])
            if model is None and self.pruning.shrink_at is not None:
                _resize_like(self.model, resume_from_checkpoint)
        self.pruning.resume_from = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Consider only fully pruned models for the best one."""
        pruner = self.pruning.pruner
        if self._prunes and pruner is not None and pruner.config is not None:
            last = pruner.schedule.span(self.state.max_steps)[1]
            if self.state.global_step < max(last, self.pruning.shrinking_step(self.state) or 0):
                return False
        return super()._determine_best_metric(metrics, trial)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's card and add what is counted in the model; ``push_to_hub`` uploads it.

        A card without the comment with which the Trainer marks its own belongs to the author: only our part of it is
        updated.
        """
        folder = Path(str(self.args.output_dir))
        card = folder / "README.md"
        text = read_card(card) if card.is_file() else ""
        if not text or _GENERATED in text:
            split_card(text)  # refuse a harmful card that came with a checkpoint before transformers reads it
            super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and self._prunes and (folder / "config.json").is_file():
            describe_model(self.model, folder, name=self.hub_model_id or folder.name)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        limit, self.args.save_total_limit = (
            self.args.save_total_limit,
            None,
        )  # delete old ones later
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        run = self._get_output_dir(trial=trial)
        if self._prunes:
            self.pruning.save(Path(run) / f"checkpoint-{self.state.global_step}", self.args.should_save)
        if self.args.should_save:
            # what a run that came further left behind, which may not be whole, does not count: where times of files do
            # not tell, transformers takes the highest step for the newest one
            later = sum(
                int(path.name.rpartition("-")[2]) > self.state.global_step
                for path in Path(run).glob("checkpoint-*")
                if path.name.rpartition("-")[2].isdecimal()
            )
            rotate_checkpoints(
                output_dir=run,
                save_total_limit=limit and limit + later,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )


def _resize_like(model: Any, folder: str) -> None:
    """Resize a model like a checkpoint that was shrunk in the middle of its training."""
    shrunk = type(model).from_pretrained(folder)
    resize(model, {site.name: site.units for site in find_unit_groups(shrunk)})
    if (record := getattr(shrunk.config, RECORD, None)) is not None:
        setattr(model.config, RECORD, record)
    simplify_config(model, find_unit_groups(model))
