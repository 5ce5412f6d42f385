"""Prune a classifier to 80 % zeros while it is trained, with its dense self as the teacher.

    python examples/prune_while_training.py MODEL DATA OUT

MODEL is a folder or Hub id, DATA a folder with train and dev files (columns sentence and label) or a Hub data set.
"""

import copy
import sys

from transformers import AutoTokenizer, DataCollatorWithPadding, TrainingArguments

import hf_prune
from hf_prune import AutoPrunedModelForSequenceClassification, Distillation, PruningConfig, PruningTrainer, Schedule


def main(source: str, data: str, out: str) -> None:
    """Train, compare with the dense model, save."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoPrunedModelForSequenceClassification.from_pretrained(source)
    dense = copy.deepcopy(model)
    train, dev = (hf_prune.load_classification(data, split) for split in ("train", "validation"))

    trainer = PruningTrainer(
        model=model,
        args=TrainingArguments(out, num_train_epochs=1, per_device_train_batch_size=32, save_strategy="no"),
        train_dataset=hf_prune.classification_examples(train, tokenizer, label2id=model.config.label2id),
        data_collator=DataCollatorWithPadding(tokenizer),
        pruning_config=PruningConfig(sparsity=0.8, schedule=Schedule("cubic", end=0.7)),
        teacher=dense,
        distillation=Distillation(task=0.1, logits=0.9, hidden=1.0),
    )
    trainer.train()

    scores = [hf_prune.evaluate_classification(each.eval(), tokenizer, dev) for each in (dense, model)]
    print(model.sparsity_report())
    print(hf_prune.compare(*scores))
    model.save_pretrained(out)  # any transformers loads it
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
