"""What every registered kind of unit must satisfy, and two toy kinds that nothing in the package knows about."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_prune
from hf_prune import ConfigError, PruningConfig, UnknownNameError, prune, shrink
from hf_prune.architectures.bypass import bypass
from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.architectures.kinds.registry import KINDS, all_kinds, kind_named, unit_descriptions
from hf_prune.architectures.switched_off import switch_off
from hf_prune.architectures.unit_groups import UnitGroup
from hf_prune.inference.speedup import workload_inputs
from hf_prune.structured.costs import flops
from tests.architecture_models import tiny
from tests.architectures.test_channels import tiny as tiny_convnet
from tests.contracts import toy_kinds
from tests.moe_families import tiny_moe
from tests.support.fresh_process import ForkServer

ALL = sorted({*KINDS.names(), *(kind.name for kind in toy_kinds.TOYS)})
GRANULARITIES = [name for name in ALL if name != "channel"]  # which is a granularity of single weights
WORKLOAD = {"batch_size": 2, "length": 16}


@pytest.fixture(autouse=True, scope="module")
def _toys() -> Iterator[None]:
    """Add the toy kinds, and take them away again."""
    KINDS.names()
    before = dict(KINDS._entries)
    toy_kinds.register()
    yield
    KINDS._entries = before


@functools.cache
def models() -> tuple[tuple[Any, Callable[[], dict[str, Tensor]]], ...]:
    """Small models that have units of one kind or another, each with what makes inputs."""
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    convnets = [tiny_convnet(name) for name in ("resnet", "mobilenet_v2")]
    texts = [tiny(name) for name in ("bert", "gpt2", "llama", "t5")]
    images = [(model, lambda: {"pixel_values": pixels}) for model in convnets]
    return (*texts, *images, *(tiny_moe(name) for name in ("mixtral", "switch_transformers")))


def units_in(kind: str) -> Iterator[tuple[Any, Any, list[UnitGroup], list[str]]]:
    """(model, inputs, groups, removable layers) for each model that has units of a kind."""
    for model, inputs in models():
        groups = kind_named(kind).groups(model)
        layers = kind_named(kind).removable_layers(model, lambda name: False)
        if groups or layers:
            yield copy.deepcopy(model), inputs, groups, layers


def first_with(kind: str) -> tuple[Any, Any, list[UnitGroup], list[str]]:
    """The first of them; a new kind without any needs a model in :func:`models`."""
    return next(units_in(kind))


@torch.no_grad()
def logits(model: Any, inputs: Any) -> Tensor:
    return model(**inputs()).logits


@torch.no_grad()
def silence(model: Any, group: UnitGroup, units: Tensor) -> None:
    """Zero everything that belongs to some units, and switch them off where that does not suffice."""
    if not kind_named(group.kind).zeros_suffice:
        kept = [unit for unit in range(group.units) if unit not in units.tolist()]
        switch_off(model, group, torch.tensor(kept))
    for name in (name for names in group.own_parameters(model, units.tolist()) for name in names):
        model.get_parameter(name).data.zero_()
    for piece in group.slices:
        model.get_parameter(piece.name).data.index_fill_(piece.dim, piece.index(units), 0)


def same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * a.abs().max())


def pruned(kind: str, **settings: Any) -> tuple[Any, Any]:
    """A model that lost units of a kind and still has its masks, and what makes its inputs."""
    model, inputs, _, _ = first_with(kind)
    scope = {"scope": "global"} if not any(name.startswith("target") for name in settings) else {}
    return prune(model, granularity=[kind], criterion="magnitude", **scope, **settings), inputs


@pytest.mark.parametrize("kind", ALL)
def test_a_kind_describes_itself(kind: str) -> None:
    entry = kind_named(kind)
    assert entry.name == kind
    assert entry.description
    assert entry.__doc__
    assert entry.scopes <= {"layer", "global"}
    assert entry.scopes
    assert entry.objectives <= {"layer", "loss"}
    assert entry.objectives
    assert entry.criteria is None or entry.criteria
    assert entry.cut_as is None or kind_named(entry.cut_as).cut_as is None
    assert all(0 <= share < 1 for share in (*entry.fine_shares, *entry.coarse_shares))
    assert kind in [other.name for other in all_kinds()]


@pytest.mark.parametrize("kind", ALL)
def test_slices_of_different_units_do_not_overlap(kind: str) -> None:
    for model, _, groups, _ in units_in(kind):
        for group in groups:
            assert group.kind == kind
            assert group.units > group.minimum >= 0
            assert group.producers
            assert group.consumers or not kind_named(kind).zeros_suffice
            for piece in (*group.slices, *group.values):
                index = piece.index(torch.arange(group.units))
                assert len(index.unique()) == len(index) <= model.get_parameter(piece.name).shape[piece.dim]
            assert set(group.values) <= {*group.producers} or group.values[0].name == group.producers[0].name


@pytest.mark.parametrize("kind", ALL)
def test_cutting_a_silenced_unit_changes_no_output_and_saves_what_was_counted(kind: str, tmp_path: Path) -> None:
    cases = list(units_in(kind))
    assert cases, f"add a model that has {kind}s to models()"
    for number, (model, inputs, groups, layers) in enumerate(cases):
        before, parameters = model.num_parameters(), dict(model.named_parameters())
        if groups:
            group = groups[-1]
            # As many as are cut at once: one, or more where kernels want multiples.
            first = 1 if group.units > group.minimum + group.step else 0
            silence(model, group, torch.arange(first, first + group.step))
            saved = group.step * group.parameters_per_unit(parameters)
        else:
            bypass(model.get_submodule(layers[-1]))
            saved = sum(p.numel() for p in model.get_submodule(layers[-1]).parameters())
        masked = logits(model, inputs)
        shrunk = shrink(copy.deepcopy(model))
        assert same(logits(shrunk, inputs), masked)
        assert shrunk.num_parameters() == before - saved
        if kind != "channel":  # convolutional models are saved and loaded in tests/architectures/test_channels.py
            shrunk.save_pretrained(tmp_path / str(number))
            loaded = type(model).from_pretrained(tmp_path / str(number)).eval()
            assert same(logits(loaded, inputs), logits(shrunk, inputs))
            weights = loaded.state_dict()
            assert all(torch.equal(weights[name], tensor) for name, tensor in shrunk.state_dict().items())
            assert {g.name: g.units for g in find_unit_groups(loaded)} == {
                g.name: g.units for g in find_unit_groups(shrunk)
            }


@pytest.mark.parametrize("kind", ALL)
def test_the_config_records_what_was_cut(kind: str) -> None:
    model, _, groups, layers = first_with(kind)
    if not groups:
        stack, _, number = layers[-1].rpartition(".")
        bypass(model.get_submodule(layers[-1]))
        record = shrink(model).config.pruned_structure
        ((name, entry),) = record["layers"].items()
        assert stack.endswith(name)
        assert int(number) in range(entry["before"])
        assert int(number) not in entry["kept"]
        return
    group, cut_kind = groups[0], kind_named(kind).cut_as or kind
    silence(model, group, torch.tensor([0]))
    before = {g.name: g.units for g in find_unit_groups(model) if g.kind == cut_kind}
    record = shrink(model).config.pruned_structure
    left = {g.name: g.units for g in find_unit_groups(model) if g.kind == cut_kind}
    assert record["units"] == {group.name: {"before": before[group.name], "kept": left[group.name]}}
    assert left[group.name] < before[group.name]


@pytest.mark.parametrize("kind", GRANULARITIES)
def test_a_budget_of_parameters_is_met_as_planned(kind: str) -> None:
    model, _, _, _ = first_with(kind)
    before, share = model.num_parameters(), 0.98 if kind == "pooled_feature" else 0.9
    settings: dict[str, Any] = {"granularity": [kind], "criterion": "magnitude", "target_params": share}
    plan = prune(copy.deepcopy(model), dry_run=True, **settings)
    assert plan.parameters_before == before
    shrunk = shrink(prune(model, **settings))
    assert shrunk.num_parameters() == plan.parameters_after
    assert (share - 0.1) * before <= shrunk.num_parameters() <= share * before


# Removing experts saves no operations: a token goes to as many as before.
@pytest.mark.parametrize("kind", [kind for kind in GRANULARITIES if kind != "expert"])
def test_a_budget_of_operations_is_met(kind: str) -> None:
    model, _, _, _ = first_with(kind)
    share = 0.999 if kind == "pooled_feature" else 0.75
    config = PruningConfig(criterion="magnitude", granularity=[kind], target_flops=share, workload=WORKLOAD)
    inputs = workload_inputs(model, config.workload)
    before = flops({"dense": model}, inputs)["dense"]
    after = flops({"smaller": shrink(prune(model, config))}, inputs)["smaller"]
    assert 0.5 * before <= after <= share * before


@pytest.mark.parametrize("kind", GRANULARITIES)
def test_masks_hold_the_outputs_of_the_shrunk_model(kind: str, tmp_path: Path) -> None:
    model, inputs = pruned(kind, sparsity=0.4)
    masked = logits(model, inputs)
    removed = [name for name, mask in hf_prune.MaskStore.of(model).masks.items() if not mask.all()]
    assert removed
    assert all((model.get_parameter(name)[~hf_prune.MaskStore.of(model).masks[name]] == 0).all() for name in removed)
    shrunk = shrink(copy.deepcopy(model))
    assert shrunk.num_parameters() < model.num_parameters()
    assert same(logits(shrunk, inputs), masked)


@pytest.mark.parametrize("criterion", ["magnitude", "random", "taylor", "fisher", "reconstruction"])
@pytest.mark.parametrize("kind", GRANULARITIES)
def test_every_criterion_ranks_it(kind: str, criterion: str) -> None:
    if criterion not in (kind_named(kind).criteria or [criterion]):
        with pytest.raises(ConfigError, match=f"{criterion!r} cannot rank {kind}s"):
            PruningConfig(granularity=[kind], criterion=criterion)
        return
    model, inputs, _, _ = first_with(kind)
    before = model.num_parameters()
    batches = [{**inputs()}] if criterion in ("taylor", "fisher", "reconstruction") else None
    settings: dict[str, Any] = {"granularity": [kind], "scope": "global", "criterion": criterion}
    assert shrink(prune(model, 0.4, calibration=batches, **settings)).num_parameters() < before


def test_toys_load_in_a_new_process(tmp_path: Path, fresh_process: ForkServer) -> None:
    """Pairs of neurons at once, since neurons were cut; pooled features once their kind is registered."""
    expected = {}
    for kind in ("neuron_pair", "pooled_feature"):
        model, inputs = pruned(kind, sparsity=0.4)
        shrink(model).save_pretrained(tmp_path / kind)
        expected[kind] = logits(model, inputs).flatten().tolist()
    code = """if True:
        import json, sys, hf_prune
        from transformers import BertForSequenceClassification
        from tests.architecture_models import tiny
        from tests.contracts import toy_kinds

        def run(kind):
            model = BertForSequenceClassification.from_pretrained(f"{sys.argv[1]}/{kind}").eval()
            return model(**tiny("bert")[1]()).logits.flatten().tolist()

        pairs = run("neuron_pair")
        try:
            run("pooled_feature")
        except hf_prune.ArchitectureError as error:
            assert "its kind of unit is not registered here" in str(error), error
        else:
            raise AssertionError("nothing knows pooled features")
        toy_kinds.register()
        print(json.dumps({"neuron_pair": pairs, "pooled_feature": run("pooled_feature")}))
    """
    done = fresh_process.run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert loaded == {kind: pytest.approx(values, abs=1e-5) for kind, values in expected.items()}


def test_pairs_stay_or_go_together() -> None:
    model, _ = pruned("neuron_pair", sparsity=0.4)
    store = hf_prune.MaskStore.of(model)
    rows = store.masks["bert.encoder.layer.1.intermediate.dense.weight"].all(1)
    assert torch.equal(rows[::2], rows[1::2])
    assert rows.any()
    assert not rows.all()


def test_a_toy_goes_with_other_kinds_but_not_with_the_one_that_it_regroups() -> None:
    model, _ = tiny("bert")
    before = {group.kind: group.units for group in find_unit_groups(model)}
    settings: dict[str, Any] = {"criterion": "magnitude", "scope": "layer"}
    shrink(prune(model, 0.5, granularity=["head", "pooled_feature", "neuron_pair"], **settings))
    assert {g.kind: g.units for g in find_unit_groups(model)} == {kind: units // 2 for kind, units in before.items()}
    with pytest.raises(
        ConfigError, match=r"'neuron' and 'neuron_pair', which both divide encoder\.layer\.0\.output\.dense"
    ):
        prune(tiny("bert")[0], 0.5, granularity=["neuron", "neuron_pair"], **settings)


def test_toys_are_named_in_errors() -> None:
    assert list(unit_descriptions()) == ["head", "neuron", "expert", "layer", "neuron_pair", "pooled_feature"]
    with pytest.raises(UnknownNameError, match="'no_kind': expected one of head, neuron, expert, layer, neuron_pair"):
        PruningConfig(granularity=["head", "no_kind"])


def test_a_kind_says_which_criteria_rank_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_kinds.PooledFeature, "criteria", frozenset({"magnitude", "random"}))
    PruningConfig(granularity=["pooled_feature"], criterion="random")
    with pytest.raises(ConfigError, match="'taylor' cannot rank pooled_features: expected one of magnitude, random"):
        PruningConfig(granularity=["pooled_feature"], criterion="taylor")


def test_two_kinds_that_cut_the_same_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_kinds.NeuronPair, "cut_as", None)
    with pytest.raises(hf_prune.ArchitectureError, match=r"'neuron' and 'neuron_pair' both cut .*names it in cut_as"):
        shrink(tiny("bert")[0])
