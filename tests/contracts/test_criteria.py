"""What every criterion must do; a new file in hf_prune/criteria/ is covered without a change here."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from hf_prune.criteria.base import (
    DIFFERENCES,
    STATISTICS,
    TRAINED,
    Criterion,
    UnitCriterion,
    UnitRanking,
    WeightStats,
)
from hf_prune.criteria.registry import CRITERIA, unit_rankings
from hf_prune.errors import PlanError, UnknownNameError
from hf_prune.pipeline import prune
from hf_prune.planning.choices import SCOPES
from hf_prune.planning.config import PruningConfig
from hf_prune.pruning.mask_store import MaskStore
from tests.architecture_models import tiny
from tests.models import assert_unchanged, mlp, same_bits, snapshot, tiny_batches

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# Those that watch a training prune in a PruningTrainer, see test_trainer.py.
ONE_SHOT = [name for name in CRITERIA.names() if not CRITERIA.get(name).needs & TRAINED]
ALL = [(name, scope) for name in ONE_SHOT for scope in SCOPES if scope in CRITERIA.get(name).scopes]


def example(dtype: torch.dtype = torch.float32, shape: tuple[int, int] = (6, 8), seed: int = 0) -> tuple[Tensor, dict]:
    """A weight and every statistic that calibration can gather."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator)

    gradient = draw()
    values = {"gradient": gradient, "absolute_gradient": gradient.abs() + draw().abs()}
    values["squared_gradient"] = gradient**2 + draw() ** 2
    padded = torch.nn.functional.pad(torch.stack([draw() for _ in range(12)]), (0, -shape[1] % 4))
    each = padded.unflatten(-1, (-1, 4))  # (examples, out, blocks, 4)
    values["fisher"] = torch.einsum("eobi,eobj->obij", each, each) / len(each)
    values["training_score"] = draw()
    inputs = torch.randn(40, shape[1], generator=generator)
    gram = inputs.t() @ inputs / len(inputs)
    return draw().to(dtype), {**values, "input_gram": gram, "input_norm": gram.diagonal().sqrt()}


class Half:
    """Keeps the upper half of each group of columns that is decided together."""

    width, pools = 1, False

    def __call__(self, scores: Tensor) -> Tensor:
        return scores > scores.median()

    def columns(self, scores: Tensor, start: int) -> Tensor:
        return self(scores)


def statistics(criterion: Criterion, values: dict, seed: int = 7) -> WeightStats:
    """Only what the criterion declared: it must not read anything else."""
    return WeightStats(seed=seed, **{need: values[need] for need in criterion.needs})


@pytest.fixture(params=CRITERIA.names())
def criterion(request):
    return CRITERIA.get(request.param)()


def test_it_describes_itself(criterion):
    assert CRITERIA.get(criterion.name) is type(criterion)
    assert criterion.description.strip()
    assert "\n" not in criterion.description
    assert criterion.paper.strip()
    assert type(criterion).__doc__
    assert STATISTICS == {f.name for f in dataclasses.fields(WeightStats)} - {"seed", "columns"}
    assert criterion.needs <= STATISTICS - DIFFERENCES
    assert criterion.scopes <= set(SCOPES)
    assert criterion.scopes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 8), (1, 5), (3, 1)])
def test_scores_are_float32_of_the_weights_shape(criterion, dtype, shape):
    weight, values = example(dtype, shape)
    scores = criterion.scores(weight, statistics(criterion, values))
    assert (scores.dtype, scores.shape) == (torch.float32, weight.shape)
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_pure(criterion, dtype):
    weight, values = example(dtype)
    inputs = {"weight": weight, **values}
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    first = criterion.scores(weight, statistics(criterion, values))
    torch.rand(3)  # the global random state must not matter
    second = type(criterion)().scores(weight, statistics(criterion, values))
    assert same_bits(first, second)
    assert all(same_bits(inputs[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_weights_score_lowest(criterion, dtype):
    weight, values = example(dtype)
    weight[::2, 1::3] = 0.0
    weight[1, 0] = -0.0
    if criterion.needs & TRAINED:
        values["training_score"][weight == 0] = -100  # a training knows what it has removed
    scores = criterion.scores(weight, statistics(criterion, values))
    zero = weight == 0
    assert scores[zero].max() < scores[~zero].min()


def test_a_transposed_weight_scores_the_same(criterion):
    """Conv1D gives views that are not contiguous."""
    weight, values = example()
    expected = criterion.scores(weight, statistics(criterion, values))
    transposed = {name: tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor for name, tensor in values.items()}
    assert torch.equal(criterion.scores(weight.t().contiguous().t(), statistics(criterion, transposed)), expected)


@pytest.mark.parametrize("name", [name for name in CRITERIA.names() if CRITERIA.get(name).rowwise])
def test_rowwise_scores_can_be_made_a_few_rows_at_a_time(name):
    criterion = CRITERIA.get(name)()
    weight, values = example()
    stats = statistics(criterion, values)
    whole = criterion.scores(weight, stats)
    parts = [criterion.scores(weight[rows], stats.rows(rows)) for rows in (slice(0, 1), slice(1, 5), slice(5, 6))]
    assert same_bits(torch.cat(parts), whole)


def test_it_repairs_only_if_it_says_so(criterion):
    if criterion.repairs and "global" in criterion.scopes:  # the mask is known only after all scores are
        assert type(criterion).update is not Criterion.update
    weight, values = example()
    before = weight.clone()
    keep, after = criterion.prune_weight(weight, statistics(criterion, values), Half())
    assert (keep.dtype, keep.shape, after.shape, after.dtype) == (torch.bool, weight.shape, weight.shape, weight.dtype)
    assert torch.equal(weight, before)
    if not criterion.repairs:
        assert torch.equal(after[keep], before[keep])


def calibration(criterion: str, model: nn.Module) -> list | None:
    return tiny_batches(model) if CRITERIA.get(criterion).needs else None


@pytest.mark.parametrize(("name", "scope"), ALL)
def test_config_round_trip(name, scope):
    config = PruningConfig(0.3, criterion=name, scope=scope)
    assert PruningConfig.from_json(config.to_json()) == config


@pytest.mark.covering(1)
@pytest.mark.parametrize(("name", "scope"), ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_exact_counts_and_exact_zeros(name, scope, dtype):
    model = mlp().to(dtype)
    batches = [{**batch, "x": batch["x"].to(dtype)} for batch in tiny_batches(model)]
    before = snapshot(model)
    prune(model, 0.3, criterion=name, scope=scope, calibration=batches if CRITERIA.get(name).needs else None)
    masks = MaskStore.of(model).masks
    removed = {key: int((~mask).sum()) for key, mask in masks.items()}
    if scope == "layer":
        assert removed == {"fc1.weight": 29, "fc2.weight": 11}
    elif scope == "row":
        assert (~masks["fc1.weight"]).sum(1).tolist() == [2] * 12
        assert (~masks["fc2.weight"]).sum(1).tolist() == [4] * 3
    else:
        assert sum(removed.values()) == 40
    repairs = CRITERIA.get(name).repairs
    for key, parameter in model.named_parameters():
        if key in masks:
            assert same_bits(parameter[~masks[key]], torch.zeros(removed[key], dtype=dtype))
        if not repairs:
            kept = masks.get(key, torch.ones_like(parameter, dtype=torch.bool))
            assert same_bits(parameter[kept], before[key][kept])


@pytest.mark.parametrize(("name", "scope"), ALL)
def test_the_same_call_gives_the_same_masks(name, scope):
    found = []
    for _ in range(2):
        model = mlp()
        prune(model, 0.3, criterion=name, scope=scope, calibration=calibration(name, model))
        found.append(snapshot(model))
        torch.rand(5)
    assert_unchanged(model, found[0])


@pytest.mark.parametrize(
    ("name", "scope", "granularity"),
    [(*pair, spec) for pair in ALL for spec in ("unstructured", "block:3x2")]
    + [(name, scope, "2:4") for name, scope in ALL if scope == "layer"],  # N:M brings its own pools
)
def test_in_two_steps_equals_at_once(name, scope, granularity):
    """0.3 and then 0.5 removes 0.5 in all, and the second step only adds zeros."""
    first = "3:4" if granularity == "2:4" else granularity
    config = PruningConfig(None if granularity == "2:4" else 0.5, name, granularity, scope)
    model, once = mlp(hidden=24), mlp(hidden=24)
    prune(once, config, calibration=calibration(name, once))
    start = None if granularity == "2:4" else 0.3
    prune(model, PruningConfig(start, name, first, scope), calibration=calibration(name, model))
    early = {key: mask.clone() for key, mask in MaskStore.of(model).masks.items()}
    prune(model, config, calibration=calibration(name, model))
    masks, expected = MaskStore.of(model).masks, MaskStore.of(once).masks
    assert sum(int(m.sum()) for m in masks.values()) == sum(int(m.sum()) for m in expected.values())
    if scope != "global":
        assert {k: int(m.sum()) for k, m in masks.items()} == {k: int(m.sum()) for k, m in expected.items()}
    assert not any(bool((mask & ~early[key]).any()) for key, mask in masks.items())
    if not CRITERIA.get(name).needs and not CRITERIA.get(name).repairs:  # the scores of what is left are the same
        assert all(torch.equal(mask, expected[key]) for key, mask in masks.items())


@pytest.mark.parametrize(("name", "scope"), ALL)
def test_discarded_masks_leave_no_trace(name, scope):
    model = mlp()
    before = snapshot(model)
    batches = calibration(name, model)
    prune(model, 0.3, criterion=name, scope=scope, calibration=batches, keep_dense=True)
    prune(model, 0.6, criterion=name, scope=scope, calibration=batches)
    assert float((model.fc1.weight == 0).float().mean()) > 0.3
    MaskStore.of(model).discard(model)
    assert_unchanged(model, before)
    assert MaskStore.of(model) is None


def test_magnitude_by_hand():
    weight = torch.tensor([[-3.0, 0.5], [0.0, 2.0]])
    assert CRITERIA.get("magnitude")().scores(weight, WeightStats(0)).tolist() == [[3.0, 0.5], [0.0, 2.0]]


@pytest.mark.parametrize(("name", "need"), [("taylor", "absolute_gradient"), ("snip", "gradient")])
def test_first_order_scores_by_hand(name, need):
    weight, statistic = torch.tensor([[-3.0, 0.5]]), torch.tensor([[0.5, 4.0]])
    stats = WeightStats(0, **{need: statistic})
    assert CRITERIA.get(name)().scores(weight, stats).tolist() == [[1.5, 2.0]]
    assert CRITERIA.get(name).needs == {need}


def test_snip_takes_the_size_of_a_negative_gradient():
    stats = WeightStats(0, gradient=torch.tensor([[-2.0]]))
    assert CRITERIA.get("snip")().scores(torch.tensor([[3.0]]), stats).tolist() == [[6.0]]


def test_random_depends_on_the_seed_and_on_the_parameters_name():
    weight = torch.ones(8, 8)
    random = CRITERIA.get("random")()
    assert not torch.equal(random.scores(weight, WeightStats(0)), random.scores(weight, WeightStats(1)))
    masks = []
    for seed in (0, 1):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        prune(model, 0.5, criterion="random", seed=seed)
        masks += MaskStore.of(model).masks.values()
    assert len({tuple(mask.reshape(-1).tolist()) for mask in masks}) == 4


def test_random_is_uniform():
    scores = CRITERIA.get("random")().scores(torch.ones(100, 100), WeightStats(3))
    assert 0 < scores.min()
    assert scores.max() <= 1
    assert abs(scores.mean() - 0.5) < 0.02


def test_criteria_say_how_they_rank_units_and_those_of_a_training_come_last():
    rankings = unit_rankings()
    names = ["fisher", "frequency", "greedy", "magnitude", "random", "reap", "reconstruction", "taylor", "movement"]
    assert list(rankings) == names
    assert all(ranking.description and ranking.paper for ranking in rankings.values())
    with pytest.raises(UnknownNameError, match="unknown criterion 'reconstruction': expected one of alps, "):
        PruningConfig(criterion="reconstruction")
    with pytest.raises(UnknownNameError, match="criterion of heads, neurons and layers 'wanda': expected one of fi"):
        PruningConfig(criterion="wanda", granularity="head")


def test_a_criterion_of_units_without_curves_is_refused(monkeypatch):
    CRITERIA.names()  # loaded, so that the entry below is the only change
    new = type("New", (UnitCriterion,), {"name": "new", "units": UnitRanking("no data", "a line", "a paper")})
    monkeypatch.setitem(CRITERIA._entries, "new", new)
    model, _ = tiny("bert")
    with pytest.raises(PlanError, match="'new' is registered for units, but choose_units has no curves for it"):
        prune(model, 0.5, criterion="new", granularity="head")
