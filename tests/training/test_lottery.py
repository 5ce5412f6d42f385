"""Lottery tickets: the same share goes in each round, and what stays starts from early weights."""

import itertools

import pytest
import torch
from transformers import Trainer

from hf_prune import ConfigError, MaskStore, PruningConfig, PruningTrainer, find_ticket
from tests import models
from tests.training.test_trainer import Sentences, arguments


def maker(folder, kind=PruningTrainer, **settings):
    def make(model):
        data = {"train_dataset": Sentences(), "eval_dataset": Sentences(16)}
        return kind(model=model, args=arguments(folder, max_steps=6, **settings), **data)

    return make


@pytest.mark.parametrize("kind", [PruningTrainer, Trainer])
@pytest.mark.parametrize("rewind_to", [0, 3])
def test_rounds_and_rewinding(tmp_path, kind, rewind_to):
    model = models.tiny_bert()
    begin = {name: value.clone() for name, value in model.state_dict().items()}
    config = PruningConfig(0.75, target_modules=("query", "dense"))
    result = find_ticket(model, maker(tmp_path, kind), config, rounds=2, rewind_to=rewind_to)
    assert [each.sparsity for each in result.rounds] == pytest.approx([0, 0.5, 0.75], abs=1e-3)
    masks = MaskStore.of(model).masks
    assert result.model is model
    for name, value in result.ticket.items():
        kept = masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert not value[~kept].any()
        assert torch.equal(value[kept], begin[name][kept]) == (rewind_to == 0)
    for name, mask in masks.items():
        assert not model.get_parameter(name).detach()[~mask].any()
        assert not torch.equal(model.get_parameter(name).detach(), result.ticket[name])  # it was trained since
    assert "eval_loss" in result.rounds[0].metrics
    assert str(result).splitlines()[0].split()[:3] == ["round", "sparsity", "loss"]
    assert len(result.to_dict()["rounds"]) == 3


def test_later_masks_are_inside_earlier_ones_and_go_by_trained_weights(tmp_path):
    model = models.tiny_bert()
    seen = []
    make = maker(tmp_path)

    def watch(changed):
        store = MaskStore.of(changed)
        seen.append({} if store is None else {name: mask.clone() for name, mask in store.masks.items()})
        return make(changed)

    find_ticket(model, watch, PruningConfig(0.75, target_modules=("query",)), rounds=3)
    assert [bool(masks) for masks in seen] == [False, True, True, True]
    for before, after in itertools.pairwise(seen[1:]):
        for name in before:
            assert not (after[name] & ~before[name]).any()


@pytest.mark.parametrize(
    ("settings", "more", "match"),
    [
        ({"granularity": "2:4"}, {}, "sparsity that can grow"),
        ({"criterion": "wanda"}, {}, "without data"),
        ({"schedule": "cubic"}, {}, "no schedule"),
        ({}, {"rounds": 0}, "rounds is 0"),
        ({}, {"rewind_to": -1}, "rewind_to is -1"),
        ({}, {"rewind_to": 99}, "the training has 6 steps"),
    ],
)
def test_refused(tmp_path, settings, more, match):
    with pytest.raises(ConfigError, match=match):
        find_ticket(models.tiny_bert(), maker(tmp_path), PruningConfig(**settings), **more)
