"""Weights that accelerate has offloaded: their masks stay whole; they are read where that is enough, else refused."""

import copy
import tempfile

import pytest
import torch
from accelerate import cpu_offload, disk_offload

from hf_prune import (
    AutoPrunedModelForCausalLM,
    MaskError,
    PlanError,
    evaluate_perplexity,
    export_model,
    measure_latency,
    prunable,
    prune,
    sparsity_report,
    trim_vocabulary,
    weight_histogram,
)
from hf_prune.auto import load_native
from tests import models
from tests.models import assert_unchanged, same_bits, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")

ON_DISK = ("model.layers.1", "model.embed_tokens", "lm_head")  # with the first and the last parameter of the model
PLACES = {"model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", **dict.fromkeys(ON_DISK, "disk")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A sparse Llama and the folder that it lies in."""
    folder = tmp_path_factory.mktemp("sparse")
    model = prunable(models.tiny_llama()).prune(0.5)
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def offloaded(saved, tmp_path):
    model = AutoPrunedModelForCausalLM.from_pretrained(saved[1], device_map=PLACES, offload_folder=tmp_path / "off")
    assert sum(p.is_meta for p in model.parameters()) > 7
    return model


def assert_masks(model, expected):
    assert model.masks.keys() == expected.masks.keys()
    for name, mask in model.masks.items():
        assert not mask.is_meta
        assert torch.equal(mask, expected.masks[name])


@pytest.mark.parametrize("how", ["dense", "compressed", "onto itself"])
def test_what_is_saved_is_whole(how, saved, offloaded, tmp_path):
    folder = tmp_path / "again"
    if how == "onto itself":
        saved[0].save_pretrained(folder)
        offloaded = AutoPrunedModelForCausalLM.from_pretrained(folder, device_map=PLACES, offload_folder=tmp_path / "o")
    offloaded.save_pretrained(folder, compressed=how == "compressed")
    loaded = load_native(str(folder))
    assert_unchanged(loaded, snapshot(saved[0]))
    assert_masks(loaded, saved[0])
    assert_masks(offloaded, saved[0])


@pytest.mark.parametrize("make", [models.tiny_gpt2, models.tiny_albert])
@pytest.mark.parametrize("how", [cpu_offload, disk_offload])
def test_models_that_somebody_offloaded_after_loading(how, make, tmp_path):
    model = prunable(make()).prune(0.5, keep_dense=True)
    whole = copy.deepcopy(model)
    options = {"offload_dir": tmp_path / "off"} if how is disk_offload else {}
    how(model, execution_device=torch.device("cpu"), **options)
    model.save_pretrained(tmp_path / "again")
    assert_unchanged(load_native(str(tmp_path / "again")), snapshot(whole))
    with pytest.raises(PlanError, match="where giving dense weights back does not reach it: load the model without"):
        model.discard_masks()
    assert_masks(model, whole)


def test_everything_that_only_looks_works(saved, offloaded, tmp_path):
    whole = saved[0]
    assert sparsity_report(offloaded).to_dict() == sparsity_report(whole).to_dict()
    names = list(whole.masks)
    found, expected = weight_histogram(offloaded, names), weight_histogram(whole, names)
    assert (found.counts == expected.counts).all()
    assert found.zeros == expected.zeros
    texts = (models.tiny_tokenizer(), ["w1 w2 w3 " * 20])
    score, right = (evaluate_perplexity(model, *texts, window=8).perplexity for model in (offloaded, whole))
    assert score == pytest.approx(right)
    measure_latency({"offloaded": offloaded}, lengths=[4], rounds=2, warmup=0)
    assert_masks(copy.deepcopy(offloaded), whole)
    assert offloaded.apply_masks() is offloaded
    assert_masks(offloaded, whole)
    offloaded.make_permanent()
    assert dict(offloaded.masks) == {}


@pytest.mark.parametrize(
    ("action", "match"),
    [
        (lambda m: m.prune(0.6), "load the model without offloading before pruning it"),
        (lambda m: m.prune(0.6, granularity=("head", "neuron")), "where pruning heads, neurons and layers does not"),
        (
            lambda m: m.prune(0.6, granularity="layer", scope="global"),
            "where pruning heads, neurons and layers does not reach it",
        ),
        (lambda m: m.adopt_zeros(), "load the model without offloading"),
        (lambda m: m.shrink(), r"where shrink\(\) does not reach it: load the model without offloading"),
        (lambda m: trim_vocabulary(m, models.tiny_tokenizer(), ["w1"]), r"where trim_vocabulary\(\) does not reach it"),
        (lambda m: export_model(m, tempfile.gettempdir() + "/m.onnx"), r"where export_model\(\) does not reach it"),
        (lambda m: step(m), "where a training does not reach it"),
    ],
)
def test_what_changes_weights_is_refused_and_the_masks_stay(action, match, saved, offloaded):
    with pytest.raises(PlanError, match=f"is on the meta device .*{match}"):
        action(offloaded)
    assert_masks(offloaded, saved[0])
    held = {name: p.detach() for name, p in offloaded.named_parameters() if not p.is_meta}
    assert all(same_bits(value, saved[0].get_parameter(name).detach()) for name, value in held.items())


def step(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.keep_sparse(optimizer)
    optimizer.step()


def test_what_is_on_a_device_can_be_pruned(saved, offloaded):
    offloaded.prune(0.8, target_modules=r"model\.layers\.0\..*")
    for name, mask in offloaded.masks.items():
        assert not mask.is_meta
        assert torch.equal(mask, saved[0].masks[name]) == ("layers.1" in name)


def test_offloaded_weights_that_are_not_those_of_their_mask_are_refused(offloaded):
    name = "model.layers.1.mlp.up_proj.weight"
    offloaded.masks[name].zero_()
    before = snapshot(offloaded)["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(MaskError, match=rf"{name} is offloaded, and has non-zero weights that its mask removes"):
        offloaded.apply_masks()
    assert same_bits(offloaded.get_parameter("model.layers.0.mlp.up_proj.weight").detach(), before)


def test_weights_that_were_never_loaded(tmp_path):
    model = prunable(prune(models.tiny_bert(), 0.5))
    model.bert.pooler.to("meta")
    for action in (lambda: sparsity_report(model), lambda: model.save_pretrained(tmp_path / "new")):
        with pytest.raises(PlanError, match=r"bert\.pooler\..* is on the meta device, and no hook of accelerate holds"):
            action()
    assert not (tmp_path / "new").exists()
