"""Train a checkpoint while pruning it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from hf_prune.calibration.batches import Batches
from hf_prune.checkpoint.companions import copy_companions
from hf_prune.checkpoint.staging import staged_checkpoint
from hf_prune.cli.workflows.card import write_run_card
from hf_prune.cli.workflows.loading import load_for_task
from hf_prune.errors import CheckpointError, ConfigError
from hf_prune.evaluation.data.files import refuse_same_split
from hf_prune.evaluation.sparsity_report import SparsityReport, sparsity_report
from hf_prune.evaluation.structure_report import structure_report
from hf_prune.evaluation.tasks import Task
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.traits import shrinks_by_default
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.training.distillation import Distillation
from hf_prune.training.run_record import config_facts
from hf_prune.training.state import check_old_run, last_whole_checkpoint, says_its_run
from hf_prune.training.trainer import PruningTrainer
from hf_prune.utils.digests import examples_digest, tensors_digest
from hf_prune.utils.files import write_json
from hf_prune.utils.formatting import format_duration
from hf_prune.utils.load_options import load_options, resolve_device
from hf_prune.utils.locks import output_lock, writes_alone
from hf_prune.utils.output_folder import check_output
from hf_prune.utils.results import Result

SEEN = "a model looks better than it is on the examples that it was trained on"


@dataclass(frozen=True)
class TrainingSettings:
    """How a checkpoint is trained.

    Args:
        split: What it learns from.
        epochs: Passes over it.
        learning_rate: Of AdamW, at its highest.
        batch_size: Examples, or windows of tokens, in a batch.
        accumulation: Batches in an optimizer step.
        warmup: Share of the steps in which the learning rate rises; afterwards it falls to zero.
        bf16: Compute in bfloat16.
        seed: Seed of the order of the examples and of dropout.
        report_to: Where the Trainer of transformers reports: such as ``("wandb",)`` or ``("tensorboard",)``.
    """

    split: str = "train"
    epochs: float = 1.0
    learning_rate: float = 5e-5
    batch_size: int = 32
    accumulation: int = 1
    warmup: float = 0.05
    bf16: bool = False
    seed: int = 0
    report_to: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class TrainingReport(Result):
    """The result of a training with pruning.

    Args:
        sparsity: What is zero, or was removed.
        dense: Score of the model before training.
        pruned: Score of the trained model on the same examples.
        comparison: The two scores compared, example by example.
        steps: Optimizer steps.
        seconds: How long the training took.
    """

    bars = ("pruned.accuracy", "dense.accuracy")

    sparsity: SparsityReport
    dense: Any
    pruned: Any
    comparison: Any
    steps: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in values.items()}

    def __str__(self) -> str:
        lines = [str(self.sparsity), "", f"before: {self.dense}", f"after:  {self.pruned}", str(self.comparison)]
        return "\n".join([*lines, f"Trained for {self.steps:,} steps in {format_duration(self.seconds)}."])


@writes_alone("train")
def train_checkpoint(
    source: str,
    config: PruningConfig | None,
    out: Path,
    task: Task,
    *,
    settings: TrainingSettings | None = None,
    score_split: str = "validation",
    teacher: str | None = None,
    distillation: Distillation | None = None,
    shrink_at: int | float | None = None,
    checkpoints: Path | None = None,
    allow_changes: bool = False,
    overwrite: bool = False,
    command: str | None = None,
) -> TrainingReport:
    """Train a checkpoint while pruning it, into a folder: weights, masks, tokenizer, ``training_report.json``, card.

    Args:
        source: Folder or Hub id of a sequence classifier or a causal language model.
        config: What is pruned, and by which schedule; None keeps the masks that the checkpoint has.
        out: The folder.
        task: What it learns from and is scored on.
        settings: How it is trained.
        score_split: The split to score, before and after.
        teacher: Folder or Hub id of a dense model for the same task; ``"self"`` is the model before training.
        distillation: How much of the loss comes from the teacher.
        shrink_at: See :class:`hf_prune.PruningCallback`.
        checkpoints: A folder for checkpoints of the training, which resumes from the last complete one there.
        allow_changes: Resume even if the model, the data or the settings of the training have changed; settings of
            the pruning may not.
        overwrite: Replace what is in the way in ``out``.
        command: The command line, for the card.

    Raises:
        CheckpointError: If ``out`` is the source, or something is in the way, or the checkpoints belong to another
            training.
        ConfigError: If settings contradict one another.
        DataError: If the model or the data cannot be found or read.
    """
    settings = settings or TrainingSettings()
    refuse_same_split(task.source, settings.split, score_split, "trained and scored on", SEEN)
    check_output(out, "train", [source, teacher], overwrite=overwrite, beside=[checkpoints])
    model, tokenizer = load_for_task(source, task)
    if config is None and MaskStore.of(model) is None:
        raise ConfigError(f"{source!r} has no masks to keep: say what to prune, or prune it first")
    examples = task.training_examples(settings.split, model, tokenizer)
    calibration = (
        None if config is None else task.calibration_batches([config.replace(schedule=None)], model, tokenizer)
    )
    if config is not None and (config.criterion == "taylor" or config.learns_in_training) and config.repair is None:
        calibration = None  # these criteria watch the training itself
    dense: Any = task.score(model.eval(), tokenizer, score_split, source=task.source)
    with ExitStack() as stack:
        if checkpoints is not None:
            stack.enter_context(output_lock(checkpoints, "train"))
        folder = checkpoints or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trainer = PruningTrainer(
            model=model,
            args=training_arguments(settings, folder, saves=checkpoints is not None),
            train_dataset=examples,
            data_collator=task.data_collator(tokenizer),
            pruning_config=config,
            teacher=_teacher(teacher, model, task),
            distillation=distillation,
            calibration=calibration,
            shrink_at=shrink_at,
            allow_changes=allow_changes,
        )
        last = None if checkpoints is None else last_whole_checkpoint(checkpoints)
        if last is not None and not allow_changes and not says_its_run(last):
            if not check_old_run(last, lambda: _old_run(trainer, examples, calibration or [], distillation, settings)):
                raise CheckpointError(
                    f"{last} does not say which training it belongs to, as an earlier version made it: name another "
                    f"folder, or pass --allow-changes (allow_changes=True) to resume from it unchecked"
                )
            trainer.pruning.allow_changes = True  # compared by check_old_run
        with contextlib.redirect_stdout(sys.stderr):  # for progress
            result = trainer.train(resume_from_checkpoint=None if last is None else str(last))
        trained: Any = trainer.model
    trained.eval()
    sparsity = sparsity_report(trained)
    if config is not None and shrinks_by_default(config):
        trained.shrink()
        sparsity = dataclasses.replace(sparsity, structure=structure_report(trained))
    pruned: Any = task.score(trained, tokenizer, score_split, source=task.source)
    training = TrainingReport(
        sparsity=sparsity,
        dense=dense,
        pruned=pruned,
        comparison=task.compare(dense, pruned),
        steps=trainer.state.global_step,
        seconds=float(result.metrics.get("train_runtime", 0.0)),
    )
    with staged_checkpoint(out, "train", overwrite=overwrite, beside=[checkpoints]) as staging:
        trained.save_pretrained(staging)
        copy_companions(source, staging)
        write_json(staging / "training_report.json", training.to_dict())
        write_run_card(staging, out, source, config, None if calibration is None else task, command=command)
    return training


def _old_run(
    trainer: Any, examples: Batches, calibration: Batches, distillation: Distillation | None, settings: TrainingSettings
) -> dict[str, Any]:
    """The facts that earlier versions wrote beside the checkpoints of a training, instead of into each of them."""
    config = trainer.pruning.config
    return {
        "model": tensors_digest(trainer.model.named_parameters()),
        "model config": config_facts(trainer.model),
        "data": examples_digest(examples),
        "calibration data": examples_digest(calibration),
        "pruning config": None if config is None else config.to_dict(),
        "teacher": None if trainer.teacher is None else tensors_digest(trainer.teacher.named_parameters()),
        "distillation": None if distillation is None else dataclasses.asdict(distillation),
        "shrink_at": trainer.pruning.shrink_at,
        **{name: value for name, value in dataclasses.asdict(settings).items() if name != "report_to"},
    }


def _teacher(teacher: str | None, model: PreTrainedModel, task: Task) -> Any:
    if teacher is None:
        return None
    if teacher == "self":
        return copy.deepcopy(model)
    return load_for_task(teacher, task)[0]


def training_arguments(settings: TrainingSettings, folder: Path, *, saves: bool) -> TrainingArguments:
    """The settings as arguments of the Trainer."""
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        warmup_steps=settings.warmup,
        bf16=settings.bf16,
        use_cpu=resolve_device(load_options().device).type == "cpu",
        seed=settings.seed,
        logging_steps=0.05,
        save_strategy="steps" if saves else "no",
        save_steps=0.1,
        save_total_limit=2,
        report_to=list(settings.report_to),
    )
