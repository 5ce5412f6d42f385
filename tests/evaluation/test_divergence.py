"""The divergence of predictions, by hand and against scipy, and the budgets that are said in changed answers."""

from __future__ import annotations

import base64
import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import bernoulli, entropy

from hf_prune import compare, evaluate_classification, find_sparsity
from hf_prune.errors import BudgetError, ConfigError, DataError
from hf_prune.evaluation.accuracy_result import Evaluation
from hf_prune.evaluation.allowed_loss import AllowedLoss
from hf_prune.evaluation.divergence import divergence_of, pack_rows, read_divergence, unpack_rows, upper_bound_of_share
from hf_prune.evaluation.examples.evaluate import evaluate_examples
from hf_prune.evaluation.examples.score import ExampleScore, compare_examples
from hf_prune.hub.plausibility import check_evaluation
from tests import models
from tests.evaluation.test_sparsity_search import DATA, TOKENIZER


def logs(rng: np.random.Generator, n: int, classes: int) -> np.ndarray:
    return np.log(rng.dirichlet(np.ones(classes), n))


def test_the_divergence_of_classes_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    dense, pruned = logs(rng, 40, 3), logs(rng, 40, 3)
    found = divergence_of(dense, pruned)
    each = [entropy(np.exp(a), np.exp(b)) for a, b in zip(dense, pruned, strict=True)]
    changed = [a.argmax() != b.argmax() for a, b in zip(dense, pruned, strict=True)]
    assert found.kl == pytest.approx(np.mean(each))
    assert found.kl_standard_error == pytest.approx(np.std(each, ddof=1) / math.sqrt(40))
    assert found.flips == pytest.approx(100 * np.mean(changed))
    assert 0 < found.flips < found.flips_upper_bound
    assert found.flips_standard_error == pytest.approx(100 * bernoulli(np.mean(changed)).std() / math.sqrt(40))
    assert str(found).startswith(f"KL {found.kl:.4f} ± ")
    assert found.to_dict()["n"] == 40


def test_the_divergence_of_several_labels_is_the_sum_over_them() -> None:
    rng = np.random.default_rng(1)
    dense, pruned = rng.normal(0, 3, (30, 4)), rng.normal(0, 3, (30, 4))
    p, q = expit(dense), expit(pruned)
    by_hand = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(1)
    found = divergence_of(dense, pruned, labels=True)
    assert found.kl == pytest.approx(by_hand.mean())
    assert found.flips == pytest.approx(100 * ((dense > 0) != (pruned > 0)).any(1).mean())


def test_many_classes_and_the_impossible() -> None:
    rng = np.random.default_rng(5)
    dense, pruned = logs(rng, 3, 1000), logs(rng, 3, 1000)
    each = [entropy(np.exp(a), np.exp(b)) for a, b in zip(dense, pruned, strict=True)]
    assert divergence_of(dense, pruned).kl == pytest.approx(np.mean(each))
    certain, likely = np.array([[0.0, -np.inf]]), np.log([[0.9, 0.1]])
    assert divergence_of(certain, likely).kl == pytest.approx(-math.log(0.9))
    assert 100 < divergence_of(likely, certain).kl < 1e4
    assert math.isfinite(divergence_of([[np.inf, 0.0]], [[-np.inf, 0.0]], labels=True).kl)


@pytest.mark.parametrize("labels", [False, True])
def test_what_cannot_be_compared_is_refused(labels: bool) -> None:
    rows = logs(np.random.default_rng(2), 5, 3)
    broken = rows.copy()
    broken[1, 2] = np.nan
    with pytest.raises(DataError, match=r"pruned model are NaN, or no .* for 1 of 5 examples"):
        divergence_of(rows, broken, labels=labels)
    for nothing in (rows[:0], rows[:, :0], rows[0]):
        with pytest.raises(DataError, match="expected a row for each of one or more examples"):
            divergence_of(nothing, nothing, labels=labels)
    for confidence in (0, 1, math.nan, 95):
        with pytest.raises(ConfigError, match=r"confidence is .*: expected a number between 0 and 1"):
            divergence_of(rows, rows, labels=labels, confidence=confidence)


def test_log_probabilities_that_are_none() -> None:
    rows = logs(np.random.default_rng(2), 1, 3)
    for row in ([np.inf, -1.0, -1.0], [-np.inf] * 3):
        with pytest.raises(DataError, match="no log-probabilities, for 1 of 1"):
            divergence_of([row], rows)


def test_a_saved_divergence_is_counted_again_but_for_its_kl() -> None:
    found = divergence_of(logs(np.random.default_rng(0), 40, 3), logs(np.random.default_rng(1), 40, 3), confidence=0.9)
    changed = round(found.flips * 40 / 100)
    assert read_divergence({**found.to_dict(), "flips": 0.0}, changed, 40, 0.9) == found
    for kl in (-1, math.nan, math.inf, "1", None, True):
        with pytest.raises(DataError, match=r"kl is .*: expected a number of 0 or more"):
            read_divergence({**found.to_dict(), "kl": kl}, changed, 40, 0.9)


def test_nothing_moved() -> None:
    rows = logs(np.random.default_rng(2), 5, 3)
    found = divergence_of(rows, rows)
    assert (found.kl, found.flips, found.kl_standard_error, found.flips_standard_error) == (0, 0, 0, 0)
    assert found.flips_upper_bound == pytest.approx(100 * 1.6448536**2 / (5 + 1.6448536**2))
    with pytest.raises(DataError, match=r"shapes \(5, 3\) and \(4, 3\): expected those of the same examples"):
        divergence_of(rows, rows[:4])


def test_the_bound_of_a_share_holds_about_as_often_as_it_says() -> None:
    counts = np.random.default_rng(3).binomial(500, 0.03, 4000)
    held = np.mean([upper_bound_of_share(k / 500, 500, 0.95) >= 0.03 for k in counts])
    assert 0.93 < held < 0.98


def test_rows_survive_packing() -> None:
    rows = logs(np.random.default_rng(4), 6, 5).astype(np.float32)
    assert np.array_equal(unpack_rows(pack_rows(rows)), rows)
    assert base64.b64decode(pack_rows(rows)[0]) == rows[0].tobytes()
    for texts, message in (
        (["%"], "not base64 of float32"),
        ([3], "not base64 of float32"),
        (["AAA="], "not base64 of float32"),
        ([*pack_rows(rows), ""], r"\[0, 5\] numbers"),
        (pack_rows([[math.nan, 0.0]]), "all finite"),
    ):
        with pytest.raises(DataError, match=message):
            unpack_rows(texts)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def scores() -> tuple[Evaluation, Evaluation]:
    model = models.tiny_classifier()
    dense = evaluate_classification(model, TOKENIZER, DATA)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return dense, evaluate_classification(model, TOKENIZER, DATA)


def test_scores_keep_what_was_predicted_in_the_order_of_the_data(scores: tuple[Evaluation, Evaluation]) -> None:
    model = models.tiny_classifier()
    rows = unpack_rows(scores[0].distributions)
    for i in (0, len(DATA) - 1):
        with torch.no_grad():
            logits = model(**TOKENIZER([DATA[i]["sentence"]], return_tensors="pt")).logits[0]
        assert rows[i] == pytest.approx(logits.log_softmax(-1).numpy(), abs=1e-5)
    assert tuple(rows.argmax(1)) == scores[0].predictions


def test_a_class_that_cannot_be_is_next_to_impossible() -> None:
    model = models.tiny_classifier()
    with torch.no_grad():
        model.classifier.bias[1] = -math.inf
    score = evaluate_classification(model, TOKENIZER, DATA)
    assert set(score.predictions) == {0}
    assert Evaluation.from_dict(score.to_dict()) == score
    assert compare(score, score).divergence is not None


def test_a_comparison_says_how_far_predictions_moved(scores: tuple[Evaluation, Evaluation]) -> None:
    found = compare(*scores)
    assert found.divergence is not None
    assert found.divergence.kl > 0
    changed = sum(a != b for a, b in zip(scores[0].predictions, scores[1].predictions, strict=True))
    assert found.divergence.flips == pytest.approx(100 * changed / len(DATA))
    assert f"\npredictions: {found.divergence.summary()}" in str(found)
    assert found.to_dict()["divergence"] == found.divergence.to_dict()
    old = dataclasses.replace(scores[0], distributions=())  # of an earlier version
    assert compare(old, scores[1]).divergence is None
    assert "predictions" not in str(compare(old, scores[1]))


def test_models_with_other_labels_are_compared_by_what_they_get_right(scores: tuple[Evaluation, Evaluation]) -> None:
    three = evaluate_classification(models.tiny_classifier(num_labels=3), TOKENIZER, DATA)
    found = compare(scores[0], three)
    assert found.divergence is None
    assert found.pruned_accuracy == three.accuracy


def test_files_of_scores_stay_small(scores: tuple[Evaluation, Evaluation], monkeypatch: pytest.MonkeyPatch) -> None:
    example = evaluate_examples(models.tiny_classifier(), TOKENIZER, DATA, kind="classification")
    for score in (scores[0], example):
        for most, kept in ((2 * len(DATA), len(DATA)), (2 * len(DATA) - 1, 0)):
            monkeypatch.setattr("hf_prune.evaluation.divergence.MOST_STORED", most)
            values = score.to_dict()
            assert len(values["distributions"]) == kept
            assert type(score).from_dict(values).distributions == score.distributions[:kept]


def test_nearly_equal_classes_may_each_be_the_prediction() -> None:
    model = models.tiny_classifier()
    with torch.no_grad():  # logits that differ by less than float32 tells of their log-probabilities
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1e-9]))
    score = evaluate_examples(model, TOKENIZER, DATA, kind="classification")
    assert {row[0] for row in score.kept} == {1}
    assert set(unpack_rows(score.distributions).argmax(1)) == {0}
    assert ExampleScore.from_dict(score.to_dict()) == score


def test_saved_scores_are_read_back_and_edited_ones_refused(scores: tuple[Evaluation, Evaluation]) -> None:
    values = scores[0].to_dict()
    assert Evaluation.from_dict(values) == scores[0]
    assert Evaluation.from_dict({k: v for k, v in values.items() if k != "distributions"}).distributions == ()
    turned = list(pack_rows(unpack_rows(scores[0].distributions)[:, ::-1]))
    for edited, message in (
        (turned, "predictions are not those of the distributions"),
        (values["distributions"][:-1], "distributions of .* examples"),
        (list(pack_rows(unpack_rows(scores[0].distributions) - 1)), "do not add up to 1"),
        ("AAAA", "expected a list of texts"),
    ):
        with pytest.raises(DataError, match=message):
            Evaluation.from_dict({**values, "distributions": edited})


def test_scores_by_kind_have_them_too() -> None:
    model = models.tiny_classifier()
    dense = evaluate_examples(model, TOKENIZER, DATA, kind="classification", metric="macro_f1")
    assert ExampleScore.from_dict(dense.to_dict()) == dense
    found = compare_examples(dense, dense)
    assert found.divergence is not None
    assert found.divergence.kl == found.divergence.flips == 0
    assert "\npredictions: KL 0.0000" in str(found)


def measured(scores: tuple[Evaluation, Evaluation]) -> dict[str, dict]:
    dense, pruned = scores
    return {
        "evaluation": pruned.to_dict(),
        "dense": dense.to_dict(),
        "comparison": compare(dense, pruned).to_dict(),
    }


def test_a_card_with_them_can_be_true(scores: tuple[Evaluation, Evaluation]) -> None:
    values = measured(scores)
    check_evaluation(values)
    for name in ("evaluation", "dense"):
        values[name]["distributions"] = values[name]["predictions"] = values[name]["labels"] = None
    check_evaluation(values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"kl": -0.1}, "kl is -0.1: expected a number of 0 or more"),
        ({"kl": 0.5}, "kl is 0.5, and the distributions give"),
        ({"flips": 12.3456}, "the nearest number of examples"),
        ({"flips": 0.0}, "answers changed, and .* became right or wrong"),
        ({"flips_standard_error": 0.001}, "flips_standard_error is 0.001, and flips and n give"),
        ({"flips_upper_bound": 99.0}, "flips_upper_bound is 99.0"),
        ({"n": 3}, "the divergence has n = 3"),
        ({"flips": 101.0}, "expected a number from 0 to 100"),
    ],
)
def test_a_card_that_cannot_be_true_is_refused(
    scores: tuple[Evaluation, Evaluation], edit: dict[str, float], message: str
) -> None:
    values = measured(scores)
    values["comparison"]["divergence"] |= edit
    with pytest.raises(DataError, match=message):
        check_evaluation(values)


def test_the_largest_sparsity_within_a_share_of_changed_answers() -> None:
    search = find_sparsity(models.tiny_classifier(), TOKENIZER, DATA, max_flips=40.0)
    assert search.max_drop is None
    assert search.chosen.comparison.divergence is not None
    assert search.chosen.comparison.divergence.flips_upper_bound <= 40
    beyond = [p for p in search.points if p.sparsity > search.sparsity]
    assert beyond
    assert all(p.comparison.divergence.flips_upper_bound > 40 for p in beyond)  # type: ignore[union-attr]
    assert "within 40 % of the answers" in str(search)
    assert search.to_dict()["max_flips"] == 40
    assert "distributions" not in search.to_dict()["dense"]


def test_budgets_that_cannot_be_met_or_understood() -> None:
    few = DATA.select(range(8))
    with pytest.raises(BudgetError, match=r"change of at most 1 % of the answers cannot be shown with 8 sentences"):
        find_sparsity(models.tiny_classifier(), TOKENIZER, few, max_flips=1.0)
    for options, message in (
        ({"max_drop": 1.0, "max_flips": 1.0}, "max_drop is 1.0 and max_flips 1.0: expected one of them"),
        ({}, "max_drop is None: expected points of the metric, or per cent"),
        ({"max_flips": 100}, "max_flips is 100: expected percent of the answers between 0 and 100"),
        ({"max_flips": True}, "max_flips is True"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_sparsity(models.tiny_classifier(), TOKENIZER, few, **options)
    assert AllowedLoss.of(None, 2).text == "2 % of the answers"
    with pytest.raises(DataError, match="nothing is known of the answers that changed"):
        AllowedLoss(2.0, flips=True).loss(type("Old", (), {"divergence": None}))
