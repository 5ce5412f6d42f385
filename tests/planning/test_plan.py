"""The plan: exact counts, a table to read, and every refusal before anything changes."""

import json
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from hf_prune.conversion.streaming.prune_stream import prune_stream
from hf_prune.errors import CalibrationError, MaskError, PlanError
from hf_prune.evaluation.sparsity_report import sparsity_report
from hf_prune.mixin import prunable
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import make_plan
from hf_prune.pruning.mask_store import MaskStore, checked_masks
from hf_prune.training.pruner import TrainingPruner
from hf_prune.utils.notices import QualityWarning
from tests import models
from tests.models import assert_unchanged, mlp, snapshot
from tests.moe_families import tiny_moe


def removes(model: nn.Module, **settings) -> list[int | None]:
    return [t.remove for t in make_plan(model, PruningConfig(**settings)).tensors]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sparsity": 0.3}, [29, 11]),  # 0.3 * 96 = 28.8, 0.3 * 36 = 10.8
        ({"sparsity": 0.3, "scope": "row"}, [12 * 2, 3 * 4]),  # 0.3 * 8 = 2.4, 0.3 * 12 = 3.6
        ({"sparsity": 0.3, "granularity": "block:3x2"}, [5, 2]),  # 0.3 * 16 = 4.8, 0.3 * 6 = 1.8
        ({"sparsity": 0.3, "granularity": "block:3x2", "scope": "row"}, [4 * 1, 1 * 2]),  # 0.3 * 4 = 1.2, 0.3 * 6
        ({"granularity": "2:4"}, [48, 18]),
        ({"granularity": "1:4"}, [72, 27]),
        ({"sparsity": 0.0}, [0, 0]),
        ({"sparsity": 1.0}, [96, 36]),
        ({"sparsity": 0.3, "allocation": {"fc2": 0.5}}, [29, 18]),
    ],
)
def test_counts_by_hand(settings, expected):
    assert removes(models.mlp(), **settings) == expected  # fc1 is (12, 8), fc2 is (3, 12)


def test_global_scope_counts_over_all_tensors():
    plan = make_plan(models.mlp(), PruningConfig(0.3, scope="global"))
    assert plan.remove == 40  # 0.3 * 132 = 39.6
    assert [(t.remove, t.sparsity) for t in plan.tensors] == [(None, None)] * 2


def test_halves_round_to_even_as_in_torch():
    assert removes(nn.Linear(5, 1), sparsity=0.5) == [2]
    assert removes(nn.Linear(7, 1), sparsity=0.5) == [4]


def test_totals_count_tied_weights_once():
    model = models.tied_linears()
    plan = make_plan(model, PruningConfig(0.5))
    assert plan.total_parameters == 64 + 8 + 8 + 16 + 2
    assert plan.target_parameters == 64 + 16
    assert plan.removed_parameters == 32 + 8
    assert plan.total_bytes == 4 * plan.total_parameters
    assert plan.element_size == 4
    assert make_plan(model.to(torch.bfloat16), PruningConfig()).total_bytes == 2 * plan.total_parameters


def test_blocks_count_as_their_weights():
    plan = make_plan(models.mlp(), PruningConfig(0.3, granularity="block:3x2"))
    assert (plan.remove, plan.removed_parameters) == (7, 42)


def test_already_removed_weights_are_shown():
    model = prune(models.mlp(), 0.25)
    assert [t.already for t in make_plan(model, PruningConfig(0.5), masks=checked_masks(model)).tensors] == [24, 9]


def test_a_plan_changes_nothing(any_transformer):
    before = snapshot(any_transformer)
    plan = make_plan(any_transformer, PruningConfig(0.5))
    str(plan)
    plan.to_dict()
    assert_unchanged(any_transformer, before)
    assert MaskStore.of(any_transformer) is None
    assert plan.model_name == type(any_transformer).__name__


def test_the_table():
    assert str(make_plan(models.mlp(), PruningConfig(0.3, exclude_modules=["fc2"]))) == (
        "Plan for MLP: magnitude, unstructured, scope layer, allocation uniform\n"
        "weight      shape  weights  sparsity  units to remove  removed already\n"
        "----------  -----  -------  --------  ---------------  ---------------\n"
        "fc1.weight  12x8        96   30.00 %               29                0\n"
        "29 of 96 target weights go (30.21 %), 19.73 % of the model's 147 parameters.\n"
        "Targets: 384 B dense; the same as bit mask and surviving values: 280 B.\n"
        "Multiply-adds per token or position in the targets: 96 dense, 67 with a non-zero weight. "
        "Dense kernels compute the zeros too: zeros alone bring no speed-up."
    )


def test_the_table_in_global_scope_and_with_an_explicit_allocation():
    assert "by score" in str(make_plan(models.mlp(), PruningConfig(scope="global")))
    assert "allocation explicit" in str(make_plan(models.mlp(), PruningConfig(allocation={"fc1": 0.1})))


def test_to_dict_is_json():
    values = json.loads(json.dumps(make_plan(models.mlp(), PruningConfig(0.3)).to_dict()))
    assert values["config"] == PruningConfig(0.3).to_dict()
    assert values["removed_parameters"] == 40
    assert values["tensors"][1] == {
        "name": "fc2.weight",
        "shape": [3, 12],
        "units": 36,
        "sparsity": 0.3,
        "remove": 11,
        "already_removed": 0,
    }


def test_what_a_granularity_does_not_divide_stays_dense_and_is_named():
    model = models.tiny_resnet()
    before = snapshot(model)
    stem = "resnet.embedder.embedder.convolution"
    sentence = (
        rf"Left dense, since granularity '2:4' does not divide them: {stem} \(8, 3, 7, 7\): its 3 inputs are not a "
        r"multiple of 4\."
    )
    plan = make_plan(model, PruningConfig(granularity="2:4", target_modules=".*"))
    assert re.search(sentence, str(plan))
    assert any(re.search(sentence, note) for note in plan.to_dict()["notes"])
    with pytest.warns(UserWarning, match=sentence):
        prune(model, granularity="2:4", target_modules=".*")
    assert torch.equal(model.get_submodule(stem).weight, before[f"{stem}.weight"])
    assert f"{stem}.weight" not in MaskStore.of(model).masks
    assert sparsity_report(model).nm_patterns == ("2:4",)
    plan = make_plan(
        models.tiny_resnet(), PruningConfig(granularity="2:4", target_modules=".*", exclude_modules=[stem])
    )
    assert plan.remove > 0
    assert not plan.notes


@pytest.mark.parametrize("settings", [{}, {"scope": "global"}, {"criterion": "taylor"}], ids=str)
def test_a_head_that_blocks_do_not_divide_stays_dense(bert, settings):
    head = bert.classifier.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"classifier \(2, 16\): its 2 outputs are not a multiple of 16"):
        prune(bert, 0.5, granularity="block:16x1", calibration=models.tiny_batches(bert), **settings)
    assert torch.equal(bert.classifier.weight, head)
    assert "classifier.weight" not in MaskStore.of(bert).masks
    assert sparsity_report(bert).target_sparsity == 0.5


def test_n_m_may_not_cross_the_positions_of_a_kernel():
    """6 channels x 6 positions are 36 columns, which 4 divides; 6 inputs it does not."""
    with pytest.raises(PlanError, match="its 6 inputs are not a multiple of 4"):
        make_plan(nn.Sequential(nn.Conv2d(6, 2, (2, 3))), PruningConfig(granularity="2:4", target_modules=["0"]))


@pytest.mark.parametrize(
    ("granularity", "message"),
    [
        ("block:5x1", r"its 12 outputs are not a multiple of 5; fc2 .* its 3 outputs"),
        ("block:1x5", r"its 8 inputs are no"),
        ("block:1x32", r"its 8 inputs are not a multiple of 32; fc2 .* its 12 inputs"),
        ("block:64x64", r"its 12 outputs are not a multiple of 64"),
    ],
)
def test_blocks_that_do_not_divide_are_refused(granularity, message):
    with pytest.raises(PlanError, match=rf"does not divide 2 of 2 targets: fc1 \(12, 8\): {message}"):
        make_plan(models.mlp(), PruningConfig(granularity=granularity))


def test_a_long_list_is_cut(bert):
    with pytest.raises(PlanError, match=r"does not divide 14 of 14 targets: .*; .*; .* and 11 more\. Choose"):
        make_plan(bert, PruningConfig(granularity="block:1x7"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_weights_are_refused_before_any_change(bert, bad):
    prune(bert, 0.2)
    with torch.no_grad():
        bert.classifier.weight[1, 3] = bad
    before, masks = snapshot(bert), dict(MaskStore.of(bert).masks.packed)
    with pytest.raises(
        PlanError, match=r"NaN or infinite values in classifier\.weight: expected finite weights; check how"
    ):
        prune(bert, 0.5)
    assert_unchanged(bert, before)
    assert masks == MaskStore.of(bert).masks.packed  # the very same


def test_a_bad_weight_that_is_no_target_is_nobodys_business(bert):
    with torch.no_grad():
        bert.bert.embeddings.word_embeddings.weight[0, 0] = float("nan")
    assert make_plan(bert, PruningConfig()).remove > 0


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_less_than_before_is_refused(scope):
    model = prune(models.mlp(hidden=40), 0.5, scope=scope)
    before, store = snapshot(model), MaskStore.of(model)
    masks = {name: mask.clone() for name, mask in store.masks.items()}
    message = r"sparsity=0\.3 is below what earlier pruning already removed .*\(\d+ of 440 weights, 5\d\.\d\d %\), and "
    with pytest.raises(
        PlanError, match=message + r"pruning only adds zeros: ask for more, or call discard_masks\(\) first"
    ):
        prune(model, 0.3, scope=scope)
    assert_unchanged(model, before)
    assert MaskStore.of(model).masks.packed == store.masks.packed  # the very same
    assert all(torch.equal(store.masks[name], mask) for name, mask in masks.items())
    assert store.config.sparsity == 0.5


def test_the_same_sparsity_in_another_scope_may_round_differently():
    model = prune(models.mlp(hidden=40), 0.3)
    zeros = int((model.fc1.weight == 0).sum())
    prune(model, 0.3, scope="global")
    assert int((model.fc1.weight == 0).sum()) >= zeros


def test_masks_that_no_longer_fit_are_refused_before_any_change():
    model = prune(models.mlp(), 0.3, exclude_modules=["fc1"])
    model.fc2 = models.fill(nn.Linear(12, 5))
    before = snapshot(model)
    with pytest.raises(
        MaskError, match=r"mask of 'fc2\.weight' has shape \(3, 12\), but the model has shape \(5, 12\)"
    ):
        prune(model, 0.5)
    model.fc2 = nn.Identity()
    with pytest.raises(MaskError, match=r"but the model has no parameter there: the model was changed after pruning"):
        prune(model, 0.5, target_modules=["fc1"])
    assert list(MaskStore.of(model).masks) == ["fc2.weight"]
    assert torch.equal(model.fc1.weight, before["fc1.weight"])


def test_what_earlier_prunings_removed_makes_the_count_a_lower_bound():
    model = prune(mlp(hidden=24), 0.3)
    plan = prune(model, 0.5, granularity="block:3x2", dry_run=True)
    assert not plan.is_exact
    assert f"At least {plan.removed_parameters:,} of" in str(plan)
    prune(model, 0.5, granularity="block:3x2")
    assert sparsity_report(model).removed >= plan.removed_parameters
    fresh = prune(mlp(hidden=24), 0.5, dry_run=True)
    assert fresh.is_exact
    assert "At least" not in str(fresh)


def test_matrices_that_no_config_can_target_are_named():
    """What is multiplied in a way that nobody has declared is of no kind that can be pruned: the plan says so."""
    plan = prune(Odd(), 0.5, dry_run=True)
    assert dict(plan.uncovered) == {"experts": 4 * 6 * 6}
    assert "Not covered: 144 parameters in 1 matrices of no kind that can be pruned, such as experts." in str(plan)
    assert plan.to_dict()["uncovered_parameters"] == 144
    assert "Not covered" not in str(prune(mlp(), 0.5, dry_run=True))


class Odd(nn.Module):
    """A Linear, and experts that nobody has declared."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc = nn.Embedding(10, 6), nn.Linear(6, 4)
        self.experts = nn.Parameter(torch.ones(4, 6, 6))

    def forward(self, input_ids):
        return self.fc(torch.einsum("bsi,eio->bso", self.embedding(input_ids), self.experts))


def mixtral():
    config = MixtralConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    return models.fill(MixtralForCausalLM(config))


def test_experts_are_targets_and_routers_are_left_dense_by_choice(recwarn):
    model = mixtral()
    plan = prune(model, 0.5, dry_run=True)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1}
    assert plan.target_parameters == sum(n for name, n in sizes.items() if "experts" in name or "self_attn" in name)
    assert dict(plan.left_dense) == {f"model.layers.{i}.mlp.gate.weight": 4 * 16 for i in (0, 1)}
    assert "Left dense by choice: 128 weights in 2 first or depthwise convolutions, routers, and tables" in str(plan)
    assert not plan.uncovered
    assert not recwarn.list


ROUTERS = {  # a Linear inside a class of its own
    "switch_transformers": r".*\.mlp\.router\.classifier\.weight",
    "nllb-moe": r".*\.ffn\.router\.classifier\.weight",
    "jetmoe": r"model\.layers\.\d\.(mlp|self_attention\.experts)\.router\.layer\.weight",
    "hunyuan_v1_moe": r"model\.layers\.\d\.mlp\.gate\.wg\.weight",
    "dbrx": r".*\.ffn\.router\.layer\.weight",
}


@pytest.mark.parametrize("family", ROUTERS)
def test_a_linear_inside_a_router_is_left_dense_by_choice(family):
    model, _ = tiny_moe(family)
    plan = make_plan(model, PruningConfig(0.5))
    routers = {name for name, _ in model.named_parameters() if re.fullmatch(ROUTERS[family], name)}
    assert routers
    assert routers <= set(plan.left_dense)
    targets = {t.target.name for t in plan.tensors}
    assert not [name for name in targets if "router" in name or ".gate." in name]
    assert any("experts" in name or ".ffn." in name for name in targets)
    (named,) = make_plan(model, PruningConfig(0.5, target_modules=[min(routers).removesuffix(".weight")])).tensors
    assert named.target.name == min(routers)


class QueryRouter(nn.Module):
    """Chooses among its experts, and is no small part of anything."""

    def __init__(self) -> None:
        super().__init__()
        self.choose = nn.Linear(8, 2)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))


class GateUpLinear(nn.Linear):
    """The name of a layer that gates nothing by itself."""


def test_what_a_router_chooses_among_and_layers_with_similar_names_are_targets():
    model = nn.Sequential(QueryRouter(), GateUpLinear(8, 8))
    plan = make_plan(model, PruningConfig(0.5))
    assert [t.target.name for t in plan.tensors] == ["0.experts.0.weight", "0.experts.1.weight", "1.weight"]
    assert dict(plan.left_dense) == {"0.choose.weight": 16}
    assert "choose.weight" in {t.target.name for t in make_plan(model[0], PruningConfig(0.5)).tensors}


@pytest.mark.parametrize(
    ("name", "table"),
    [
        *((name, True) for name in ("query", "query_tokens", "pos_embed", "position_bias", "r_w_bias", "gamma_2")),
        *((name, True) for name in ("relative_position_bias_table", "attention_biases", "A_log", "time_maa_w")),
        *((name, False) for name in ("query_weight", "w_query", "query_key_value", "token_mixer", "debias")),
        *((name, False) for name in ("embed_proj", "scale_matrix", "bias_kernel")),
    ],
)
def test_tables_are_told_by_whole_words_of_their_names(name, table):
    """Matrices that are multiplied and that no config can target are named as such, and not as tables."""
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_parameter(name, nn.Parameter(torch.ones(4, 4)))
    plan = make_plan(model, PruningConfig(0.5))
    assert (name in plan.left_dense, name in plan.uncovered) == (table, not table)


def test_matrices_that_stay_dense_are_named_once():
    sentence = r"85\.71 % of the 168 weights in matrices of Odd stay dense, the largest experts \(144\): pruning covers"
    assert re.search(sentence, str(prune(Odd(), 0.5, dry_run=True)))
    with pytest.warns(UserWarning, match=sentence) as caught:
        prune(Odd(), 0.5, criterion="wanda", scope="row", calibration=[{"input_ids": torch.ones(1, 2).long()}])
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert re.search(sentence, sparsity_report(Odd()).summary())


class Mixed(nn.Module):
    """A Linear that 2:3 divides, one that it does not, and a matrix of no module that is known."""

    def __init__(self, table: bool = True) -> None:
        super().__init__()
        self.even, self.odd = nn.Linear(6, 4), nn.Linear(4, 5)
        if table:
            self.table = nn.Parameter(torch.ones(3, 3))


@pytest.mark.parametrize(
    ("settings", "table", "sentence"),
    [
        ({"granularity": "2:3"}, False, r"45\.45 % of the 44 .* the largest odd\.weight \(20\)\.$"),
        (
            {"granularity": "2:3"},
            True,
            r"54\.72 % of the 53 .* the largest odd\.weight \(20\), table \(9\)\. Of table \(9\): pruning covers Lin",
        ),
        ({}, True, r"16\.98 % of the 53 .* the largest table \(9\): pruning covers Linear, Conv1D"),
    ],
)
def test_the_reason_why_matrices_stay_dense_is_theirs(settings, table, sentence):
    """A Linear that a granularity does not divide is covered by pruning: another sentence says why it stays."""
    model = Mixed(table)
    with pytest.warns(UserWarning, match=sentence) as caught:
        prune(model, **settings)
    (warning,) = caught
    assert ("does not divide them: odd (5, 4)" in str(warning.message)) == bool(settings)
    assert warning.filename == __file__


def test_warnings_name_the_line_of_the_user():
    """Whatever lies between it and the place where something was found: methods, decorators, loops."""
    model = prunable(models.tiny_bert())
    model.table = nn.Parameter(torch.ones(100, 100))  # of no kind that is known
    with pytest.warns(UserWarning, match="stay dense") as caught:
        model.prune(0.5)
    assert [warning.filename for warning in caught] == [__file__]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    with pytest.warns(UserWarning, match="not zero any more") as caught:
        sparsity_report(model)
    assert [warning.filename for warning in caught] == [__file__]


def test_streaming_and_training_say_what_stays_dense(tmp_path):
    models.tiny_resnet().save_pretrained(tmp_path / "dense")
    config = PruningConfig(granularity="4:16")
    with pytest.warns(UserWarning, match=r"Left dense, since granularity '4:16' does not divide them: ") as caught:
        prune_stream(tmp_path / "dense", config, tmp_path / "out")
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=r"Left dense, since granularity '4:16' does not divide them: ") as caught:
        TrainingPruner(models.tiny_resnet(), config, steps=4)
    assert len(caught) == 1


def test_who_names_modules_is_told_only_of_those(recwarn):
    prune(with_table(), 0.5, target_modules=["query", "key"])
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"stay dense, the largest bert\.table"):
        prune(with_table(), 0.5, target_modules=r"bert|.*query")


def with_table():
    model = models.tiny_bert()
    model.bert.table = nn.Parameter(torch.ones(100, 100))
    return model


def test_first_and_depthwise_convolutions_are_left_by_choice(recwarn):
    """The first convolution of a ResNet reads pixels; those of a grouped one with several inputs are targets."""
    model = models.tiny_resnet()
    plan = prune(model, 0.5, dry_run=True)
    convolutions = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert dict(plan.left_dense) == {name: m.weight.numel() for name, m in convolutions.items() if m.in_channels == 3}
    pruned = {t.target.name for t in plan.tensors}
    assert pruned == {*convolutions, "classifier.1.weight"} - set(plan.left_dense)
    assert not recwarn.list
    layers = nn.Sequential(nn.Conv1d(8, 8, 3, groups=8), nn.Conv1d(8, 8, 3, groups=4), nn.Conv1d(4, 8, 3))
    plan = prune(layers, 0.5, dry_run=True)
    assert [t.target.slabs for t in plan.tensors] == [4]
    assert dict(plan.left_dense) == {"0.weight": 24, "2.weight": 96}
    assert not prune(layers, 0.5, target_modules=".*", dry_run=True).left_dense


@pytest.mark.parametrize("kind", [*sorted(models.TRANSFORMERS), "vit", "moe"])
def test_ordinary_models_are_pruned_without_a_word(kind, recwarn):
    build = {**models.TRANSFORMERS, "vit": models.tiny_vit, "moe": models.tiny_moe}[kind]
    model = build()
    prune(model, 0.5)
    assert not sparsity_report(model).notes
    assert not [w for w in recwarn.list if w.category is not QualityWarning]  # of language models, by magnitude


def old_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(module)


@pytest.mark.parametrize(
    "change",
    [old_weight_norm, torch.nn.utils.parametrizations.orthogonal],
)
def test_layers_whose_weights_are_computed_are_named(change):
    """One in ten thousand weights, and still somebody meant it."""
    model = nn.ModuleDict({"wide": nn.Linear(256, 256), "small": nn.Linear(4, 4)})
    change(model["small"])
    before = snapshot(model)
    with pytest.warns(
        UserWarning, match=r"Left dense, since their weights are computed .*: small; torch\.nn\.utils\.para"
    ):
        prune(model, 0.5)
    assert list(MaskStore.of(model).masks) == ["wide.weight"]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name.startswith("small"))
    plain = nn.ModuleDict({"wide": nn.Linear(256, 256), "small": nn.Linear(4, 4)})
    change(plain["small"])
    prune(plain, 0.5, exclude_modules=["small"])


@pytest.mark.parametrize("dim", [0, 2])
def test_weight_norm_is_pruned_in_its_directions(dim):
    """Zeros of the direction are zeros of the weight, and the lengths are those of what is left."""
    layer = torch.nn.utils.parametrizations.weight_norm(models.fill(nn.Conv1d(8, 6, 5)), dim=dim)
    model = nn.Sequential(layer)
    (tensor,) = make_plan(model, PruningConfig(0.5)).tensors
    assert (tensor.target.module, tensor.target.matrix_shape) == ("0", (6, 40))
    prune(model, 0.5)
    assert int((layer.weight == 0).sum()) == 120
    lengths = layer.weight.norm(dim=[d for d in range(3) if d != dim], keepdim=True)
    assert torch.allclose(lengths, layer.parametrizations.weight.original0)
    prune(model, 0.7, criterion="wanda", calibration=[{"input": torch.randn(2, 8, 20)}])
    assert int((layer.weight == 0).sum()) == 168
    assert make_plan(model, PruningConfig(0.8, target_modules=["0"])).tensors


NORMED = {
    "linear": (lambda: nn.Linear(32, 32), 0),
    "input by input": (lambda: nn.Linear(32, 32), 1),
    "one length": (lambda: nn.Linear(32, 32), None),
    "grouped": (lambda: nn.Conv1d(8, 8, 4, groups=2), 2),  # as in wav2vec2
    "transposed": (lambda: nn.ConvTranspose1d(16, 6, 2), 0),
}


@pytest.mark.parametrize("kind", NORMED)
@pytest.mark.parametrize("settings", [{}, {"scope": "global"}, {"criterion": "wanda"}, {"criterion": "random"}])
def test_weight_norm_is_pruned_as_what_the_layer_multiplies_with(kind, settings):
    """Lengths of directions have no effect; what stays keeps its value, and a second pruning goes on from there."""
    build, dim = NORMED[kind]
    plain = nn.Sequential(models.fill(build()))
    normed = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(models.fill(build()), dim=dim))
    parts = normed[0].parametrizations.weight
    with torch.no_grad():
        (parts.original1 if dim == 1 else parts.original1[: len(parts.original1) // 2]).mul_(100)
        if dim is None:
            parts.original1[len(parts.original1) // 2 :] *= 100
        plain[0].weight.copy_(normed[0].weight)
    original = plain[0].weight.detach().clone()
    dense = [p.detach().clone() for p in normed.parameters()]
    size = (3, 32) if isinstance(plain[0], nn.Linear) else (2, plain[0].in_channels, 12)
    data = [{"input": torch.randn(size, generator=torch.Generator().manual_seed(0))}]
    for sparsity in (0.3, 0.6):
        given = {**settings, "calibration": data} if "wanda" in settings.values() else settings
        for model in (plain, normed):
            prune(model, sparsity, keep_dense=True, **given)
        if settings.get("criterion") == "random":  # seeded by the name, which differs
            assert torch.allclose(normed[0].weight[normed[0].weight != 0], original[normed[0].weight != 0])
        else:
            assert torch.equal(normed[0].weight == 0, plain[0].weight == 0)
            assert torch.allclose(normed[0].weight, plain[0].weight, rtol=1e-5)
    MaskStore.of(normed).discard(normed)
    assert all(torch.equal(p, before) for p, before in zip(normed.parameters(), dense, strict=True))


def test_lengths_of_weight_norm_stay_where_gradients_take_them_as_given():
    layer = torch.nn.utils.parametrizations.weight_norm(models.fill(nn.Linear(8, 8)))
    lengths = layer.parametrizations.weight.original0.detach().clone()
    data = [{"x": torch.randn(4, 8), "labels": torch.zeros(4).long()}]
    before = layer.weight.detach().clone()
    prune(Loss(layer), 0.5, criterion="taylor", calibration=data)
    assert torch.equal(layer.parametrizations.weight.original0, lengths)
    assert not torch.allclose(layer.weight[layer.weight != 0], before[layer.weight != 0])


class Loss(nn.Module):
    """The loss of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x, labels):
        return SimpleNamespace(loss=nn.functional.cross_entropy(self.layer(x), labels))


def test_an_error_gives_lengths_back():
    """The next layer fails after the first one was pruned."""
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(models.fill(nn.Linear(8, 8))), nn.Linear(8, 8))
    before = snapshot(model)

    def fail(*_):
        raise RuntimeError("on purpose")

    model[1].register_forward_pre_hook(lambda *_: fail() if (model[0].weight == 0).any() else None)
    with pytest.raises(CalibrationError, match="on purpose"):
        prune(model, 0.5, criterion="wanda", calibration=[{"input": torch.randn(4, 8)}])
    assert_unchanged(model, before)
    assert MaskStore.of(model) is None


def test_something_is_left_of_every_slice_of_weight_norm():
    """Its length is divided by: the largest weight of a slice goes after all others."""
    layer = torch.nn.utils.parametrizations.weight_norm(models.fill(nn.ConvTranspose1d(16, 6, 2)))
    with torch.no_grad():
        layer.parametrizations.weight.original1[:8] *= 1e-3  # a slice for each input
    model = nn.Sequential(layer)
    for sparsity in (0.5, 0.9):
        prune(model, sparsity, scope="global")
        assert int((layer.weight == 0).sum()) == round(sparsity * 192)
        assert bool(layer.weight.isfinite().all())
        assert bool((layer.weight != 0).any(2).any(1).all())


def test_what_weight_norm_cannot_do():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 6, 5)), nn.Conv1d(6, 4, 1))
    plan = make_plan(model, PruningConfig(0.5, "sparsegpt"))
    assert [t.target.module for t in plan.tensors] == ["1"]
    assert "weight norm computes it, so it cannot be repaired unless" in str(plan)
    before = snapshot(model)
    with pytest.raises(PlanError, match=r"nothing would be left of 3 of 6 slices of 0\.parametriz.* scope 'row'"):
        prune(model, 0.5, granularity="row", target_modules=["0"])
    assert_unchanged(model, before)


def test_sparsities_that_remove_nothing_or_everything():
    assert "A sparsity of 0 removes nothing." in str(prune(mlp(), 0.0, dry_run=True))
    assert "A sparsity of 1 removes everything that may go" in str(prune(mlp(), 1.0, dry_run=True))
    assert "A sparsity of" not in str(prune(mlp(), 0.5, dry_run=True))
