"""Settings of a training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TrainingArguments


@dataclass(frozen=True)
class TrainingSettings:
    """How a checkpoint is trained.

    Args:
        split: What it learns from.
        epochs: Passes over it.
        learning_rate: Of AdamW, at its highest.
        batch_size: Examples, or windows of tokens, in a batch.
        accumulation: Batches in an optimizer step.
        warmup: Share of the steps in which the learning rate rises; it falls to zero then.
        bf16: Compute in bfloat16.
        seed: Of the order of the examples, and of dropout.
    """

    split: str = "train"
    epochs: float = 1.0
    learning_rate: float = 5e-5
    batch_size: int = 32
    accumulation: int = 1
    warmup: float = 0.05
    bf16: bool = False
    seed: int = 0


def arguments(settings: TrainingSettings, folder: Path, *, saves: bool) -> TrainingArguments:
    """The settings as the Trainer takes them."""
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        warmup_steps=settings.warmup,
        bf16=settings.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=settings.seed,
        logging_steps=0.05,
        save_strategy="steps" if saves else "no",
        save_steps=0.1,
        save_total_limit=2,
        report_to=[],
    )
