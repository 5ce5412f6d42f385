"""Who listens hears of every long loop, and can stop it."""

import copy
import threading

import pytest
import torch
from datasets import Dataset

from hf_prune import evaluate_classification, listen_to_progress, prune, text_batches
from tests import models


@pytest.fixture(scope="module")
def data():
    tokenizer = models.tiny_tokenizer()
    return tokenizer, text_batches(models.tiny_sentences(12, 0)["sentence"], tokenizer, batch_size=4)


@pytest.mark.parametrize(
    ("settings", "titles"),
    [
        ({"criterion": "wanda"}, {"Pruning": 14}),
        ({"criterion": "wanda", "calibration_order": "one_pass"}, {"Calibrating": 3}),
        ({"criterion": "fisher_diagonal"}, {"Calibrating": 3}),
        ({"criterion": "sparsegpt", "polish": {"epochs": 1}}, {"Dense outputs": 3, "Pruning": 14, "Polishing": None}),
        ({"criterion": "wanda", "objective": "loss"}, {"Sensitivity": 3, "Pruning": 14}),
        ({"criterion": "taylor", "granularity": ("head", "neuron")}, {"Units": 3}),
    ],
)
def test_every_loop_tells(data, settings, titles):
    heard = {}
    with listen_to_progress(lambda title, done, total: heard.setdefault(title, []).append((done, total))):
        prune(models.tiny_classifier(), 0.5, calibration=data[1], **settings)
    for title, total in titles.items():
        steps = heard[title]
        assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
        assert len(steps) == (total or len(steps))
        assert {each for _, each in steps} <= {len(steps), None}


def test_scoring_tells(data):
    heard = []
    with listen_to_progress(lambda *told: heard.append(told)):
        evaluate_classification(
            models.tiny_classifier(), data[0], Dataset.from_dict(models.tiny_sentences(8, 0)), batch_size=2
        )
    assert heard == [("Scoring", i, 4) for i in range(1, 5)]


@pytest.mark.parametrize(
    "settings", [{"criterion": "sparsegpt"}, {"criterion": "fisher", "granularity": ("head", "neuron")}]
)
def test_what_the_listener_raises_leaves_the_model_as_it_was(data, settings):
    model = models.tiny_classifier()
    before = copy.deepcopy(model.state_dict())

    def stop(title, done, total):
        if done == 2:
            raise TimeoutError

    with pytest.raises(TimeoutError), listen_to_progress(stop):
        prune(model, 0.5, calibration=data[1], **settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    prune(model, 0.5, calibration=data[1], **settings)  # nobody listens any more


def test_other_threads_are_not_heard(data):
    heard = []
    with listen_to_progress(lambda *told: heard.append(told)):
        other = threading.Thread(
            target=prune, args=(models.tiny_classifier(), 0.5), kwargs={"criterion": "wanda", "calibration": data[1]}
        )
        other.start()
        other.join()
    assert heard == []
