"""Block Fisher against slow twins: the blocks, the scores, the updates, and how they are gathered."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_prune.calibration.statistics import collect_stats
from hf_prune.criteria import fisher as criterion_module
from hf_prune.criteria.base import WeightStats
from hf_prune.criteria.registry import CRITERIA
from hf_prune.errors import CalibrationError, PlanError
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import make_plan
from hf_prune.pruning import fisher as fisher_module
from hf_prune.pruning.fisher import gather_blocks
from hf_prune.pruning.fisher_pieces import Piece, block_size, runs
from hf_prune.pruning.mask_store import MaskStore
from tests import models
from tests.models import assert_unchanged, mlp, same_bits, snapshot, tiny_batches
from tests.reference.fisher import reference_blocks, reference_example_gradients, reference_surgery

FISHER = CRITERIA.get("fisher")()


def build(kind: str) -> nn.Module:
    return {"mlp": mlp, "tied": models.tied_linears, **models.TRANSFORMERS}[kind]()


def targets_of(kind: str) -> dict:
    return {"target_modules": r".*(shortcut|convolution|classifier\.1)"} if kind == "resnet" else {}


def problem(rows=3, blocks=2, size=4, inputs=None, examples=12, seed=0):
    """A weight and blocks from more examples than a block has weights."""
    generator = torch.Generator().manual_seed(seed)
    inputs = inputs or blocks * size
    weight = torch.randn(rows, inputs, generator=generator)
    gradients = list(torch.randn(examples, rows, inputs, generator=generator))
    return weight, reference_blocks(gradients, size)


def damped(block: torch.Tensor) -> torch.Tensor:
    """One block as the criterion damps it."""
    return criterion_module._damped(block[None, None])[0, 0]


# --- gathering -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "albert", "gpt2", "t5", "resnet", "mlp", "tied"])
def test_blocks_equal_a_loop_over_single_examples(kind):
    """Batches of unequal size; weights that are used several times; Conv1D and convolutions."""
    model, twin = build(kind), build(kind)
    batches = tiny_batches(model, sizes=(4, 1, 2))
    plan = make_plan(model, PruningConfig(criterion="fisher", **targets_of(kind)))
    (pieces,) = runs(plan)
    found = list(gather_blocks(model, pieces, batches))
    assert len(found) == len(plan.tensors)
    assert any(bool(blocks.any()) for blocks in found)
    for piece, blocks in zip(pieces, found, strict=True):
        gradients = reference_example_gradients(twin, piece.tensor.target, batches)
        torch.testing.assert_close(blocks, reference_blocks(gradients, piece.size).float(), rtol=1e-3, atol=1e-10)
        assert blocks.dtype == torch.float32


@pytest.mark.parametrize("kind", ["bert", "gpt2", "resnet", "tied"])
def test_the_diagonal_is_the_mean_squared_gradient(kind):
    model, twin = build(kind), build(kind)
    batches = tiny_batches(model, sizes=(3, 2))
    plan = make_plan(model, PruningConfig(criterion="fisher_diagonal", **targets_of(kind)))
    found = collect_stats(model, plan, batches)
    for tensor in plan.tensors:
        gradients = torch.stack(reference_example_gradients(twin, tensor.target, batches))
        squared = found[tensor.target.name].squared_gradient
        torch.testing.assert_close(squared, (gradients**2).mean(0), rtol=1e-3, atol=1e-12)


def test_uses_of_a_shared_weight_add_up_before_they_are_squared():
    model = models.tied_linears()
    batches = tiny_batches(model, sizes=(2,))
    apart = models.tied_linears()
    apart.second.weight = nn.Parameter(apart.first.weight.detach().clone())
    each = [
        torch.stack(
            reference_example_gradients(apart, SimpleNamespace(name=name, shape=(8, 8), layout="linear"), batches)
        )
        for name in ("first.weight", "second.weight")
    ]
    plan = make_plan(model, PruningConfig(criterion="fisher_diagonal"))
    found = collect_stats(model, plan, batches)["first.weight"].squared_gradient
    torch.testing.assert_close(found, ((each[0] + each[1]) ** 2).mean(0))
    assert not torch.allclose(found, (each[0] ** 2 + each[1] ** 2).mean(0), rtol=1e-2)


@pytest.mark.parametrize(
    ("inputs", "width", "expected"),
    [(384, 1, 48), (1536, 1, 50), (50, 1, 50), (51, 1, 26), (7, 1, 7), (384, 4, 48), (1536, 16, 48), (128, 64, 64)],
)
def test_block_sizes(inputs, width, expected):
    assert block_size(inputs, width) == expected


@pytest.mark.parametrize("granularity", ["unstructured", "2:4", "block:4x2"])
@pytest.mark.parametrize("budget", [1, 3000, 40_000, 10**9])
def test_runs_cover_every_output_once_and_keep_the_budget(granularity, budget):
    plan = make_plan(models.tiny_gpt2(), PruningConfig(criterion="fisher", granularity=granularity))
    found = runs(plan, budget)
    covered = {t.target.name: [] for t in plan.tensors}
    for pieces in found:
        cost = sum(torch.Size(piece.shape).numel() * 8 for piece in pieces)
        height = plan.granularity.block[0]
        assert cost <= budget or (len(pieces) == 1 and pieces[0].stop - pieces[0].start == height)
        for piece in pieces:
            assert piece.start % height == piece.stop % height == 0
            covered[piece.tensor.target.name] += range(piece.start, piece.stop)
    assert all(covered[t.target.name] == list(range(t.target.matrix_shape[0])) for t in plan.tensors)
    assert (len(found) == 1) == (budget == 10**9)


@pytest.mark.covering(1)
@pytest.mark.parametrize("scope", ["row", "layer", "global"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_many_runs_find_what_one_finds(monkeypatch, kind, scope):
    """A few rows at a time, everything on the disk, against all at once in memory."""
    found = []
    for budget, cache in ((2**30, 2**30), (50000, 0)):
        monkeypatch.setattr(fisher_module, "FISHER_BYTES", budget)
        model = build(kind)
        prune(model, 0.6, criterion="fisher", scope=scope, calibration=tiny_batches(model), cache_bytes=cache)
        found.append(snapshot(model))
    assert len(runs(make_plan(build(kind), PruningConfig(criterion="fisher")), 50000)) > 5
    for name, weight in found[0].items():
        assert torch.equal(weight == 0, found[1][name] == 0)
        torch.testing.assert_close(weight, found[1][name], rtol=1e-4, atol=1e-6)


def test_a_finished_weight_looks_at_no_other(monkeypatch):
    """The cost of each is that of its own scores, however many weights there are."""
    keep, seen = fisher_module.keep_units, []

    def watched(plan, tensors, sources):
        seen.append(([t.target.name for t in tensors], list(sources)))
        return keep(plan, tensors, sources)

    monkeypatch.setattr(fisher_module, "keep_units", watched)
    model = mlp()
    prune(model, 0.5, criterion="fisher", calibration=tiny_batches(model))
    assert len(seen) > 1
    assert all(own == given for own, given in seen)


def test_no_more_than_the_budget_is_gathered_at_once(monkeypatch):
    sizes = []
    gather = fisher_module.gather_blocks

    def watched(model, pieces, *arguments):
        sizes.append(sum(torch.Size(piece.shape).numel() * 8 for piece in pieces))
        return gather(model, pieces, *arguments)

    monkeypatch.setattr(fisher_module, "gather_blocks", watched)
    monkeypatch.setattr(fisher_module, "FISHER_BYTES", 50_000)
    model = models.tiny_bert()
    prune(model, 0.5, criterion="fisher", calibration=tiny_batches(model), cache_bytes=0)
    assert max(sizes) <= 50_000 < sum(sizes)


# --- scores and updates ----------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [8, 7, 5])
def test_a_score_is_the_least_cost_of_removing_that_weight(inputs):
    weight, blocks = problem(inputs=inputs)
    scores = FISHER.scores(weight, WeightStats(0, fisher=blocks.float()))
    for row, column in itertools.product(range(3), range(inputs)):
        block, place = divmod(column, 4)
        vector = torch.zeros(4)
        part = weight[row, block * 4 : block * 4 + 4]
        vector[: len(part)] = part
        cost = reference_surgery(vector, damped(blocks[row, block]), [place])[1]
        assert float(scores[row, column]) == pytest.approx(cost, rel=1e-4)


@pytest.mark.parametrize("columns", [2, 4])
def test_scores_of_neighbours_add_up_to_the_least_cost_of_removing_them(columns):
    weight, blocks = problem()
    scores = FISHER.scores(weight, WeightStats(0, fisher=blocks.float(), columns=columns))
    for row, unit in itertools.product(range(3), range(8 // columns)):
        block, place = divmod(unit * columns, 4)
        gone = range(place, place + columns)
        cost = reference_surgery(weight[row, block * 4 : block * 4 + 4], damped(blocks[row, block]), gone)[1]
        found = scores[row, unit * columns : (unit + 1) * columns]
        assert float(found.sum()) == pytest.approx(cost, rel=1e-4)
        single = FISHER.scores(weight, WeightStats(0, fisher=blocks.float()))[
            row, unit * columns : (unit + 1) * columns
        ]
        assert abs(float(single.sum()) - cost) > 1e-3 * cost  # the weights of a unit do depend on each other


@pytest.mark.parametrize("inputs", [8, 7, 5])
@pytest.mark.parametrize("seed", range(3))
def test_an_update_is_the_best_for_all_that_goes(inputs, seed):
    weight, blocks = problem(inputs=inputs, seed=seed)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    before = weight.clone()
    found = FISHER.update(weight, keep, WeightStats(0, fisher=blocks.float()))
    assert torch.equal(weight, before)
    for row, block in itertools.product(range(3), range(2)):
        part = slice(block * 4, block * 4 + 4)
        size = weight[row, part].numel()
        gone = (~keep[row, part]).nonzero().squeeze(1).tolist()
        change, _ = reference_surgery(weight[row, part], damped(blocks[row, block])[:size, :size], gone)
        torch.testing.assert_close(found[row, part], weight[row, part] + change.float(), rtol=1e-4, atol=1e-5)
    assert not found[~keep].any()


def test_one_removed_weight_of_a_row_is_the_best_of_all():
    """One block per row, one weight to go: optimal brain surgeon is exact, so no other choice costs less."""
    weight, blocks = problem(rows=5, blocks=1, size=6)
    model = nn.Linear(6, 5, bias=False)
    plan = make_plan(model, PruningConfig(1 / 6, "fisher", scope="row"))
    keep, units = torch.ones(5, 6, dtype=torch.bool), FISHER.scores(weight, WeightStats(0, fisher=blocks.float()))
    assert plan.tensors[0].remove == 5
    keep.scatter_(1, units.argmin(1, keepdim=True), False)
    new = FISHER.update(weight, keep, WeightStats(0, fisher=blocks.float()))
    for row in range(5):
        hessian = damped(blocks[row, 0])
        costs = [reference_surgery(weight[row], hessian, [j])[1] for j in range(6)]
        change = (new[row] - weight[row]).double()
        assert float(0.5 * change @ hessian @ change) == pytest.approx(min(costs), rel=1e-4)


def test_a_weight_by_itself_is_the_diagonal():
    """Blocks of one weight: the score of fisher_diagonal, but for the damping, and no update."""
    weight, blocks = problem(rows=2, blocks=5, size=1)
    diagonal = blocks[:, :, 0, 0].float()
    expected = CRITERIA.get("fisher_diagonal")().scores(weight, WeightStats(0, squared_gradient=diagonal))
    stats = WeightStats(0, fisher=blocks.float())
    lifted = torch.stack([damped(block)[0, 0] for block in blocks.flatten(0, 1)]).view(2, 5).float() / diagonal
    torch.testing.assert_close(FISHER.scores(weight, stats), expected * lifted)
    keep = weight > 0
    torch.testing.assert_close(FISHER.update(weight, keep, stats), weight * keep)


def test_the_diagonal_by_hand():
    stats = WeightStats(0, squared_gradient=torch.tensor([[2.0, 0.5, 0.0]]))
    scores = CRITERIA.get("fisher_diagonal")().scores(torch.tensor([[-3.0, 4.0, 9.0]]), stats)
    assert scores[0, :2].tolist() == [9.0, 4.0]
    assert 0 < scores[0, 2] < 1e-20


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-12, 1e12])
def test_gradients_of_any_size_stay_finite(size):
    weight, blocks = problem()
    stats = WeightStats(0, fisher=(blocks * size).float())
    scores = FISHER.scores(weight, stats)
    new = FISHER.update(weight, weight > 0, stats)
    assert torch.isfinite(scores).all()
    assert torch.isfinite(new).all()
    if size == 0:
        torch.testing.assert_close(new, weight * (weight > 0))


def test_fewer_examples_than_weights_of_a_block():
    weight, blocks = problem(rows=4, blocks=1, size=30, examples=3)
    stats = WeightStats(0, fisher=blocks.float())
    assert torch.isfinite(FISHER.scores(weight, stats)).all()
    assert torch.isfinite(FISHER.update(weight, weight > 0, stats)).all()


# --- pruning ---------------------------------------------------------------------------------------


def hand_pruned(model: nn.Module, batches, sparsity: float, old: dict | None = None) -> dict[str, torch.Tensor]:
    """Layer scope, unstructured, from the twins alone."""
    found = {}
    for name in ("fc1.weight", "fc2.weight"):
        weight = model.get_parameter(name).detach().clone()
        target = SimpleNamespace(name=name, shape=tuple(weight.shape), layout="linear")
        alive = torch.ones_like(weight, dtype=torch.bool) if old is None else old[name]
        gradients = [g * alive for g in reference_example_gradients(model, target, batches)]
        blocks = reference_blocks(gradients, weight.shape[1])[:, 0]
        costs = []
        for row, column in itertools.product(*map(range, weight.shape)):
            cost = reference_surgery(weight[row], damped(blocks[row]), [column])[1]
            costs.append((cost if alive[row, column] else -1.0, row, column))
        gone = sorted(costs)[: round(sparsity * len(costs))]
        for row in range(len(weight)):
            columns = [column for _, r, column in gone if r == row]
            if columns:
                weight[row] += reference_surgery(weight[row], damped(blocks[row]), columns)[0].float()
                weight[row, columns] = 0
        found[name] = weight
    return found


def test_pruning_is_what_the_twins_do():
    model = mlp()
    batches = tiny_batches(model, sizes=(20, 12))
    expected = hand_pruned(mlp(), batches, 0.4)
    prune(model, 0.4, criterion="fisher", calibration=batches)
    for name, weight in expected.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), weight, rtol=1e-3, atol=1e-5)


def test_pruning_again_leaves_removed_weights_out_of_the_blocks():
    model = mlp()
    batches = tiny_batches(model, sizes=(20, 12))
    prune(model, 0.3, criterion="random")
    twin = mlp()
    twin.load_state_dict(model.state_dict())
    expected = hand_pruned(twin, batches, 0.6, dict(MaskStore.of(model).masks))
    prune(model, 0.6, criterion="fisher", calibration=batches)
    for name, weight in expected.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), weight, rtol=1e-3, atol=1e-5)


@pytest.mark.covering(2)
@pytest.mark.parametrize("criterion", ["fisher", "fisher_diagonal"])
@pytest.mark.parametrize(
    "granularity", ["unstructured", "2:4", "1:4", "block:4x1", "block:16x1", "block:1x4", "block:2x2"]
)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_transformers_are_pruned_exactly_and_the_same_each_time(criterion, granularity, kind):
    found = []
    for labels in (True, False):  # which change nothing
        model = build(kind)
        narrow = ["classifier", *(["k_proj", "v_proj"] if granularity == "block:16x1" else [])]
        excluded = [name for name in narrow if any(m.endswith(name) for m, _ in model.named_modules())]
        config = PruningConfig(None, criterion, granularity, exclude_modules=excluded)
        plan = make_plan(model, config)
        batches = tiny_batches(model)
        if not labels:
            batches = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
        prune(model, config, calibration=batches)
        masks = MaskStore.of(model).masks
        area = plan.granularity.block[0] * plan.granularity.block[1]
        for tensor in plan.tensors:
            keep = tensor.target.matrix(masks[tensor.target.name])
            assert int((~keep).sum()) == tensor.remove * area
            assert not model.get_parameter(tensor.target.name)[~masks[tensor.target.name]].any()
            if granularity in ("2:4", "1:4"):
                assert keep.unflatten(1, (-1, 4)).sum(-1).unique().tolist() == [int(granularity[0])]
            elif granularity.startswith("block"):
                rows, columns = plan.granularity.block
                tiles = keep.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2)
                assert torch.equal(tiles.any(-1), tiles.all(-1))
        found.append(snapshot(model))
    assert all(same_bits(found[0][name], other[name]) for other in found[1:] for name in found[0])


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_every_layout_of_a_convolution(scope):
    model = models.conv_net()
    batches = [{"x": torch.randn(5, 4, 9)}]
    before = snapshot(model)
    prune(model, 0.5, criterion="fisher", scope=scope, target_modules=".*", calibration=batches)
    store = MaskStore.of(model)
    assert sum(int((~mask).sum()) for mask in store.masks.values()) == sum(m.numel() for m in store.masks.values()) // 2
    for name in ("conv1d.weight", "conv2d.weight", "grouped.weight"):
        kept = store.masks[name]
        assert not torch.equal(model.get_parameter(name)[kept], before[name][kept])  # survivors are updated


def test_updates_lower_the_cost_on_the_calibration_data():
    """The mean squared change of the examples' losses, to first order: what the Fisher matrix measures."""
    model, batches = mlp(), tiny_batches(mlp(), sizes=(32,))
    prune(model, 0.5, criterion="fisher", calibration=batches)
    masks, dense = MaskStore.of(model).masks, mlp()
    name = "fc1.weight"
    target = SimpleNamespace(name=name, shape=(12, 8), layout="linear")
    blocks = reference_blocks(reference_example_gradients(dense, target, batches), 8)[:, 0]

    def cost(weight):
        change = (weight - dense.fc1.weight).detach().double()
        return float(torch.einsum("oi,oij,oj->", change, blocks, change))

    assert cost(model.fc1.weight) < 0.8 * cost(dense.fc1.weight * masks[name])


def test_a_weight_that_no_batch_reaches_goes_first():
    class Unused(models.MLP):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(4, 4)

    for criterion in ("fisher", "fisher_diagonal"):
        model = models.fill(Unused())
        batches = tiny_batches(mlp())
        prune(model, 16 / (96 + 36 + 16), criterion=criterion, scope="global", calibration=batches)
        assert not model.idle.weight.any()
        assert bool(model.fc1.weight.all())


# --- refusals --------------------------------------------------------------------------------------


def test_units_wider_than_a_block_may_be_are_refused():
    model = nn.Linear(512, 4)
    message = r"'block:1x256' decides on 256 of them at once: expected at most 128; choose another granularity, or"
    with pytest.raises(PlanError, match=message):
        make_plan(model, PruningConfig(criterion="fisher", granularity="block:1x256"))
    make_plan(model, PruningConfig(criterion="fisher", granularity="block:1x128"))
    make_plan(model, PruningConfig(criterion="fisher_diagonal", granularity="block:1x256"))


@pytest.mark.parametrize("criterion", ["fisher", "fisher_diagonal"])
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, r"criterion '{}' needs calibration data, and got none: .* \(dicts with the model's inputs\)$"),
        ([], r"calibration has no batches: expected at least one"),
        ([torch.ones(2, 8)], r"a calibration batch is a Tensor: expected a dict of model inputs"),
        ([{"x": torch.full((1, 8), float("nan"))}], r"the model's outputs for a calibration batch are not"),
        (
            [{"x": torch.ones(3, 8), "labels": torch.zeros(2, dtype=torch.long)}],
            r"a calibration batch of 2 examples holds 'x' of shape \(3, 8\), .*: expected 2 as the first dimension",
        ),
    ],
)
def test_unusable_batches_are_refused_before_any_change(criterion, batches, message):
    model = mlp().train()
    model.fc1.weight.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=message.format(criterion)):
        prune(model, 0.5, criterion=criterion, calibration=batches)
    assert_unchanged(model, before)
    assert MaskStore.of(model) is None
    assert (model.training, model.fc1.training) == (True, True)
    assert (model.fc1.weight.requires_grad, model.fc2.weight.requires_grad) == (False, True)


def test_gradients_that_are_not_finite_are_refused():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x, labels=None):
            return SimpleNamespace(logits=(self.fc.weight * 0).sum().sqrt().expand(1, 1))

    for criterion in ("fisher", "fisher_diagonal"):
        with pytest.raises(CalibrationError, match=r"the gradient of fc\.weight is not finite: expected finite values"):
            prune(Fixed(), criterion=criterion, calibration=[{"x": torch.ones(1, 2)}])


def test_updates_that_are_not_finite_are_refused(monkeypatch):
    monkeypatch.setattr(type(FISHER), "update", lambda self, weight, keep, stats: weight * float("inf"))
    model, before = mlp(), snapshot(mlp())
    with pytest.raises(CalibrationError, match=r"the repaired weights of fc1\.weight are not finite"):
        prune(model, criterion="fisher", calibration=tiny_batches(model))
    assert_unchanged(model, before)


def test_a_piece_knows_its_place():
    tensor = make_plan(nn.Linear(6, 4), PruningConfig()).tensors[0]
    piece = Piece(tensor, 2, 4, 4)
    assert (piece.shape, piece.is_last, Piece(tensor, 0, 2, 4).is_last) == ((2, 2, 4, 4), True, False)
