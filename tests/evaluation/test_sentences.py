"""Scores of models of sentence-transformers, against hand computations, slow twins and the library's own evaluators."""

import dataclasses
import json
import math
import random

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_prune import (
    ConfigError,
    DataError,
    ModelTypeError,
    SentenceScore,
    compare_sentences,
    evaluate_sentences,
    load_sentences,
    prunable,
)
from hf_prune.evaluation.sentence_result import order_doubt
from tests import models

pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
from sentence_transformers.cross_encoder.evaluation import CrossEncoderRerankingEvaluator
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)

from tests.sentence_models import pairs, texts, tiny_cross_encoder, tiny_encoder


def similar(n=30, seed=0):
    rng = random.Random(seed)
    first, second = zip(*pairs(n, seed), strict=True)
    return Dataset.from_dict({"sentence1": first, "sentence2": second, "score": [rng.random() for _ in first]})


def searched(relevances=(3.0, 0.0, 1.0, 0.0), n=5, seed=0):
    documents = list(dict.fromkeys(texts(200, seed)))[: len(relevances) * n]
    rows = [
        (f"w{i} w{i + 1}", documents[i * len(relevances) + j], r) for i in range(n) for j, r in enumerate(relevances)
    ]
    return Dataset.from_dict(dict(zip(("query", "document", "score"), map(list, zip(*rows, strict=True)), strict=True)))


# --- values ------------------------------------------------------------------------------------


def test_spearman_is_that_of_the_library(tmp_path):
    model, data = tiny_encoder(tmp_path), similar()
    score = evaluate_sentences(model, data)
    evaluator = EmbeddingSimilarityEvaluator(
        data["sentence1"], data["sentence2"], data["score"], main_similarity="cosine", similarity_fn_names=["cosine"]
    )
    assert score.metric == "Spearman"
    assert score.value == pytest.approx(evaluator(model)["spearman_cosine"], abs=1e-6)
    assert score.n == 30
    assert score.references == tuple(data["score"])
    expected = model.similarity_pairwise(
        torch.tensor(model.encode(data["sentence1"])), torch.tensor(model.encode(data["sentence2"]))
    )
    assert score.values == pytest.approx(expected.tolist(), abs=1e-6)


def test_ndcg_and_mrr_are_those_of_the_library(tmp_path):
    model, data = tiny_encoder(tmp_path), searched((1.0, 0.0, 1.0, 0.0))
    score = evaluate_sentences(model, data, batch_size=3)
    documents = list(dict.fromkeys(data["document"]))
    queries = {str(i): query for i, query in enumerate(dict.fromkeys(data["query"]))}
    relevant = {
        number: {str(documents.index(row["document"])) for row in data if row["query"] == query and row["score"]}
        for number, query in queries.items()
    }
    evaluator = InformationRetrievalEvaluator(
        queries, {str(i): text for i, text in enumerate(documents)}, relevant, main_score_function="cosine"
    )
    found = evaluator(model)
    assert score.metric == "nDCG@10"
    assert score.n == 5
    assert score.value == pytest.approx(found["cosine_ndcg@10"], abs=1e-6)
    assert score.mrr == pytest.approx(found["cosine_mrr@10"], abs=1e-6)
    assert math.fsum(score.values) / 5 == pytest.approx(score.value)


def test_a_cross_encoder_ranks_what_stands_beside_the_query(tmp_path):
    model, data = tiny_cross_encoder(tmp_path), searched((1.0, 0.0, 1.0, 0.0, 0.0))
    score = evaluate_sentences(model, data)
    samples = []
    for query in dict.fromkeys(data["query"]):
        rows = [row for row in data if row["query"] == query]
        sides = {kind: [r["document"] for r in rows if bool(r["score"]) == kind] for kind in (True, False)}
        samples.append({"query": query, "positive": sides[True], "negative": sides[False]})
    found = CrossEncoderRerankingEvaluator(samples, at_k=10)(model)
    assert score.value == pytest.approx(found["ndcg@10"], abs=1e-6)
    assert score.mrr == pytest.approx(found["mrr@10"], abs=1e-6)


def test_gains_are_graded_and_linear(tmp_path):
    """By hand: DCG = sum of gain / log2(rank + 1), over that of the best order."""
    model, data = tiny_cross_encoder(tmp_path), searched((3.0, 0.0, 1.0, 0.0), n=1)
    said = model.predict([(row["query"], row["document"]) for row in data])
    order = np.argsort(-said)
    gains = [data["score"][i] for i in order]
    dcg = sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))
    score = evaluate_sentences(model, data)
    assert score.value == pytest.approx(dcg / (3 + 1 / math.log2(3)))
    assert score.mrr == pytest.approx(1 / (1 + next(i for i, gain in enumerate(gains) if gain)))


def test_prompts_of_queries_and_documents_are_used(tmp_path):
    plain = tiny_encoder(tmp_path / "a")
    prompted = tiny_encoder(tmp_path / "b", prompts={"query": "w9 w8 w7 ", "document": "w20 w21 "})
    data = searched()
    spelled = Dataset.from_dict(
        {
            "query": ["w9 w8 w7 " + query for query in data["query"]],
            "document": ["w20 w21 " + document for document in data["document"]],
            "score": data["score"],
        }
    )
    assert evaluate_sentences(prompted, data).values == pytest.approx(evaluate_sentences(plain, spelled).values)
    assert evaluate_sentences(prompted, data).values != evaluate_sentences(plain, data).values


def test_rows_without_a_score_are_relevant(tmp_path):
    model, data = tiny_encoder(tmp_path), searched()
    only = data.filter(lambda row: row["score"] == 3.0)
    assert evaluate_sentences(model, only.remove_columns("score")).values == evaluate_sentences(model, only).values


def test_the_model_keeps_its_modes(tmp_path):
    model = tiny_encoder(tmp_path).train()
    model[1].eval()
    evaluate_sentences(model, similar())
    assert model.training
    assert not model[1].training


# --- comparisons ------------------------------------------------------------------------------------


def test_a_drop_is_paired(tmp_path):
    model, data = tiny_encoder(tmp_path), similar(60)
    said = evaluate_sentences(model, data).values
    data = data.remove_columns("score").add_column("score", [x + (i % 3) * np.std(said) for i, x in enumerate(said)])
    dense = evaluate_sentences(model, data)
    assert order_doubt(dense) == ""
    same = compare_sentences(dense, dense)
    assert (same.drop, same.drop_standard_error, same.p_value) == (0.0, 0.0, 1.0)
    assert same.upper_bound == pytest.approx(1.645 * 100 / (dense.n + 2), rel=1e-3)  # of pairs that were not seen
    pruned = evaluate_sentences(prunable(model).prune(0.9), data)
    found = compare_sentences(dense, pruned)
    assert found.drop == pytest.approx(100 * (dense.value - pruned.value))
    assert found.interval[0] < found.drop < found.upper_bound < found.interval[1]
    assert found.drop_standard_error > 0
    assert str(found).startswith(
        f"Spearman {dense.value:.4f} -> {pruned.value:.4f}: drop {found.drop:.2f} points (95 %"
    )


def test_errors_of_ndcg_are_those_of_the_differences():
    dense = ranked([1.0, 0.5, 0.75, 1.0])
    pruned = ranked([0.5, 0.5, 0.5, 0.75])
    found = compare_sentences(dense, pruned)
    assert found.drop == pytest.approx(25.0)
    assert found.drop_standard_error == pytest.approx(100 * np.std([0.5, 0, 0.25, 0.25], ddof=1) / 2)


def ranked(values):
    n = len(values)
    error = float(np.std(values, ddof=1) / math.sqrt(n))
    return SentenceScore(
        "nDCG@10", sum(values) / n, n, error, tuple(values), (1.0,) * n, "", "", "0" * 16, 0.0, "float32", 24, 8
    )


def test_a_model_that_orders_by_chance_has_nothing_to_lose(tmp_path):
    dense = evaluate_sentences(tiny_encoder(tmp_path), similar(300, seed=3))
    assert order_doubt(dense).startswith("the dense model has Spearman ")
    assert str(compare_sentences(dense, dense)).startswith("Warning: the dense model has Spearman")


def test_what_cannot_be_compared_is_refused(tmp_path):
    model = tiny_encoder(tmp_path)
    one, other = evaluate_sentences(model, similar()), evaluate_sentences(model, similar(seed=9))
    with pytest.raises(DataError, match="expected the same score on the same data"):
        compare_sentences(one, other)
    with pytest.raises(DataError, match=r"found Spearman on 30 examples .* and nDCG@10 on 5"):
        compare_sentences(one, evaluate_sentences(model, searched()))
    with pytest.raises(ConfigError, match=r"confidence is 95: expected a number between 0 and 1"):
        compare_sentences(one, one, confidence=95)


# --- saved scores ------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [similar(), searched()], ids=["pairs", "queries"])
def test_a_saved_score_is_counted_again(data, tmp_path):
    score = evaluate_sentences(tiny_encoder(tmp_path), data)
    saved = json.loads(json.dumps(score.to_dict()))
    assert SentenceScore.from_dict(saved) == score
    with pytest.raises(DataError, match=r"value is 0.99\d*, but the values that are saved with it give "):
        SentenceScore.from_dict({**saved, "value": 0.99123})
    with pytest.raises(DataError, match="values is no list of finite numbers"):
        SentenceScore.from_dict({**saved, "values": [float("nan")] * score.n})
    with pytest.raises(DataError, match="n is 3, with"):
        SentenceScore.from_dict({**saved, "n": 3})
    with pytest.raises(DataError, match="metric is 'BLEU': expected one of Spearman, nDCG@10"):
        SentenceScore.from_dict({**saved, "metric": "BLEU"})


# --- data ------------------------------------------------------------------------------------


def test_files_are_read_and_checked(tmp_path):
    path = tmp_path / "sts.tsv"
    path.write_text("index\tsentence1\tsentence2\tscore\n0\ta b\tc\t4.25\n1\td\te\t0\n")
    assert load_sentences(path, "")[0] == {"sentence1": "a b", "sentence2": "c", "score": 4.25}
    path.write_text("question\tanswer\nq\ta\n")
    data = load_sentences(path, "", text_columns=("question", "answer"))
    assert data[0] == {"question": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        (
            "a\tb\nx\ty\n",
            {},
            DataError,
            "has the columns a, b: expected sentence1 and sentence2 or query and",
        ),
        ("sentence1\tsentence2\nx\ty\n", {}, DataError, "has no column 'score' or 'label'"),
        ("sentence1\tsentence2\tscore\nx\ty\tz\n", {}, DataError, "row 1 of .*: 'score' is 'z', expected a number"),
        (
            "query\tdocument\tscore\nx\ty\t-1\n",
            {},
            DataError,
            "row 1 of .*: 'score' is '-1', expected a number, 0 or",
        ),
        ("query\tdocument\tscore\n", {}, DataError, "has no rows"),
        (
            "query\tdocument\nx\ty\n",
            {"metric": "bleu"},
            ConfigError,
            "metric is 'bleu': expected one of spearman",
        ),
        ("query\tdocument\nx\ty\n", {"text_columns": ("query",)}, ConfigError, "expected two columns"),
        ("query\tdocument\nx\ty\n", {"text_columns": ("query", "z")}, DataError, "has no column 'z'"),
    ],
)
def test_unusable_data_is_refused(text, options, error, message, tmp_path):
    path = tmp_path / "data.tsv"
    path.write_text(text)
    with pytest.raises(error, match=message):
        load_sentences(path, "", **options)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sentence1": ["w1", "w2"], "sentence2": ["w3", "w4"], "score": [1, 1]}, "all 2 pairs have the score 1"),
        ({"query": ["w1"], "document": ["w2"], "score": [0]}, "the query 'w1' has no relevant document"),
        ({"query": ["w1"], "document": ["w2"], "score": [1]}, "there is one document: expected several to rank"),
    ],
)
def test_what_cannot_be_ordered_is_refused(data, message, tmp_path):
    with pytest.raises(DataError, match=message):
        evaluate_sentences(tiny_encoder(tmp_path), Dataset.from_dict(data))


def test_models_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(ModelTypeError, match="found a BertForSequenceClassification: expected a Sentence"):
        evaluate_sentences(models.tiny_bert(), similar())
    with pytest.raises(DataError, match="the query 'w0 w1' has one document: expected several, since a CrossEncoder"):
        evaluate_sentences(tiny_cross_encoder(tmp_path), searched((1.0,)))


def test_a_model_that_returns_nan_is_refused(tmp_path):
    model = tiny_encoder(tmp_path)
    with torch.no_grad():
        model[2].linear.bias.fill_(float("nan"))
    with pytest.raises(DataError, match="SentenceTransformer returns NaN or infinity for some of"):
        evaluate_sentences(model, similar())


def test_the_score_of_a_constant_is_zero(tmp_path):
    model = tiny_encoder(tmp_path)
    with torch.no_grad():
        model[2].linear.weight.zero_()
    score = evaluate_sentences(model, similar())
    assert score.value == 0.0
    assert dataclasses.asdict(score)["n"] == 30
