"""Weights that accelerate has offloaded: read, pruned and saved where they are; gradients are refused."""

import copy
import gc
import os
import subprocess
import sys
import tempfile
import weakref

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.utils import OffloadedWeightsLoader
from safetensors.torch import save_file

from hf_prune import (
    AutoPrunedModelForCausalLM,
    MaskStore,
    PlanError,
    evaluate_perplexity,
    export_model,
    measure_latency,
    prunable,
    prune,
    sparsity_report,
    trim_hidden,
    trim_vocabulary,
    weight_histogram,
)
from hf_prune.auto import load_native
from hf_prune.utils import offloaded_weights
from hf_prune.utils.offloaded_weights import values_of
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
    assert_masks(model, whole)
    model.discard_masks()
    whole.discard_masks()
    model.save_pretrained(tmp_path / "dense")
    assert_unchanged(load_native(str(tmp_path / "dense")), snapshot(whole))


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
        (lambda m: m.prune(0.6, granularity=("head", "neuron")), "where pruning heads, neurons and layers does not"),
        (
            lambda m: m.prune(0.6, granularity="layer", scope="global"),
            "where pruning heads, neurons and layers does not reach it",
        ),
        (lambda m: m.shrink(), r"where shrink\(\) does not reach it: load the model without offloading"),
        (lambda m: trim_vocabulary(m, models.tiny_tokenizer(), ["w1"]), r"where trim_vocabulary\(\) does not reach it"),
        (lambda m: trim_hidden(m, 8, calibration=[]), r"where trim_hidden\(\) does not reach it"),
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


def test_masks_are_applied_where_the_weights_are(offloaded):
    name = "model.layers.1.mlp.up_proj.weight"
    store = MaskStore.of(offloaded)
    store.masks[name] = torch.zeros_like(store.masks[name])
    store.attach(offloaded)
    offloaded.apply_masks()
    assert offloaded.get_parameter(name).is_meta
    assert not values_of(offloaded, name, offloaded.get_parameter(name)).any()


SETTINGS = [
    {"criterion": "magnitude", "scope": "global"},
    {"criterion": "magnitude", "granularity": "2:4"},
    {"criterion": "sparsegpt"},
    {"criterion": "magnitude", "repair": "least_squares"},
    {"criterion": "wanda", "scope": "row", "allocation": "owl", "calibration_order": "one_pass"},
]


def dense_llama(tmp_path):
    folder = tmp_path / "dense"
    models.tiny_llama().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_offloaded_weights_are_pruned_as_others_and_stay_on_the_disk(settings, tmp_path):
    folder = dense_llama(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    whole = AutoPrunedModelForCausalLM.from_pretrained(folder)
    model = AutoPrunedModelForCausalLM.from_pretrained(folder, device_map=PLACES, offload_folder=tmp_path / "off")
    places = {name: p.device for name, p in model.named_parameters()}
    batches = models.tiny_batches(whole)
    for one in (whole, model):
        one.prune(0.3, **settings, calibration=batches) if settings.get("granularity") != "2:4" else None
        one.prune(0.5, **settings, calibration=batches)
    assert {name: p.device for name, p in model.named_parameters()} == places
    assert_masks(model, whole)
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, whole(**batches[0]).logits)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    model.save_pretrained(tmp_path / "out")
    assert_unchanged(load_native(str(tmp_path / "out")), snapshot(whole))
    twin = copy.deepcopy(model)
    del model, one
    gc.collect()
    assert_values(twin, whole)
    del twin
    gc.collect()
    assert not list((tmp_path / "off").glob("pruned-*"))


def assert_values(model, expected):
    for name, parameter in model.named_parameters():
        assert same_bits(values_of(model, name, parameter), expected.get_parameter(name).detach())


@pytest.mark.parametrize("make", [models.tiny_gpt2, models.tiny_albert])
@pytest.mark.parametrize("how", [cpu_offload, disk_offload])
def test_offloaded_by_somebody_and_then_pruned(how, make, tmp_path):
    model, whole = prunable(make()), prunable(make())
    batches = models.tiny_batches(whole)
    options = {"offload_dir": tmp_path / "off"} if how is disk_offload else {}
    how(model, execution_device=torch.device("cpu"), **options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "off").glob("*.dat")}
    for one in (model, whole):
        one.prune(0.5, criterion="sparsegpt", calibration=batches, keep_dense=True)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_values(model, whole)
    assert {path.name: path.read_bytes() for path in (tmp_path / "off").glob("*.dat")} == before
    model.discard_masks()
    assert_values(model, make())


def test_zeros_of_offloaded_weights_are_adopted(saved, offloaded):
    offloaded.make_permanent()
    assert offloaded.adopt_zeros().weights == sum(mask.numel() for mask in saved[0].masks.values())
    assert_masks(offloaded, saved[0])


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"criterion": "taylor"}, "criterion 'taylor'"),
        ({"criterion": "fisher"}, "criterion 'fisher'"),
        ({"criterion": "sparsegpt", "objective": "loss"}, "objective 'loss'"),
        ({"polish": "distill"}, "a polish"),
    ],
    ids=str,
)
def test_gradients_of_offloaded_weights_are_refused(settings, what, saved, offloaded):
    batches = models.tiny_batches(saved[0])
    with pytest.raises(PlanError, match=f"is offloaded, and {what} takes gradients.*choose criterion 'magnitude'"):
        offloaded.prune(0.6, calibration=batches, **settings)
    assert_masks(offloaded, saved[0])
    assert_values(offloaded, saved[0])


def test_a_full_disk_leaves_everything_as_it_was(saved, offloaded, monkeypatch):
    written = []

    def fill_up(tensors, path):
        if len(written) == 3:
            raise OSError("No space left on device")
        written.append(path)
        save_file(tensors, path)

    monkeypatch.setattr(offloaded_weights, "save_file", fill_up)
    with pytest.raises(OSError, match="No space left"):
        offloaded.prune(0.8)
    assert len(written) == 3
    monkeypatch.undo()
    assert_masks(offloaded, saved[0])
    assert_values(offloaded, saved[0])


def test_one_weight_at_a_time_is_in_memory(tmp_path, monkeypatch):
    folder = dense_llama(tmp_path)
    places = {"model.embed_tokens": "disk", "model.layers": "disk", "model.norm": "cpu", "lm_head": "disk"}
    places["model.rotary_emb"] = "cpu"
    model = AutoPrunedModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "off")
    alive, most = weakref.WeakValueDictionary(), [0]
    read = OffloadedWeightsLoader.__getitem__

    def watched(loader, key):
        tensor = read(loader, key)
        alive[id(tensor)] = tensor
        most[0] = max(most[0], sum(t.nbytes for t in list(alive.values())))
        return tensor

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", watched)
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    for scope in ("layer", "global"):
        model.prune(0.5, scope=scope)
    assert 0 < most[0] <= 3 * largest


def test_weights_that_were_never_loaded(tmp_path):
    model = prunable(prune(models.tiny_bert(), 0.5))
    model.bert.pooler.to("meta")
    for action in (lambda: sparsity_report(model), lambda: model.save_pretrained(tmp_path / "new")):
        with pytest.raises(PlanError, match=r"bert\.pooler\..* is on the meta device, and no hook of accelerate holds"):
            action()
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() here")
def test_the_end_of_a_forked_process_leaves_the_files(tmp_path):
    script = (
        "import os, sys\n"
        "from hf_prune.utils.offloaded_weights import _File\n"
        f"file = _File({str(tmp_path)!r})\n"
        "if (child := os.fork()) == 0:\n"
        "    sys.exit(0)\n"
        "os.waitpid(child, 0)\n"
        "print(os.path.exists(file.path))\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "True"
    assert list(tmp_path.iterdir()) == []  # the process that wrote it deletes it
