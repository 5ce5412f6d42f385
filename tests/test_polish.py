"""Polish: closer to the dense model, masks exact, everything else as it was, and said in the report."""

import copy
import json

import pytest
import torch

from hf_prune import polish as polish_module
from hf_prune.config import POLISH_DEFAULTS, PruningConfig
from hf_prune.errors import CalibrationError, ConfigError
from hf_prune.masking import MaskStore
from hf_prune.pipeline import prune
from hf_prune.plan import make_plan
from hf_prune.polish import DenseOutputs
from hf_prune.report import sparsity_report
from tests import models
from tests.models import assert_unchanged, same_bits, snapshot, tiny_batches
from tests.test_calibration import Interrupted, state, unusual

QUICK = {"epochs": 4, "learning_rate": 1e-3}
BUILD = {**models.TRANSFORMERS, "vit": models.tiny_vit, "mlp": models.mlp}


def large(kind, seed=0):
    """A model whose layers matter."""
    model = BUILD[kind](seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "shared" not in name:
                parameter.mul_(6)
    return model


@pytest.mark.parametrize("kind", sorted(BUILD))
def test_it_comes_closer_and_keeps_the_masks(kind):
    dense = large(kind)
    batches = tiny_batches(dense, sizes=(4,) * 20)
    model = copy.deepcopy(dense)
    modules = ".*convolution" if kind == "resnet" else "all-linear"
    plain = prune(copy.deepcopy(dense), 0.6, target_modules=modules)
    prune(model, 0.6, calibration=batches, polish=QUICK, target_modules=modules)
    store = MaskStore.of(model)
    assert store.masks.keys() == MaskStore.of(plain).masks.keys()
    for name, mask in MaskStore.of(plain).masks.items():
        assert torch.equal(mask, store.masks[name])
        assert not model.get_parameter(name)[~mask].any()
    record = store.polished
    assert record.kept
    assert record.after < record.before
    assert (record.steps, record.epochs, record.examples) == (4 * 18, 4, 4 * 18)
    assert not all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_embeddings_stay(kind):
    model = large(kind)
    before = snapshot(model)
    prune(model, 0.6, calibration=tiny_batches(model, sizes=(4,) * 4), polish=QUICK)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for name, parameter in model.named_parameters():
        if id(parameter) in embeddings:
            assert same_bits(parameter, before[name])


def test_nothing_removed_is_nothing_to_do():
    """The distance to itself is next to nothing and cannot fall: the weights stay, and the report says so."""
    model = models.tiny_bert()
    before = snapshot(model)
    prune(model, 0.0, calibration=tiny_batches(model, sizes=(4,) * 4), polish=QUICK)
    record = MaskStore.of(model).polished
    assert record.before < 1e-3
    if not record.kept:
        assert_unchanged(model, before)
        assert "Polish given up" in sparsity_report(model).summary()


def test_a_polish_that_makes_it_worse_is_given_up():
    model = large("bert")
    batches = tiny_batches(model, sizes=(4,) * 20)
    plain = prune(copy.deepcopy(model), 0.5)
    prune(model, 0.5, calibration=batches, polish={"epochs": 1, "learning_rate": 0.9})
    record = MaskStore.of(model).polished
    assert not record.kept
    assert record.after >= record.before
    assert_unchanged(model, snapshot(plain))
    assert "the distance on held-out batches did not fall; nothing was kept" in str(sparsity_report(model))


@pytest.mark.parametrize("settings", [{"criterion": "alps", "objective": "loss"}, {"criterion": "taylor"}, {}])
def test_dense_weights_come_back(settings):
    model = large("bert")
    before = snapshot(model)
    prune(model, 0.5, calibration=tiny_batches(model), polish=QUICK, keep_dense=True, **settings)
    assert any(not same_bits(p, before[n]) for n, p in model.named_parameters() if "LayerNorm" in n)
    MaskStore.of(model).discard(model)
    assert_unchanged(model, before)


def test_other_data_than_for_the_statistics():
    model = large("bert")
    batches, more = tiny_batches(model), tiny_batches(model, sizes=(4,) * 20, seed=1)
    found = prune(model, 0.5, criterion="wanda", calibration=batches, polish_data=more, polish=QUICK)
    assert MaskStore.of(found).polished.examples == 4 * 18
    expected = prune(large("bert"), 0.5, criterion="wanda", calibration=batches)
    assert all(torch.equal(MaskStore.of(found).masks[n], m) for n, m in MaskStore.of(expected).masks.items())


def test_the_same_call_gives_the_same_weights():
    found = [
        prune(large("bert"), 0.5, calibration=tiny_batches(large("bert"), sizes=(4,) * 6), polish=QUICK)
        for _ in range(2)
    ]
    assert_unchanged(found[0], snapshot(found[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_stay(dtype):
    model = large("bert").to(dtype)
    prune(model, 0.5, calibration=tiny_batches(model, sizes=(4,) * 6), polish=QUICK)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert MaskStore.of(model).polished.after < MaskStore.of(model).polished.before


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
@pytest.mark.parametrize("settings", [{}, {"criterion": "sparsegpt", "repair": "least_squares"}])
def test_an_exception_midway_leaves_the_model_bit_for_bit(error, settings, monkeypatch):
    model = prune(unusual(large("bert")), 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, was, store = snapshot(model), state(model), MaskStore.of(model)
    distance, calls = DenseOutputs.distance, [0]

    def stop(*args):
        calls[0] += 1
        if calls[0] == 6:
            raise error
        return distance(*args)

    monkeypatch.setattr(DenseOutputs, "distance", stop)
    with pytest.raises(error):
        prune(model, 0.5, calibration=tiny_batches(model, sizes=(4,) * 4), polish=QUICK, **settings)
    assert_unchanged(model, before)
    assert state(model) == was
    assert MaskStore.of(model) is store
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_distance_that_is_not_finite_is_refused(monkeypatch):
    model = large("bert")
    before = snapshot(model)
    distance = DenseOutputs.distance
    monkeypatch.setattr(DenseOutputs, "distance", lambda *a: distance(*a) * float("nan"))
    with pytest.raises(
        CalibrationError, match=r"the polish diverged at step 1 of 8: lower its learning rate, now 0\.001"
    ):
        prune(model, 0.5, calibration=tiny_batches(model), polish=QUICK)
    assert_unchanged(model, before)


def test_dense_outputs_that_are_not_finite_are_refused():
    model = large("mlp")
    batches = tiny_batches(model)
    batches[1]["x"][0, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(
        CalibrationError, match="what the dense model puts out for the batches of the polish is not finite"
    ):
        prune(model, 0.5, calibration=batches, polish=QUICK)
    assert_unchanged(model, before)


def test_it_needs_batches():
    with pytest.raises(CalibrationError, match="polish needs calibration data, and got none"):
        prune(models.tiny_bert(), 0.5, polish="distill")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("distil", r"unknown polish 'distil': expected one of distill. Did you mean 'distill'"),
        (3, r"polish is 3: expected None, 'distill', or settings such as"),
        ({"epoch": 3}, r"unknown setting of polish 'epoch': expected one of epochs, learning_rate. Did you mean"),
        ({"epochs": 0}, r"polish\['epochs'\] is 0: expected an integer of at least 1"),
        ({"learning_rate": 0}, r"polish\['learning_rate'\] is 0: expected a number between 0 and 1"),
        ({"learning_rate": "fast"}, r"polish\['learning_rate'\] is 'fast': expected a number"),
    ],
)
def test_settings_that_make_no_sense(value, message):
    with pytest.raises(ConfigError, match=message):
        PruningConfig(polish=value)


def test_settings_round_trip():
    config = PruningConfig(polish="distill")
    assert config.polish == dict(POLISH_DEFAULTS)
    assert PruningConfig.from_json(config.to_json()) == config
    assert PruningConfig(polish={"epochs": 1}).polish == {**POLISH_DEFAULTS, "epochs": 1}
    assert hash(config) == hash(PruningConfig(polish={}))
    assert "then trained (polish" in str(make_plan(models.tiny_bert(), config))


def test_the_report_says_what_was_done(tmp_path):
    from hf_prune import AutoPrunedModelForSequenceClassification, prunable

    model = prunable(large("bert"))
    model.prune(0.5, calibration=tiny_batches(model, sizes=(4,) * 4), polish=QUICK)
    text = model.sparsity_report().polish
    assert text.startswith("Polished: ")
    assert "parameters were trained for 16 steps" in text
    assert "on 16 unlabelled examples, 4 times; on held-out batches the distance fell from" in text
    assert json.loads(model.sparsity_report().to_json())["polish"] == text
    model.save_pretrained(tmp_path)
    again = AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path)
    assert "The weights were trained after pruning: polish {'epochs': 4" in again.sparsity_report().summary()
    assert prune(models.tiny_bert(), 0.5) is not None
    model.prune(0.6)
    assert model.sparsity_report().polish == ""


def test_bfloat16_is_only_asked_of_processors_that_have_it(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not polish_module.has_bf16(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert polish_module.has_bf16(torch.device("cpu"))
