"""Accuracy of one model, and of two models on the same examples."""

import dataclasses
import itertools
import json
import math
import os
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.accuracy import accuracy_metric, evaluate_classification, evaluate_sst2
from hf_prune.evaluation.accuracy_result import Evaluation
from hf_prune.evaluation.comparison import compare, reason_to_doubt
from hf_prune.evaluation.data.classification import classification_batches

WORDS = [f"w{i}" for i in range(40)]
PAD, UNK, CLS, SEP = range(4)
VOCAB = len(WORDS) + 4
SHARED = os.environ.get("HF_PRUNE_SHARED")


def make_tokenizer(**options) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    core = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=core, **{"model_input_names": inputs, **special, **options})


def make_bert(seed: int = 3, cls=BertForSequenceClassification, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = {"vocab_size": VOCAB, "max_position_embeddings": 32, "num_labels": 3, "initializer_range": 0.3, **sizes}
    return cls(BertConfig(**{**config, **options}))  # large weights, so that every class is predicted


def make_gpt2(**options):
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.5}
    return GPT2ForSequenceClassification(GPT2Config(vocab_size=VOCAB, num_labels=3, **sizes, **options))


def make_data(n: int = 40, seed: int = 0, classes: int = 3) -> Dataset:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 25))) for _ in range(n)]
    return Dataset.from_dict({"sentence": texts, "label": [rng.randrange(classes) for _ in range(n)]})


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def bert():
    return make_bert()


def one_by_one(model, tokenizer, texts) -> list[int]:
    """The straightforward twin: every sentence alone, no padding at all."""
    model.eval()
    with torch.no_grad():
        return [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]


def result(predictions, truth, **changes) -> Evaluation:
    p = sum(map(int.__eq__, predictions, truth)) / len(truth)
    values = {
        "accuracy": p,
        "n": len(truth),
        "standard_error": math.sqrt(p * (1 - p) / len(truth)),
        "predictions": tuple(predictions),
        "labels": tuple(truth),
        "split": "validation",
        "source": "glue/sst2",
        "data_fingerprint": "0" * 16,
        "seconds": 0.25,
        "dtype": "float32",
        "max_length": 128,
        "batch_size": 32,
    }
    return Evaluation(**{**values, **changes})


def paired(both: int, lost: int, won: int, neither: int) -> tuple[Evaluation, Evaluation]:
    """Two results with these four cells; every label is 1."""
    dense = [1] * (both + lost) + [0] * (won + neither)
    pruned = [1] * both + [0] * lost + [1] * won + [0] * neither
    return result(dense, [1] * len(dense)), result(pruned, [1] * len(pruned))


# --- metric ----------------------------------------------------------------------------------------


@pytest.fixture
def metric(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path))
    return accuracy_metric()


def test_metric_by_hand(metric):
    values = metric.compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
    assert values == {"accuracy": 0.75, "n": 4, "standard_error": pytest.approx(math.sqrt(0.75 * 0.25 / 4))}


def test_metric_takes_batches_and_tensors(metric):
    metric.add_batch(predictions=torch.tensor([0, 1]), references=torch.tensor([0, 0]))
    metric.add(prediction=2, reference=2)
    values = metric.compute()
    assert (values["accuracy"], values["n"]) == (2 / 3, 3)
    assert metric.compute(predictions=[1], references=[1]) == {"accuracy": 1.0, "n": 1, "standard_error": 0.0}


def test_metric_is_a_described_evaluate_metric(metric):
    import evaluate

    assert isinstance(metric, evaluate.Metric)
    assert set(metric.features) == {"predictions", "references"}
    assert "standard error" in metric.description
    assert type(accuracy_metric()) is type(metric)
    assert accuracy_metric() is not metric  # it has state


def test_metric_of_nothing(metric):
    with pytest.raises(DataError, match="accuracy of no examples is not defined: pass at least one prediction"):
        metric.compute(predictions=[], references=[])


# --- evaluation ------------------------------------------------------------------------------------


def test_evaluation_equals_one_by_one(bert, tokenizer):
    data = make_data()
    expected = one_by_one(bert, tokenizer, data["sentence"])
    assert len(set(expected)) == 3  # or the order could not show
    found = evaluate_classification(bert, tokenizer, data, batch_size=7, source="here", split="dev")
    assert found.predictions == tuple(expected)
    assert found.labels == tuple(data["label"])
    right = sum(a == b for a, b in zip(expected, data["label"], strict=True))
    assert (found.accuracy, found.n) == (right / 40, 40)
    assert found.standard_error == pytest.approx(math.sqrt(right / 40 * (1 - right / 40) / 40))
    assert (found.source, found.split, found.dtype, found.batch_size) == ("here", "dev", "float32", 7)
    assert found.max_length == 32
    assert 0 < found.seconds < 60


TEXTS = st.lists(st.lists(st.sampled_from(WORDS), max_size=29).map(" ".join), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(texts=TEXTS, order=st.randoms(use_true_random=False), batch_size=st.integers(1, 13))
def test_predictions_stay_with_their_sentences(bert, tokenizer, texts, order, batch_size):
    expected = one_by_one(bert, tokenizer, texts)
    shuffled = list(range(len(texts)))
    order.shuffle(shuffled)
    data = Dataset.from_dict({"sentence": [texts[i] for i in shuffled], "label": [0] * len(texts)})
    found = evaluate_classification(bert, tokenizer, data, batch_size=batch_size)
    assert found.predictions == tuple(expected[i] for i in shuffled)


@pytest.mark.parametrize("batch_size", [1, 2, 40])
def test_batch_composition_does_not_matter(bert, tokenizer, batch_size):
    data = make_data()
    whole = evaluate_classification(bert, tokenizer, data, batch_size=32).predictions
    assert evaluate_classification(bert, tokenizer, data, batch_size=batch_size).predictions == whole
    half = data.select(range(0, 40, 2))
    assert evaluate_classification(bert, tokenizer, half, batch_size=batch_size).predictions == whole[::2]


def test_decoder_is_padded_on_the_right_whatever_the_tokenizer_says():
    model, tokenizer, data = make_gpt2(pad_token_id=PAD), make_tokenizer(padding_side="left"), make_data()
    expected = one_by_one(model, tokenizer, data["sentence"])
    assert len(set(expected)) == 3
    assert evaluate_classification(model, tokenizer, data, batch_size=8).predictions == tuple(expected)
    assert tokenizer.padding_side == "left"


def test_model_without_token_types(tokenizer):
    torch.manual_seed(0)
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 32}
    model = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=VOCAB, num_labels=3, **sizes))
    assert "token_type_ids" in tokenizer.model_input_names
    assert evaluate_classification(model, tokenizer, make_data(5)).n == 5


def test_text_pairs_use_both_columns_and_their_token_types(bert, tokenizer):
    first, second = make_data(20, seed=1), make_data(20, seed=2)
    texts = {"a": [" ".join(t.split()[:12]) for t in first["sentence"]], "b": [t[:30] for t in second["sentence"]]}
    data = Dataset.from_dict({**texts, "label": first["label"]})
    found = evaluate_classification(bert, tokenizer, data, text_columns=("a", "b"))
    with torch.no_grad():
        bert.eval()
        inputs = [tokenizer(a, b, return_tensors="pt") for a, b in zip(*texts.values(), strict=True)]
        expected = tuple(int(bert(**pair).logits.argmax()) for pair in inputs)
    assert all(1 in pair["token_type_ids"] for pair in inputs)
    assert found.predictions == expected
    assert evaluate_classification(bert, tokenizer, data, text_columns=("a",)).predictions != expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tokenizer, dtype):
    data = make_data()
    full = evaluate_classification(make_bert(), tokenizer, data)
    half = evaluate_classification(make_bert().to(dtype), tokenizer, data)
    assert half.dtype == str(dtype).removeprefix("torch.")
    assert sum(a == b for a, b in zip(full.predictions, half.predictions, strict=True)) >= 36


def test_every_module_gets_its_training_flag_back(tokenizer):
    model = make_bert()
    model.train()
    model.bert.embeddings.eval()
    before = [module.training for module in model.modules()]
    first = evaluate_classification(model, tokenizer, make_data())
    assert [module.training for module in model.modules()] == before
    assert first.predictions == evaluate_classification(model, tokenizer, make_data()).predictions  # no dropout
    model.forward = None
    with pytest.raises(TypeError):
        evaluate_classification(model, tokenizer, make_data())
    assert [module.training for module in model.modules()] == before


def test_labels_as_strings_and_class_labels(bert, tokenizer):
    data = make_data()
    plain = evaluate_classification(bert, tokenizer, data)
    names = data.remove_columns("label").add_column("label", [f"LABEL_{i}" for i in data["label"]])
    assert evaluate_classification(bert, tokenizer, names).labels == plain.labels
    classes = data.cast_column("label", ClassLabel(names=["a", "b", "c"]))
    assert evaluate_classification(bert, tokenizer, classes) == Evaluation(
        **{**vars(plain), "seconds": pytest.approx(plain.seconds, abs=60)}
    )


def test_long_inputs_are_cut(bert, tokenizer):
    assert tokenizer.model_max_length > 10**20  # what a tokenizer says that does not know
    long = Dataset.from_dict({"sentence": [" ".join(WORDS * 3), " ".join(WORDS[:30])], "label": [0, 0]})
    found = evaluate_classification(bert, tokenizer, long)
    assert found.max_length == 32
    assert found.predictions[0] == found.predictions[1]  # [CLS], 30 words, [SEP] is all that is left of both
    assert evaluate_classification(bert, make_tokenizer(model_max_length=16), long).max_length == 16
    assert evaluate_classification(bert, tokenizer, long, max_length=8).max_length == 8
    wide = make_bert(max_position_embeddings=2048)
    assert evaluate_classification(wide, tokenizer, long).max_length == 512


def test_positions_that_start_after_the_padding(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=VOCAB, max_position_embeddings=34, pad_token_id=PAD, type_vocab_size=2, **sizes)
    long = Dataset.from_dict({"sentence": [" ".join(WORDS * 3)], "label": [0]})
    assert evaluate_classification(RobertaForSequenceClassification(config), tokenizer, long).max_length == 33


def test_progress_bar_is_shown_only_when_asked_and_on_a_terminal(bert, tokenizer, capfd, monkeypatch):
    evaluate_classification(bert, tokenizer, make_data(4), progress=True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("hf_prune.utils.progress._DELAY", 0)
    evaluate_classification(bert, tokenizer, make_data(4))
    assert capfd.readouterr().err == ""
    evaluate_classification(bert, tokenizer, make_data(4), progress=True)
    assert "Scoring:   0%" in capfd.readouterr().err
    evaluate_classification(bert, tokenizer, make_data(4), progress="magnitude 30 %")
    assert "magnitude 30 %:   0%" in capfd.readouterr().err


# --- evaluation: errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"sentence": [], "label": []}, "the data set is empty: expected at least one example"),
        ({"text": ["a"], "label": [0]}, r"has no column 'sentence' \(found: text, label\)"),
        ({"sentence": ["a"], "gold": [0]}, r"has no column 'label' \(found: sentence, gold\)"),
        ({"sentence": ["a", "b"], "label": [0, 3]}, "row 2: label 3 is not a class, expected 0 to 2: drop or renumber"),
        ({"sentence": ["a"], "label": [-1]}, "row 1: label -1 is not a class, expected 0 to 2"),
        ({"sentence": ["a"], "label": [1.0]}, r"row 1: label 1\.0 is not a class"),
        (
            {"sentence": ["a", "b"], "label": ["LABEL_0", "good"]},
            "row 2: label 'good' is not in label2id .known: 'LABEL_0', 'LABEL_1', 'LABEL_2'.: use those names",
        ),
    ],
)
def test_unusable_data(bert, tokenizer, columns, message):
    with pytest.raises(DataError, match=message):
        evaluate_classification(bert, tokenizer, Dataset.from_dict(columns))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0: expected an integer of at least 1"),
        ({"batch_size": 2.0}, r"batch_size is 2\.0: expected an integer"),
        ({"max_length": 0}, "max_length is 0: expected an integer of at least 1"),
        ({"max_length": 33}, "max_length is 33: BertForSequenceClassification has only 32 positions"),
        ({"text_columns": "sentence"}, "text_columns is 'sentence': expected a list of one column, or of two"),
        ({"text_columns": ("a", "b", "c")}, "expected a list of one column, or of two for pairs"),
    ],
)
def test_settings_out_of_range(bert, tokenizer, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_classification(bert, tokenizer, make_data(2), **options)


def test_tokenizer_that_cannot_pad(bert):
    tokenizer = make_tokenizer(pad_token=None)
    with pytest.raises(DataError, match=r"no padding token.*set tokenizer\.pad_token = tokenizer\.eos_token and model"):
        evaluate_classification(bert, tokenizer, make_data(2))
    with pytest.raises(DataError, match="no padding token"):
        classification_batches(make_data(2), tokenizer)


def test_model_that_pads_with_another_token(tokenizer):
    with pytest.raises(DataError, match=r"pads with token None, the tokenizer with 0 \('\[PAD\]'\): set model\.config"):
        evaluate_classification(make_gpt2(), tokenizer, make_data(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_labels": 1},
            "has num_labels = 1 and problem_type = None: accuracy needs a classifier with at least two",
        ),
        ({"problem_type": "regression"}, "problem_type = 'regression'"),
        ({"problem_type": "multi_label_classification"}, "of which one is right"),
    ],
)
def test_model_that_is_no_classifier(tokenizer, options, message):
    with pytest.raises(DataError, match=message):
        evaluate_classification(make_bert(**options), tokenizer, make_data(2, classes=1))


def test_model_with_other_outputs(tokenizer):
    with pytest.raises(
        DataError, match=r"BertModel returns no logits, expected \(batch, 3\): load it with AutoModelFor"
    ):
        evaluate_classification(make_bert(cls=BertModel), tokenizer, make_data(2))
    with pytest.raises(DataError, match=r"returns logits of shape \(2, \d+, 3\), expected \(batch, 3\)"):
        evaluate_classification(make_bert(cls=BertForTokenClassification), tokenizer, make_data(2))


def test_nan_is_no_prediction(tokenizer):
    model = make_bert()
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[4] = math.nan  # w0
    data = Dataset.from_dict({"sentence": ["w1", "w0", "w2 w0", "w3"], "label": [0, 0, 0, 0]})
    with pytest.raises(DataError, match=r"returns NaN for 2 of 4 examples: its weights are damaged, or torch\.float32"):
        evaluate_classification(model, tokenizer, data, batch_size=1)


# --- SST-2 -----------------------------------------------------------------------------------------


def test_evaluate_sst2_reads_a_folder(tmp_path, tokenizer):
    data = make_data(10, classes=2)
    rows = [f"{text}\t{label}" for text, label in zip(data["sentence"], data["label"], strict=True)]
    (tmp_path / "dev.tsv").write_text("\n".join(["sentence\tlabel", *rows, ""]))
    model = make_bert(num_labels=2)
    whole = evaluate_sst2(model, tokenizer, source=str(tmp_path), batch_size=3)
    assert (whole.split, whole.source, whole.batch_size) == ("validation", str(tmp_path), 3)
    assert whole.predictions == evaluate_classification(model, tokenizer, data).predictions
    part = evaluate_sst2(model, tokenizer, split="dev", source=str(tmp_path), limit=4)
    assert (part.n, part.predictions) == (4, whole.predictions[:4])
    assert evaluate_sst2(model, tokenizer, source=str(tmp_path), limit=99).n == 10
    assert part.data_fingerprint != whole.data_fingerprint
    with pytest.raises(ConfigError, match="limit is 0: expected an integer of at least 1"):
        evaluate_sst2(model, tokenizer, source=str(tmp_path), limit=0)


@pytest.mark.skipif(not SHARED, reason="HF_PRUNE_SHARED names no folder with models/minilm-sst2 and data/sst2")
def test_trained_model_has_its_known_accuracy():
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = Path(SHARED) / "models" / "minilm-sst2"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    found = evaluate_sst2(model, AutoTokenizer.from_pretrained(folder), source=str(Path(SHARED) / "data" / "sst2"))
    assert re.match(r"accuracy 90\.48 % ± 0\.99 \(n = 872, ", str(found))


# --- records ---------------------------------------------------------------------------------------


def test_evaluation_in_words():
    found = result([1] * 789 + [0] * 83, [1] * 872)
    assert str(found) == "accuracy 90.48 % ± 0.99 (n = 872, glue/sst2 validation)"
    assert str(result([1], [1], source="", split="")) == "accuracy 100.00 % ± 0.00 (n = 1, data 0000000000000000)"


def test_evaluation_survives_json(bert, tokenizer):
    found = evaluate_classification(bert, tokenizer, make_data())
    assert Evaluation.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_foreign_record():
    values = result([1], [1]).to_dict()
    del values["labels"]
    with pytest.raises(DataError, match=r"missing \['labels'\], unknown \['extra'\]: pass what Evaluation\.to_dict"):
        Evaluation.from_dict({**values, "extra": 1})


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (
            {"accuracy": 0.99},
            "accuracy is 0.99, but the predictions that are saved with it give 0.75: the file was edited",
        ),
        ({"accuracy": math.nan}, "accuracy is nan"),
        ({"accuracy": True}, "accuracy is True"),
        ({"n": 400}, "n is 400, but the predictions that are saved with it give 4"),
        ({"standard_error": 0.0}, "standard_error is 0.0"),
        ({"predictions": [1, 1, 1, 1]}, "accuracy is 0.75, but the predictions that are saved with it give 1.0"),
        ({"labels": [1, 1, 1, 0]}, "accuracy is 0.75"),
        ({"labels": [1, 1, 1, -1]}, "must be class numbers"),
        ({"predictions": [1, 1, 1, False]}, "must be class numbers"),
        ({"predictions": [1, 1, 1]}, "3 predictions of 4 labels"),
        ({"predictions": [], "labels": []}, "0 predictions of 0 labels"),
    ],
)
def test_a_saved_score_is_counted_again(edits, message):
    values = result([1, 1, 1, 0], [1, 1, 1, 1]).to_dict()
    assert Evaluation.from_dict({k: v for k, v in values.items() if k != "classes"}).accuracy == 0.75
    with pytest.raises(DataError, match=message):
        Evaluation.from_dict({**values, **edits})


# --- whether a drop from it says anything ----------------------------------------------------------


@pytest.mark.parametrize(
    ("id2label", "names", "doubt"),
    [
        (None, ["0", "1", "2"], ""),
        (None, ["no", "maybe", "yes"], ""),
        (["negative", "NEUTRAL", "Positive"], ["neg", "neutral", "pos"], ""),
        (["no", "yes", "maybe"], ["no", "maybe", "yes"], "class 1 is 'yes' to the model, and 'maybe' in the data"),
        (["a", "b", "c"], ["x", "b", "c"], "class 0 is 'a' to the model, and 'x' in the data"),
        (["-", "0", "+"], ["-", "0", "+"], ""),
        (["+", "0", "-"], ["-", "0", "+"], "class 0 is '+' to the model, and '-' in the data"),
        (["👎", "x", "👍"], ["👍", "x", "👎"], "class 0 is '👎' to the model, and '👍' in the data"),
        (["positive", "x", "p"], ["p", "x", "positive"], "class 0 is 'positive' to the model, and 'p' in the data"),
        (["ab", "ac", "d"], ["a", "ac", "d"], "class 0 is 'ab' to the model, and 'a' in the data"),
        (["very_good", "so so", "Bad"], ["Very good", "so-so", "ｂａｄ"], ""),
        (None, ["LABEL_0", "label 1", "2"], ""),
        (None, ["1", "2", "3"], ""),
        (["1", "0", "2"], ["0", "1", "2"], "class 0 is '1' to the model, and '0' in the data"),
        (
            ["LABEL_1", "LABEL_0", "LABEL_2"],
            ["no", "yes", "x"],
            "class 0 is 'LABEL_1' to the model, and 'no' in the data",
        ),
        (["a", "b", "c"], ["LABEL_1", "LABEL_0", "LABEL_2"], "class 0 is 'a' to the model, and 'LABEL_1' in the data"),
        (None, ["a", "b", "c", "d"], "the model has 3 classes, and the data 4"),
        (None, None, ""),
        (None, 2, "the model has 3 classes, and the data 2, of which 0, 1 occur"),
        (["no", "yes", "maybe"], "texts", ""),
        (["no", "maybe", "yes"], "swapped", "class 2 is 'maybe' in the model's label2id, and 'yes' in its id2label"),
    ],
)
def test_classes_that_differ_are_told(bert, tokenizer, monkeypatch, id2label, names, doubt):
    data = make_data(classes=names if isinstance(names, int) else 3)
    if id2label is not None:
        monkeypatch.setattr(bert.config, "id2label", dict(enumerate(id2label)))
    if isinstance(names, list):
        data = data.cast_column("label", ClassLabel(names=names))
    if isinstance(names, str):
        ids = {"no": 0, "yes": 1, "maybe": 2}
        monkeypatch.setattr(bert.config, "label2id", ids)
        rows = {"sentence": data["sentence"][:], "label": [["no", "yes", "maybe"][y] for y in data["label"]]}
        data = Dataset.from_dict(rows)
    found = evaluate_classification(bert, tokenizer, data)
    assert found.classes == doubt
    if doubt:
        assert f"the classes differ, so the accuracy says little: {doubt}; check" in reason_to_doubt(found)


def test_a_model_that_is_no_better_than_the_most_frequent_class():
    """By hand: with 5 and 0 such examples the one-sided p is 1/32, with 4 and 0 1/16, with 8 and 1 10/512."""
    truth = [0] * 12 + [1] * 8
    assert reason_to_doubt(result([0] * 12 + [1] * 5 + [0] * 3, truth)) == ""
    assert "(p = 0.062)" in reason_to_doubt(result([0] * 12 + [1] * 4 + [0] * 4, truth))
    assert reason_to_doubt(result([0] * 12 + [1] * 4 + [0] * 4, truth), 0.9) == ""
    assert reason_to_doubt(result([1] + [0] * 11 + [1] * 8, truth)) == ""
    assert "(p = 0.02)" in reason_to_doubt(result([1] + [0] * 11 + [1] * 8, truth), 0.99)
    reversed_ = result([1 - y for y in truth], truth)
    assert reason_to_doubt(reversed_).startswith(
        "the dense model is right on 0.00 % of the examples, and always answering class 0 on 60.00 % (n = 20): it is "
        "not shown to be better (p = 1)"
    )
    assert compare(reversed_, result(truth, truth)).doubt == reason_to_doubt(reversed_)
    assert compare(result(truth, truth), reversed_).doubt == ""
    assert "p = 1" in reason_to_doubt(result([1, 1], [1, 1]))  # of one class nothing can be told


# --- comparison ------------------------------------------------------------------------------------


def test_comparison_by_hand():
    # Cells 4, 3, 1, 2. Drop (3 - 1) / 10; its error sqrt(4 - 2**2 / 10) / 10. With 0.5 in each cell: drop 2 / 12,
    # error sqrt(5 - 2**2 / 12) / 12 = 0.180021; z = 1.959964 and 1.644854.
    # McNemar: 0 or 1 heads in 4 tosses, doubled: 2 * 5 / 16.
    found = compare(*paired(4, 3, 1, 2))
    assert (found.dense_accuracy, found.pruned_accuracy, found.n, found.confidence) == (0.7, 0.5, 10, 0.95)
    assert (found.only_dense_right, found.only_pruned_right) == (3, 1)
    assert found.drop == pytest.approx(20)
    assert found.drop_standard_error == pytest.approx(18.97367)
    assert found.interval == pytest.approx((-18.6167, 51.9500), abs=1e-3)
    assert found.upper_bound == pytest.approx(46.2775, abs=1e-3)
    assert found.p_value == 0.625


def test_comparison_of_a_textbook():
    # Approval of a prime minister in two surveys: 794, 150, 86, 570 (Agresti, Categorical Data Analysis):
    # difference 0.04, standard error 0.0095, 95 % interval (0.02, 0.06).
    found = compare(*paired(794, 150, 86, 570))
    assert found.drop == pytest.approx(4.0)
    assert found.drop_standard_error == pytest.approx(0.95, abs=0.01)
    assert found.interval == pytest.approx((2.1, 5.9), abs=0.05)
    assert found.p_value == pytest.approx(3.7e-5, rel=0.1)


@pytest.mark.parametrize(("lost", "won"), [(a, b) for a in range(6) for b in range(6)])
def test_mcnemar_against_every_outcome(lost, won):
    tosses = lost + won
    outcomes = itertools.product((1, -1), repeat=tosses)  # under the null, each discordant pair is a fair coin
    as_extreme = sum(abs(sum(outcome)) >= abs(lost - won) for outcome in outcomes)
    assert compare(*paired(3, lost, won, 2)).p_value == as_extreme / 2**tosses


def test_mcnemar_of_many_pairs_is_exact():
    assert compare(*paired(0, 3000, 0, 0)).p_value == 2.0**-2999 == 0
    assert compare(*paired(0, 1000, 0, 0)).p_value == 2.0**-999
    assert compare(*paired(0, 2000, 2000, 0)).p_value == 1.0


def test_same_model_twice():
    dense, _ = paired(7, 2, 0, 1)
    found = compare(dense, dense)
    assert (found.drop, found.drop_standard_error, found.p_value) == (0, 0, 1.0)
    low, high = found.interval
    assert low == -high < 0 < high  # not of length zero: ten examples prove little


@settings(max_examples=50, deadline=None, derandomize=True)
@given(cells=st.tuples(*[st.integers(0, 30)] * 4).filter(any))
def test_comparison_is_antisymmetric_and_ordered(cells):
    dense, pruned = paired(*cells)
    found, swapped = compare(dense, pruned), compare(pruned, dense)
    assert swapped.drop == -found.drop
    assert swapped.interval == pytest.approx((-found.interval[1], -found.interval[0]))
    assert swapped.p_value == found.p_value
    assert -100 <= found.interval[0] < found.interval[1] <= 100
    assert found.upper_bound <= found.interval[1]
    # One side of 97.5 % is one end of 95 %.
    assert compare(dense, pruned, confidence=0.975).upper_bound == pytest.approx(found.interval[1])


def test_comparison_in_words_and_as_json():
    found = compare(*paired(4, 3, 1, 2), confidence=0.9)
    assert str(dataclasses.replace(found, doubt="")) == (
        "accuracy 70.00 % -> 50.00 %: drop 20.00 points (90 % interval -12.94 to 46.28, one-sided upper bound 39.74; "
        "3 only dense right, 1 only pruned right, McNemar p = 0.625, n = 10)"
    )
    assert str(found).startswith(f"Warning: {found.doubt}.\naccuracy 70.00 %")
    values = json.loads(json.dumps(found.to_dict()))
    assert values["interval"] == list(found.interval)
    assert {**values, "interval": tuple(values["interval"])} == vars(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 3}, "the dense result has 2 examples, the pruned one 3: use the same data"),
        ({"data_fingerprint": "f" * 16}, "on different data .fingerprints 0{16} and f{16}.: evaluate both models on"),
        ({"labels": (0, 1)}, "the results have different labels: give both models the same label2id"),
    ],
)
def test_unpaired_results(change, message):
    with pytest.raises(DataError, match=message):
        compare(result([1, 0], [1, 0]), result([1, 0], [1, 0], **change))


@pytest.mark.parametrize("confidence", [0, 1, 95, -0.5, math.nan])
def test_confidence_out_of_range(confidence):
    with pytest.raises(ConfigError, match=r"confidence is .*: expected a number between 0 and 1, such as 0\.95"):
        compare(*paired(1, 1, 1, 1), confidence=confidence)


# --- calibration batches ---------------------------------------------------------------------------


def texts_of(batches, tokenizer) -> list[tuple[str, int]]:
    rows = []
    for batch in batches:
        decoded = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        rows += zip(decoded, batch["labels"].tolist(), strict=True)
    return rows


def test_batches_are_a_seeded_sample_that_the_model_takes(bert, tokenizer):
    data = make_data()
    batches = classification_batches(data, tokenizer, n=10, batch_size=4)
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
    rows = texts_of(batches, tokenizer)
    assert len(set(rows)) == 10
    assert set(rows) <= set(zip(data["sentence"], data["label"], strict=True))
    assert rows == texts_of(classification_batches(data, tokenizer, n=10, batch_size=4), tokenizer)
    assert rows != texts_of(classification_batches(data, tokenizer, n=10, batch_size=4, seed=1), tokenizer)
    for batch in batches:
        assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        assert batch["attention_mask"].equal((batch["input_ids"] != PAD).long())
        assert bert(**batch).loss.isfinite()


def test_batches_of_all_the_data(tokenizer):
    data = make_data(5)
    rows = texts_of(classification_batches(data, tokenizer, n=99), tokenizer)
    assert sorted(rows) == sorted(zip(data["sentence"], data["label"], strict=True))


def test_batches_are_cut_and_labels_mapped(tokenizer):
    data = Dataset.from_dict({"sentence": [" ".join(WORDS)] * 2, "label": ["no", "yes"]})
    (batch,) = classification_batches(data, tokenizer, max_length=9, label2id={"no": 0, "yes": 1})
    assert batch["input_ids"].shape == (2, 9)
    assert sorted(batch["labels"].tolist()) == [0, 1]
    with pytest.raises(DataError, match=r"row \d: label '(no|yes)' is not in label2id \(known: none\)"):
        classification_batches(data, tokenizer)


def test_names_of_labels_in_any_case(bert, tokenizer):
    data = Dataset.from_dict({"sentence": ["a", "b", "c"], "label": ["Label_2", " label_0", "LABEL_1"]})
    assert evaluate_classification(bert, tokenizer, data).labels == (2, 0, 1)
    batches = classification_batches(
        data, tokenizer, label2id={"a": 0, "A": 1, "LABEL_1": 2, "label_0": 3, "Label_2": 4}
    )
    assert sorted(batches[0]["labels"].tolist()) == [2, 3, 4]


def test_names_that_only_their_case_tells_apart(tokenizer):
    data = Dataset.from_dict({"sentence": ["a", "b"], "label": ["A", "a"]})
    assert classification_batches(data, tokenizer, label2id={"a": 0, "A": 1})[0]["labels"].sum() == 1
    data = Dataset.from_dict({"sentence": ["a"], "label": ["á"]})
    with pytest.raises(DataError, match="row 1: label 'á' is not in label2id"):
        classification_batches(data, tokenizer, label2id={"a": 0, "A": 1})


def test_rows_in_errors_are_those_of_the_data(tokenizer):
    """Wherever the row comes in what is drawn, and whether it is drawn at all."""
    data = Dataset.from_dict({"sentence": ["a"] * 40, "label": [0] * 36 + [-1] + [0] * 3})
    for n in (1, 40):
        with pytest.raises(DataError, match="row 37: label -1 is not a class"):
            classification_batches(data, tokenizer, n=n)


def test_numbers_to_predict_are_no_classes(bert, tokenizer):
    data = Dataset.from_dict({"sentence": ["a"], "label": [2.5]})
    with pytest.raises(
        DataError, match=r"row 1: label 2\.5 is not a class, .*numbers to predict \(regression\) have no accur"
    ):
        evaluate_classification(bert, tokenizer, data)


@pytest.mark.parametrize("name", ["n", "batch_size", "max_length"])
def test_batch_settings_out_of_range(tokenizer, name):
    with pytest.raises(ConfigError, match=f"{name} is 0: expected an integer of at least 1"):
        classification_batches(make_data(2), tokenizer, **{name: 0})


def test_batches_of_unusable_data(tokenizer):
    with pytest.raises(DataError, match="row 1: label -1 is not a class, expected 0 or more"):
        classification_batches(Dataset.from_dict({"sentence": ["a"], "label": [-1]}), tokenizer)
    with pytest.raises(DataError, match="the data set is empty"):
        classification_batches(Dataset.from_dict({"sentence": [], "label": []}), tokenizer)


def test_evaluation_scores_with_the_metric(bert, tokenizer, monkeypatch):
    from hf_prune.evaluation import accuracy as evaluation

    class Fixed:
        def compute(self, *, predictions, references):
            return {"accuracy": 0.125, "n": len(references), "standard_error": 0.5}

    monkeypatch.setattr(evaluation, "accuracy_metric", Fixed)
    assert evaluate_classification(bert, tokenizer, make_data(4)).accuracy == 0.125
