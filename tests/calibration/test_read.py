"""Calibration data in the forms that people have it."""

import copy
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    AutoModelForSequenceClassification,
    BatchEncoding,
    TrainingArguments,
    ViTForImageClassification,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
)

from hf_prune import PruningConfig, PruningTrainer, accelerate, prune, sparsity_report
from hf_prune.calibration.read import MOST_ROWS, read_calibration
from hf_prune.errors import CalibrationError, DataError
from tests import models

TEXTS = models.tiny_sentences(12, 0)["sentence"]
LABELS = [i % 2 for i in range(12)]
ROWS = Dataset.from_dict({"sentence": TEXTS, "label": LABELS})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    models.tiny_classifier().save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def model(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder)


def rows_of(batches):
    """The tokens of all batches, without padding and in any order."""
    return sorted(
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )


def encoded(texts, **options):
    return models.tiny_tokenizer()(list(texts), padding=True, return_tensors="pt", **options)


FORMS = {
    "a list of texts": lambda: list(TEXTS),
    "an iterator of texts": lambda: iter(TEXTS),
    "a column": lambda: ROWS["sentence"],
    "a data set": lambda: ROWS,
    "a table of pandas": lambda: ROWS.to_pandas(),
    "a data set in torch's format": lambda: ROWS.with_format("torch"),
    "rows": lambda: [dict(row) for row in ROWS],
    "columns": lambda: {"sentence": list(TEXTS), "label": LABELS},
    "a stream": lambda: ROWS.to_iterable_dataset(),
    "a tokenized data set": lambda: ROWS.map(lambda row: dict(models.tiny_tokenizer()(row["sentence"]))),
    "one batch": lambda: encoded(TEXTS),
    "one dict": lambda: dict(encoded(TEXTS)),
    "batches": lambda: [encoded(TEXTS[:5]), encoded(TEXTS[5:])],
    "a loader of rows": lambda: DataLoader(ROWS, batch_size=5),
    "a loader of texts": lambda: DataLoader(list(TEXTS), batch_size=5),
    "a loader of pairs of texts": lambda: DataLoader(list(TEXTS), batch_size=2),
    "a loader of batches": lambda: DataLoader(
        [dict(encoded([text])) for text in TEXTS], batch_size=None, collate_fn=lambda batch: batch
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_texts(model, form):
    batches = read_calibration(model, FORMS[form]())
    assert rows_of(batches) == rows_of([encoded(TEXTS)])
    assert all(isinstance(batch, dict | BatchEncoding) for batch in batches)


@pytest.mark.parametrize("form", ["a list of texts", "a data set", "one batch", "a loader of rows"])
def test_prune_takes_them(model, form):
    expected = prune(copy.deepcopy(model), 0.5, criterion="wanda", scope="row", calibration=[encoded(TEXTS)])
    found = prune(model, 0.5, criterion="wanda", scope="row", calibration=FORMS[form]())
    differing = [n for n, p in found.named_parameters() if (p != expected.get_parameter(n)).float().mean() > 0.01]
    assert differing == []  # sums in another order may tie another way


@pytest.mark.parametrize(
    "form", ["a data set", "a table of pandas", "rows", "a tokenized data set", "a loader of rows"]
)
def test_labels_go_with_their_texts(model, form):
    ids_of = models.tiny_tokenizer()(list(TEXTS))["input_ids"]
    label_of = dict(zip(map(tuple, ids_of), LABELS, strict=True))
    seen = 0
    for batch in read_calibration(model, FORMS[form](), labels=True):
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"].tolist(), strict=True):
            assert label_of[tuple(ids[mask.bool()].tolist())] == label
            seen += 1
    assert seen == 12
    assert "labels" not in read_calibration(model, FORMS[form]())[0]


def test_names_of_labels_are_matched_without_regard_to_case(model):
    data = Dataset.from_dict({"text": ["w1 w2", "w3"], "label": ["label_1", "LABEL_0"]})
    (batch,) = read_calibration(model, data, labels=True)
    assert sorted(batch["labels"].tolist()) == [0, 1]
    with pytest.raises(DataError, match=r"row 1: label 'good' is not in label2id \(known: 'LABEL_0', 'LABEL_1'\)"):
        read_calibration(model, Dataset.from_dict({"text": ["w1"], "label": ["good"]}), labels=True)


def test_taylor_learns_from_a_data_set(model):
    expected = prune(
        copy.deepcopy(model), 0.5, criterion="taylor", calibration=read_calibration(model, ROWS, labels=True)
    )
    models.assert_unchanged(prune(model, 0.5, criterion="taylor", calibration=ROWS), models.snapshot(expected))


def test_a_language_model_is_its_own_label():
    model, tokenizer = models.tiny_gpt2(), models.tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.eos_token = "[SEP]"
    (batch,) = read_calibration(model, ["w1 w2", "w3 w4 w5 w6"], tokenizer, labels=True)
    assert batch["labels"].shape == batch["input_ids"].shape
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    assert tokenizer.pad_token is None  # as it was
    prune(model, 0.5, criterion="taylor", calibration=["w1 w2", "w3 w4 w5 w6"], tokenizer=tokenizer)
    assert int((model.transformer.h[0].mlp.c_fc.weight == 0).sum())


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_of_tokens_are_padded_as_the_tokens_are(side):
    model, tokenizer = models.tiny_gpt2(), models.tiny_tokenizer()
    tokenizer.padding_side = side
    ids = [[5, 6], [7, 8, 9, 10], [11]]
    given = {"input_ids": ids, "labels": [[-100, *row[1:]] for row in ids]}
    (batch,) = read_calibration(model, given, tokenizer, labels=True)
    padded = batch["attention_mask"] == 0
    begins = torch.isin(batch["input_ids"], torch.tensor([5, 7, 11]))
    assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(padded | begins, -100))
    own = {"input_ids": ids, "label": [0, 7, 0]}  # classes of texts say nothing of tokens
    (batch,) = read_calibration(model, own, tokenizer, labels=True)
    assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(padded, -100))
    assert torch.isfinite(model(**batch).loss)
    (batch,) = read_calibration(model, {"input_ids": [[5, 6], [7, 8]]}, labels=True)  # all of one length
    assert sorted(batch["labels"].tolist()) == [[5, 6], [7, 8]]
    for wrong, message in (
        ([[5], [7, 8]], "row 1: 1 labels for 2 tokens"),
        ([[5, 6], 3], "row 2: labels is 3, expected"),
    ):
        with pytest.raises(DataError, match=message):
            read_calibration(model, {"input_ids": [[5, 6], [7, 8]], "labels": wrong}, labels=True)


def test_pairs_of_texts(model):
    pairs = Dataset.from_dict({"premise": ["w1 w2", "w3"], "hypothesis": ["w4", "w5 w6"], "idx": [0, 1]})
    expected = models.tiny_tokenizer()(["w3", "w1 w2"], ["w5 w6", "w4"], padding=True, return_tensors="pt")
    for data in (pairs, [("w1 w2", "w4"), ("w3", "w5 w6")]):
        (batch,) = read_calibration(model, data)
        assert rows_of([batch]) == rows_of([expected])


def test_of_many_rows_some_are_drawn(model, caplog):
    data = Dataset.from_dict({"text": [f"w{i % 50 + 1}" for i in range(700)]})
    with caplog.at_level("INFO", "hf_prune"):
        batches = read_calibration(model, data)
    assert sum(len(batch["input_ids"]) for batch in batches) == MOST_ROWS
    assert "Calibrating on 512 of 700 rows, drawn at random; pass fewer rows" in caplog.text


def test_tensors_are_the_main_input():
    model = models.tiny_vit()
    size = model.config.image_size
    pixels = torch.randn(6, 3, size, size)
    assert read_calibration(model, pixels)[0]["pixel_values"] is pixels
    loader = DataLoader(TensorDataset(pixels, torch.arange(6) % 2), batch_size=4)
    batches = read_calibration(model, loader, labels=True)
    assert [sorted(batch) for batch in batches] == [["labels", "pixel_values"]] * 2
    prune(model, 0.5, criterion="taylor", calibration=loader)


def pictures(n):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (9, 7, 3), dtype=np.uint8)) for _ in range(n)]


def test_images_are_read_by_the_processor_beside_the_model(tmp_path):
    size = models.tiny_vit().config.image_size
    models.tiny_vit().save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(tmp_path / "model")
    model = ViTForImageClassification.from_pretrained(tmp_path / "model")
    for i, picture in enumerate(pictures(4)):
        (tmp_path / "images" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "images" / str(i % 2) / f"{i}.png")
    from datasets import load_dataset

    data = load_dataset("imagefolder", data_dir=str(tmp_path / "images"), split="train", cache_dir=str(tmp_path / "c"))
    (batch,) = read_calibration(model, data, labels=True)
    assert batch["pixel_values"].shape == (4, 3, size, size)
    assert batch["labels"].tolist() == [0, 0, 1, 1]
    expected = ViTImageProcessor(size={"height": size, "width": size})(data[0]["image"], return_tensors="pt")
    assert torch.equal(batch["pixel_values"][:1], expected["pixel_values"])
    prune(model, 0.5, criterion="wanda", scope="row", calibration=pictures(3))
    assert sparsity_report(model).target_sparsity == pytest.approx(0.5, abs=0.01)


def tiny_wav2vec2():
    config = Wav2Vec2Config(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(4, 4), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return Wav2Vec2ForCTC(config)


def test_sounds_are_read_by_the_feature_extractor():
    model, extractor = tiny_wav2vec2(), Wav2Vec2FeatureExtractor()
    sounds = [{"array": np.sin(np.arange(n) / 9), "sampling_rate": 16_000} for n in (400, 300)]
    (batch,) = read_calibration(model, sounds, extractor)
    assert batch["input_values"].shape == (2, 400)
    prune(model, 0.5, criterion="wanda", scope="row", calibration=sounds, tokenizer=extractor)
    wrong = [{"array": np.zeros(300), "sampling_rate": 8_000}]
    with pytest.raises(DataError, match=r"sound 0 has 8,000 samples a second, and the model reads 16,000: convert it"):
        read_calibration(model, wrong, extractor)
    with pytest.raises(
        CalibrationError, match=r"found sounds, and no processor beside the Wav2Vec2ForCTC, which comes"
    ):
        read_calibration(model, sounds)


def test_sounds_that_are_decoded_when_asked_for():
    class Decoder:  # as torchcodec has them, without subscripts
        def __init__(self, rate):
            self.rate = rate

        def get_all_samples(self):
            return SimpleNamespace(data=torch.sin(torch.arange(800).view(2, 400) / 9), sample_rate=self.rate)

    model, extractor = tiny_wav2vec2(), Wav2Vec2FeatureExtractor()
    (batch,) = read_calibration(model, [Decoder(16_000)] * 2, extractor)
    array = Decoder(0).get_all_samples().data.mean(0).numpy()
    (expected,) = read_calibration(model, [{"array": array, "sampling_rate": 16_000}] * 2, extractor)
    assert torch.equal(batch["input_values"], expected["input_values"])
    with pytest.raises(DataError, match="sound 0 has 8,000 samples a second"):
        read_calibration(model, [Decoder(8_000)], extractor)


def test_accelerate_takes_texts(model):
    assert str(accelerate(model, ["w1 w2 w3"]))
    with pytest.raises(CalibrationError, match="expected at least one batch"):
        accelerate(models.tiny_classifier(), [])


def test_a_trainer_reads_them_with_its_tokenizer(tmp_path):
    model = models.tiny_classifier()
    examples = [{**models.tiny_tokenizer()("w1 w2 w3"), "labels": i % 2} for i in range(4)]
    trainer = PruningTrainer(
        model=model,
        args=TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no"),
        train_dataset=examples,
        processing_class=models.tiny_tokenizer(),
        pruning_config=PruningConfig(sparsity=0.5, criterion="wanda", scope="row"),
        calibration=list(TEXTS),
    )
    trainer.train()
    assert rows_of(trainer.pruning.pruner.calibration) == rows_of([encoded(TEXTS)])
    assert model.sparsity_report().target_sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a text", r"calibration data is the text 'a text': expected a list of texts.*; \[text\] is a list of one"),
        (
            3,
            "calibration data is 3, of type int: expected a list of texts, a datasets.Dataset, a pandas.DataFrame",
        ),
        (len, "calibration data is <built-in function len>, .*: call it first, and pass what it returns"),
        (DatasetDict(train=ROWS), r"is a DatasetDict of train: expected one split, such as data\['train'\]"),
        ({}, "calibration data is a dict of nothing without tensors: expected"),
        ({"input_ids": 3}, "is a dict of input_ids without tensors: .*return_tensors='pt' makes tensors"),
        ([1, 2], "a calibration batch is a int: expected a dict of the model's inputs"),
        ([[1, 2], [3]], "a calibration batch is a list: expected a dict"),
        (Dataset.from_dict({"number": [1.5]}), r"has the columns number, and no texts, images.* \(found: float\)"),
        (
            Dataset.from_dict({"a": ["x"], "b": ["y"]}),
            r"several columns of texts \(a, b\): choose with data.select_columns\(\['a'\]\)",
        ),
        ([{"text": "w1"}, {"other": "w2"}], "row 1 of the calibration data has other, and row 0 text"),
        (pictures(1), "found images, and no processor beside the model in"),
    ],
    ids=range(12),
)
def test_other_kinds_are_named_with_what_to_pass(model, data, message):
    before = models.snapshot(model)
    with pytest.raises(CalibrationError, match=message):
        prune(model, 0.5, criterion="wanda", scope="row", calibration=data)
    models.assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["w1", None], "row 2 of the calibration data is None, expected a text: fill it in or drop the row"),
        ([None, "w1"], "row 1 of the calibration data is None"),
        ([("w1", "w2"), "w3"], r"row 1 of the calibration data is \('w1', 'w2'\), expected a text"),
        (Dataset.from_dict({"text": ["w1", "w2", None]}), "row 3 of the calibration data is None"),
        (Dataset.from_dict({"premise": ["w1", "w1"], "hypothesis": [None, "w2"]}), "row 1 of the calibration data is"),
        (pandas.DataFrame({"text": ["w1", float("nan")]}), "row 2 of the calibration data is nan"),
    ],
    ids=range(6),
)
def test_texts_that_are_missing_are_named_by_row(model, data, message):
    with pytest.raises(DataError, match=message):
        prune(model, 0.5, criterion="wanda", scope="row", calibration=data)


@pytest.mark.parametrize(
    ("data", "found"),
    [(list(TEXTS), "no labels beside them"), (ROWS.remove_columns("label"), "the columns sentence"),
     ([("w1", "w2")], "the columns first, second")],
    ids=["texts", "a data set", "pairs"],
)  # fmt: skip
def test_labels_that_are_missing(model, data, found):
    message = f"the criterion learns from labels, and the calibration data has {found}: pass a datasets.Dataset with"
    with pytest.raises(CalibrationError, match=message):
        prune(model, 0.5, criterion="taylor", calibration=data)


def test_without_a_tokenizer(tmp_path):
    models.tiny_classifier().save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match=r"found texts, and no tokenizer beside the BertForS.*: pass tokenizer="):
        read_calibration(models.tiny_classifier(), ["w1"])
    with pytest.raises(CalibrationError, match=r"found texts, and no tokenizer beside the model in '.*': pass"):
        read_calibration(AutoModelForSequenceClassification.from_pretrained(tmp_path), ["w1"])
    with pytest.raises(CalibrationError, match="tokenizer is a int: expected a tokenizer of transformers"):
        read_calibration(models.tiny_classifier(), ["w1"], 3)


def test_criteria_without_data_look_at_none(model):
    prune(model, 0.5, criterion="magnitude", calibration=3)  # as any other argument that is not used
