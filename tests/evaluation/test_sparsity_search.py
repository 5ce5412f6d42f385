"""The search for a sparsity within a drop in accuracy."""

from typing import Any

import pytest
from datasets import Dataset

from hf_prune import PruningConfig, classification_batches, find_sparsity, prune
from hf_prune.errors import BudgetError, ConfigError
from hf_prune.evaluation import sweep as sweep_module
from tests import models
from tests.models import assert_unchanged, snapshot

TOKENIZER = models.tiny_tokenizer()
DATA = Dataset.from_dict(models.answered_sentences(60))
QUICK = {"epochs": 1, "learning_rate": 0.001}


def batches(n: int) -> list[dict[str, Any]]:
    return classification_batches(DATA, TOKENIZER, n=n, batch_size=8, label_column=None)


def search(model: Any, **options: Any) -> Any:
    return find_sparsity(model, TOKENIZER, DATA, max_drop=99.0, **options)


def test_a_polish_sees_data_of_its_own_at_every_sparsity(monkeypatch):
    seen: list[tuple[Any, Any]] = []

    def spy(*args: Any, **settings: Any) -> Any:
        if not settings.get("dry_run"):
            seen.append((settings["calibration"], settings["polish_data"]))
        return prune(*args, **settings)

    monkeypatch.setattr(sweep_module, "prune", spy)
    model, calibration, more = models.tiny_classifier(), batches(16), batches(40)
    before = snapshot(model)
    config = PruningConfig(criterion="wanda", scope="row", polish=QUICK)
    found = search(model, config=config, calibration=calibration, polish_data=more)
    assert len(seen) == len(found.points) > 1
    assert all(given[0] is calibration and given[1] is more for given in seen)
    assert_unchanged(model, before)


def test_a_polish_with_data_of_its_own_needs_no_calibration():
    assert search(models.tiny_classifier(), config=PruningConfig(polish=QUICK), polish_data=batches(24)).points


def test_polish_data_without_a_polish_is_refused(monkeypatch):
    monkeypatch.setattr("hf_prune.evaluation.sparsity_search.score_model", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(ConfigError, match="polish_data is given, but there is no polish: set polish='distill'"):
        search(models.tiny_classifier(), polish_data=batches(16))


@pytest.mark.parametrize("option", ["max_drop", "max_flips"])
def test_scores_that_are_no_accuracies_are_refused_first(monkeypatch, option):
    monkeypatch.setattr("hf_prune.evaluation.sparsity_search.score_model", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(ConfigError, match=rf"{option} is for accuracies.*, and not for kind='regression': use a sweep"):
        find_sparsity(models.tiny_classifier(), TOKENIZER, DATA, kind="regression", **{option: 2})


def test_nothing_is_searched_for_where_a_drop_says_nothing(monkeypatch):
    """Reversed labels, and classes that are not those of the model, before anything is pruned."""
    monkeypatch.setattr("hf_prune.evaluation.sparsity_search.measure_point", lambda *_, **__: pytest.fail("pruned"))
    model = models.tiny_classifier()
    before = snapshot(model)
    labels = [1 - y for y in DATA["label"]]
    reversed_ = Dataset.from_dict({"sentence": DATA["sentence"][:], "label": labels})
    with pytest.raises(
        BudgetError, match=r"no sparsity can be found by its drop in accuracy, since .* right on 10.00 %"
    ):
        find_sparsity(model, TOKENIZER, reversed_, max_drop=99.0)
    assert_unchanged(model, before)
    with pytest.raises(BudgetError, match="the model has 3 classes, and the data 2"):
        search(models.tiny_classifier(num_labels=3))
