"""Models of sentence-transformers: the transformers model inside is pruned, and the plain class loads the result."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import hf_prune
from hf_prune import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    DataError,
    MaskStore,
    ModelTypeError,
    PlanError,
    prunable,
    prune,
    sentence_batches,
)
from tests import models

pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules.router import Router

from tests.sentence_models import pairs, texts, tiny_cross_encoder, tiny_encoder

KINDS = ["encoder", "cross-encoder"]


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    """A model, texts that it reads, and how it answers them."""
    if request.param == "encoder":
        return tiny_encoder(tmp_path / "base"), texts(), lambda model: model.encode(texts(seed=5))
    return tiny_cross_encoder(tmp_path / "base"), pairs(), lambda model: model.predict(pairs(seed=5))


def loaded(cls, folder):
    return cls(str(folder), device="cpu", local_files_only=True)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"criterion": "wanda", "scope": "row"}, {"criterion": "sparsegpt", "granularity": "2:4"}]
)
def test_pruned_saved_and_loaded_by_the_plain_class(kind, settings, compressed, tmp_path):
    model, data, answer = kind
    dense, cls = answer(model), type(model)
    rest = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("0.")}
    assert prunable(model) is model
    model.prune(0.5, calibration=data, **settings)
    assert type(model).__name__ == cls.__name__
    assert isinstance(model, cls)
    inner = model.transformers_model
    targets = [m.weight for m in inner.modules() if isinstance(m, nn.Linear)]
    targets = [w for w in targets if w.shape[0] > 1 or "granularity" not in settings]
    assert sum(int((w == 0).sum()) for w in targets) == sum(int(0.5 * w.numel()) for w in targets)
    assert all(torch.equal(p, rest[n]) for n, p in model.named_parameters() if n in rest)
    now = answer(model)
    assert not np.array_equal(now, dense)
    model.save_pretrained(tmp_path / "out", compressed=compressed)
    assert np.array_equal(answer(loaded(cls, tmp_path / "out")), now)
    again = loaded(prunable(cls), tmp_path / "out")
    assert np.array_equal(answer(again), now)
    assert again.masks.keys() == model.masks.keys()
    assert all(torch.equal(again.masks[name], mask) for name, mask in model.masks.items())
    assert again.pruning_config == model.pruning_config


def test_removed_heads_neurons_and_layers_are_loaded_by_the_plain_class(kind, tmp_path):
    model, data, answer = kind
    prunable(model).prune(0.5, granularity=("head", "neuron"), calibration=data)
    masked, before = answer(model), model.transformers_model.num_parameters()
    assert model.shrink() is model
    assert model.transformers_model.num_parameters() < before
    assert np.abs(answer(model) - masked).max() < 1e-6
    shrunk = answer(model)
    for compressed in (False, True):
        model.save(tmp_path / f"{compressed}", compressed=compressed)
        assert np.array_equal(answer(loaded(type(model), tmp_path / f"{compressed}")), shrunk)


@pytest.mark.parametrize("settings", [{"criterion": "wanda", "polish": "distill"}, {"criterion": "fisher_diagonal"}])
def test_what_learns_from_outputs_takes_those_of_the_transformers_model(kind, settings):
    model, data, _ = kind
    plain = copy.deepcopy(model.transformers_model)
    batches = sentence_batches(data, model, batch_size=4)
    prune(model, 0.5, calibration=batches, **settings)
    prune(plain, 0.5, calibration=batches, **settings)
    assert {n: int((p == 0).sum()) for n, p in plain.named_parameters()} == {
        n: int((p == 0).sum()) for n, p in model.transformers_model.named_parameters()
    }
    models.assert_unchanged(model.transformers_model, models.snapshot(plain))


def test_the_function_prunes_as_the_method_does(kind):
    model, data, _ = kind
    other = copy.deepcopy(model)
    prune(model, 0.5, criterion="wanda", calibration=data)
    prunable(other).prune(0.5, criterion="wanda", calibration=data)
    models.assert_unchanged(model, models.snapshot(other))
    assert MaskStore.of(model).masks.keys() == other.masks.keys()


def test_features_are_calibration_data_too(tmp_path):
    model, other = tiny_encoder(tmp_path / "a"), tiny_encoder(tmp_path / "b")
    features = model.preprocess(texts(6), prompt="w1 ")
    assert features["modality"] == "text"
    prune(model, 0.5, criterion="wanda", calibration=[features])
    prune(other, 0.5, criterion="wanda", calibration=[{k: features[k] for k in ("input_ids", "attention_mask")}])
    models.assert_unchanged(model, models.snapshot(other))


def test_copies_and_pickles_keep_class_and_masks(kind):
    model, _, answer = kind
    prunable(model).prune(0.5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert twin.masks.keys() == model.masks.keys()
        assert np.array_equal(answer(twin), answer(model))


def test_dense_weights_come_back(kind):
    model, _, answer = kind
    dense, before = answer(model), models.snapshot(model)
    prunable(model).prune(0.5, keep_dense=True)
    assert not np.array_equal(answer(model), dense)
    model.discard_masks()
    models.assert_unchanged(model, before)
    assert not model.masks


# --- texts as batches ------------------------------------------------------------------------------------


def test_batches_are_what_the_model_itself_reads_prompts_included(tmp_path):
    model = tiny_encoder(tmp_path, prompts={"query": "w1 w2 ", "document": "w3 "}, default_prompt_name="query")
    [batch] = sentence_batches(["w7"], model)
    words = model.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert words == ["[CLS]", "w1", "w2", "w7", "[SEP]"]
    [batch] = sentence_batches(["w7"], model, prompt_name="document")
    assert model.tokenizer.convert_ids_to_tokens(batch["input_ids"][0]) == ["[CLS]", "w3", "w7", "[SEP]"]
    with pytest.raises(ConfigError, match=r"prompt_name is 'passage': SentenceTransformer has the prompts 'query', "):
        sentence_batches(["w7"], model, prompt_name="passage")


def test_batches_are_sorted_and_cut(tmp_path):
    model = tiny_encoder(tmp_path)
    batches = sentence_batches(["w1 " * 9, "w2", "w3 w4"], model, batch_size=2, max_length=6)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 4), (1, 6)]
    assert all(batch.keys() == {"input_ids", "attention_mask"} for batch in batches)
    model.max_seq_length = 5
    assert sentence_batches(["w1 " * 9], model)[0]["input_ids"].shape == (1, 5)


def test_pairs_are_read_together(tmp_path):
    model = tiny_cross_encoder(tmp_path)
    [batch] = sentence_batches([("w1", "w2 w3")], model)
    expected = model.preprocess([("w1", "w2 w3")])
    assert torch.equal(batch["input_ids"], expected["input_ids"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"texts is \[\]: expected a list of texts"),
        ("one text", r"texts is 'one text': expected a list"),
        (["a", ("a", "b")], "found texts and pairs of texts: expected only texts"),
        (["a", 3], r"text 1 is 3: expected a text, or two for a pair"),
        ([("a", "b", "c")], r"text 0 is \('a', 'b', 'c'\): expected a text, or two for a pair"),
    ],
)
def test_what_is_no_text_is_refused(data, message, tmp_path):
    with pytest.raises(DataError, match=message):
        sentence_batches(data, tiny_encoder(tmp_path))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("one text", DataError, "calibration data is the text 'one text': expected a list of texts"),
        (["w1", 3], DataError, "text 1 is 3"),
        (None, CalibrationError, "criterion 'wanda' needs calibration data, and got none"),
        ([], CalibrationError, "calibration has no batches"),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(data, error, message, kind):
    model, _, _ = kind
    before = models.snapshot(model)
    with pytest.raises(error, match=message):
        prunable(model).prune(0.5, criterion="wanda", calibration=data)
    models.assert_unchanged(model, before)
    assert not model.masks


# --- what is no such model, and folders in the way ------------------------------------------------------------------


def test_a_model_without_transformers_is_refused():
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    static = SentenceTransformer(modules=[StaticEmbedding(models.tiny_tokenizer()._tokenizer, embedding_dim=8)])
    with pytest.raises(ModelTypeError, match="found a SentenceTransformer without a transformers model: expected"):
        prunable(static)
    with pytest.raises(PlanError, match="no target matched"):
        prune(static, 0.5)


def test_a_class_gives_its_class_with_pruning(tmp_path):
    assert prunable(SentenceTransformer) is prunable(prunable(SentenceTransformer))
    assert prunable(CrossEncoder).__name__ == "CrossEncoder"
    assert issubclass(prunable(type(models.tiny_bert())), hf_prune.PrunedModelMixin)
    with pytest.raises(ModelTypeError, match="found the class Linear: expected a transformers PreTrainedModel, or its"):
        prunable(nn.Linear)


def test_foreign_weights_in_the_way_are_not_deleted(tmp_path):
    model = prunable(tiny_encoder(tmp_path / "base")).prune(0.5)
    model.save(tmp_path / "out")
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_bytes(b"mine")
    before = sorted(p.name for p in (tmp_path / "out").rglob("*"))
    with pytest.raises(CheckpointError, match=r"holds model-00001-of-00002\.safetensors, which this save would delete"):
        model.save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == before
    model.save(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "model-00001-of-00002.safetensors").exists()


def test_a_save_that_fails_leaves_no_half_of_a_folder(tmp_path, monkeypatch):
    model = prunable(tiny_encoder(tmp_path / "base")).prune(0.5)
    model.save(tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    model.prune(0.7)
    monkeypatch.setattr(type(model[1]), "save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save(tmp_path / "out")
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out"}


def test_masks_that_do_not_fit_are_refused_on_loading(tmp_path):
    model = prunable(tiny_encoder(tmp_path / "base")).prune(0.5)
    model.save(tmp_path / "out")
    prunable(tiny_encoder(tmp_path / "other")).prune(0.5, criterion="random").save(tmp_path / "wrong")
    masks = tmp_path / "out" / "pruning_masks.safetensors"
    masks.write_bytes((tmp_path / "wrong" / masks.name).read_bytes())
    with pytest.raises(CheckpointError, match="are not those of its weights"):
        loaded(prunable(SentenceTransformer), tmp_path / "out")


def test_a_router_of_several_models_is_pruned_as_a_whole(tmp_path):
    """All models inside and the projections of each route, by the names that they have in the whole."""
    routes = {name: list(tiny_encoder(tmp_path / name)) for name in ("query", "document")}
    model = SentenceTransformer(modules=[Router(routes, default_route="document")], device="cpu")
    plan = prune(model, 0.5, dry_run=True)
    names = {tensor.target.name for tensor in plan.tensors}
    for route in routes:
        assert f"0.sub_modules.{route}.2.linear.weight" in names
        assert any(name.startswith(f"0.sub_modules.{route}.0.") for name in names)
    assert not [name for name in plan.left_dense if "linear" in name or "dense" in name]


def test_blank_texts_are_left_out_of_batches(tmp_path):
    model, pair_model = tiny_encoder(tmp_path / "a"), tiny_cross_encoder(tmp_path / "b")
    [with_blanks] = sentence_batches(["", "w7 w8", " \n"], model)
    [without] = sentence_batches(["w7 w8"], model)
    assert torch.equal(with_blanks["input_ids"], without["input_ids"])
    [batch] = sentence_batches([("", " "), ("w1", ""), ("w1", "w2")], pair_model)
    assert len(batch["input_ids"]) == 2
    with pytest.raises(DataError, match="all 2 texts are blank: expected at least one with words"):
        sentence_batches(["", " "], model)
