"""What every granularity must do; a new file in hf_prune/granularities/ needs only a spelling in EXAMPLES.

The truth is the definition: explicit Groups, summed one by one, removed by a stable sort.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_prune.criteria.base import WeightStats
from hf_prune.criteria.registry import CRITERIA
from hf_prune.errors import PlanError
from hf_prune.granularities.registry import GRANULARITIES, parse_granularity
from hf_prune.kernels.matrix import Target
from hf_prune.pipeline import prune
from hf_prune.planning.choices import SCOPES
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import make_plan
from hf_prune.pruning.compute_masks import compute_masks
from hf_prune.pruning.mask_store import MaskStore
from tests.models import mlp
from tests.reference.pruning import reference_masks, reference_matrix

# Spellings of each entry, for weights whose outputs and inputs are multiples of 4.
EXAMPLES = {
    "unstructured": ["unstructured"],
    "n:m": ["2:4", "1:4", "3:4", "1:2"],
    "block": ["block:1x4", "block:4x1", "block:2x2", "block:4x4", "block:1x1"],
    "row": ["row"],
    "column": ["column"],
    "channel": ["channel"],
}
SPELLINGS = [spelling for name in GRANULARITIES.names() for spelling in EXAMPLES[name]]
LINEAR = [spelling for spelling in SPELLINGS if spelling != "channel"]  # those that fit a Linear
ALL = [(spelling, scope) for spelling in SPELLINGS for scope in SCOPES if scope in parse_granularity(spelling).scopes]


class Layouts(nn.Module):
    """One weight of each layout, multiples of 4 throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.conv1d = Conv1D(8, 4)
        self.conv = nn.Conv2d(4, 8, (1, 2))


def modules_for(spelling: str) -> str:
    """What fits of :class:`Layouts`."""
    return "conv" if spelling == "channel" else ".*"


def coarse(model: nn.Module, seed: int, levels: int = 4) -> nn.Module:
    """Weights of few values, many of them zero: ties everywhere, and sums that are exact."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-levels, levels + 1, parameter.shape, generator=generator) / 8)
    return model


def test_every_entry_has_examples():
    assert set(GRANULARITIES.names()) == set(EXAMPLES)


@pytest.mark.parametrize("name", GRANULARITIES.names())
def test_it_describes_itself(name):
    entry = GRANULARITIES.get(name)
    assert entry.name == name
    assert all(text.strip() and "\n" not in text for text in (entry.description, entry.paper, entry.usage))
    assert entry.__doc__
    assert entry.scopes <= set(SCOPES)
    assert entry.scopes
    assert entry.parse("no such spelling") is None


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_spelling_reads_back(spelling):
    granularity = parse_granularity(spelling)
    assert granularity.spec == spelling
    assert parse_granularity(granularity.spec).__dict__ == granularity.__dict__
    config = PruningConfig(granularity=spelling)
    assert PruningConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_groups_cover_every_weight_once(spelling):
    granularity = parse_granularity(spelling)
    seen = torch.zeros(8, 12, dtype=torch.int)
    groups = list(granularity.groups("w", (8, 12)))
    for group in groups:
        for part in group.slices:
            seen[part.index] += 1
    assert (seen == 1).all()
    rows, columns = granularity.units((8, 12))
    assert len(groups) == rows * columns
    sizes = {pool: sum(g.pool == pool for g in groups) for pool in {g.pool for g in groups}}
    assert set(sizes.values()) == {granularity.pool or len(groups)}


@pytest.mark.parametrize(("spelling", "scope"), ALL)
@settings(max_examples=12)
@given(seed=st.integers(0, 10_000), sparsity=st.floats(0, 1), again=st.booleans(), data=st.data())
def test_masks_equal_the_definition(spelling, scope, seed, sparsity, again, data):
    """All layouts, ties throughout, every criterion, with and without masks of an earlier pruning."""
    entries = [CRITERIA.get(name) for name in CRITERIA.names()]
    fitting = [entry.name for entry in entries if not entry.repairs and scope in entry.scopes]
    criterion = data.draw(st.sampled_from(fitting), "criterion")
    fixed = parse_granularity(spelling).fixed_sparsity
    sparsity = sparsity if fixed is None else fixed
    model = coarse(Layouts(), seed)
    config = PruningConfig(sparsity, criterion, spelling, scope, target_modules=modules_for(spelling))
    plan = make_plan(model, config)
    targets = [tensor.target for tensor in plan.tensors]
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    old, stats, scores = {}, {}, {}
    for target in targets:
        shape = target.matrix_shape
        gradient = torch.randint(-2, 3, shape, generator=generator) / 4
        values = {"gradient": gradient, "absolute_gradient": gradient.abs() + 0.25}
        values["squared_gradient"] = gradient**2 + 0.25
        values["training_score"] = torch.randint(-2, 3, shape, generator=generator) / 4
        values["input_norm"] = torch.randint(1, 4, shape[1:], generator=generator) / 4
        entry = CRITERIA.get(criterion)
        stats[target.name] = WeightStats(seed, **{need: values[need] for need in entry.needs})
        matrix = reference_matrix(target, parameters[target.name].detach())
        scores[target.name] = entry().scores(matrix, stats[target.name])
        if again:
            old[target.name] = target.native(torch.rand(shape, generator=generator) < 0.6)
    masks, weights = compute_masks(model, plan, stats, old)
    old_matrices = {t.name: reference_matrix(t, old[t.name]) for t in targets if t.name in old}
    wanted = reference_masks(spelling, scope, {t.name: sparsity for t in targets}, targets, scores, old_matrices)
    assert weights == {}
    for target in targets:
        mask = masks[target.name]
        assert (mask.dtype, mask.shape) == (torch.bool, parameters[target.name].shape)
        assert mask.is_contiguous()
        if target.name in old:
            mask = mask & old[target.name]
        assert torch.equal(reference_matrix(target, mask), wanted[target.name])
    if not again:  # the plan's numbers are what happens
        removed = {t.name: int((~masks[t.name]).sum()) for t in targets}
        if plan.is_exact:
            assert sum(removed.values()) == plan.removed_parameters
        assert sum(removed.values()) >= plan.removed_parameters
        sizes = {t.target.name: t.target.size // t.units for t in plan.tensors}
        known = [t for t in plan.tensors if t.remove is not None]
        assert all(removed[t.target.name] == t.remove * sizes[t.target.name] for t in known)


@pytest.mark.parametrize(("spelling", "scope"), [(spelling, scope) for spelling, scope in ALL if spelling in LINEAR])
def test_a_weight_in_several_chunks_equals_the_definition(monkeypatch, spelling, scope):
    """Scores are made a few rows at a time; here a few rows are really few."""
    monkeypatch.setattr("hf_prune.pruning.compute_masks.CHUNK", 16)
    monkeypatch.setattr("hf_prune.kernels.selection.CHUNK", 8)
    model = coarse(nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8)), seed=5)
    config = PruningConfig(None, "magnitude", spelling, scope)
    plan = make_plan(model, config)
    targets = [tensor.target for tensor in plan.tensors]
    scores = {name: parameter.detach().abs() for name, parameter in model.named_parameters()}
    wanted = reference_masks(spelling, scope, {t.name: config.sparsity for t in targets}, targets, scores)
    prune(model, config)
    assert all(torch.equal(MaskStore.of(model).masks[name], mask) for name, mask in wanted.items())


@pytest.mark.parametrize("spelling", LINEAR)
def test_pruned_weights_are_whole_units(spelling):
    model = mlp(hidden=12, labels=4)
    prune(model, PruningConfig(granularity=spelling))
    granularity = parse_granularity(spelling)
    for name, mask in MaskStore.of(model).masks.items():
        for group in granularity.groups(name, tuple(mask.shape)):
            (part,) = group.slices
            assert len(set(mask[part.index].reshape(-1).tolist())) == 1


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (7, 8), (4, 40)])
def test_n_m_keeps_exactly_n_of_m_inputs(n, m):
    model = nn.Linear(80, 6)
    prune(model, granularity=f"{n}:{m}")
    assert (model.weight.view(6, -1, m) != 0).sum(-1).unique().tolist() == [n]


def test_n_m_of_a_convolution_runs_along_input_channels():
    model = nn.Sequential(nn.Conv2d(8, 3, (2, 3)))
    prune(model, granularity="2:4", target_modules=["0"])
    assert (model[0].weight.view(3, 2, 4, 2, 3) != 0).sum(2).unique().tolist() == [2]


def test_channels_are_those_of_convolutions():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv1d(2, 4, 3))
    with pytest.raises(PlanError, match=r"it is not a convolution"):
        make_plan(mlp(), PruningConfig(granularity="channel"))
    prune(model, 0.25, granularity="channel", target_modules=["0"])
    gone = (model[0].weight == 0).flatten(1).all(1)
    assert int(gone.sum()) == 2
    norms = MaskStore.of(model).masks["0.weight"].flatten(1).float().mean(1)
    assert set(norms.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("spelling", LINEAR)
def test_misfit_says_why(spelling):
    granularity = parse_granularity(spelling)
    assert granularity.misfit(Target("w", "m", "linear", (8, 12))) is None
    assert granularity.misfit(Target("w", "m", "conv", (8, 12, 3, 5))) is None
    rows, columns = granularity.block
    if rows > 1:
        assert granularity.misfit(Target("w", "m", "linear", (9, 12))) == f"its 9 outputs are not a multiple of {rows}"
    if columns > 1 or granularity.pool:
        need = granularity.pool or columns
        assert granularity.misfit(Target("w", "m", "linear", (8, 13))) == f"its 13 inputs are not a multiple of {need}"
        assert granularity.misfit(Target("w", "m", "conv1d", (13, 8))) == f"its 13 inputs are not a multiple of {need}"
        assert granularity.misfit(Target("w", "m", "conv", (8, 13, 4))) == f"its 13 inputs are not a multiple of {need}"
