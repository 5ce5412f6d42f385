"""Which weights are meant, and the one (out, in) view of them."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import PlanError
from hf_prune.kernels.matrix import Target, is_finite
from hf_prune.planning import targets
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.targets import module_matches, resolve_targets
from tests import models
from tests.reference.pruning import reference_matrix


def names(model: nn.Module, meant="all-linear", excluded=()) -> list[str]:
    config = PruningConfig(target_modules=meant, exclude_modules=excluded)
    return [target.module for target in resolve_targets(model, config)]


class Shared(nn.Module):
    """One Linear under two names, and another one."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a
        self.c = nn.Linear(4, 4)


def test_all_linear_in_the_order_of_the_modules(bert):
    layers = [
        f"bert.encoder.layer.{i}.{name}"
        for i in (0, 1)
        for name in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
    ]
    assert names(bert) == [*layers, "bert.pooler.dense", "classifier"]
    (first, *_) = resolve_targets(bert, PruningConfig())
    assert first == Target("bert.encoder.layer.0.attention.self.query.weight", layers[0], "linear", (16, 16))


@pytest.mark.parametrize(
    ("build", "head"),
    [("gpt2", "lm_head"), ("llama", "lm_head"), ("t5", "lm_head"), ("bert_mlm", "cls.predictions.decoder")],
)
def test_the_output_embedding_is_excluded_unless_named(build, head):
    model = models.TRANSFORMERS[build]()
    assert isinstance(model.get_submodule(head), nn.Linear)
    assert head not in names(model)
    assert len(names(model)) > 3
    assert names(model, [head]) == [head]


def test_the_tied_output_embedding_goes_by_the_parameters_name(gpt2):
    (target,) = resolve_targets(gpt2, PruningConfig(target_modules=["lm_head"]))
    assert (target.name, target.module) == ("transformer.wte.weight", "lm_head")


def test_conv1d_is_in_by_out(gpt2):
    target = resolve_targets(gpt2, PruningConfig(target_modules=["c_attn"]))[0]
    assert (target.shape, target.matrix_shape, target.inputs, target.layout) == ((16, 48), (48, 16), 16, "conv1d")


def test_tied_weights_are_one_target():
    targets = resolve_targets(models.tied_linears(), PruningConfig())
    assert [(t.name, t.module) for t in targets] == [("first.weight", "first"), ("head.weight", "head")]
    by_the_second_name = resolve_targets(models.tied_linears(), PruningConfig(target_modules=["second"]))
    assert [(t.name, t.module) for t in by_the_second_name] == [("first.weight", "second")]


def test_modules_run_several_times_are_one_target():
    """ALBERT runs the six weights of one layer three times."""
    found = names(models.tiny_albert())
    assert len(found) == len(set(found)) == 6 + 3  # the embedding's projection, the pooler, the classifier
    assert sum("albert_layers" in name for name in found) == 6


def test_a_shared_module_answers_to_all_its_names():
    assert names(Shared()) == ["a", "c"]
    assert names(Shared(), ["b"]) == ["a"]
    assert names(Shared(), "all-linear", ["b"]) == ["c"]


def test_convolutions_are_targets_unless_depthwise_or_first():
    model = models.conv_net()
    assert names(model) == [
        name for name in names(model, ".*") if model.get_submodule(name) not in first_or_depthwise(model)
    ]
    assert names(model, ".*") == ["conv1d", "conv2d", "grouped", "fc"]
    assert names(model, ".*", "all-linear") == [n for n in names(model, ".*") if n not in names(model)]
    assert names(models.tiny_resnet())[-1] == "classifier.1"


def first_or_depthwise(model):
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d)]
    return {m for m in convolutions if m.in_channels <= 4 or m.groups == m.in_channels}


def test_attention_of_torch_has_three_projections_in_one_weight():
    """Its output projection is a Linear that it reads without calling it."""
    attention = nn.MultiheadAttention(8, 2)
    packed, output = resolve_targets(attention, PruningConfig())
    assert (packed.name, packed.slabs, packed.matrix_shape, packed.slab_shape) == ("in_proj_weight", 3, (24, 8), (8, 8))
    assert output.name == "out_proj.weight"
    assert names(nn.Sequential(attention), ["in_proj_weight"]) == ["0"]
    apart = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    assert [t.name for t in resolve_targets(apart, PruningConfig())] == [
        *("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
    ]


def test_recurrent_layers_are_targets():
    found = resolve_targets(nn.LSTM(6, 4), PruningConfig())
    assert [(t.name, t.matrix_shape) for t in found] == [("weight_ih_l0", (16, 6)), ("weight_hh_l0", (16, 4))]
    assert [t.name for t in resolve_targets(nn.GRUCell(6, 4), PruningConfig())] == ["weight_ih", "weight_hh"]


def test_embeddings_and_norms_are_never_targets(bert):
    found = resolve_targets(bert, PruningConfig(target_modules=".*"))
    assert [t.module for t in found] == names(bert)


def test_lists_are_suffixes_of_whole_name_parts(bert):
    assert names(bert, ["query"]) == [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    assert names(bert, ("0.attention.self.query", "classifier")) == [
        "bert.encoder.layer.0.attention.self.query",
        "classifier",
    ]
    assert [module_matches("a.bc", (part,)) for part in ("bc", "c", "a.bc", "a", "x.a.bc")] == [
        *(True, False, True, False, False)
    ]


def test_a_string_is_a_regular_expression_for_the_whole_name(bert):
    assert names(bert, r".*\.1\..*(query|key)") == [
        f"bert.encoder.layer.1.attention.self.{x}" for x in ("query", "key")
    ]
    assert names(bert, "classifier") == ["classifier"]
    assert [module_matches("a.bc", pattern) for pattern in ("a.b", "bc", "a.bc", "a.b.*")] == [False, False, True, True]
    with pytest.raises(
        PlanError,
        match=r"target_modules='query' is a regular expression for whole.*a list of last names, such as \['query'\]",
    ):
        names(bert, "query")  # a part of the name is not the name


def test_excluded_wins(bert):
    kept = names(bert, "all-linear", ["classifier", "pooler.dense"])
    assert kept == [name for name in names(bert) if name not in ("classifier", "bert.pooler.dense")]
    assert names(bert, ["query", "key"], r".*\.0\..*") == names(bert, r".*\.1\..*(query|key)")


@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["qeury"], r": unknown module 'qeury': expected one of .*value\. Did you mean 'query'\?"),
        (["query", "clasifier"], r": unknown module 'clasifier': .*Did you mean 'classifier'\?"),
        (r".*\.7\..*", r"='.*7.*' is a regular expression for whole module names, and none matches: .*there are class"),
        (["uery"], r": unknown module 'uery'"),
    ],
)
def test_a_name_that_matches_nothing_is_refused(bert, setting, value, message):
    with pytest.raises(PlanError, match=f"^{setting}{message}"):
        resolve_targets(bert, PruningConfig(**{setting: value}))


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (nn.Embedding(3, 3), {}, r"no target matched target_modules='all-linear'.*Embedding has no Linear, Conv1D or"),
        (
            models.mlp(),
            {"exclude_modules": ["fc1", "fc2"]},
            r"exclude_modules=\('fc1', 'fc2'\): MLP has Linear named fc1",
        ),
        (models.mlp(), {"exclude_modules": "all-linear"}, r"no target matched .*exclude_modules='all-linear'"),
        (nn.Sequential(nn.Conv2d(2, 2, 1)), {}, r"no target matched .*Sequential has Conv2d named 0"),
        (
            models.conv_net(),
            {"exclude_modules": ".*"},
            r"ConvNet has Conv1d named conv1d; Conv2d named conv2d, grouped",
        ),
    ],
)
def test_nothing_left_is_refused(model, settings, message):
    with pytest.raises(PlanError, match=message):
        resolve_targets(model, PruningConfig(**settings))


def test_a_bare_linear_is_a_model():
    (target,) = resolve_targets(nn.Linear(2, 3), PruningConfig())
    assert (target.name, target.module, target.shape) == ("weight", "", (3, 2))
    assert names(nn.Linear(2, 3), "all-linear", "") == [""]


def test_meta_weights_are_refused():
    model = models.mlp()
    model.fc2 = nn.Linear(12, 3, device="meta")
    with pytest.raises(PlanError, match=r"fc2\.weight is on the meta device, and no hook of accelerate holds"):
        resolve_targets(model, PruningConfig())
    assert names(model, "all-linear", ["fc2"]) == ["fc1"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.complex64])
def test_quantized_weights_are_refused(dtype):
    model = models.mlp()
    model.fc1.weight = nn.Parameter(model.fc1.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(PlanError, match=rf"fc1\.weight is {dtype}: expected float32, .*; prune before quantizing"):
        resolve_targets(model, PruningConfig())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_floating_point_weight_is_a_target(dtype):
    assert names(models.mlp().to(dtype)) == ["fc1", "fc2"]


LAYOUTS = {
    "linear": (nn.Linear(4, 3).weight, (3, 4), 4),
    "conv1d": (Conv1D(3, 4).weight, (3, 4), 4),
    "conv": (nn.Conv2d(4, 3, (2, 5)).weight, (3, 40), 4),
    "conv, one dimension": (nn.Conv1d(4, 6, 3).weight, (6, 12), 4),
    "conv, groups": (nn.Conv2d(4, 6, 3, groups=2).weight, (6, 18), 2),
    "conv, three dimensions": (nn.Conv3d(2, 2, (1, 2, 3)).weight, (2, 12), 2),
    "linear, experts": (nn.Parameter(torch.randn(3, 4, 5)), (12, 5), 5),
    "linear, experts below one another": (nn.Parameter(torch.randn(12, 5)), (12, 5), 5),
    "linear, outputs by heads": (nn.Parameter(torch.randn(4, 3, 5)), (4, 15), 15),
    "conv1d, outputs by heads": (nn.Parameter(torch.randn(4, 3, 5)), (15, 4), 4),
    "conv1d, experts": (nn.Parameter(torch.randn(3, 5, 4)), (12, 5), 5),
    "conv1d, experts below one another": (nn.Parameter(torch.randn(15, 4)), (12, 5), 5),
}


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_convolution_is_a_matrix_like_any_other(groups):
    layer = nn.ConvTranspose2d(4, 6, (2, 3), groups=groups)
    target = resolve_targets(nn.Sequential(layer), PruningConfig(target_modules=".*"))[0]
    assert (target.slabs, target.matrix_shape, target.inputs) == (groups, (6, 4 // groups * 6), 4 // groups)
    weight = layer.weight.detach()
    matrix = target.matrix(weight)
    for output in range(6):
        group, place = divmod(output, 6 // groups)
        inputs = weight.chunk(groups)[group][:, place]  # (inputs, *kernel)
        assert torch.equal(matrix[output], inputs.movedim(0, -1).flatten())
    assert torch.equal(target.native(matrix), weight)
    assert target.native(matrix).is_contiguous()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_canonical_matrix(kind):
    weight, shape, inputs = LAYOUTS[kind]
    weight = weight.detach()
    slabs = 3 if "experts" in kind else 1
    target = Target("w", "m", kind.partition(",")[0], tuple(weight.shape), slabs)
    assert (target.matrix_shape, target.inputs, target.size) == (shape, inputs, weight.numel())
    matrix = target.matrix(weight)
    if "heads" in kind:
        assert torch.equal(matrix, weight.flatten(1) if target.layout == "linear" else weight.flatten(1).t())
    elif slabs == 1:
        assert torch.equal(matrix, reference_matrix(target, weight))
    for number, slab in enumerate(weight.reshape(slabs, -1, weight.shape[-1]) if slabs > 1 else ()):
        assert torch.equal(matrix[target.rows(number)], slab if target.layout == "linear" else slab.t())
        assert torch.equal(target.slab(number).matrix(matrix[target.rows(number)]), matrix[target.rows(number)])
    back = target.native(matrix)
    assert torch.equal(back, weight)
    assert back.is_contiguous()


def test_the_columns_of_a_convolution_run_over_input_channels_first():
    weight = torch.tensor([[[0.0, 1.0], [10.0, 11.0], [20.0, 21.0]]])  # (1 out, 3 in, 2 positions)
    target = Target("w", "m", "conv", (1, 3, 2))
    assert target.matrix(weight).tolist() == [[0.0, 10.0, 20.0, 1.0, 11.0, 21.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_is_finite_finds_a_single_bad_value(dtype, bad):
    tensor = torch.ones(5, 7, dtype=dtype)
    assert is_finite(tensor)
    tensor[2, 3] = bad
    assert not is_finite(tensor)
    tensor[4, 6] = -bad
    assert not is_finite(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_is_finite_when_only_the_sum_overflows(dtype):
    assert is_finite(torch.full((100,), torch.finfo(dtype).max, dtype=dtype))


def test_empty_weight_is_refused():
    model = nn.Sequential(nn.Linear(4, 1))
    model[0].weight = nn.Parameter(torch.empty(0, 4))
    with pytest.raises(PlanError, match=r"0\.weight has no elements \(shape \(0, 4\)\): gather partitioned weights"):
        resolve_targets(model, PruningConfig())


def test_a_pattern_that_takes_too_long_is_stopped(monkeypatch):
    """Alternatives are no repetition, and can take forever all the same: configs come from checkpoints of others."""
    monkeypatch.setattr(targets, "_MATCH_SECONDS", 0.01)
    pattern = PruningConfig(target_modules="(?:a|[ac]|aa)" * 30 + "[x-z]").target_modules
    model = nn.ModuleDict({"a" * 50: nn.Linear(2, 2)})
    with pytest.raises(PlanError, match=r"takes longer than 0.01 s to match with 'a+': list the modules instead"):
        resolve_targets(model, PruningConfig(target_modules=pattern))


def test_names_mean_what_follows_a_dot():
    names = ["a", "b.a", "b.ba", "b.a.c", "ab.a"]
    assert [name for name in names if targets.module_matches(name, ("a",))] == ["a", "b.a", "ab.a"]
    assert [name for name in names if targets.module_matches(name, {"b.a"})] == ["b.a"]
    assert not targets.module_matches("a..b", ("b.",))
