"""Wanda, SparseGPT and ALPS against hand computations, slow twins, and each other."""

import pytest
import torch
from torch import nn

from hf_prune.calibration.padding import Padding
from hf_prune.criteria.base import WeightStats
from hf_prune.criteria.registry import CRITERIA
from hf_prune.kernels.least_squares import damped, layer_error, least_squares
from hf_prune.kernels.matrix import output_rows
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import make_plan
from hf_prune.planning.targets import resolve_targets
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.pruning.selector import Selector
from tests import models
from tests.kernels.test_least_squares import problem
from tests.models import same_bits, tiny_batches
from tests.reference.reconstruction import (
    reference_best_rows,
    reference_error,
    reference_least_squares,
    reference_sparsegpt,
)

REPAIRING = ["sparsegpt", "alps"]


def run(criterion: str, weight, gram, sparsity=0.5, old=None, **settings):
    """Prune one matrix with the plan's own selection."""
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    if "granularity" in settings and ":" in settings["granularity"] and "block" not in settings["granularity"]:
        sparsity = None
    plan = make_plan(model, PruningConfig(sparsity, criterion, **settings))
    entry = CRITERIA.get(criterion)()
    values = {"input_gram": gram.float(), "input_norm": gram.diagonal().sqrt().float()}
    stats = WeightStats(0, **{need: values[need] for need in entry.needs})
    return entry.prune_weight(weight, stats, Selector(criterion, plan.tensors[0], plan.granularity, old))


def test_wanda_by_hand():
    stats = WeightStats(0, input_norm=torch.tensor([2.0, 0.5, 0.0]))
    scores = CRITERIA.get("wanda")().scores(torch.tensor([[-3.0, 4.0, 9.0]]), stats)
    assert scores[0, :2].tolist() == [6.0, 2.0]
    assert 0 < scores[0, 2] < 1e-6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
def test_sparsegpt_equals_its_twin(seed, sparsity):
    weight, _, gram = problem(rows=4, columns=160, tokens=400, seed=seed)
    keep, found = run("sparsegpt", weight, gram, sparsity)
    expected_keep, expected = reference_sparsegpt(weight, gram.float(), sparsity)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_sparsegpt_of_n_m_equals_its_twin():
    weight, _, gram = problem(rows=4, columns=136, tokens=400)
    keep, found = run("sparsegpt", weight, gram, granularity="2:4")
    expected_keep, expected = reference_sparsegpt(weight, gram.float(), 0.5, pool=(2, 4))
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert keep.view(4, 34, 4).sum(-1).unique().tolist() == [2]


@pytest.mark.covering(2)
@pytest.mark.parametrize("criterion", REPAIRING)
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("granularity", "scope"),
    [
        *(("unstructured", "layer"), ("unstructured", "row"), ("2:4", "layer"), ("1:4", "layer")),
        *(("block:3x2", "layer"), ("block:3x2", "row"), ("block:6x1", "layer"), ("block:1x4", "row")),
    ],
)
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9, 1.0])
def test_counts_are_exact_in_more_columns_than_one_block(criterion, again, granularity, scope, sparsity):
    weight, _, gram = problem(rows=6, columns=300, tokens=500, dtype=torch.float32)
    old = None
    if again:
        old = torch.rand(6, 300) < (0.7 if sparsity > 0.4 else 1.1)
        if granularity == "2:4":
            old = (torch.arange(300) % 4 != 1).expand(6, 300)
        if granularity == "1:4":
            old = (torch.arange(300) % 2 == 1).expand(6, 300)
        if granularity.startswith("block"):
            return
        weight = weight * old
    keep, new = run(criterion, weight, gram, sparsity, old, granularity=granularity, scope=scope)
    if granularity in ("2:4", "1:4"):
        assert keep.view(6, 75, 4).sum(-1).unique().tolist() == [int(granularity[0])]
    elif granularity == "unstructured":
        counts = (~keep).sum(1) if scope == "row" else (~keep).sum()[None]
        assert counts.unique().tolist() == [round(sparsity * 300 * (1 if scope == "row" else 6))]
    else:
        rows, columns = map(int, granularity.removeprefix("block:").split("x"))
        blocks = keep.view(6 // rows, rows, 300 // columns, columns).permute(0, 2, 1, 3).flatten(2)
        assert torch.equal(blocks.all(-1), blocks.any(-1))
        gone = (~blocks.all(-1)).sum(1) if scope == "row" else (~blocks.all(-1)).sum()[None]
        units = 300 // columns * (1 if scope == "row" else 6 // rows)
        assert gone.unique().tolist() == [round(sparsity * units)]
    if old is not None:
        assert not (keep & ~old).any()
    assert not new[~keep].any()
    assert torch.isfinite(new).all()


@pytest.mark.covering(1)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_each_method_is_better_than_the_one_before(seed, sparsity):
    """In layer error: ALPS at most SparseGPT, and at most magnitude + least squares, which is below magnitude."""
    weight, _, gram = problem(rows=24, columns=48, tokens=200, seed=seed, dtype=torch.float32)
    keep, _ = run("magnitude", weight, gram, sparsity)
    plain = float(layer_error(weight, weight * keep, gram))
    solved = float(layer_error(weight, least_squares(weight, keep, damped(gram)), gram))
    sparsegpt = float(layer_error(weight, run("sparsegpt", weight, gram, sparsity)[1], gram))
    alps = float(layer_error(weight, run("alps", weight, gram, sparsity)[1], gram))
    assert solved < plain
    assert alps <= solved
    assert alps <= sparsegpt


def test_alps_is_close_to_the_best_of_all_masks():
    """The error beyond that of the best masks of 6 x 6 weights, over several problems, against magnitude's."""
    beyond = {"alps": 0.0, "magnitude": 0.0}
    for seed in range(6):
        weight, inputs, gram = problem(rows=6, columns=6, tokens=100, seed=seed)
        best = reference_error(weight, reference_best_rows(weight, inputs, 3), inputs)
        for criterion in beyond:
            keep, _ = run(criterion, weight, gram, scope="row")
            error = reference_error(weight, reference_least_squares(weight, keep, inputs), inputs)
            assert error >= best * (1 - 1e-9)
            beyond[criterion] += error / best - 1
    assert 0 < beyond["alps"] < 0.5 * beyond["magnitude"]


@pytest.mark.parametrize("criterion", [*REPAIRING, "wanda"])
def test_inputs_that_are_always_zero_go_first(criterion):
    weight, inputs, _ = problem(columns=8, dtype=torch.float32)
    inputs[:, [2, 5]] = 0
    weight[:, [2, 5]] *= 100
    keep, new = run(criterion, weight, inputs.t() @ inputs / len(inputs), 0.25)
    assert not keep[:, [2, 5]].any()
    assert keep[:, [0, 1, 3, 4, 6, 7]].all()
    torch.testing.assert_close(new[keep], weight[keep], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", REPAIRING)
@pytest.mark.parametrize("gram", [torch.zeros(8, 8), torch.ones(8, 8), torch.eye(8) * 1e-30, torch.eye(8) * 1e20])
def test_degenerate_inputs_stay_finite(criterion, gram):
    weight, _, _ = problem(dtype=torch.float32)
    keep, new = run(criterion, weight, gram)
    assert int(keep.sum()) == 20
    assert torch.isfinite(new).all()
    assert not new[~keep].any()


@pytest.mark.covering(2)
@pytest.mark.parametrize("criterion", ["wanda", *REPAIRING])
@pytest.mark.parametrize("granularity", ["unstructured", "2:4", "block:4x4"])
@pytest.mark.parametrize("kind", ["bert", "distilbert", "gpt2", "llama", "t5", "albert"])
def test_transformers_are_pruned_exactly_and_the_same_each_time(criterion, granularity, kind):
    found = []
    for _ in range(2):
        model = models.TRANSFORMERS[kind]()
        config = PruningConfig(None, criterion, granularity)
        if hasattr(model, "classifier"):
            config = config.replace(exclude_modules=["classifier"])
        if granularity == "block:4x4":
            config = config.replace(target_modules=r".*(ffn|mlp|fc|wi|wo|intermediate|lin).*")
        plan = make_plan(model, config)
        prune(model, config, calibration=tiny_batches(model))
        masks = MaskStore.of(model).masks
        area = plan.granularity.block[0] * plan.granularity.block[1]
        for tensor in plan.tensors:
            assert int((~masks[tensor.target.name]).sum()) == tensor.remove * area
            assert not model.get_parameter(tensor.target.name)[~masks[tensor.target.name]].any()
        found.append(models.snapshot(model))
    assert all(same_bits(found[0][name], found[1][name]) for name in found[0])


class Grouped(nn.Module):
    """A convolution of three groups, or three convolutions that each see a third of the channels."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        whole = nn.Conv2d(12, 6, (3, 2), stride=2, padding=1, groups=3)
        apart = nn.ModuleList(nn.Conv2d(4, 2, (3, 2), stride=2, padding=1) for _ in range(3))
        for i, part in enumerate(apart):
            part.weight.data.copy_(whole.weight[2 * i : 2 * i + 2])
            part.bias.data.copy_(whole.bias[2 * i : 2 * i + 2])
        self.convolutions = nn.ModuleList([whole]) if together else apart

    def forward(self, x):
        parts = x.chunk(len(self.convolutions), dim=1)
        return torch.cat([conv(part) for conv, part in zip(self.convolutions, parts, strict=True)], 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "wanda", "scope": "row"},
        {"criterion": "wanda", "granularity": "2:4"},
        *({"criterion": criterion} for criterion in REPAIRING),
        {"criterion": "magnitude", "scope": "row", "repair": "least_squares"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_each_group_of_a_convolution_has_inputs_of_its_own(settings):
    batches = [{"x": torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(i))} for i in range(3)]
    models_ = [Grouped(True), Grouped(False)]
    for model in models_:
        sparsity = {} if "granularity" in settings else {"sparsity": 0.5}
        prune(model, calibration=batches, target_modules=".*", **sparsity, **settings)
    (whole,), parts = models_[0].convolutions, models_[1].convolutions
    assert torch.equal(whole.weight == 0, torch.cat([part.weight for part in parts]) == 0)
    assert torch.allclose(whole.weight, torch.cat([part.weight for part in parts]), atol=1e-4)
    assert torch.allclose(whole.bias, torch.cat([part.bias for part in parts]), atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose1d(8, 5, 4, stride=2, padding=1),
        nn.ConvTranspose1d(8, 6, 3, stride=3, output_padding=1, dilation=2, groups=2),
        nn.ConvTranspose2d(6, 4, (2, 3), stride=(2, 1), padding=(0, 2)),
        nn.Conv2d(6, 4, (2, 3), stride=(2, 1), padding=(0, 2), groups=2, dilation=2),
        nn.Conv1d(8, 4, 5, padding="same", padding_mode="reflect"),
    ],
)
def test_the_inputs_of_a_convolution_times_its_matrix_are_its_outputs(layer):
    x = torch.randn(2, layer.in_channels, *((7,) * len(layer.kernel_size)), generator=torch.Generator().manual_seed(0))
    (target,) = resolve_targets(nn.Sequential(layer), PruningConfig(target_modules=".*"))
    rows = Padding(layer).rows(layer, x, "conv")
    matrix = target.matrix(layer.weight.detach())
    parts = [
        part @ matrix[target.rows(number)].t() for number, part in enumerate(rows if target.slabs > 1 else rows[None])
    ]
    assert torch.allclose(torch.cat(parts, 1) + layer.bias, output_rows(layer(x), "conv"), atol=1e-5)


def test_groups_that_are_a_single_unit_stay_dense():
    """A criterion that repairs decides on each group by itself, and here each has one channel."""
    model = nn.Sequential(nn.Conv2d(8, 4, 3, groups=4), nn.Conv2d(4, 8, 1))
    plan = make_plan(model, PruningConfig(0.5, "sparsegpt", granularity="row", target_modules=".*"))
    assert [t.target.module for t in plan.tensors] == ["1"]
    assert "each of its 4 groups is a single unit, and criterion 'sparsegpt' needs several" in str(plan)
    wanda = make_plan(model, PruningConfig(0.5, "wanda", granularity="row", scope="layer", target_modules=".*"))
    assert [t.remove for t in wanda.tensors] == [2, 4]


def test_the_plan_says_what_will_happen():
    plan = make_plan(models.mlp(), PruningConfig(repair="least_squares"))
    assert "repair least_squares, sequential calibration" in str(plan)
    assert "calibration" not in str(make_plan(models.mlp(), PruningConfig()))


@pytest.mark.parametrize("scope", ["layer", "row"])
def test_what_is_gone_of_a_block_stays_gone(scope):
    """A block of which an earlier pruning removed a part is kept as what is left of it."""
    weight, _, _ = problem(rows=4, columns=16, tokens=200)
    old = torch.ones(4, 16, dtype=torch.bool)
    old[:, ::4] = False
    plan = make_plan(nn.Linear(16, 4), PruningConfig(0.5, "sparsegpt", granularity="block:1x2", scope=scope))
    select = Selector("sparsegpt", plan.tensors[0], plan.granularity, old)
    scores = weight.square() * old
    for keep, there in ((select(scores), old), (select.columns(scores[:, 4:12], 4), old[:, 4:12])):
        assert (keep & there).any()
        assert not (keep & ~there).any()
