"""Perplexity over windows, two models on the same windows, and windows to calibrate on."""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertForMaskedLM, BertForTokenClassification, LlamaModel

from hf_prune.calibration.texts import joined_tokens, token_windows
from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.perplexity import compare_perplexity, evaluate_perplexity
from hf_prune.evaluation.perplexity_result import Perplexity
from hf_prune.evaluation.statistics import student_t
from tests import models
from tests.models import VOCAB, assert_unchanged, snapshot
from tests.reference.perplexity import reference_nlls, reference_perplexity


def words(n: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(VOCAB - 4)}" for _ in range(n))


def ids_of(texts: list[str]) -> list[int]:
    """Texts of the tiny tokenizer as one row: [CLS], the words, [SEP]."""
    return [2, *(int(word[1:]) + 4 for text in texts for word in text.split()), 3]


def sharp(seed: int = 0, **settings) -> torch.nn.Module:
    """A tiny Llama that is far from uniform."""
    model = models.tiny_llama(seed, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(12)
    return model


def result(nlls: list[float], tokens: list[int] | None = None, **changes) -> Perplexity:
    tokens = tokens or [7] * len(nlls)
    values = {
        "perplexity": math.exp(sum(a * b for a, b in zip(nlls, tokens, strict=True)) / sum(tokens)),
        "n": len(nlls),
        "n_tokens": sum(tokens),
        "standard_error": 0.5,
        "window_nll": tuple(nlls),
        "window_tokens": tuple(tokens),
        "window": 8,
        "stride": 8,
        "bos_in_every_window": False,
        "unused_tokens": 3,
        "split": "test",
        "source": "texts",
        "data_fingerprint": "0123456789abcdef",
        "seconds": 1.5,
        "dtype": "float32",
        "batch_size": 2,
    }
    return Perplexity(**{**values, **changes})


# --- evaluate_perplexity ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sharp, models.tiny_gpt2, lambda: sharp(tie_word_embeddings=True)])
@pytest.mark.parametrize(
    ("window", "stride", "bos"),
    [
        *((8, None, False), (8, 8, False), (8, 3, False), (8, 1, False), (5, 4, False), (2, None, False)),
        *((8, None, True), (8, 7, True), (8, 2, True), (2, None, True)),
    ],
)
def test_equals_its_twin(make, window, stride, bos):
    model, tokenizer, texts = make(), models.tiny_tokenizer(), [words(13), words(17, 1)]
    tokenizer.bos_token = "[CLS]"
    tokens = ids_of(texts)[1 if bos else 0 :]  # the BOS that the tokenizer puts is not there twice
    expected = reference_nlls(model, tokens, window, stride, 2 if bos else None)
    found = evaluate_perplexity(
        model, tokenizer, texts, window=window, stride=stride, batch_size=3, bos_in_every_window=bos
    )
    assert found.perplexity == pytest.approx(reference_perplexity(expected), rel=1e-5)
    assert found.window_nll == pytest.approx([sum(nlls) / len(nlls) for nlls in expected], rel=1e-5)
    assert found.window_tokens == tuple(len(nlls) for nlls in expected)
    assert found.n == len(expected)
    assert found.n_tokens == sum(found.window_tokens)


class Counting(torch.nn.Module):
    """Predicts that the next token is the last one plus 1, with probability 3/4, whatever came before."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, 1)
        self.config = SimpleNamespace(is_encoder_decoder=False)
        self.config.get_text_config = lambda: self.config
        self.shapes: list[tuple[int, ...]] = []

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        self.shapes.append(tuple(input_ids.shape))
        rest = math.log(0.25 / (VOCAB - 1))
        logits = torch.full((*input_ids.shape, VOCAB), rest)
        return SimpleNamespace(logits=logits.scatter(-1, ((input_ids + 1) % VOCAB)[..., None], math.log(0.75)))


def test_by_hand():
    """[CLS] w0 w1 | w2 w3 w9 | [SEP]: four predictions, one of which is wrong."""
    model = Counting()
    found = evaluate_perplexity(model, models.tiny_tokenizer(), ["w0 w1 w2", "w3 w9"], window=3, batch_size=5)
    right, wrong = -math.log(0.75), -math.log(0.25 / (VOCAB - 1))
    first, second = (wrong + right) / 2, (right + wrong) / 2  # [CLS] is 2, w0 is 4
    assert found.window_nll == pytest.approx((first, second), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp((first + second) / 2), rel=1e-6)
    assert (found.n, found.n_tokens, found.unused_tokens, found.window, found.stride) == (2, 4, 1, 3, 3)
    assert found.standard_error == pytest.approx(0, abs=1e-6)
    assert model.shapes == [(2, 3), (2, 3)]  # a look at whether it is causal, and both windows at once


def test_the_standard_error_is_that_of_a_mean_of_windows():
    found = evaluate_perplexity(sharp(), models.tiny_tokenizer(), [words(60)], window=6)
    mean = sum(found.window_nll) / found.n
    sigma = math.sqrt(sum((nll - mean) ** 2 for nll in found.window_nll) / (found.n - 1))
    assert found.n == 10
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-9)
    assert found.standard_error == pytest.approx(found.perplexity * sigma / math.sqrt(found.n), rel=1e-9)
    assert evaluate_perplexity(sharp(), models.tiny_tokenizer(), [words(60)], window=6, limit=1).standard_error is None


@given(
    n=st.integers(20, 70),
    window=st.integers(2, 20),
    stride=st.integers(1, 20),
    bos=st.booleans(),
    limit=st.none() | st.integers(1, 5),
)
@settings(max_examples=40)
def test_each_token_is_predicted_at_most_once_and_none_in_the_middle_is_left_out(n, window, stride, bos, limit):
    tokenizer = models.tiny_tokenizer()
    tokenizer.bos_token = "[CLS]"
    stride = min(stride, window - bos)
    options = {"stride": stride, "bos_in_every_window": bos, "limit": limit}
    found = evaluate_perplexity(Counting(), tokenizer, [words(n)], window=window, **options)
    tokens = n + 2 - bos
    assert found.n == min(1 + (tokens - (window - bos)) // stride, limit or tokens)
    used = (found.n - 1) * stride + window - bos
    assert found.unused_tokens == tokens - used
    first_ones = 0 if bos else (1 if stride < window else found.n)  # of windows that share nothing with the one before
    assert found.n_tokens == used - first_ones
    assert limit is not None or found.unused_tokens < stride


def test_windows_start_with_bos_where_the_tokenizer_starts_texts_with_it():
    model, tokenizer, texts = sharp(), models.tiny_tokenizer(), [words(60)]
    assert not evaluate_perplexity(model, tokenizer, texts, window=8).bos_in_every_window
    tokenizer.bos_token = "w1"  # which it knows, but does not put anywhere
    assert not evaluate_perplexity(model, tokenizer, texts, window=8).bos_in_every_window
    tokenizer.bos_token = "[CLS]"
    found = evaluate_perplexity(model, tokenizer, texts, window=8)
    assert found.bos_in_every_window
    explicit = evaluate_perplexity(model, tokenizer, texts, window=8, bos_in_every_window=True)
    assert found.window_nll == explicit.window_nll
    assert evaluate_perplexity(model, tokenizer, texts, window=8, bos_in_every_window=False).n == 62 // 8


def test_no_text_at_all_is_refused():
    class Bare:
        """A tokenizer that puts nothing around texts."""

        bos_token_id = 1

        def __call__(self, text, **options):
            return {"input_ids": []}

    with pytest.raises(DataError):
        evaluate_perplexity(sharp(), Bare(), [""], window=8, bos_in_every_window=True)


def test_batches_and_pieces_change_nothing(monkeypatch):
    model, tokenizer, texts = sharp(), models.tiny_tokenizer(), [words(100)]
    one = evaluate_perplexity(model, tokenizer, texts, window=10, stride=7)
    monkeypatch.setattr("hf_prune.evaluation.likelihood._CHUNK", 3 * VOCAB)  # three positions at a time
    other = evaluate_perplexity(model, tokenizer, texts, window=10, stride=7, batch_size=4)
    assert other.window_nll == pytest.approx(one.window_nll, rel=1e-6)
    assert (one.batch_size, other.batch_size) == (1, 4)
    assert one.data_fingerprint == other.data_fingerprint


def test_likelihoods_are_computed_in_float32_at_least():
    model, tokenizer, texts = sharp(), models.tiny_tokenizer(), [words(60)]
    half = evaluate_perplexity(model.bfloat16(), tokenizer, texts, window=20)
    with torch.no_grad():
        logits = model(torch.tensor([ids_of(texts)[:20]])).logits[0].double()
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids_of(texts)[1:20]))
    assert half.dtype == "bfloat16"
    assert half.window_nll[0] == pytest.approx(float(expected), rel=1e-6)
    double = evaluate_perplexity(sharp().double(), tokenizer, texts, window=20)
    assert double.dtype == "float64"
    expected = reference_nlls(sharp().double(), ids_of(texts), 20)
    assert double.perplexity == pytest.approx(reference_perplexity(expected), rel=1e-12)


def test_the_model_is_as_it_was_and_sees_no_cache():
    model, seen = sharp().train(), []
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = snapshot(model)
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((module.training, kwargs["use_cache"])), with_kwargs=True
    )
    evaluate_perplexity(model, models.tiny_tokenizer(), [words(60)], window=20)
    handle.remove()
    assert set(seen) == {(False, False)}
    assert [module.training for module in model.modules()] == modes
    assert_unchanged(model, before)


def test_the_default_window_is_the_context_or_2048():
    tokenizer = models.tiny_tokenizer()
    assert evaluate_perplexity(sharp(), tokenizer, [words(60)]).window == 24
    assert evaluate_perplexity(Counting(), tokenizer, [words(3000)]).window == 2048


def broken(value: float) -> torch.nn.Module:
    model = sharp()
    with torch.no_grad():
        model.lm_head.weight[5] = value
    return model


ERRORS = {
    "text": ("one text", {}, DataError, r"texts is 'one text': expected a list of texts"),
    "none": ([], {}, DataError, r"texts is \[\]: expected a list of texts, at least one"),
    "number": (["w1", 3], {}, DataError, r"text 1 is 3: expected a string"),
    "short": (["w1 w2"], {"window": 5}, DataError, r"the texts have 4 tokens, too few for one window of 5: pass more"),
    "window": ([words(9)], {"window": 1}, ConfigError, r"window is 1: expected at least 2 tokens"),
    "no window": ([words(9)], {"window": 0}, ConfigError, r"window is 0: expected an integer of at least 1"),
    "context": ([words(99)], {"window": 25}, ConfigError, r"window is 25: LlamaForCausalLM has only 24 positions"),
    "stride": ([words(9)], {"window": 4, "stride": 5}, ConfigError, r"stride is 5: expected at most the 4 tokens"),
    "no stride": ([words(9)], {"window": 4, "stride": 0}, ConfigError, r"stride is 0: expected an integer"),
    "batch": ([words(9)], {"window": 4, "batch_size": 0}, ConfigError, r"batch_size is 0: expected an integer"),
    "limit": ([words(9)], {"window": 4, "limit": 0}, ConfigError, r"limit is 0: expected an integer of at least 1"),
    "bos": (
        *([words(9)], {"window": 4, "bos_in_every_window": True}, DataError),
        r"bos_in_every_window is set, but \w+ has no BOS token: leave it out, or set tokenizer.bos_token",
    ),
}


@pytest.mark.parametrize("what", ERRORS)
def test_settings_and_texts_that_are_refused(what):
    texts, options, error, message = ERRORS[what]
    model = sharp().train()
    with pytest.raises(error, match=message):
        evaluate_perplexity(model, models.tiny_tokenizer(), texts, **options)
    assert model.training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: BertForMaskedLM(models._bert_config(initializer_range=0.5)),
            r"BertForMaskedLM sees the tokens that it has to predict: perplexity is that of a",
        ),
        (models.tiny_bert, r"BertForSequenceClassification returns logits of shape \(2, 2\) for \(2, 8\) tokens: perp"),
        (lambda: models.fill(BertForTokenClassification(models._bert_config())), r"logits of shape \(2, 8, 2\) for"),
        (lambda: LlamaModel(models.tiny_llama().config), r"LlamaModel returns no logits for \(2, 8\) tokens: perplexi"),
        (models.tiny_t5, r"T5ForConditionalGeneration has an encoder: perplexity is that of a causal language model"),
        (lambda: sharp(vocab_size=20), r"the tokenizer gives token \d+, but LlamaForCausalLM knows 20 tokens: load"),
        (lambda: broken(float("nan")), r"gives likelihoods that are not finite in 4 of 4 windows: its weights are"),
        (lambda: broken(float("inf")), r"gives likelihoods that are not finite in \d of 4 windows: its weights are"),
    ],
)
def test_models_that_are_refused(make, message):
    model = make().train()
    before = snapshot(model)
    with pytest.raises(DataError, match=message):
        evaluate_perplexity(model, models.tiny_tokenizer(), [words(60)], window=15, batch_size=2)
    assert model.training
    assert_unchanged(model, before)


def test_causal_models_in_half_precision_are_not_taken_for_others():
    for dtype in (torch.bfloat16, torch.float16):
        for make in (sharp, models.tiny_gpt2):
            assert evaluate_perplexity(make().to(dtype), models.tiny_tokenizer(), [words(60)], window=15).n == 4


# --- records and comparisons -----------------------------------------------------------------------


def test_perplexity_in_words_and_back():
    found = result([1.0, 2.0])
    assert str(found) == "perplexity 4.48 ± 0.50 (n = 2 windows of 8 tokens, texts test)"
    alone = result([1.0], standard_error=None, source="", split="")
    assert str(alone) == "perplexity 2.72 (n = 1 window of 8 tokens, data 0123456789abcdef)"
    for each in (found, alone):
        assert Perplexity.from_dict(json.loads(json.dumps(each.to_dict()))) == each
    values = found.to_dict()
    values["loss"] = values.pop("seconds")
    with pytest.raises(DataError, match=r"not a saved perplexity: missing \['seconds'\], unknown \['loss'\]: pass"):
        Perplexity.from_dict(values)


def test_comparison_by_hand():
    """Differences 0.1, 0.2, 0.3: mean 0.2, standard deviation 0.1, t with two degrees of freedom 4.3027."""
    found = compare_perplexity(result([1.0, 2.0, 3.0]), result([1.1, 2.2, 3.3]))
    error = 0.1 / math.sqrt(3)
    assert found.ratio == pytest.approx(math.exp(0.2))
    assert found.ratio == pytest.approx(found.pruned_perplexity / found.dense_perplexity)
    assert found.ratio_standard_error == pytest.approx(math.exp(0.2) * error)
    assert found.interval == pytest.approx((math.exp(0.2 - 4.302653 * error), math.exp(0.2 + 4.302653 * error)))
    assert str(found) == (
        "perplexity 7.39 -> 9.03: 1.2214 ± 0.0705 times the dense one "
        "(95 % interval 0.9527 to 1.5658, paired, n = 3 windows)"
    )
    assert json.loads(json.dumps(found.to_dict()))["interval"] == list(found.interval)


def test_windows_count_by_their_tokens():
    found = compare_perplexity(result([1.0, 2.0], [9, 3]), result([1.4, 2.0], [9, 3]))
    assert found.ratio == pytest.approx(math.exp(0.3))
    # mean 0.3; weights 3/4 and 1/4; 2 / 1 * ((0.75 * 0.1)² + (0.25 * -0.3)²)
    assert found.ratio_standard_error == pytest.approx(math.exp(0.3) * math.sqrt(2 * 2 * 0.075**2))


def test_one_window_has_no_interval():
    found = compare_perplexity(result([1.0]), result([1.5]))
    assert (found.ratio_standard_error, found.interval) == (None, None)
    assert str(found) == "perplexity 2.72 -> 4.48: 1.6487 times the dense one (one window: no interval)"


def test_a_hopeless_model_has_an_infinite_ratio():
    assert compare_perplexity(result([1.0, 1.0]), result([1.0, 1.0], window_nll=(900.0, 900.0))).ratio == math.inf


def test_the_paired_error_is_the_smaller_one():
    dense = evaluate_perplexity(sharp(), models.tiny_tokenizer(), [words(400)], window=20)
    other = sharp()
    with torch.no_grad():
        other.lm_head.weight += 0.01 * torch.randn_like(other.lm_head.weight)
    pruned = evaluate_perplexity(other, models.tiny_tokenizer(), [words(400)], window=20)
    found = compare_perplexity(dense, pruned)
    assert 0 < found.ratio_standard_error < 0.2 * pruned.standard_error / dense.perplexity
    assert found.interval[0] < found.ratio < found.interval[1]
    same = compare_perplexity(dense, dense)
    assert (same.ratio, same.interval) == (1.0, (1.0, 1.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 4}, r"the results have different windows \(window 8 and 4\): evaluate both in the same way"),
        ({"stride": 4}, r"different windows \(stride 8 and 4\)"),
        ({"bos_in_every_window": True}, r"different windows \(bos_in_every_window False and True\)"),
        ({"data_fingerprint": "x"}, r"on different tokens \(fingerprints 0123456789abcdef and x\): evaluate both"),
    ],
)
def test_results_that_cannot_be_compared(changes, message):
    with pytest.raises(DataError, match=message):
        compare_perplexity(result([1.0, 2.0]), result([1.0, 2.0], **changes))


def test_more_that_cannot_be_compared():
    with pytest.raises(DataError, match=r"different windows \(n 2 and 3\)"):
        compare_perplexity(result([1.0, 2.0]), result([1.0, 2.0, 3.0]))
    for confidence in (0, 1, 95):
        with pytest.raises(ConfigError, match=rf"confidence is {confidence}: expected a number between 0 and 1"):
            compare_perplexity(result([1.0]), result([1.0]), confidence=confidence)


@pytest.mark.parametrize(
    ("confidence", "degrees", "expected"),
    [
        *((0.95, 1, 12.706205), (0.95, 2, 4.302653), (0.95, 3, 3.182446), (0.95, 4, 2.776445), (0.99, 5, 4.032143)),
        *((0.95, 39, 2.022691), (0.9, 120, 1.657651), (0.95, 10_000, 1.959964), (0.95, 9_999, 1.960201)),
    ],
)
def test_student_t_equals_the_tables(confidence, degrees, expected):
    assert student_t(confidence, degrees) == pytest.approx(expected, abs=2e-6)


# --- token_windows ---------------------------------------------------------------------------------


def test_texts_are_joined_by_a_blank_line_and_tokenised_once():
    tokenizer, texts = models.tiny_tokenizer(), [words(30), words(20, 1)]
    assert joined_tokens(texts, tokenizer).tolist() == ids_of(texts)  # longer than model_max_length, and not cut

    class Spy:
        def __call__(self, text, **_):
            self.text = text
            return {"input_ids": [1]}

    spy = Spy()
    joined_tokens((t for t in ("a", "", "b\n")), spy)
    assert spy.text == "a\n\n\n\nb\n"


def test_windows_are_full_distinct_and_drawn_with_the_seed():
    tokenizer, texts = models.tiny_tokenizer(), [words(50), words(53, 1)]
    every = [ids_of(texts)[i : i + 10] for i in range(0, 100, 10)]
    batches = token_windows(texts, tokenizer, n=7, length=10, batch_size=3)
    assert [tuple(b["input_ids"].shape) for b in batches] == [(3, 10), (3, 10), (1, 10)]
    assert all(b.keys() == {"input_ids", "attention_mask"} and b["attention_mask"].eq(1).all() for b in batches)
    assert all(tensor.dtype == torch.int64 for b in batches for tensor in b.values())
    drawn = [row for b in batches for row in b["input_ids"].tolist()]
    assert all(row in every for row in drawn)
    assert len({tuple(row) for row in drawn}) == 7
    again = token_windows(texts, tokenizer, n=7, length=10, batch_size=7)
    assert again[0]["input_ids"].tolist() == drawn
    assert token_windows(texts, tokenizer, n=7, length=10, seed=1)[0]["input_ids"].tolist() != drawn
    (whole,) = token_windows(texts, tokenizer, n=99, length=10, batch_size=99, labels=True)
    assert sorted(whole["input_ids"].tolist()) == sorted(every)
    assert torch.equal(whole["labels"], whole["input_ids"])
    assert token_windows(texts, tokenizer)[0]["input_ids"].shape[1] == 24  # what the tokenizer allows


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ("w1", {}, DataError, r"texts is 'w1': expected a list of texts"),
        (["w1", None], {}, DataError, r"text 1 is None: expected a string"),
        (
            ["w1 w2"],
            {"length": 5},
            DataError,
            r"the texts have 4 tokens: expected at least the 5 of one window; pass m",
        ),
        (["w1"], {"n": 0}, ConfigError, r"n is 0: expected an integer of at least 1"),
        (["w1"], {"length": 0}, ConfigError, r"length is 0: expected an integer of at least 1"),
        (["w1"], {"batch_size": 1.5}, ConfigError, r"batch_size is 1.5: expected an integer of at least 1"),
    ],
)
def test_windows_that_cannot_be_cut(texts, options, error, message):
    with pytest.raises(error, match=message):
        token_windows(texts, models.tiny_tokenizer(), **options)
