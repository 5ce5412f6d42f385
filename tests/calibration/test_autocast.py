"""Autocast, in which a Trainer wraps a model's forward, does not reach the statistics."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
from transformers import TrainingArguments

from hf_prune import PruningTrainer, prune
from hf_prune.calibration.hooks import Watcher
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.schedule import Schedule
from tests import models


def test_watchers_multiply_in_float32():
    linear, seen = torch.nn.Linear(4, 4), []
    watcher = Watcher(linear, lambda _, args, *__: seen.append((args[0] @ args[0].t()).dtype))
    with ExitStack() as hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        watcher.install(hooks, None)
        assert linear(torch.randn(2, 4)).dtype == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    assert seen == [torch.float32]


@pytest.mark.parametrize(
    "settings",
    [{"criterion": "sparsegpt"}, {"preset": "best"}, {"granularity": ("head", "neuron"), "preset": "best"}],
    ids=["sparsegpt", "best", "units"],
)
def test_pruning_within_autocast_is_pruning_without(settings):
    model = models.tiny_bert()
    expected, batches = copy.deepcopy(model), models.tiny_batches(model)
    prune(expected, 0.5, calibration=batches, **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prune(model, 0.5, calibration=batches, **settings)
    for (name, value), other in zip(expected.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_a_training_in_bfloat16_calibrates_with_sums_in_float32(tmp_path, monkeypatch):
    """Of rounded products, the Gram matrices of many alike inputs are not positive definite any more."""
    enabled, add = [], Watcher.install

    def install(self, hooks, remaining):
        def call(*args):
            enabled.append(torch.is_autocast_enabled("cpu"))
            return self.call(*args)

        add(Watcher(self.module, call, self.after, self.waits), hooks, remaining)

    monkeypatch.setattr(Watcher, "install", install)
    model = models.tiny_bert()
    batches = models.tiny_batches(model)
    batch = batches[0]
    rows = [{name: value[i % len(value)] for name, value in batch.items()} for i in range(8)]
    trainer = PruningTrainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path), max_steps=2, bf16=True, use_cpu=True, report_to="none", save_strategy="no"
        ),
        train_dataset=rows,
        pruning_config=PruningConfig(0.5, preset="balanced", schedule=Schedule("one_shot")),
        calibration=batches,
    )
    trainer.train()
    assert enabled
    assert not any(enabled)
    assert trainer.model.sparsity_report().target_sparsity == pytest.approx(0.5, abs=0.02)
