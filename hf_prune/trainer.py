"""Pruning inside the Trainer of transformers: PruningCallback does the work, PruningTrainer wires it.

The masks are a matter of the callback. The Trainer adds what only it can do: gradients are looked at once all processes
have added theirs up, a teacher takes part in the loss, the best checkpoint is one that is pruned to the end, and old
checkpoints go only when the new one is complete.
"""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from hf_prune.activations import Batches
from hf_prune.cards import describe_model
from hf_prune.config import PruningConfig
from hf_prune.distillation import Distillation
from hf_prune.distributed import processes
from hf_prune.errors import ConfigError, MaskError
from hf_prune.front_matter import read_card, split_card
from hf_prune.masking import MaskStore
from hf_prune.mixin import prunable
from hf_prune.pipeline import resolve_config
from hf_prune.shrinking import RECORD, resize, simplify_config
from hf_prune.sites import find_sites
from hf_prune.training import TrainingPruner
from hf_prune.training_facts import data_facts, model_facts, run_facts
from hf_prune.training_state import check_same_run, check_training, last_whole_checkpoint, load_training, save_training

_GENERATED = "<!-- This model card has been generated automatically"  # of the Trainer: until the author removes it
_HANDLES = "_hf_prune_hooks"  # where a model keeps the handles of hooks while it is trained


class PruningCallback(TrainerCallback):
    """Prunes the model of any ``Trainer`` while it is trained, and keeps removed weights at zero.

    After every optimizer step the masks are applied; gradients of removed weights are cleared before they are clipped.
    Masks change as the config's schedule says. Checkpoints hold all that is needed to go on bit for bit. The sparsity
    is in ``trainer.state.log_history`` wherever something is logged.

    Args:
        pruning_config: The settings, or a sparsity; None keeps the masks that the model has.
        calibration: Batches for criteria and repairs that look at data whenever masks change, such as ``sparsegpt``.
        shrink_at: After which step, or which share of all steps, heads, neurons and channels that are pruned are taken
            out; not before the schedule ends. The rest of the training is faster then.
        threshold: Of ``soft_movement``: a weight goes if the sigmoid of its score is below.
        regularization: Of ``soft_movement``: how hard scores are pulled down.
        allow_changes: Go on from a checkpoint also if the settings, the data or the model are not those that the
            training began with; by default that is refused. What is pruned, and how, is never changed on the way.

    Example:
        >>> config = PruningConfig(sparsity=0.8, schedule="cubic")
        >>> trainer = Trainer(model=model, args=args, callbacks=[PruningCallback(config)])  # doctest: +SKIP
    """

    def __init__(
        self,
        pruning_config: PruningConfig | float | None = None,
        *,
        calibration: Batches | None = None,
        shrink_at: int | float | None = None,
        threshold: float = 0.1,
        regularization: float = 1.0,
        allow_changes: bool = False,
    ) -> None:
        self.shrink_at = shrink_at
        self.allow_changes = allow_changes
        self.run: dict[str, Any] | None = None  # what makes this training the one that it is
        self.config = None if pruning_config is None else resolve_config(pruning_config, {})
        self.pruner: TrainingPruner | None = None
        self.resume_from: str | None = None
        self.is_needed = True  # False: a model without masks may be trained, and nothing is done then
        self._watches = True  # False: a PruningTrainer tells when gradients are there
        self._settings = {"threshold": threshold, "regularization": regularization}
        self._calibration = calibration

    # --- the events ------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Check the settings, go on from a checkpoint, or prune what the schedule wants before the first step."""
        _refuse_deepspeed(args)
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
        self.pruner = TrainingPruner(model, config, state.max_steps, calibration=self._calibration, **self._settings)
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
        """Zero what the step moved, change the masks if it is time, and take out what is pruned if that is due."""
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
        """Take the masks of the checkpoint that was loaded as the best one, and make sure that all zeros are there."""
        if self.pruner is None:
            return
        for handle in self.pruner.model.__dict__.pop(_HANDLES, ()):
            handle.remove()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._restore(Path(state.best_model_checkpoint))
        self.pruner.check()

    # --- what they need --------------------------------------------------------------------------------------

    def save(self, folder: Path, writes: bool) -> None:
        """Write masks and what was learned into a checkpoint; every process calls this, one writes.

        Args:
            folder: The checkpoint.
            writes: Whether this process is the one that writes.
        """
        assert self.pruner is not None
        state = self.pruner.state()
        now = {"run": self.run, "weights_now": model_facts(self.pruner.model)}
        if writes:
            if not folder.is_dir():
                raise MaskError(f"{folder} is no folder: expected the Trainer's checkpoint there; use a PruningTrainer")
            save_training(folder, MaskStore.of(self.pruner.model), state, {**self._facts(), **now})

    def own_facts(self) -> dict[str, Any]:
        """What a training must share besides what any ``Trainer`` has."""
        return {"calibration": data_facts(self._calibration), "shrink_at": self.shrink_at}

    def check_run(self, folder: Path, before: dict[str, Any]) -> None:
        """Refuse to go on from a checkpoint of another training, unless changes are allowed.

        Args:
            folder: The checkpoint.
            before: The settings that it was made with.

        Raises:
            CheckpointError: If settings, data or model differ.
        """
        assert self.run is not None
        if not self.allow_changes:
            self.run = check_same_run(folder, before, self.run)

    def shrinking_step(self, state: TrainerState) -> int | None:
        """After which step the model is shrunk."""
        if self.shrink_at is None or isinstance(self.shrink_at, int):
            return self.shrink_at
        return round(self.shrink_at * state.max_steps)

    def check_shrinking(self, state: TrainerState) -> None:
        """Refuse a ``shrink_at`` that cannot be."""
        step = self.shrinking_step(state)
        if step is None:
            return
        assert self.pruner is not None
        end = self.pruner.schedule.span(state.max_steps)[1]
        if not max(1, end) <= step <= state.max_steps:
            raise ConfigError(
                f"shrink_at={self.shrink_at!r} is step {step}: expected one from {max(1, end)}, where the schedule "
                f"ends, to {state.max_steps}, where the training does"
            )
        if processes()[1] > 1:
            raise ConfigError(
                "shrink_at with several processes: DDP and FSDP hold on to the parameters that they began with; shrink "
                "after the training, or between two trainings"
            )
        find_sites(self.pruner.model)  # an error here comes before the work

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
        assert self.pruner is not None
        pruner = self.pruner
        if pruner.config is None:
            return
        last = pruner.schedule.span(state.max_steps)[1]
        if args.load_best_model_at_end and last > 0:
            raise ConfigError(
                "load_best_model_at_end would load a checkpoint from before the end of the schedule, which is less "
                "sparse: use a PruningTrainer, which looks at those from after its end only"
            )
        if processes()[1] > 1 and (pruner.config.learns_in_training or pruner.config.criterion == "taylor"):
            raise ConfigError(
                f"criterion {pruner.config.criterion!r} needs the gradients of all processes: use a PruningTrainer"
            )
        if args.fp16 and (pruner.config.learns_in_training or pruner.config.criterion == "taylor"):
            raise ConfigError(
                f"criterion {pruner.config.criterion!r} with fp16 has to know the scale of the loss: use a "
                f"PruningTrainer, or bf16"
            )
        if processes()[1] > 1 and pruner.schedule.exchanges:
            raise ConfigError(
                "a schedule that exchanges weights needs the gradients of all processes: use a PruningTrainer"
            )

    def _watch(self, model: nn.Module, state: TrainerState) -> None:
        """Look at each gradient of a step as soon as it is complete."""
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


class PruningTrainer(Trainer):
    """A ``Trainer`` that prunes, and can learn from a dense teacher.

    Args:
        *args: As of ``Trainer``.
        pruning_config: The settings, or a sparsity; None keeps the masks that the model has.
        teacher: A model of the same task, for example a copy of the dense one; it is frozen and not saved.
        distillation: How much of the loss comes from where; by default ``Distillation()`` if there is a teacher.
        calibration: Batches for criteria and repairs that look at data whenever masks change.
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
        calibration: Batches | None = None,
        shrink_at: int | float | None = None,
        threshold: float = 0.1,
        regularization: float = 1.0,
        allow_changes: bool = False,
        **kwargs: Any,
    ) -> None:
        if distillation is not None and teacher is None:
            raise ConfigError("a distillation, and no teacher: pass teacher=, a dense model of the same task")
        super().__init__(*args, **kwargs)
        if teacher is not None and teacher is self.model:
            raise ConfigError("the teacher is the model itself: pass a copy that stays dense, copy.deepcopy(model)")
        _refuse_deepspeed(self.args)
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
        """One batch; once the gradients of a step are complete, those of removed weights are cleared."""
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
        """The loss on the labels, and while training what the teacher adds to it.

        A batch counts in its step as many labels as it has, also where the model ignores ``num_items_in_batch``: the
        losses of most classifiers would otherwise grow with the number of batches and processes that share a step.
        """
        own = self.compute_loss_func is None  # a function of the user's knows how to count
        counts = num_items_in_batch is not None and (self.model_accepts_loss_kwargs or not own)
        if not model.training or (self.teacher is None and not (counts and own)):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        hidden = {"output_hidden_states": True} if self.teacher is not None and self.distillation.hidden else {}
        batch = dict(inputs)
        loss, outputs = super().compute_loss(model, {**inputs, **hidden}, True, None if own else num_items_in_batch)
        share: Any = 1.0
        if counts:
            share = self._get_num_labels(batch) / num_items_in_batch
            if self.args.average_tokens_across_devices:
                share = share * self.accelerator.num_processes
        elif not own:
            share = 1 / self.current_gradient_accumulation_steps
        if own:
            loss = loss.nan_to_num(nan=0.0) * share if counts else loss  # the mean over no label is no number
        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                goal = self.teacher(**self._for_teacher(batch), **hidden)
            extra = self.distillation.loss(outputs, goal, batch, shifts=self._loss_shifts_labels)
            loss = self.distillation.task * loss + extra.to(loss.device) * share
        self.loss_is_scaled_for_ga = counts or not own
        return (loss, outputs) if return_outputs else loss

    def _get_num_labels(self, batch: dict[str, Any]) -> Tensor:
        """How many labels of a batch count, as the Trainer counts those of a step."""
        labels = batch["labels"][..., 1:] if self._loss_shifts_labels else batch["labels"]
        return batch.get("shift_labels", labels).ne(-100).sum()

    def _for_teacher(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Without labels, which decoders of two-part models need to make their inputs."""
        if getattr(getattr(self.teacher, "config", None), "is_encoder_decoder", False):
            return batch
        return {name: value for name, value in batch.items() if name != "labels"}

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; ``resume_from_checkpoint=True`` goes on from the newest checkpoint that is whole.

        Args:
            resume_from_checkpoint: As of ``Trainer.train``.
            trial: As of ``Trainer.train``.
            ignore_keys_for_eval: As of ``Trainer.train``.
        """
        if resume_from_checkpoint is True and self._prunes:
            last = last_whole_checkpoint(Path(str(self.args.output_dir)))
            resume_from_checkpoint = True if last is None else str(last)
        assert isinstance(self.model, nn.Module)
        if self.pruning.run is None or not resume_from_checkpoint:  # going on, the model is not as it began any more
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
        """Only models that are pruned to the end can be the best one."""
        pruner = self.pruning.pruner
        if self._prunes and pruner is not None and pruner.config is not None:
            last = pruner.schedule.span(self.state.max_steps)[1]
            if self.state.global_step < max(last, self.pruning.shrinking_step(self.state) or 0):
                return False
        return super()._determine_best_metric(metrics, trial)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's card, with what was counted in the model: ``push_to_hub`` uploads it.

        A card that the author has taken over, by removing the comment that the Trainer's begin with, stays but for our
        part.
        """
        folder = Path(str(self.args.output_dir))
        card = folder / "README.md"
        text = read_card(card) if card.is_file() else ""
        if not text or _GENERATED in text:
            split_card(text)  # which may have come with a checkpoint: checked before transformers reads it
            super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and self._prunes and (folder / "config.json").is_file():
            describe_model(self.model, folder, name=self.hub_model_id or folder.name)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # old ones go when this one is complete
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        run = self._get_output_dir(trial=trial)
        if self._prunes:
            self.pruning.save(Path(run) / f"checkpoint-{self.state.global_step}", self.args.should_save)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=run,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )


def _resize_like(model: Any, folder: str) -> None:
    """Give a model the sizes of one that was shrunk in the middle of its training."""
    shrunk = type(model).from_pretrained(folder)
    resize(model, {site.name: site.units for site in find_sites(shrunk)})
    if (record := getattr(shrunk.config, RECORD, None)) is not None:
        setattr(model.config, RECORD, record)
    simplify_config(model)


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> str:
    return os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}")


def _refuse_deepspeed(args: TrainingArguments) -> None:
    if getattr(args, "deepspeed", None) or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError(
            "DeepSpeed holds parameters and gradients where masks do not reach them, and was not tested: use DDP or "
            "FSDP2 (accelerate launch --use_fsdp --fsdp_version 2)"
        )
