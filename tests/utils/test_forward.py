"""What a batch must be, and what is said of one that a model cannot run."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    T5Config,
    T5Model,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_prune.errors import CalibrationError, DataError
from hf_prune.evaluation.accuracy import evaluate_classification
from hf_prune.evaluation.perplexity import evaluate_perplexity
from hf_prune.pipeline import prune
from tests.models import VOCAB, assert_unchanged, fill, snapshot, tiny_bert, tiny_gpt2, tiny_t5, tiny_tokenizer

_SIZES = {"d_model": 16, "max_position_embeddings": 24, "vocab_size": VOCAB}
_SIZES |= {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 24))}
_SIZES |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}


def marian(**settings):
    values = {**_SIZES, "pad_token_id": 3, "decoder_start_token_id": 3, "eos_token_id": 0, **settings}
    return fill(MarianMTModel(MarianConfig(**values))).eval()


def whisper():
    values = {k: v for k, v in _SIZES.items() if k != "max_position_embeddings"}
    config = WhisperConfig(**values, num_mel_bins=8, max_source_positions=10, max_target_positions=12, pad_token_id=0)
    return fill(WhisperForConditionalGeneration(config)).eval()


def texts() -> list[dict]:
    """One batch, the second text shorter and padded."""
    ids = torch.arange(4, 16).view(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    return [{"input_ids": ids * mask, "attention_mask": mask}]


WITH_DECODER = {
    "t5": tiny_t5,
    "t5_base": lambda: fill(T5Model(T5Config(**tiny_t5().config.to_dict()))).eval(),
    "bart": lambda: fill(BartForConditionalGeneration(BartConfig(**_SIZES, decoder_start_token_id=2))).eval(),
    "marian": marian,
}


@pytest.mark.parametrize("kind", list(WITH_DECODER))
@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "wanda", "scope": "row"},
        {"criterion": "fisher"},
        {"repair": "least_squares"},
        {"criterion": "sparsegpt", "objective": "loss"},
    ],
    ids=str,
)
def test_a_decoder_that_is_given_nothing_reads_the_encoders_text(kind, settings):
    """The same masks as where decoder inputs are spelled out: the text, a token further right, and its padding."""
    model, other = WITH_DECODER[kind](), WITH_DECODER[kind]()
    plain = texts()
    start = model.config.decoder_start_token_id
    ids, mask = plain[0]["input_ids"], plain[0]["attention_mask"]
    shifted = torch.cat([torch.full((2, 1), start), ids[:, :-1]], 1)
    spelled_out = [{**plain[0], "decoder_input_ids": shifted, "decoder_attention_mask": mask}]
    prune(model, 0.5, calibration=plain, **settings)
    prune(other, 0.5, calibration=spelled_out, **settings)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert plain[0].keys() == {"input_ids", "attention_mask"}


def test_labels_are_never_replaced_by_the_text():
    model, other = tiny_t5(), tiny_t5()
    labelled = [{**texts()[0], "labels": torch.arange(20, 28).view(2, 4)}]
    prune(model, 0.5, criterion="wanda", scope="row", calibration=labelled)
    prune(other, 0.5, criterion="wanda", scope="row", calibration=texts())
    name = "decoder.block.0.layer.1.EncDecAttention.q.weight"
    assert not torch.equal(model.get_parameter(name), other.get_parameter(name))


@pytest.mark.filterwarnings("ignore:.* stay dense, the largest:UserWarning")  # Whisper's convolutions
@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (
            lambda: marian(decoder_vocab_size=40, share_encoder_decoder_embeddings=False),
            texts()[0],
            r"decoder of MarianMTModel cannot read the same text, since its encoder knows 48 tokens and its decoder "
            r"40: add labels or decoder_input_ids to each batch",
        ),
        (
            lambda: tiny_t5(decoder_start_token_id=None, pad_token_id=None),
            texts()[0],
            r"since its config names no start token: add labels or decoder_input_ids",
        ),
        (
            whisper,
            {"input_features": torch.randn(2, 8, 20)},
            r"WhisperForConditionalGeneration cannot run a batch of input_features \(2, 8, 20\) \(ValueError: .*\): "
            r"expected what its forward takes, input_features, .*; it has a decoder, so add labels or decoder_input",
        ),
    ],
)
def test_a_decoder_that_cannot_read_it_needs_labels(model, batch, message):
    model = model()
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=message):
        prune(model, 0.5, criterion="wanda", scope="row", calibration=[batch])
    assert_unchanged(model, before)


EVERY_PATH = [
    {"criterion": "wanda", "scope": "row"},
    {"criterion": "taylor"},
    {"criterion": "fisher"},
    {"criterion": "fisher_diagonal"},
    {"criterion": "fisher", "granularity": "head"},
    {"criterion": "fisher", "granularity": ("head", "layer"), "scope": "global"},
    {"repair": "least_squares"},
    {"polish": "distill"},
    {"allocation": "owl"},
]


@pytest.mark.parametrize("settings", EVERY_PATH, ids=str)
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ("a text", "calibration data is the text 'a text': expected a list of texts"),
        (["a text", "another one"], "found texts, and no tokenizer beside the BertForSequenceClassification"),
        (
            DatasetDict(train=Dataset.from_dict({"text": ["a"]})),
            r"calibration data is a DatasetDict of train: expected one split, such as data\['train'\]",
        ),
        ([{}], r"a calibration batch holds no tensors \(found: nothing\): .*hf_prune.text_batches\(texts, tokenizer\)"),
        ([[4, 5, 6], [7, 8]], "a calibration batch is a list"),
        (Dataset.from_dict({"text": ["a", "b"]}), "found texts, and no tokenizer"),
        (
            [{"input_ids": torch.tensor([4, 5])}],
            r"a calibration batch holds input_ids of shape \(2,\): expected \(batch, ",
        ),
        ([{"input_ids": [[4, 5], [6, 7]]}] * 2, r"the calibration data has the columns input_ids, and no texts"),
    ],
    ids=range(8),
)
def test_what_is_no_list_of_batches(settings, batches, message):
    model = tiny_bert()
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=message):
        prune(model, calibration=batches, **settings)
    assert_unchanged(model, before)


@pytest.mark.parametrize("settings", EVERY_PATH, ids=str)
def test_a_batch_that_the_model_cannot_run(settings):
    """What the batch holds and what the model takes, and the model's own error behind it."""
    model = tiny_bert()
    before = snapshot(model)
    batch = {"input_ids": torch.full((1, 3), VOCAB), "labels": torch.zeros(1, dtype=torch.int64)}
    with pytest.raises(
        CalibrationError,
        match=r"BertForSequenceClassification cannot run a batch of input_ids \(1, 3\).* \(IndexError: index out of "
        r"range in self\): expected what its forward takes, input_ids, attention_mask, .*labels$",
    ) as caught:
        prune(model, calibration=[batch, batch], **settings)
    assert isinstance(caught.value.__cause__, IndexError)
    assert_unchanged(model, before)


@pytest.mark.parametrize("settings", EVERY_PATH, ids=str)
def test_calibration_on_padding_alone(settings):
    model = tiny_bert()
    before = snapshot(model)
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.zeros(2, 3, dtype=torch.int64)}
    with pytest.raises(CalibrationError, match=r"nothing but padding \(attention_mask \(2, 3\) is 0 everywhere\)"):
        prune(model, calibration=[batch, batch], **settings)
    assert_unchanged(model, before)


class _Odd(ValueError):
    """A model's own kind of error."""


def test_scoring_with_a_model_that_raises(monkeypatch):
    def forward(input_ids, attention_mask=None):
        raise _Odd("my own trouble")

    tokenizer = tiny_tokenizer()
    classifier, decoder = tiny_bert(), tiny_gpt2()
    monkeypatch.setattr(classifier, "forward", forward)
    monkeypatch.setattr(decoder, "forward", forward)
    data = Dataset.from_dict({"sentence": ["w1 w2"], "label": [0]})
    told = r"cannot run a batch of .*input_ids \(1, \d\).* \(_Odd: my own trouble\): .* input_ids, attention_mask$"
    with pytest.raises(DataError, match=told):
        evaluate_classification(classifier, tokenizer, data)
    with pytest.raises(DataError, match=told.replace("1,", r"\d,")):
        evaluate_perplexity(decoder, tokenizer, ["w1 w2 w3 w4 w5 w6 w7 w8"], window=4)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (
            3,
            "calibration data is 3, of type int: expected a list of texts, a datasets.Dataset",
        ),
        (texts, "calibration data is <function .*: call it first, and pass what it"),
    ],
)
@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "wanda", "scope": "row"},
        {"criterion": "taylor"},
        {"granularity": "neuron", "criterion": "taylor", "scope": "global"},
    ],
)
def test_calibration_data_that_cannot_be_iterated_over(calibration, message, settings):
    model = tiny_bert()
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=message):
        prune(model, 0.5, calibration=calibration, **settings)
    assert_unchanged(model, before)
