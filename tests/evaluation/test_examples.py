"""Tasks that are scored example by example: metrics, kinds, comparison, and the sweep."""

import dataclasses
import math

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from sklearn import metrics as reference
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    ViTImageProcessor,
)

from hf_prune import evaluate_classification, evaluate_examples, evaluate_perplexity, prune, run_sweep
from hf_prune.calibration.labels import label_numbers, label_rows
from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.examples import metrics
from hf_prune.evaluation.examples.base import Columns
from hf_prune.evaluation.examples.generation import rouge_l
from hf_prune.evaluation.examples.kinds import KINDS, find_kind, kind_of_model
from hf_prune.evaluation.examples.questions import normal, word_f1
from hf_prune.evaluation.examples.score import ExampleScore, compare_examples, example_doubt
from hf_prune.evaluation.examples.tokens import entities
from hf_prune.evaluation.tasks import ClassificationTask, ExampleTask
from tests import models

TEXTS = models.tiny_sentences(24, 0)["sentence"]
NAMES = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC"}


def tiny(cls, **settings):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24, pad_token_id=models.tiny_tokenizer().pad_token_id, **settings,
    )  # fmt: skip
    return cls(config).eval()


# --- metrics ---------------------------------------------------------------------------------------

CLASSES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=30)


@given(CLASSES)
def test_metrics_of_classes_are_those_of_sklearn(pairs):
    rows = np.array(pairs, dtype=float)
    said, true = rows[:, 0].astype(int), rows[:, 1].astype(int)
    assert metrics.accuracy(rows) == pytest.approx(reference.accuracy_score(true, said))
    assert metrics.macro_f1(rows) == pytest.approx(reference.f1_score(true, said, average="macro", zero_division=0))
    if len({*said, *true}) > 1:  # else sklearn warns
        assert metrics.matthews(rows) == pytest.approx(reference.matthews_corrcoef(true, said), abs=1e-9)
    assert metrics.class_f1((rows > 1).astype(float)) == pytest.approx(
        reference.f1_score(true > 1, said > 1, zero_division=0)
    )


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=20))
def test_correlations_are_those_of_scipy(pairs):
    rows = np.array(pairs, dtype=float)
    if len(set(rows[:, 0])) > 1 and len(set(rows[:, 1])) > 1:
        assert metrics.pearson(rows) == pytest.approx(stats.pearsonr(*rows.T).statistic, abs=1e-9)
        assert metrics.spearman(rows) == pytest.approx(stats.spearmanr(*rows.T).statistic, abs=1e-9)
    else:
        assert metrics.pearson(rows) == 0


@given(st.lists(st.tuples(*[st.integers(0, 1)] * 6), min_size=2, max_size=20))
def test_metrics_of_labels_are_those_of_sklearn(rows):
    rows = np.array(rows, dtype=float)
    said, true = rows[:, :3].astype(int), rows[:, 3:].astype(int)
    for average, ours in (("micro", metrics.micro_f1), ("macro", metrics.label_f1)):
        assert ours(rows) == pytest.approx(reference.f1_score(true, said, average=average, zero_division=0))
    assert metrics.subset_accuracy(rows) == pytest.approx(reference.accuracy_score(true, said))


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (["B-PER", "I-PER", "O", "B-LOC"], {(0, 1, "PER"), (3, 3, "LOC")}),
        (["B-PER", "B-PER"], {(0, 0, "PER"), (1, 1, "PER")}),
        (["I-PER", "I-LOC", "I-LOC"], {(0, 0, "PER"), (1, 2, "LOC")}),  # as seqeval counts them
        (["O", "O"], set()),
        (["PER", "PER", "LOC"], {(0, 1, "PER"), (2, 2, "LOC")}),
        (["S-PER", "B-X-Y", "I-X-Y"], {(0, 0, "PER"), (1, 2, "X-Y")}),
    ],
)
def test_entities(labels, found):
    assert entities(labels) == found


def test_words_of_answers_and_texts():
    assert normal("The  cat, sat!") == "cat sat"
    assert word_f1("the black cat", "a cat") == pytest.approx(2 / 3)
    assert (word_f1("", ""), word_f1("x", "")) == (1.0, 0.0)
    assert rouge_l("a b c d", "a x c d") == pytest.approx(0.75)
    assert rouge_l("d c b a", "a b c d") == pytest.approx(0.25)  # the order counts
    assert rouge_l("", "a") == 0


def test_standard_errors_are_those_of_a_share():
    rows = np.array([[1.0, i % 4 == 0] for i in range(400)], dtype=float)
    sampled = metrics.resampled(metrics.CLASSES["accuracy"], rows).std(ddof=1)
    assert sampled == pytest.approx(math.sqrt(0.25 * 0.75 / 400), rel=0.1)


def test_a_rare_class_does_not_change_the_metric_of_a_sample():
    true = np.r_[np.zeros(300), np.ones(99), 2]  # a third of the samples lack class 2
    rows = np.stack([np.r_[true[1:], 0], true], axis=1)
    f1, macro = (metrics.CLASSES[name] for name in ("f1", "macro_f1"))
    assert f1.of(rows) == macro.of(rows)
    assert np.array_equal(metrics.resampled(f1, rows), metrics.resampled(macro, rows))


# --- kinds -----------------------------------------------------------------------------------------


def numbered(n=24):
    return {"sentence": TEXTS[:n], "label": [i % 2 for i in range(n)]}


def classified():
    return tiny(BertForSequenceClassification), models.tiny_tokenizer(), Dataset.from_dict(numbered())


def labelled():
    model = tiny(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification")
    data = {"text": TEXTS, "labels": [[i % 3] if i % 2 else [0, 2] for i in range(24)]}
    return model, models.tiny_tokenizer(), Dataset.from_dict(data)


def scored():
    model = tiny(BertForSequenceClassification, num_labels=1)
    return model, models.tiny_tokenizer(), Dataset.from_dict({"text": TEXTS, "score": [i / 7 for i in range(24)]})


def tagged():
    model = tiny(BertForTokenClassification, id2label=NAMES, label2id={v: k for k, v in NAMES.items()})
    words = [text.split() for text in TEXTS]
    tags = [[(i + j) % 4 for j in range(len(row))] for i, row in enumerate(words)]
    return model, models.tiny_tokenizer(), Dataset.from_dict({"tokens": words, "ner_tags": tags})


def asked():
    rows = {
        "question": ["w1 w2", "w3"] * 6,
        "context": ["w4 w5 w6 w7", "w8 w9 w10"] * 6,
        "answers": [{"text": ["w5 w6"], "answer_start": [3]}, {"text": ["w8"], "answer_start": [0]}] * 6,
    }
    return tiny(BertForQuestionAnswering), models.tiny_tokenizer(), Dataset.from_dict(rows)


def pictured():
    model, rng = models.tiny_vit(), np.random.default_rng(0)
    size = model.config.image_size
    images = [Image.fromarray(rng.integers(0, 255, (9, 7, 3), dtype=np.uint8)) for _ in range(8)]
    data = Dataset.from_dict({"image": images, "label": [i % 2 for i in range(8)]})
    return model, ViTImageProcessor(size={"height": size, "width": size}), data


def written():
    model, tokenizer = models.tiny_t5(), models.tiny_tokenizer()
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.max_length = 8
    return model, tokenizer, Dataset.from_dict({"document": TEXTS[:4], "summary": [t.split()[0] for t in TEXTS[:4]]})


def modelled():
    return models.tiny_gpt2(), models.tiny_tokenizer(), Dataset.from_dict({"text": [" ".join(TEXTS)] * 4})


CASES = {
    "classification": (classified, "accuracy"),
    "multi-label-classification": (labelled, "F1"),
    "regression": (scored, "Spearman"),
    "token-classification": (tagged, "entity F1"),
    "question-answering": (asked, "answer F1"),
    "image-classification": (pictured, "accuracy"),
    "text-generation": (written, "ROUGE-L"),
    "language-modeling": (modelled, "log-likelihood"),
}


def test_every_kind_has_a_case():
    assert set(CASES) == set(KINDS)


@pytest.mark.parametrize("kind", CASES)
def test_a_model_is_scored_by_its_kind(kind):
    make, label = CASES[kind]
    model, reader, data = make()
    assert kind_of_model(type(model).__name__, model.config.to_dict()) == kind
    score = evaluate_examples(model, reader, data)
    assert (score.kind, score.metric, score.n) == (kind, label, len(score.kept))
    assert math.isfinite(score.value)
    again = evaluate_examples(model, reader, data, batch_size=1)
    assert np.allclose(score.kept, again.kept, atol=1e-4)  # in the order of the data, however it is padded
    assert ExampleScore.from_dict(score.to_dict()) == score
    assert label in str(score)
    same = compare_examples(score, score)
    assert (same.drop, same.p_value, same.drop_standard_error) == (0, 1, 0)
    unseen = 0 if kind == "language-modeling" else 100 / (score.n + 2)  # which have no limit
    assert same.upper_bound == pytest.approx(1.645 * unseen, rel=1e-3)


@pytest.mark.parametrize("kind", CASES)
def test_it_is_calibrated_on_the_same_data(kind, tmp_path):
    make, _ = CASES[kind]
    model, reader, data = make()
    task = find_kind(kind)
    columns = task.columns(data.column_names, "the data", None, None)
    longest = task.longest(model, reader, None)
    examples = task.encode(model, reader, list(data.select_columns(columns.names)), columns, longest)
    batch = task.collate(model, reader, examples[:4], True)
    assert torch.isfinite(model(**batch).loss)
    prune(model, 0.5, criterion="taylor", calibration=[batch])


def test_right_answers_score_one():
    """What each kind keeps of a model that is always right, made by hand."""
    model, tokenizer, data = tagged()
    task = find_kind("token-classification")
    columns = task.columns(data.column_names, "", None, None)
    examples = task.encode(model, tokenizer, list(data), columns, 24)
    logits = torch.zeros(len(examples), 24, 4)
    for i, example in enumerate(examples):
        for word, place in example["first"].items():
            logits[i, place, example["true"][word]] = 1
    rows = np.array(task.judge(model, tokenizer, type("Out", (), {"logits": logits})(), examples))
    assert metrics.entity_f1(rows) == metrics.token_accuracy(rows) == 1

    model, tokenizer, data = asked()
    task = find_kind("question-answering")
    columns = task.columns(data.column_names, "", None, None)
    examples = task.encode(model, tokenizer, list(data), columns, 24)
    starts, ends = torch.zeros(len(examples), 24), torch.zeros(len(examples), 24)
    for i, example in enumerate(examples):
        starts[i, example["labels"][0]] = ends[i, example["labels"][1]] = 5
    out = {"start_logits": starts, "end_logits": ends}
    assert task.judge(model, tokenizer, out, examples) == [[1.0, 1.0]] * 12


def test_an_answer_at_the_end_of_a_long_text_is_found():
    model, tokenizer, _ = asked()
    words = [f"w{i}" for i in range(30)]
    row = {"question": "w1", "context": " ".join(words), "answers": {"text": ["w28 w29"], "answer_start": []}}
    task = find_kind("question-answering")
    [example] = task.encode(model, tokenizer, [row], Columns(("question", "context"), "answers"), 16)
    first, *_, last = example["windows"]
    assert first != last
    assert max(len(window["input_ids"]) for window in example["windows"]) == 16
    assert example["inputs"] == last  # from which a calibration learns
    read = [place for places in example["places"] for place in places if place]
    assert {example["context"][a:b] for a, b in read} == set(words)
    assert len(read) > len(words)  # neighbours overlap
    batch = task.scored_batch(model, tokenizer, [example, example])
    assert batch["input_ids"].shape == (2 * len(example["windows"]), 16)
    with torch.inference_mode():
        logits = task.answer(model, tokenizer, batch)
    assert logits["start_logits"].shape == batch["input_ids"].shape
    for name, place in (("start_logits", example["labels"][0]), ("end_logits", example["labels"][1])):
        logits[name] = torch.zeros(batch["input_ids"].shape)
        logits[name][len(example["windows"]) - 1, place] = 5
    assert task.judge(model, tokenizer, logits, [example, example])[0] == [1, 1]


def test_a_question_that_leaves_no_room_for_its_text():
    model, tokenizer, data = asked()
    rows = data.to_list()
    rows[4]["question"] = " ".join(["w1"] * 30)
    with pytest.raises(DataError, match=r"row 5: the question has 30 tokens, which leaves no room .* in 16"):
        find_kind("question-answering").encode(model, tokenizer, rows, Columns(("question", "context"), "answers"), 16)


def test_a_question_may_have_no_answer():
    places = [None, None, None, (0, 1), (2, 3), None]
    start = torch.full((2, 6), -9.0)
    start[0, 0], start[1, 3], start[1, 0] = 9, 9, 8  # no answer is likelier in the first row only
    outputs = {"start_logits": start, "end_logits": start}

    def judged(may_lack):
        examples = [
            {"places": [places], "context": "a b", "answers": answers, "may_lack_answer": may_lack}
            for answers in ([], ["a"])
        ]
        return find_kind("question-answering").judge(None, None, outputs, examples)

    assert judged(True) == [[1.0, 1.0], [1.0, 1.0]]
    assert judged(False)[0] == [0.0, 0.0]  # as in SQuAD 1.1
    model, tokenizer, data = asked()
    rows = data.to_list()
    encode, columns = find_kind("question-answering").encode, Columns(("question", "context"), "answers")
    assert not any(example["may_lack_answer"] for example in encode(model, tokenizer, rows, columns, 24))
    rows[3]["answers"] = {"text": [], "answer_start": []}
    assert all(example["may_lack_answer"] for example in encode(model, tokenizer, rows, columns, 24))


def test_the_log_likelihood_is_that_of_the_perplexity():
    model, tokenizer, data = modelled()
    score = evaluate_examples(model, tokenizer, data)
    window = score.max_length
    expected = evaluate_perplexity(model, tokenizer, data["text"], window=window)
    assert score.n == expected.n
    assert math.exp(-score.value) == pytest.approx(expected.perplexity, rel=1e-5)


def test_names_of_labels_whatever_their_case():
    model, tokenizer, data = tagged()
    rows = {"tokens": data["tokens"][:], "ner_tags": [[NAMES[i].lower() for i in row] for row in data["ner_tags"]]}
    found = evaluate_examples(model, tokenizer, Dataset.from_dict(rows))
    assert found.kept == evaluate_examples(model, tokenizer, data).kept


@pytest.mark.parametrize("write", [str, int])
def test_digits_that_name_classes_are_names_by_every_metric(tmp_path, write):
    names = {str(i + 1): i for i in range(5)}
    model = tiny(BertForSequenceClassification, label2id=names, id2label={i: n for n, i in names.items()})
    path = tmp_path / ("data.csv" if write is str else "data.jsonl")
    table = pandas.DataFrame({"text": TEXTS, "label": [write(1 + i % 4) for i in range(24)]})
    table.to_csv(path, index=False) if write is str else table.to_json(path, orient="records", lines=True)
    for task in (ClassificationTask(str(path)), ExampleTask("classification", str(path))):
        assert label_numbers(task.load("train")["label"][:], names, 5) == [i % 4 for i in range(24)]
    tokenizer, rows = models.tiny_tokenizer(), ClassificationTask(str(path)).load("train")
    by_class = evaluate_classification(model, tokenizer, rows, text_columns=("text",))
    by_example = evaluate_examples(model, tokenizer, ExampleTask("classification", str(path)).load("train"))
    assert by_class.accuracy == by_example.value
    assert label_numbers(["0", "1", "4"], names, 5) == [0, 1, 4]  # not all are names
    assert label_rows([["1"], ["0", "4"]], names, 5, "word") == [[1], [0, 4]]  # judged together


# --- comparison and sweep --------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the dense model has")  # which is random
@pytest.mark.parametrize("kind", ["token-classification", "regression", "question-answering", "language-modeling"])
def test_a_sweep_and_its_continuation(kind, tmp_path):
    make, label = CASES[kind]
    model, reader, data = make()
    options = {"kind": kind, "sparsities": [0.5, 0.9], "out": tmp_path, "source": "data", "split": "dev"}
    result = run_sweep(model, reader, data, **options)
    assert result.dense.metric == label
    assert [p.comparison.metric for p in result.points] == [label] * 2
    drop = 100 * (result.dense.value - result.points[1].evaluation.value)
    assert result.points[1].comparison.drop == pytest.approx(drop)
    again = run_sweep(model, reader, data, **options)
    assert [p.evaluation for p in again.points] == [p.evaluation for p in result.points]  # read, not measured
    assert [p.prune_seconds for p in again.points] == [p.prune_seconds for p in result.points]
    assert label in str(result)


def test_a_comparison_sees_what_pruning_costs():
    def answers(wrong):
        """One in so many is wrong; half of the true classes are 1."""
        return tuple((float(i // 10 % 2 if i % wrong else 1 - i // 10 % 2), float(i // 10 % 2)) for i in range(200))

    facts = {"split": "", "source": "", "data_fingerprint": "x", "seconds": 1.0, "dtype": "float32"}
    facts |= {"kind": "classification", "metric": "accuracy", "name": "accuracy", "max_length": 1, "batch_size": 1}
    dense = ExampleScore(**facts, value=0.9, n=200, standard_error=0.02, kept=answers(10))
    pruned = dataclasses.replace(dense, value=0.8, kept=answers(5))
    found = compare_examples(dense, pruned)
    assert found.drop == pytest.approx(10)
    assert found.p_value < 0.001
    assert found.interval[0] > 0
    assert found.drop_standard_error == pytest.approx(100 * math.sqrt(0.1 * 0.9 / 200), rel=0.1)  # paired
    assert example_doubt(dense) == ""
    chance = dataclasses.replace(dense, value=0.5, kept=answers(2))
    assert "not shown to be above 0.5000, which one answer for all of them has" in example_doubt(chance)
    assert "not shown to be above 0, so" in example_doubt(dataclasses.replace(dense, value=0.01, kept=()))
    with pytest.raises(DataError, match=r"the results differ in n \(200 and 3\)"):
        compare_examples(dense, dataclasses.replace(pruned, n=3))


def test_edited_scores_are_refused():
    score = evaluate_examples(*classified())
    with pytest.raises(DataError, match="the file was edited; measure again"):
        ExampleScore.from_dict({**score.to_dict(), "value": 0.99})
    with pytest.raises(DataError, match="not a saved score of examples"):
        ExampleScore.from_dict({**score.to_dict(), "kept": [[1.0], [1.0, 2.0]]})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": "rouge_l"}, ConfigError, "metric is 'rouge_l': of classification, expected one of accuracy, f1"),
        ({"kind": "poetry"}, ConfigError, "the kind of task is 'poetry': expected one of classification"),
        ({"text_columns": ["x"]}, DataError, r"has no column 'x' \(found: sentence, label\): name it with text_column"),
        ({"label_column": "x"}, DataError, r"has no column 'x' \(found: sentence, label\): name it with label_column"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0"),
    ],
)
def test_wrong_settings(options, error, message):
    with pytest.raises(error, match=message):
        evaluate_examples(*classified(), **options)


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (classified, {"label": ["good"] * 24}, r"row 1: label 'good' is not in label2id"),
        (classified, {"sentence": ["a", None] * 12}, "row 2 of the data set: 'sentence' is None, expected text"),
        (asked, {"question": [None, "a"] * 6}, "row 1 of the data set: 'question' is None, expected text"),
        (asked, {"context": ["a", None] * 6}, "row 2 of the data set: 'context' is None, expected text"),
        (scored, {"score": ["a"] * 24}, "row 1: label 'a' is not a number"),
        (scored, {"score": [1.0] * 24}, "all 24 rows have the label 1: expected labels that differ"),
        (labelled, {"labels": [3.5] * 24}, "row 1: label 3.5 is not a list of labels"),
        (tagged, {"ner_tags": [[0]] * 24}, r"row \d+: \d words with 1 labels: expected as many"),
        (tagged, {"ner_tags": [[9] * len(t.split()) for t in TEXTS]}, "row 1, word 1: label 9 is not a class"),
        (written, {"summary": [1, 2, 3, 4]}, "row 1: found .* and 1: expected two texts"),
        (pictured, {"image": ["a"] * 8}, "row 1: 'image' is a str: expected an image"),
    ],
    ids=range(11),
)
def test_rows_of_no_use_are_named(make, change, message):
    model, reader, data = make()
    columns = {name: data[name][:] for name in data.column_names} | change
    with pytest.raises(DataError, match=message):
        evaluate_examples(model, reader, Dataset.from_dict(columns))


def test_models_without_a_task():
    data, model = Dataset.from_dict(numbered()), tiny(BertModel)
    with pytest.raises(DataError, match="BertModel is for none of the tasks that are scored by example"):
        evaluate_examples(model, models.tiny_tokenizer(), data)
