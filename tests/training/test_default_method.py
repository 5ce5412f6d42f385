"""What a training prunes by where nobody named a method, and how calibrated masks close."""

import copy

import pytest
import torch
from transformers import Trainer

from hf_prune import MaskStore, PruningCallback, PruningConfig, PruningTrainer, Schedule, prune
from hf_prune.kernels.packed_masks import PackedMask
from hf_prune.training.default_method import training_batches
from hf_prune.training.goal import close_masks
from hf_prune.utils.notices import QualityWarning
from tests import models
from tests.training.test_trainer import STEPS, Sentences, Watch, arguments

CUBIC = Schedule("cubic", begin=0, end=8, every=2)


class Stream(torch.utils.data.IterableDataset):
    """Examples without numbers."""

    def __iter__(self):
        yield from (Sentences()[i] for i in range(96))


def train(folder, config, kind=PruningTrainer, data=None, **settings):
    watch = Watch()
    callbacks = [watch]
    if kind is Trainer:
        callbacks.append(PruningCallback(config))
    else:
        settings["pruning_config"] = config
    data = Sentences() if data is None else data
    run = kind(model=models.tiny_bert(), args=arguments(folder), train_dataset=data, callbacks=callbacks, **settings)
    run.train()
    return run.model, watch


@pytest.mark.parametrize("kind", [PruningTrainer, Trainer])
def test_the_best_method_decides_at_the_first_update_and_the_schedule_closes_the_masks(tmp_path, kind):
    dense = models.tiny_bert()
    model, watch = train(tmp_path, PruningConfig(sparsity=0.75, schedule=CUBIC), kind)
    expected = [CUBIC.sparsity(step - step % 2, STEPS, 0.75) for step in range(1, STEPS + 1)]
    assert watch.sparsities == pytest.approx(expected, abs=2e-3)
    run = PruningTrainer(model=copy.deepcopy(dense), args=arguments(tmp_path), train_dataset=Sentences())
    batches = training_batches(run.get_train_dataloader(), seed=0)
    prune(dense, PruningConfig(sparsity=0.75, preset="best"), calibration=batches)
    chosen, store = MaskStore.of(dense).masks, MaskStore.of(model)
    assert {name: mask.tolist() for name, mask in store.masks.items()} == {n: m.tolist() for n, m in chosen.items()}
    assert (store.config.criterion, store.config.repair, store.config.schedule) == ("alps", "least_squares", CUBIC)
    for earlier, later in zip(watch.masks, watch.masks[1:], strict=False):
        assert not any((later[name] & ~earlier[name]).any() for name in earlier)


@pytest.mark.parametrize("named", [{"criterion": "magnitude"}, {"scope": "layer"}, {"steps": 1}])
def test_who_names_a_method_has_it(tmp_path, named):
    config = PruningConfig(sparsity=0.75, schedule=CUBIC, **named)
    assert config.names_method
    assert MaskStore.of(train(tmp_path, config)[0]).config.criterion == "magnitude"


def test_settings_from_a_file_are_named():
    config = PruningConfig(sparsity=0.75, schedule=CUBIC)
    assert not config.names_method
    assert PruningConfig.from_json(config.to_json()).names_method
    assert PruningConfig(sparsity=0.75, preset="fast").names_method


def test_rigl_goes_by_magnitude_and_gradient(tmp_path):
    model, _ = train(tmp_path, PruningConfig(sparsity=0.75, schedule=Schedule("rigl", end=8, every=2)))
    assert MaskStore.of(model).config.criterion == "magnitude"


def test_data_of_the_users_comes_first_and_examples_without_numbers_are_no_data(tmp_path):
    config = PruningConfig(sparsity=0.75, schedule=CUBIC)
    with pytest.warns(QualityWarning, match="is pruned by magnitude.*pass calibration="):
        model, _ = train(tmp_path, config, data=Stream())
    assert MaskStore.of(model).config.criterion == "magnitude"
    given = [{"input_ids": torch.arange(4, 28).view(4, 6)}]
    model, watch = train(tmp_path, config, data=Stream(), calibration=given)
    assert MaskStore.of(model).config.criterion == "alps"
    assert watch.sparsities[-1] == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("schedule", [None, Schedule("linear", begin=3, end=9)])
@pytest.mark.parametrize("kind", [{"granularity": "2:4"}, {"granularity": ("head", "neuron"), "sparsity": 0.5}])
def test_patterns_and_units_end_as_they_are(tmp_path, kind, schedule):
    model, watch = train(tmp_path, PruningConfig(**kind, schedule=schedule))
    assert watch.sparsities[-1] == pytest.approx(0.5, abs=1e-3)
    assert watch.sparsities[0] == (0 if schedule else watch.sparsities[-1])
    if kind["granularity"] == "2:4":
        for mask in MaskStore.of(model).masks.values():
            assert (mask.view(-1, 4).sum(1) == 2).all()
    else:
        model.shrink()


def test_the_training_draws_the_same_random_numbers():
    loader = torch.utils.data.DataLoader(Sentences(), batch_size=4, shuffle=True)
    torch.manual_seed(3)
    first = torch.rand(3)
    torch.manual_seed(3)
    batches = training_batches(loader, seed=0)
    assert torch.equal(torch.rand(3), first)
    assert sum(len(batch["input_ids"]) for batch in batches) == 96
    drawn = torch.cat([batch["input_ids"] for batch in batches])
    assert sorted(map(tuple, drawn.tolist())) == sorted(map(tuple, Sentences().ids.tolist()))
    assert not torch.equal(drawn, Sentences().ids)


def test_long_texts_are_fewer():
    loader = torch.utils.data.DataLoader(Sentences(n=512, length=512))
    assert sum(len(batch["input_ids"]) for batch in training_batches(loader, seed=0)) == 64
    assert sum(len(b["input_ids"]) for b in training_batches(torch.utils.data.DataLoader(Sentences(n=900)), 0)) == 512


class Numbered(torch.utils.data.Dataset):
    """Examples that note which of them were read."""

    def __init__(self, n, example):
        self.n, self.example, self.read = n, example, []

    def __len__(self):
        return self.n

    def __getitem__(self, number):
        self.read.append(number)
        return self.example(number)


def padded(number):
    """A text of 3 to 19 tokens in 32 places."""
    size = 3 + number % 17
    return {"input_ids": [number] * 32, "attention_mask": [1] * size + [0] * (32 - size)}


def tensors(number):
    """The same, as a data set with ``with_format("torch")`` returns it."""
    return {name: torch.tensor(value) for name, value in {**padded(number), "label": number % 2}.items()}


@pytest.mark.parametrize("example", [padded, tensors, lambda number: {"input_ids": [number] * (3 + number % 17)}])
def test_of_many_texts_the_longest_of_those_that_are_drawn_are_taken(example):
    data = Numbered(3000, example)
    numbers = lambda rows: {"input_ids": torch.tensor([row["input_ids"][0] for row in rows])}  # noqa: E731
    batches = training_batches(torch.utils.data.DataLoader(data, collate_fn=numbers), seed=0)
    taken = torch.cat([batch["input_ids"] for batch in batches]).tolist()
    drawn = list(dict.fromkeys(data.read))
    assert len(drawn) == 2048
    assert sorted(3 + n % 17 for n in taken) == sorted(3 + n % 17 for n in drawn)[-512:]
    assert taken == [number for number in drawn if number in set(taken)]  # in the order in which they were drawn


def test_no_more_long_texts_are_read_than_the_tokens_ask_for():
    data = Numbered(3000, lambda number: {"input_ids": [number] * 512})
    collate = lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])}  # noqa: E731
    batches = training_batches(torch.utils.data.DataLoader(data, collate_fn=collate), seed=0)
    assert sum(len(batch["input_ids"]) for batch in batches) == 64
    assert len(set(data.read)) == 256


@pytest.mark.parametrize(
    "example",
    [
        lambda number: {"pixel_values": torch.full((3, 2, 2), float(number))},
        lambda number: {"input_ids": [number] * 400, "pixel_values": torch.full((3, 2, 2), float(number))},
        lambda number: {"input_ids": [[number] * 9] * 4, "pixel_values": torch.zeros(3)},
    ],
)
def test_images_are_not_read_to_choose_among_them(example):
    data = Numbered(3000, example)
    collate = lambda rows: {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}  # noqa: E731
    batches = training_batches(torch.utils.data.DataLoader(data, collate_fn=collate), seed=0)
    assert sum(len(batch["pixel_values"]) for batch in batches) == len(set(data.read)) == 128


def test_texts_that_the_collator_tokenizes_are_drawn_as_they_come():
    data = Numbered(3000, lambda number: {"text": "a " * number})
    collate = lambda rows: {"input_ids": torch.ones(len(rows), 4, dtype=torch.long)}  # noqa: E731
    batches = training_batches(torch.utils.data.DataLoader(data, collate_fn=collate), seed=0)
    assert sum(len(batch["input_ids"]) for batch in batches) == len(set(data.read)) == 512


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_masks_close_by_size_among_what_goes(share):
    """Against a loop over the weights."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator)
    goal = torch.rand(6, 8, generator=generator) > 0.6
    mask = goal | (torch.rand(6, 8, generator=generator) > 0.2)
    found = close_masks({"w": mask}, {"w": PackedMask.of(goal)}, {"w": weight}, share)["w"]
    expected, removed = mask.clone(), [(abs(float(weight[i, j])), i, j) for i, j in (~goal).nonzero().tolist()]
    closed = sum(not mask[i, j] for _, i, j in removed)
    for _, i, j in sorted(entry for entry in removed if mask[entry[1], entry[2]]):
        if closed >= round(share * len(removed)):
            break
        expected[i, j] = False
        closed += 1
    assert torch.equal(found, expected)
    assert torch.equal(found, goal) == (share == 1.0)
