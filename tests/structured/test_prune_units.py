"""Pruning whole heads, neurons and layers: what goes, how much of it, and that it can be taken out."""

import contextlib
import copy
import pickle
import sys
import zlib

import pytest
import torch
from transformers import (
    BitConfig,
    BitModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import hf_prune
from hf_prune import (
    ArchitectureError,
    CalibrationError,
    CheckpointError,
    ConfigError,
    PlanError,
    PruningConfig,
    prunable,
    prune,
    shrink,
)
from hf_prune.architectures.bypass import bypass, bypassed_layers
from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.calibration.predictions import sampled_prediction
from hf_prune.inference.speedup import workload_inputs
from hf_prune.inference.timing import Timings
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.pruning.records import SpeedRecord
from hf_prune.pruning.transaction import WeightBackup
from hf_prune.structured.choose_units import choose_units
from hf_prune.structured.costs import flops
from hf_prune.structured.gate_statistics import gate_statistics, layer_losses
from hf_prune.structured.prune_units import unit_masks
from hf_prune.structured.reconstruction import Reading, inner_plan, redundancy_curves
from tests import models
from tests.architecture_models import MODELS, tiny
from tests.architectures.custom_mixtures import mixture
from tests.architectures.custom_models import OwnConfig, OwnModel
from tests.models import assert_unchanged, snapshot, tiny_resnet
from tests.moe_families import tiny_moe

CRITERIA = ("fisher", "magnitude", "random", "reconstruction", "taylor")
KINDS = (("head",), ("neuron",), ("layer",), ("head", "neuron"), ("head", "neuron", "layer"))


def batches_for(inputs, n=3):
    """A few batches of different tokens."""
    given = inputs()
    return [{k: v.roll(i, -1) if k == "input_ids" else v for k, v in given.items()} for i in range(n)]


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs()).logits


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


# --- every criterion, every kind ---------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("kinds", KINDS, ids="+".join)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_is_asked_for_goes_and_can_be_taken_out(criterion, kinds):
    model, inputs = tiny("bert")
    before = model.num_parameters()
    config = PruningConfig(0.4, criterion=criterion, granularity=kinds, scope="global")
    calibration = batches_for(inputs) if config.needs_data else None
    plan = prune(model, config, calibration=calibration, dry_run=True)
    assert shapes(model) == shapes(tiny("bert")[0])
    assert not model.__dict__.get("_hf_prune_masks")
    prune(model, config, calibration=calibration)
    masked = logits(model, inputs)
    shrink(model)
    assert (logits(model, inputs) - masked).abs().max() <= 1e-5
    assert model.num_parameters() == plan.parameters_after
    gone, prunable_parameters = before - model.num_parameters(), plan.parameters.total({}) - plan.parameters.base
    largest = max(c[-1] - c[-2] for c in plan.parameters.groups.values()) if plan.parameters.groups else 0
    if "layer" in kinds:
        largest = max(largest, prunable_parameters / 2)
    assert 0.4 * prunable_parameters <= gone <= 0.4 * prunable_parameters + largest


@pytest.mark.parametrize("model_type", [name for name in MODELS if name not in ("camembert", "xlm-roberta", "ernie")])
def test_every_architecture_can_be_pruned_by_its_predictions(model_type):
    model, inputs = tiny(model_type)
    before = model.num_parameters()
    config = PruningConfig(
        0.4, criterion="fisher", granularity=("head", "neuron"), scope="global", repair="least_squares"
    )
    prune(model, config, calibration=batches_for(inputs))
    gone = MaskStore.of(model).masks.values()
    masked = logits(model, inputs)
    removed = sum(int((~mask).sum()) for mask in gone)
    shrink(model)
    assert (logits(model, inputs) - masked).abs().max() <= 1e-5
    assert model.num_parameters() == before - removed < before


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_same_call_gives_the_same_masks(criterion):
    found = []
    for _ in range(2):
        model, inputs = tiny("bert")
        prune(
            model,
            0.5,
            criterion=criterion,
            granularity=("head", "neuron"),
            scope="global",
            calibration=batches_for(inputs),
        )
        found.append(MaskStore.of(model).masks)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(mask, found[1][name]) for name, mask in found[0].items())


def test_seeds_draw_other_units():
    drawn = set()
    for seed in range(4):
        model, _ = tiny("bert")
        prune(model, 0.5, criterion="random", granularity="neuron", seed=seed)
        drawn.add(tuple(MaskStore.of(model).masks["bert.encoder.layer.0.output.dense.weight"][0].tolist()))
    assert len(drawn) > 1


def test_scope_layer_takes_the_same_share_everywhere():
    model, _ = tiny("bert")
    shrink(prune(model, 0.5, granularity=("head", "neuron")))
    assert {(site.kind, site.units) for site in find_unit_groups(model)} == {("head", 2), ("neuron", 12)}


def test_magnitude_takes_the_smallest_groups():
    model, _ = tiny("bert")
    layer = model.bert.encoder.layer[1]
    with torch.no_grad():
        layer.intermediate.dense.weight[5] *= 0.1
        layer.intermediate.dense.bias[5] *= 0.1
        layer.output.dense.weight[:, 5] *= 0.1
    prune(model, 1 / 24, granularity="neuron")
    mask = MaskStore.of(model).masks["bert.encoder.layer.1.output.dense.weight"]
    assert (~mask[0]).nonzero().tolist() == [[5]]
    assert not bool(model.bert.encoder.layer[1].intermediate.dense.bias[5])


def test_units_that_were_pruned_before_count():
    model, inputs = tiny("bert")
    prune(model, 0.25, granularity="neuron", criterion="fisher", calibration=batches_for(inputs))
    first = {name: mask.clone() for name, mask in MaskStore.of(model).masks.items()}
    prune(model, 0.5, granularity="neuron", criterion="fisher", calibration=batches_for(inputs))
    second = MaskStore.of(model).masks
    assert all(not bool((second[name] & ~mask).any()) for name, mask in first.items())
    shrink(model)
    assert {site.units for site in find_unit_groups(model) if site.kind == "neuron"} == {12}


def test_groups_of_queries_go_together():
    model, inputs = tiny("llama")
    prune(model, 0.5, granularity="head", criterion="taylor", calibration=batches_for(inputs))
    shrink(model)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)
    assert model.config.head_dim == 4


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 2}
MULTI_QUERY = {"vocab_size": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_inner": 48, "eos_token_id": 2}
SHARED_MATRIX = {
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL, **GROUPED)),
    "gpt_bigcode": lambda: GPTBigCodeForCausalLM(GPTBigCodeConfig(**MULTI_QUERY)),
    "dbrx": lambda: tiny_moe("dbrx")[0],
}


@pytest.mark.parametrize("family", SHARED_MATRIX)
def test_nothing_but_the_heads_that_go_is_masked_in_a_matrix_of_queries_keys_and_values(family):
    """Of a matrix with fewer keys than queries, or with one key for all heads, which belongs to no head."""
    model = models.fill(SHARED_MATRIX[family]()).eval()
    config = PruningConfig(0.5, granularity="head", criterion="magnitude")
    plan, _ = choose_units(model, config, None)
    masks = unit_masks(model, plan)
    removed = sum(int((~mask).sum()) for mask in masks.values())
    assert removed == plan.parameters_before - plan.parameters_after > 0
    prune(model, config)
    x = {"input_ids": torch.arange(12).view(2, 6) + 3}
    with torch.no_grad():
        masked = model(**x).logits
        shrunk = shrink(model)(**x).logits
    torch.testing.assert_close(shrunk, masked, rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in model.parameters()) == plan.parameters_after


@pytest.mark.parametrize("kinds", [("head",), ("neuron",)])
@pytest.mark.parametrize("model_type", MODELS)
def test_as_many_weights_are_masked_as_the_plan_says(model_type, kinds):
    model, _ = tiny(model_type)
    plan, _ = choose_units(model, PruningConfig(0.5, granularity=kinds, criterion="magnitude"), None)
    removed = sum(int((~mask).sum()) for mask in unit_masks(model, plan).values())
    assert removed == plan.parameters_before - plan.parameters_after


def test_sizes_are_multiples():
    model, inputs = tiny("bert")
    config = PruningConfig(0.45, granularity="neuron", criterion="fisher", scope="global", round_to=8)
    shrink(prune(model, config, calibration=batches_for(inputs)))
    assert all(site.units % 8 == 0 for site in find_unit_groups(model) if site.kind == "neuron")


def test_excluded_modules_stay():
    model, _ = tiny("bert")
    prune(model, 0.5, granularity=("head", "neuron"), exclude_modules=["encoder.layer.1", "attention.self.query"])
    shrink(model)
    left = {site.name: site.units for site in find_unit_groups(model)}
    assert left["encoder.layer.1.output.dense"] == 24
    assert left["encoder.layer.0.output.dense"] == 12
    assert left["encoder.layer.0.attention.output.dense"] == 4
    with pytest.raises(PlanError, match=r"no neuron of .* may go: check exclude_modules"):
        prune(tiny("bert")[0], 0.5, granularity="neuron", exclude_modules=r".*layer\.\d")


def test_layers_that_go_are_bypassed_until_they_are_taken_out():
    model, inputs = tiny("bert")
    dense = copy.deepcopy(model)
    prune(
        model,
        0.3,
        granularity="layer",
        criterion="fisher",
        scope="global",
        calibration=batches_for(inputs),
        keep_dense=True,
    )
    gone = bypassed_layers(model)
    assert len(gone) == 1
    by_hand = copy.deepcopy(dense)
    del by_hand.bert.encoder.layer[int(gone[0][-1])]
    assert torch.allclose(logits(by_hand, inputs), logits(model, inputs), atol=1e-6)
    prunable(model).discard_masks()
    assert not bypassed_layers(model)
    assert torch.equal(logits(model, inputs), logits(dense, inputs))


def test_the_least_useful_layer_goes():
    model, inputs = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight *= 1e-3
        model.model.layers[1].mlp.down_proj.weight *= 1e-3
    prune(model, 0.3, granularity="layer", criterion="fisher", scope="global", calibration=batches_for(inputs))
    assert bypassed_layers(model) == ["model.layers.1"]


# --- budgets ------------------------------------------------------------------------------------------


def test_a_budget_of_parameters():
    model, inputs = tiny("bert")
    before = model.num_parameters()
    prune(model, granularity=("head", "neuron"), criterion="fisher", target_params=0.8, calibration=batches_for(inputs))
    shrink(model)
    assert 0.76 * before <= model.num_parameters() <= 0.8 * before


@pytest.mark.parametrize("kinds", [("head", "neuron"), ("head", "neuron", "layer")], ids="+".join)
def test_a_budget_of_operations(kinds):
    model, inputs = tiny("bert")
    workload = {"batch_size": 2, "length": 16}
    config = PruningConfig(criterion="fisher", granularity=kinds, target_flops=0.6, workload=workload)
    given = workload_inputs(model, config.workload)
    before = flops({"dense": model}, given)["dense"]
    shrink(prune(model, config, calibration=batches_for(inputs)))
    after = flops({"smaller": model}, given)["smaller"]
    assert 0.5 * before <= after <= 0.6 * before


def test_a_budget_of_time_is_met_as_measured(monkeypatch):
    """A machine on which every weight takes a microsecond, and whose small matrices are slower than foretold."""

    def seconds(model):
        count = sum(p.numel() for p in model.bert.encoder.parameters())
        return 1e-6 * count * (1.2 if count < 15_000 else 1.0)

    on_a_machine_where(monkeypatch, seconds)
    model, inputs = tiny("bert")
    config = PruningConfig(criterion="fisher", granularity=("head", "neuron"), target_speedup=2.0)
    prune(model, config, calibration=batches_for(inputs))
    speed, masked = MaskStore.of(model).speed, copy.deepcopy(model)
    shrink(model)
    assert speed.asked == 2.0
    assert speed.measured == pytest.approx(seconds(masked) / seconds(model))
    assert speed.measured == pytest.approx(2.0, rel=0.05)
    assert "Speed-up asked for: 2.00" in str(speed)


def test_savings_that_do_not_add_up_are_no_reason_to_refuse(monkeypatch):
    """A group alone saves half of the time: what the sum of all foretells would be less than none."""
    model, inputs = tiny("bert")
    whole = sum(p.numel() for p in model.bert.encoder.parameters())

    def seconds(one):
        return 1e-3 * max(0.45, 1 - 3 * (1 - sum(p.numel() for p in one.bert.encoder.parameters()) / whole))

    on_a_machine_where(monkeypatch, seconds)
    config = PruningConfig(criterion="fisher", granularity=("head", "neuron"), target_speedup=2.0)
    prune(model, config, calibration=batches_for(inputs))
    assert MaskStore.of(model).speed.measured == pytest.approx(2.0, rel=0.15)


def on_a_machine_where(monkeypatch, seconds):
    """Have models take given seconds."""
    for module in ("inference.speedup", "structured.latency_costs"):
        monkeypatch.setattr(f"hf_prune.{module}.timed", lambda model, run: Run(model))
        monkeypatch.setattr(f"hf_prune.{module}.time_together", fake_timings(seconds))


def test_a_speedup_out_of_reach_is_refused_with_the_most_there_is(monkeypatch):
    model, inputs = tiny("llama")
    total, inside = model.num_parameters(), sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    on_a_machine_where(monkeypatch, lambda one: 1e-6 * one.num_parameters())
    before = snapshot(model)
    settings = {"granularity": "neuron", "target_speedup": 50, "workload": {"prompt": 4, "new_tokens": 3}}
    with pytest.raises(PlanError, match=r"becomes at most (\d\.\d\d) times as fast on the workload") as error:
        prune(model, criterion="fisher", calibration=batches_for(inputs), **settings)
    most = float(str(error.value).split("at most ")[1].split()[0])
    assert 1 < most < total / (total - inside)
    assert_unchanged(model, before)


def test_a_generation_is_timed_by_prefill_and_decoding(monkeypatch):
    model, inputs = tiny("llama")
    on_a_machine_where(monkeypatch, lambda one: 1e-6 * one.num_parameters())
    dense = model.num_parameters()
    settings = {"granularity": "neuron", "target_speedup": 1.2, "workload": {"prompt": 4, "new_tokens": 3}}
    prune(model, criterion="fisher", calibration=batches_for(inputs), **settings)
    shrink(model)
    speed = model.config.pruned_structure["speed"]
    assert speed["measured"] == pytest.approx(dense / model.num_parameters())
    assert speed["prefill"] == speed["decode"] == pytest.approx(speed["measured"])
    assert (speed["length"], speed["new_tokens"]) == (4, 3)
    assert "batch 1 x 4, 3 new tokens" in str(SpeedRecord(**speed))
    assert "Apart: the prompt 1.2" in str(SpeedRecord(**speed))


class Run:
    """A forward pass that takes no time at all."""

    def __init__(self, model):
        self.model = model

    def __call__(self):
        pass


def fake_timings(seconds):
    return lambda runs, **_: {name: Timings((seconds(run.model),) * 9, (0.0,) * 9) for name, run in runs.items()}


def test_a_speedup_that_is_far_from_what_was_foretold_is_said():
    record = SpeedRecord(2.0, 2.0, 1.7, 1.6, 1.8, 50, 1, 64, 1, "float32", "cpu")
    assert "differ by more than 10 %" in str(record)
    assert "differ" not in str(record.with_prediction(1.7, 1.75))


def test_a_budget_that_cannot_be_met_changes_nothing():
    model, inputs = tiny("bert")
    expected = logits(model, inputs)
    with pytest.raises(PlanError, match="cannot be met"):
        prune(model, granularity="head", criterion="fisher", target_params=0.1, calibration=batches_for(inputs))
    assert torch.equal(logits(model, inputs), expected)
    assert MaskStore.of(model) is None


# --- statistics ---------------------------------------------------------------------------------------


def test_windows_with_many_logits_are_run_one_by_one_to_the_same_end(monkeypatch):
    model, inputs = tiny("llama")
    batches = batches_for(inputs)
    layers = {name: model.get_submodule(name) for name in ("model.layers.0", "model.layers.1")}
    sites = find_unit_groups(model)
    plain = lambda outputs, mask, generator: outputs.logits.square().sum()  # noqa: E731
    monkeypatch.setattr("hf_prune.calibration.output_head.sampled_prediction", plain)

    def measure():
        config = PruningConfig(criterion="fisher", granularity=("head", "neuron"), repair="least_squares")
        curves, sensitivity = redundancy_curves(
            model,
            config,
            sites,
            Reading.in_memory(model, config, batches, False, 2**20),
            {group.name: torch.ones(group.units) for group in sites},
        )
        tokens = [sensitivity.weights("model.layers.1.mlp.down_proj.weight", i, 0) for i in range(3)]
        outputs = [*sensitivity.outputs.values()]
        sensitivity.close()
        fisher = [one.fisher for one in gate_statistics(model, sites, batches).values()]
        return [*layer_losses(model, layers, batches).values()], [*tokens, *outputs, *fisher], curves

    sizes = []
    model.register_forward_pre_hook(lambda m, args, kw: sizes.append(len(kw["input_ids"])), with_kwargs=True)
    whole = measure()
    assert set(sizes) == {2}
    monkeypatch.setattr("hf_prune.calibration.batches._MOST_LOGITS", 1)
    apart = measure()
    assert 1 in sizes
    assert apart[0] == pytest.approx(whole[0], rel=1e-4)
    torch.testing.assert_close(apart[1], whole[1], rtol=1e-4, atol=1e-6)
    assert all(torch.equal(apart[2][name].order, whole[2][name].order) for name in whole[2])


def test_gate_gradients_are_those_of_scaled_columns():
    model, inputs = tiny("bert")
    sites = find_unit_groups(model)
    batches = [{k: v[i : i + 1] for k, v in inputs().items()} for i in range(2)]
    found = gate_statistics(model, sites, batches, seed=5)
    for site in sites[:2]:
        weight = model.get_parameter(site.consumers[0].name)
        each = []
        for index, batch in enumerate(batches):
            generator = torch.Generator().manual_seed(zlib.crc32(f"5:{index}".encode()))
            value = sampled_prediction(model(**batch), batch["attention_mask"], generator)
            (gradient,) = torch.autograd.grad(value, [weight])
            each.append((gradient * weight.detach()).view(len(weight), site.units, -1).sum((0, 2)))
        gates = torch.stack(each).double()  # (examples, units)
        assert torch.allclose(found[site.name].fisher, gates.t() @ gates / 2, atol=1e-6)
        assert torch.allclose(found[site.name].absolute, gates.abs().mean(0), atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_examples_of_a_batch_have_gradients_of_their_own():
    model, inputs = tiny("bert")
    site = find_unit_groups(model)[1]
    both = gate_statistics(model, [site], [inputs()])[site.name]
    assert torch.linalg.matrix_rank(both.fisher, rtol=1e-6) == 2


def test_measured_layer_losses_agree_with_the_gates_for_small_layers():
    """A layer that adds little: its bypass changes the predictions as one gate on all it adds foretells."""
    model, inputs = tiny("vit")
    layer = model.vit.layers[-1]
    with torch.no_grad():
        layer.attention.o_proj.weight.zero_()
        layer.attention.o_proj.bias.zero_()
        layer.mlp.fc2.weight *= 1e-3
        layer.mlp.fc2.bias.zero_()
    site = find_unit_groups(model)[-1]
    repeated = [inputs()] * 200  # each with directions of its own
    foretold = float(gate_statistics(model, [site], repeated)[site.name].fisher.sum())
    measured = layer_losses(model, {"last": layer}, [inputs()])["last"]
    assert measured == pytest.approx(foretold, rel=0.25)


def test_repair_brings_the_outputs_closer():
    distances = []
    for repair in (None, "least_squares"):
        model, inputs = tiny("bert")
        batches = batches_for(inputs, 40)
        dense = [logits(model, lambda b=b: b) for b in batches]
        prune(
            model,
            0.4,
            granularity=("head", "neuron"),
            criterion="fisher",
            repair=repair,
            scope="global",
            calibration=batches,
        )
        now = [logits(model, lambda b=b: b) for b in batches]
        distances.append(sum(float((a - b).square().sum()) for a, b in zip(dense, now, strict=True)))
    assert distances[1] < 0.7 * distances[0]


@pytest.mark.parametrize("order", ["sequential", "one_pass"])
def test_repair_leaves_what_is_gone_at_zero(order):
    model, inputs = tiny("gpt2")
    config = PruningConfig(
        0.4,
        granularity=("head", "neuron"),
        criterion="fisher",
        repair="least_squares",
        calibration_order=order,
        scope="global",
    )
    prune(model, config, calibration=batches_for(inputs))
    parameters = dict(model.named_parameters())
    for name, mask in MaskStore.of(model).masks.items():
        assert not bool(parameters[name][~mask].any()), name


def test_a_polish_follows():
    model, inputs = tiny("bert")
    config = PruningConfig(
        0.4, granularity=("head", "neuron"), scope="global", polish={"epochs": 3, "learning_rate": 1e-3}
    )
    prune(model, config, calibration=batches_for(inputs, 20))
    (record,) = MaskStore.of(model).polishes
    assert record.steps > 0
    masked = logits(model, inputs)
    shrink(model)
    assert (logits(model, inputs) - masked).abs().max() <= 1e-5


# --- refusals, plans ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": ("head", "weight")}, "unknown kind of unit in granularity 'weight'"),
        ({"granularity": "head", "sparsity": 0.5, "target_params": 0.5}, "sparsity, target_params are all set"),
        ({"granularity": "head", "target_params": 0}, "target_params is 0: expected the share that remains"),
        ({"granularity": "head", "target_flops": 50}, r"target_flops is 50: .* did you mean 0\.5"),
        ({"granularity": "head", "target_speedup": 0.5}, r"target_speedup is 0\.5: expected a number of at least 1"),
        ({"granularity": "head", "scope": "row"}, "unknown scope of heads, neurons and layers 'row'"),
        ({"granularity": "head", "criterion": "wanda"}, "unknown criterion of heads, neurons and layers 'wanda'"),
        ({"granularity": "layer", "scope": "layer"}, "scope='layer', in which every layer loses the same share"),
        ({"granularity": "head", "target_modules": ["query"]}, "target_modules=.* contradicts granularity"),
        ({"granularity": "head", "allocation": "erk"}, "allocation='erk' contradicts granularity"),
        ({"granularity": "head", "steps": 3}, "steps=3 contradicts granularity"),
        ({"granularity": "head", "round_to": 0}, "round_to is 0"),
        ({"granularity": "head", "workload": {"size": 1}}, "unknown key of workload 'size'"),
        ({"granularity": "head", "workload": 7}, "workload is 7: expected a dict"),
        (
            {"granularity": "head", "workload": {"length": 8, "new_tokens": 8}},
            "length is of one forward pass, prompt and new_tokens of a generation",
        ),
        ({"granularity": "head", "workload": {"length": 0}}, r"workload\['length'\] is 0"),
        ({"granularity": "head", "objective": "loss"}, "objective='loss' contradicts criterion 'magnitude' without"),
        (
            {"granularity": "layer", "scope": "global", "objective": "loss", "repair": "least_squares"},
            "objective='loss' contradicts granularity 'layer'",
        ),
        (
            {"target_speedup": 2, "granularity": "unstructured"},
            "target_speedup=2 contradicts granularity='unstructured'",
        ),
        ({"round_to": 8}, "round_to=8 is for heads and neurons"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        PruningConfig(**settings)


def test_configs_go_through_json_and_change():
    config = PruningConfig(criterion="fisher", granularity=["neuron", "head"], target_speedup=2, repair="least_squares")
    assert (config.granularity, config.scope, config.objective) == (("head", "neuron"), "global", "loss")
    assert config.workload == {"batch_size": 1, "length": 128}
    assert PruningConfig.from_json(config.to_json()) == config
    assert config.replace(target_params=0.5).target_speedup is None
    assert config.replace(sparsity=0.5).target_speedup is None
    assert config.replace(seed=1).target_speedup == 2
    back = PruningConfig(0.5, granularity="head").replace(granularity="2:4")
    assert (back.granularity, back.scope, back.sparsity) == ("2:4", "layer", 0.5)
    assert PruningConfig(0.3).replace(granularity="head", sparsity=0.3).scope == "layer"


def test_data_that_is_missing():
    model, _ = tiny("bert")
    with pytest.raises(CalibrationError, match="criterion 'fisher' needs calibration data"):
        prune(model, 0.5, granularity="head", criterion="fisher")
    with pytest.raises(CalibrationError, match="repair='least_squares' needs calibration data"):
        prune(model, 0.5, granularity="head", repair="least_squares")
    with pytest.raises(CalibrationError, match="calibration has no batches"):
        prune(model, 0.5, granularity="head", criterion="fisher", calibration=[])
    assert MaskStore.of(model) is None


def test_an_unknown_architecture_is_refused():
    config = BitConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], num_groups=8)
    with pytest.raises(ArchitectureError, match="no entry for 'bit'"):
        prune(BitModel(config), 0.5, granularity="head")


def test_reconstruction_needs_one_consumer():
    model, inputs = tiny("t5")
    with pytest.raises(PlanError, match=r"heads of encoder\.block\.0.* go into 3"):
        prune(model, 0.5, granularity="head", criterion="reconstruction", calibration=batches_for(inputs))


def test_an_error_in_the_repair_gives_everything_back(monkeypatch):
    model, inputs = tiny("bert")
    before = copy.deepcopy(model.state_dict())

    def fail(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr("hf_prune.structured.prune_units.prune_sequentially", fail)
    config = PruningConfig(
        0.4, granularity=("head", "layer"), criterion="fisher", scope="global", repair="least_squares"
    )
    with pytest.raises(RuntimeError, match="no"):
        prune(model, config, calibration=batches_for(inputs))
    assert not bypassed_layers(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert MaskStore.of(model) is None


TRACED = ("pipeline.py", "prune_units.py", "transaction.py", "contextlib.py")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a folder goes when it is forgotten
def test_ctrl_c_at_the_end_never_leaves_a_layer_switched_off_whose_weights_are_back():
    """Interrupted at each of the last lines, the last time that it runs: nothing has happened, or all of it."""
    settings = {"granularity": "layer", "scope": "global"}

    def prune_until(model, line):
        """Raise KeyboardInterrupt before a line, of those of the pruning and of its contexts; which there were."""
        lines = []

        def trace(frame, event, _):
            if not frame.f_code.co_filename.endswith(TRACED):
                return None
            if event == "line":
                lines.append((frame.f_code.co_filename, frame.f_lineno))
                if len(lines) - 1 == line:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            prune(model, 0.5, **settings)
        finally:
            sys.settrace(None)
        return lines

    outcomes = []
    lines = prune_until(tiny("bert")[0], None)
    lasts = {where: number for number, where in enumerate(lines)}
    for line in (number for number in lasts.values() if number >= len(lines) - 90):
        model = tiny("bert")[0]
        before = snapshot(model)
        with contextlib.suppress(KeyboardInterrupt):
            prune_until(model, line)
        outcomes.append(len(bypassed_layers(model)))
        assert torch.is_grad_enabled(), line
        assert (MaskStore.of(model) is not None) == bool(outcomes[-1]), line
        if not outcomes[-1]:
            assert_unchanged(model, before)
    assert set(outcomes) == {0, 1}


@pytest.mark.parametrize("more", [{"repair": "least_squares"}, {"polish": {"epochs": 1}}], ids=str)
def test_units_go_where_single_weights_have_gone_before(more):
    model, inputs = tiny("bert")
    prune(model, 0.2)
    before = {name: mask.clone() for name, mask in MaskStore.of(model).masks.items()}
    prune(model, 0.4, granularity=("head", "neuron"), calibration=batches_for(inputs, 4), **more)
    for name, mask in MaskStore.of(model).masks.items():
        assert not bool((mask & ~before.get(name, mask)).any()), name
        assert not bool(model.get_parameter(name).detach()[~mask].any()), name


def test_a_plan_says_what_goes():
    model, inputs = tiny("bert")
    open_plan = prunable(model).plan(granularity=("head", "neuron"), criterion="fisher", target_params=0.8)
    assert "by data" in str(open_plan)
    assert open_plan.to_dict()["parameters_after"] is None
    plan = model.plan(0.5, granularity=("head", "neuron"))
    assert "encoder.layer.0.output.dense" in str(plan)
    assert f"{model.num_parameters():,} parameters" in str(plan)
    values = plan.to_dict()
    assert {(s["kind"], s["units"], s["kept"]) for s in values["sites"]} == {("head", 4, 2), ("neuron", 24, 12)}
    layers = model.plan(0.3, granularity="layer", criterion="fisher", scope="global", calibration=batches_for(inputs))
    assert "gone" in str(layers)


@pytest.mark.parametrize("model_type", ["bert", "vit", "whisper", "t5"])
def test_workloads_are_what_the_model_takes(model_type):
    model, _ = tiny(model_type)
    given = workload_inputs(model, {"batch_size": 2, "length": 8})
    assert model(**given).logits.shape[0] == 2


def test_workloads_that_do_not_fit():
    model, _ = tiny("bert", max_position_embeddings=8)
    with pytest.raises(PlanError, match="length 9 is longer than the 8 positions"):
        workload_inputs(model, {"batch_size": 1, "length": 9})
    model.main_input_name = "input_values"
    with pytest.raises(PlanError, match="takes 'input_values', for which no workload"):
        workload_inputs(model, {"batch_size": 1, "length": 9})


def test_the_report_counts_what_has_gone():
    model, _ = tiny("bert")
    before = model.num_parameters()
    prune(model, 0.5, granularity=("head", "neuron"))
    report = hf_prune.sparsity_report(model)
    shrink(model)
    assert report.remaining == model.num_parameters()
    assert report.parameters == before


def test_a_repair_of_units_knows_no_limit_of_layers():
    """The settings of the repair inside name the matrices one by one: far more than fit in a pattern of a user."""
    model, inputs = tiny("bert", num_hidden_layers=24)
    settings = PruningConfig(
        0.5, granularity=("head", "neuron"), scope="global", repair="least_squares", calibration_order="one_pass"
    )
    prune(model, settings, calibration=batches_for(inputs, 1))
    assert MaskStore.of(model).masks


def test_an_inner_plan_means_exactly_the_matrices_that_it_is_given():
    model = torch.nn.Module()
    model.a = torch.nn.Linear(2, 2)
    model.b = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "x": torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)})})
    for name in ("a.weight", "b.a.weight", "b.x.a.weight"):
        plan = inner_plan(model, PruningConfig(), [name])
        assert [tensor.target.name for tensor in plan.tensors] == [name]


# --- what is no parameter ----------------------------------------------------------------------------


def as_buffer(module, key):
    values = getattr(module, key).detach()
    delattr(module, key)
    module.register_buffer(key, values)


CHANGES = {
    "weight norm": lambda module: torch.nn.utils.parametrizations.weight_norm(module),
    "old weight norm": lambda module: torch.nn.utils.weight_norm(module),
    "spectral norm": lambda module: torch.nn.utils.parametrizations.spectral_norm(module),
    "buffer": lambda module: as_buffer(module, "weight"),
    "buffer of biases": lambda module: as_buffer(module, "bias"),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["attention.self.value", "intermediate.dense", "output.dense"])
def test_units_of_weights_that_are_no_parameters_are_refused(change, name):
    model = tiny("bert")[0]
    change(model.get_submodule(f"bert.encoder.layer.1.{name}"))
    before = snapshot(model)
    for act in (
        lambda: prune(model, 0.5, granularity="neuron", scope="global"),
        lambda: prune(model, 0.5, granularity="head", scope="global"),
        lambda: shrink(model),
        lambda: hf_prune.structure_report(model),
    ):
        with pytest.raises(
            ArchitectureError, match=rf"(weight|bias) of .*layer.1.{name} .* is computed from others or"
        ):
            act()
    assert "are not counted: " in hf_prune.explain_speed(model)
    assert_unchanged(model, before)


def test_channels_of_weights_that_are_no_parameters_are_refused():
    model = tiny_resnet()
    name = find_unit_groups(model)[0].producers[0].name.removesuffix(".weight")
    torch.nn.utils.parametrizations.weight_norm(model.get_submodule(name))
    before = snapshot(model)
    with pytest.raises(ArchitectureError, match=rf"weight of {name} .* is computed from others or a buffer"):
        prune(model, 0.5, granularity="channel")
    assert_unchanged(model, before)


def test_units_of_what_another_tool_masked_are_refused():
    model = tiny("bert")[0]
    torch.nn.utils.prune.l1_unstructured(model.bert.encoder.layer[0].output.dense, "weight", 0.5)
    before = snapshot(model)
    for act in (
        lambda: prune(model, 0.5, granularity="neuron", scope="global"),
        lambda: hf_prune.structure_report(model),
        lambda: hf_prune.sparsity_report(model),
    ):
        with pytest.raises(
            PlanError, match=r"output.dense was pruned with torch.nn.utils.prune: call .*from_torch_prune"
        ):
            act()
    assert_unchanged(model, before)


def test_units_of_a_module_without_a_weight_are_refused():
    model = tiny("bert")[0]
    model.bert.encoder.layer[0].intermediate.dense = torch.nn.Identity()
    with pytest.raises(
        ArchitectureError, match=r"intermediate.dense of Bert.* is a Identity without a weight: expected"
    ):
        hf_prune.structure_report(model)


def test_a_dry_run_needs_no_data_for_a_repair_nor_for_a_polish_with_its_own():
    model, inputs = tiny("bert")
    prune(model, 0.5, granularity="head", repair="least_squares", dry_run=True)
    prune(model, 0.5, granularity="head", polish={"epochs": 1}, polish_data=batches_for(inputs, 4))
    assert len(MaskStore.of(model).polishes) == 1


@pytest.mark.parametrize(
    "save", [lambda m, path: m.save_pretrained(path), lambda m, path: torch.save(m.state_dict(), path)]
)
def test_a_plain_model_with_layers_switched_off_is_not_saved_as_another_one(save, tmp_path):
    model = models.tiny_bert()
    batch = models.tiny_batches(model)[0]
    prune(model, 0.5, granularity="layer")
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.\d is switched off.*call hf_prune\.shrink\(model\)"):
        save(model, tmp_path / "out")
    with torch.no_grad():
        masked = model(**batch).logits
        model = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        shrink(model).save_pretrained(tmp_path / "out")
        again = type(model).from_pretrained(tmp_path / "out").eval()
        assert torch.allclose(again(**batch).logits, masked, atol=1e-6)


def sharing_model(share):
    """Eight layers, of which the last four use the attention, or one matrix, of the first four as well."""
    torch.manual_seed(0)
    model = prunable(OwnModel(OwnConfig(depth=8, width=32, ff=48, nh=4, nkv=2)).eval())
    for former, latter in zip(model.stack[:4], model.stack[4:], strict=True):
        if share == "module":
            latter.mix = former.mix
        else:
            latter.ffw.w2.weight = former.ffw.w2.weight
    return model


@pytest.mark.parametrize("share", ["module", "weight"])
@pytest.mark.parametrize("spared", ["later", "none"])
def test_what_layers_share_goes_with_the_last_of_them(share, spared):
    model = sharing_model(share)
    dense, tokens = copy.deepcopy(model), torch.arange(20).view(2, 10)
    sizes = [p.numel() for p in model.parameters()]
    excluded = tuple(f"stack.{number}*" for number in (4, 5, 6, 7)) if spared == "later" else ()
    plan = model.plan(0.4, granularity="layer", criterion="magnitude", exclude_modules=excluded)
    prune(model, 0.4, granularity="layer", criterion="magnitude", exclude_modules=excluded)
    gone = bypassed_layers(model)
    assert gone
    for name in gone:
        bypass(dense.get_submodule(name))
    expected = dense(input_ids=tokens).logits
    assert torch.equal(model(input_ids=tokens).logits, expected)
    shrink(model)
    assert torch.equal(model(input_ids=tokens).logits, expected)
    assert sum(p.numel() for p in model.parameters()) <= plan.parameters_after < sum(sizes)


def test_units_of_shared_weights_are_refused_before_anything_changes():
    for share, said in (("weight", r"ffw\.w2\.weight"), ("module", r"mix\.\w+(\.weight)?")):
        model = sharing_model(share)
        before = snapshot(model)
        with pytest.raises(ArchitectureError, match=f"{said} cannot be made smaller: it is shared by"):
            model.plan(0.5, granularity=("head", "neuron"), criterion="magnitude")
        with pytest.raises(ArchitectureError, match="give each a weight of its own first"):
            prune(model, 0.5, granularity=("head", "neuron"), criterion="magnitude")
        assert_unchanged(model, before)
    model, _ = mixture("listed")
    for expert in model.stack[0].moe.parts:
        expert.w1.weight = model.stack[0].moe.parts[0].w1.weight
    before = snapshot(model)
    with pytest.raises(ArchitectureError, match=r"moe\.parts\.0\.w1\.weight cannot be made smaller: it is shared by"):
        prune(model, 0.5, granularity="expert", criterion="magnitude")
    assert_unchanged(model, before)


def test_a_weight_of_two_names_is_backed_up_once():
    model = sharing_model("module")
    before = snapshot(model)
    backup = WeightBackup(in_memory=True)
    for name in ("stack.0.mix.wo.weight", "stack.4.mix.wo.weight"):
        backup.save(model, name)
        model.get_parameter(name).data.zero_()
    backup.restore(model)
    assert_unchanged(model, before)
