"""The whole story: reference values, torch's own pruning, and pruning again and again."""

import sys
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils.hooks import RemovableHandle
from transformers import DistilBertConfig, DistilBertForSequenceClassification
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import ConfigError, MaskError, PlanError
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.plan import PruningPlan
from hf_prune.planning.resolve import resolve_config
from hf_prune.pruning.mask_fit import zero_weight
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.utils.offload_cache import OffloadCache
from tests import models
from tests.models import assert_same_masks, assert_unchanged, mlp, snapshot


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    return MaskStore.of(model).masks


def zeros(model: nn.Module) -> int:
    return sum(p.numel() - int(p.count_nonzero()) for p in model.parameters())


@pytest.fixture(scope="module")
def distilbert() -> nn.Module:
    """The full-size classifier, pruned once by the default config at 0.3; what starts as zero is filled first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DistilBertForSequenceClassification(DistilBertConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.masked_fill_(parameter == 0, 0.01)
    assert zeros(model) == 0
    return prune(model, 0.3)


def test_distilbert_reference_values(distilbert):
    total = sum(p.numel() for p in distilbert.parameters())
    nonzero = sum(int(p.count_nonzero()) for p in distilbert.parameters())
    assert (total, nonzero) == (66_955_010, 54_037_406)
    assert round(100 * (1 - nonzero / total), 2) == 19.29


def test_every_distilbert_layer_loses_its_share(distilbert):
    removed = {name: (mask.numel(), int((~mask).sum())) for name, mask in masks(distilbert).items()}
    assert len(removed) == 6 * 6 + 2
    assert set(removed.values()) == {(589_824, 176_947), (2_359_296, 707_789), (1_536, 461)}


def test_large_layers_equal_torch(distilbert):
    """Far above the sampling threshold."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        again = DistilBertForSequenceClassification(DistilBertConfig())
    for name in ("distilbert.transformer.layer.0.ffn.lin1", "distilbert.transformer.layer.5.attention.q_lin"):
        layer = again.get_submodule(name)
        torch_prune.l1_unstructured(layer, "weight", amount=0.3)
        assert len(layer.weight_orig.abs().unique()) > 1000
        cut = layer.weight_orig.abs()[layer.weight_mask == 0].max()
        same = (layer.weight_orig.abs() == cut).sum() == 1  # else torch may choose differently among the tied
        found = masks(distilbert)[f"{name}.weight"]
        differing = found != layer.weight_mask.bool()
        assert not differing.any() if same else bool((layer.weight_orig[differing].abs() == cut).all())


def without_ties(model: nn.Module) -> nn.Module:
    """All weights of the model differ in size."""
    sizes = torch.randperm(sum(p.numel() for p in model.parameters()), generator=torch.Generator().manual_seed(3)) + 1
    start = 0
    with torch.no_grad():
        for parameter in model.parameters():
            part = sizes[start : start + parameter.numel()].view(parameter.shape).float() / len(sizes)
            parameter.copy_(part * parameter.sign())
            start += parameter.numel()
    return model


TORCH = ["bert", "gpt2", "albert", "llama", "t5", "distilbert"]


@pytest.mark.parametrize("kind", TORCH)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.77, 1.0])
def test_scope_layer_equals_l1_unstructured(kind, sparsity):
    model = without_ties(models.TRANSFORMERS[kind]())
    expected = {}
    prune(model, sparsity)
    for name in masks(model):
        layer = without_ties(models.TRANSFORMERS[kind]()).get_submodule(name.removesuffix(".weight"))
        torch_prune.l1_unstructured(layer, "weight", amount=sparsity)
        expected[name] = layer.weight_mask.bool()
    assert len(expected) >= 6
    assert all(torch.equal(masks(model)[name], mask) for name, mask in expected.items())


@pytest.mark.parametrize("kind", TORCH)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_scope_global_equals_global_unstructured(kind, sparsity):
    model, other = (without_ties(models.TRANSFORMERS[kind]()) for _ in range(2))
    prune(model, sparsity, scope="global")
    layers = [(other.get_submodule(name.removesuffix(".weight")), "weight") for name in masks(model)]
    torch_prune.global_unstructured(layers, pruning_method=torch_prune.L1Unstructured, amount=sparsity)
    for (layer, _), mask in zip(layers, masks(model).values(), strict=True):
        assert torch.equal(mask, layer.weight_mask.bool())


def test_ties_go_by_position():
    model = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1, 2, 1], [1, 1, -1, 1], [0.5, 1, 1, 1]]))
    prune(model, 0.5)
    assert masks(model)["weight"].int().tolist() == [[0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 1, 1]]
    assert model.weight.tolist() == [[0, 0, 2, 0], [0, 0, -1, 1], [0, 1, 1, 1]]


def test_ties_across_tensors_go_by_position():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-1.0)
    prune(model, 5 / 8, scope="global")
    assert [m.int().tolist() for m in masks(model).values()] == [[[0, 0], [0, 0]], [[0, 1], [1, 1]]]


def test_a_kept_zero_stays_in_the_mask():
    """Masks are not read off the weights: what is zero by chance may still learn."""
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0, 0, 1]]))
    prune(model, 0.5)
    assert masks(model)["weight"].tolist() == [[False, False, True, True]]
    prune(model, 0.75)
    assert masks(model)["weight"].tolist() == [[False, False, False, True]]


def test_removed_weights_go_first_even_if_training_moved_them():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[4.0, 1, 2, 3]]))
        prune(model, 0.5)
        model.weight.copy_(torch.tensor([[4.0, 100, 100, 3]]))  # a step that nobody masked
    with pytest.warns(UserWarning, match=r"^2 of the 2 .* not zero any more, .*: they become zero now"):
        prune(model, 0.75)
    assert model.weight.tolist() == [[4, 0, 0, 0]]


def test_a_block_whose_half_was_removed_counts_only_what_is_left():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 4, 3, 3]]))
        prune(model, 0.25)
        model.weight.copy_(torch.tensor([[100.0, 4, 3, 3]]))
    with pytest.warns(UserWarning, match=r"^1 of the 1 .* not zero any more, .*: they become zero now"):
        prune(model, 0.5, granularity="block:1x2")
    assert model.weight.tolist() == [[0, 0, 3, 3]]


@pytest.mark.parametrize("first", [0.3, 0.5])
def test_unstructured_then_n_m(first):
    """Valid 2:4, more zeros and no fewer; where a pool had two zeros already, it loses no third."""
    model = prune(mlp(hidden=16), first)
    early = {name: mask.clone() for name, mask in masks(model).items()}
    prune(model, granularity="2:4")
    for name, mask in masks(model).items():
        assert not (mask & ~early[name]).any()
        left = mask.view(-1, 4).sum(1)
        assert torch.equal(left, early[name].view(-1, 4).sum(1).clamp(max=2))
        assert torch.equal(mask, model.get_parameter(name) != 0)


def test_n_m_then_more():
    model = prune(mlp(hidden=16), granularity="2:4")
    early = {name: mask.clone() for name, mask in masks(model).items()}
    prune(model, 0.5)
    assert all(torch.equal(mask, early[name]) for name, mask in masks(model).items())
    prune(model, 0.75)
    assert not any((mask & ~early[name]).any() for name, mask in masks(model).items())
    assert [int(mask.sum()) for mask in masks(model).values()] == [32, 12]


def test_pruning_other_modules_later_keeps_earlier_masks():
    model = prune(mlp(), 0.5, target_modules=["fc1"])
    early = masks(model)["fc1.weight"].clone()
    prune(model, 0.3, target_modules=["fc2"])
    assert torch.equal(masks(model)["fc1.weight"], early)
    assert int((~masks(model)["fc2.weight"]).sum()) == 11
    assert zeros(model) == 48 + 11


def test_conv1d_is_pruned_like_the_transposed_linear(gpt2):
    for settings in ({"scope": "row"}, {"scope": "layer"}, {"granularity": "2:4"}, {"granularity": "block:4x1"}):
        conv1d, linear = Conv1D(8, 12), nn.Linear(12, 8)
        with torch.no_grad():
            conv1d.weight.copy_(torch.randint(1, 5, (12, 8)))  # ties, so the order of positions matters
            linear.weight.copy_(conv1d.weight.t())
        prune(conv1d, **settings)
        prune(linear, **settings)
        assert torch.equal(conv1d.weight, linear.weight.t())
    prune(gpt2, 0.5, scope="row")
    weight = gpt2.transformer.h[0].attn.c_attn.weight  # (in 16, out 48)
    assert (weight == 0).sum(0).tolist() == [8] * 48


def test_the_shared_block_of_albert_is_pruned_once():
    model = models.tiny_albert()
    prune(model, 0.5)
    names = [name for name in masks(model) if "albert_layers" in name]
    assert len(names) == 6
    assert all(int((~masks(model)[name]).sum()) * 2 == masks(model)[name].numel() for name in names)
    assert zeros(model) == sum(m.numel() for m in masks(model).values()) // 2


def test_tied_weights_are_pruned_once(gpt2):
    model = prune(models.tied_linears(), 0.5)
    assert model.first.weight is model.second.weight
    assert zeros(model) == 32 + 8
    prune(gpt2, 0.5, target_modules=["lm_head"])
    assert list(masks(gpt2)) == ["transformer.wte.weight"]
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    assert float((gpt2.lm_head.weight == 0).float().mean()) == 0.5


def test_the_output_embedding_is_left_alone(any_transformer):
    head = any_transformer.get_output_embeddings()
    before = None if head is None else head.weight.clone()
    prune(any_transformer, 0.9)
    assert zeros(any_transformer) == sum(int((~mask).sum()) for mask in masks(any_transformer).values()) > 0
    if head is not None:
        assert torch.equal(head.weight, before)


def test_explicit_allocation():
    model = prune(mlp(), 0.5, allocation={"fc2": 0.25})
    assert [int((~mask).sum()) for mask in masks(model).values()] == [48, 9]
    model = prune(mlp(), 0.5, allocation={"fc1": 0.0, "fc2": 1.0})
    assert [int((~mask).sum()) for mask in masks(model).values()] == [0, 36]


def test_erk_prunes_what_it_says():
    model = mlp()  # raw densities (12 + 8) / 96 and (3 + 12) / 36
    prune(model, 0.5, allocation="erk")
    scale = 66 / (20 + 15)
    expected = [round((1 - 20 / 96 * scale) * 96), round((1 - 15 / 36 * scale) * 36)]
    assert [int((~mask).sum()) for mask in masks(model).values()] == expected
    assert sum(expected) == 66


@pytest.mark.parametrize("sparsity", [0, 0.0])
def test_nothing_to_remove(sparsity):
    model = mlp()
    before = snapshot(model)
    prune(model, sparsity)
    assert_unchanged(model, before)
    assert all(bool(mask.all()) for mask in masks(model).values())


def test_everything_can_go():
    model = prune(mlp(), 1.0)
    assert zeros(model) == 132


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_weights_that_are_not_contiguous(scope):
    model, plain = mlp(), mlp()
    model.fc1.weight = nn.Parameter(model.fc1.weight.detach().t().contiguous().t())
    assert not model.fc1.weight.is_contiguous()
    prune(model, 0.5, scope=scope)
    prune(plain, 0.5, scope=scope)
    assert_unchanged(model, snapshot(plain))


def test_forward_still_runs_and_trains(any_transformer):
    prune(any_transformer, 0.5)
    for batch in models.tiny_batches(any_transformer):
        any_transformer(**batch).loss.backward()


def test_dry_run_returns_the_plan_and_changes_nothing():
    model = mlp()
    before = snapshot(model)
    plan = prune(model, 0.3, dry_run=True)
    assert isinstance(plan, PruningPlan)
    assert plan.remove == 40
    assert_unchanged(model, before)
    assert MaskStore.of(model) is None
    assert prune(model, 0.3, criterion="taylor", dry_run=True).config.criterion == "taylor"  # without data


def test_it_returns_the_model_and_remembers_the_config():
    model = mlp()
    config = PruningConfig(0.3)
    assert prune(model, config) is model
    assert MaskStore.of(model).config == config


@pytest.mark.parametrize(
    ("config", "settings", "expected"),
    [
        (None, {}, PruningConfig()),
        (0.3, {}, PruningConfig(0.3)),
        (None, {"sparsity": 0.3}, PruningConfig(0.3)),
        (0.3, {"scope": "row"}, PruningConfig(0.3, scope="row")),
        (PruningConfig(0.3), {}, PruningConfig(0.3)),
        (PruningConfig(0.3), {"sparsity": 0.4, "seed": 2}, PruningConfig(0.4, seed=2)),
    ],
)
def test_resolve_config(config, settings, expected):
    assert resolve_config(config, settings) == expected


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (0.3, {"sparsity": 0.4}, r"sparsity is given twice: 0\.3 and 0\.4"),
        (0.3, {"criterium": "taylor"}, r"unknown setting 'criterium': .*Did you mean 'criterion'\?"),
        (PruningConfig(), {"criterium": "taylor"}, r"unknown setting 'criterium': .*Did you mean 'criterion'\?"),
        ("magnitude", {}, r"sparsity is 'magnitude': expected a share from 0 to 1"),
        (50, {}, r"sparsity is 50: expected a share from 0 to 1; did you mean 0\.5\?"),
    ],
)
def test_bad_settings_are_refused_before_any_change(config, settings, message):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=message):
        prune(model, config, **settings)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["qeury"]}, "unknown module 'qeury'"),
        ({"exclude_modules": ["clasifier"]}, "unknown module 'clasifier'"),
        ({"allocation": {"qeury": 0.3}}, "allocation: unknown target module 'qeury'"),
        ({"granularity": "block:5x1"}, "does not divide 14 of 14 targets"),
        ({"sparsity": 0.1}, "is below what earlier pruning already removed"),
    ],
)
def test_refused_plans_change_nothing(bert, settings, message):
    prune(bert, 0.3)
    before, store = snapshot(bert), MaskStore.of(bert)
    early, packed = dict(store.masks), dict(store.masks.packed)
    with pytest.raises(PlanError, match=message):
        prune(bert, **settings)
    assert_unchanged(bert, before)
    assert MaskStore.of(bert).masks.packed == store.masks.packed == packed  # the very same
    assert all(torch.equal(mask, early[name]) for name, mask in store.masks.items())
    assert store.config == PruningConfig(0.3)


def test_keep_dense_too_late_is_refused_before_calibration():
    model = prune(mlp(), 0.3)

    def batches():
        raise AssertionError("calibration was read")
        yield

    before = snapshot(model)
    with pytest.raises(MaskError, match="was pruned before without it"):
        prune(model, 0.5, criterion="taylor", calibration=batches(), keep_dense=True)
    assert_unchanged(model, before)


def test_plan_counts_what_is_gone_already():
    model = prune(mlp(), 0.5, scope="global")
    removed = sum(int((~mask).sum()) for mask in MaskStore.of(model).masks.values())
    plan = prune(model, 0.5, dry_run=True)
    prune(model, 0.5)
    after = sum(int((~mask).sum()) for mask in MaskStore.of(model).masks.values())
    assert after >= removed
    assert plan.removed_parameters == sum(max(t.remove, t.already) for t in plan.tensors) <= after


def test_compiled_model_is_pruned_itself():
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    assert prune(compiled, 0.5) is compiled
    assert MaskStore.of(model) is not None
    outside, inside = MaskStore.of(compiled).masks.packed, MaskStore.of(model).masks.packed
    assert outside["_orig_mod.fc1.weight"] is inside["fc1.weight"]


_WRITING = ("pipeline.py", "transaction.py", "mask_store.py", "held_masks.py", "interrupts.py")


def lines_of_writing(do, at=None):
    """The lines of the steps that write, in order, as (file, number); Ctrl-C comes before the one numbered ``at``."""
    lines = []

    def trace(frame, event, _):
        if not frame.f_code.co_filename.endswith(_WRITING):
            return None
        if event == "line" and (at is None or len(lines) <= at):
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(lines) - 1 == at:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        do()
    finally:
        sys.settrace(None)
    return lines


INTERRUPTED = [  # settings, and whether the model has masks before
    ({}, False),
    ({"criterion": "magnitude"}, True),
    ({"repair": "least_squares"}, True),
    ({"criterion": "wanda", "keep_dense": True}, True),
]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a folder goes when it is forgotten
@pytest.mark.parametrize("case", range(len(INTERRUPTED)))
def test_ctrl_c_leaves_a_model_before_or_after_and_never_between(case):
    """Interrupted at every line of the steps that write, the first time that it runs and the last time.

    Lines that run with several settings are interrupted with two of them, in turn.
    """
    batches = [{"x": torch.randn(4, 6, generator=torch.Generator().manual_seed(0))}]

    def build(number):
        settings, again = INTERRUPTED[number]
        model = models.mlp(inputs=6, hidden=4, labels=2)
        return prune(model, 0.2, keep_dense="keep_dense" in settings) if again else model

    def lines_with(number, model, at=None):
        return lines_of_writing(lambda: prune(model, 0.5, calibration=batches, **INTERRUPTED[number][0]), at)

    def state(model):
        store = MaskStore.of(model)
        masks = {} if store is None else {name: mask.tolist() for name, mask in store.masks.items()}
        return {name: p.tolist() for name, p in model.named_parameters()}, masks, store and store.config

    before, done = build(case), build(case)
    runs = [lines_with(number, done if number == case else build(number)) for number in range(len(INTERRUPTED))]
    allowed = (state(before), state(done))
    assert allowed[0] != allowed[1]
    own, points = runs[case], set()
    for turn, line in enumerate(dict.fromkeys(line for lines in runs for line in lines)):
        cases = [number for number, lines in enumerate(runs) if line in lines]
        if cases[turn % len(cases)] == case:
            points.add(own.index(line))
        if cases[(turn + 1) % len(cases)] == case:
            points.add(len(own) - 1 - own[::-1].index(line))
    seen = set()
    for point in sorted(points):
        model = build(case)
        with pytest.raises(KeyboardInterrupt):
            lines_with(case, model, point)
        assert state(model) in allowed, own[point]
        seen.add(state(model)[1] == allowed[1][1])
    assert seen == {False, True}


@pytest.mark.parametrize(
    ("settings", "where"),
    [({"criterion": "magnitude"}, "mask_store.zero_weight"), ({"criterion": "wanda"}, "transaction.zero_weight")],
)
def test_ctrl_c_pressed_again_and_again_leaves_a_model_before_or_after(settings, where, monkeypatch):
    """Also while the last step is done to its end, or weights and masks are given back."""
    batches = [{"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(0))}]
    before, model = (prune(mlp(), 0.2) for _ in range(2))
    after = prune(prune(mlp(), 0.2), 0.5, calibration=batches, **settings)
    presses = iter([False, True] + [True] * 3)

    def pressed(do):
        def wrapped(*args):
            if next(presses, False):
                raise KeyboardInterrupt
            return do(*args)

        return wrapped

    monkeypatch.setattr(f"hf_prune.pruning.{where}", pressed(zero_weight))
    monkeypatch.setattr(OffloadCache, "get", pressed(OffloadCache.get))
    with pytest.raises(KeyboardInterrupt):
        prune(model, 0.5, calibration=batches, **settings)
    assert next(presses, None) is None
    expected = after if where.startswith("mask_store") else before
    assert_same_masks(model, MaskStore.of(expected))
    for name, weight in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), weight), name


@pytest.mark.parametrize("settings", [{"keep_dense": True}, {"objective": "loss", "repair": "least_squares"}], ids=str)
@pytest.mark.parametrize("what", ["remove", "register_forward_hook", "register_forward_pre_hook"])
def test_ctrl_c_leaves_no_hooks(settings, what, monkeypatch):
    """Pressed in the moment before a hook is removed, and in the one after it was added, from the first to the last."""
    owner = RemovableHandle if what == "remove" else nn.Module
    do, counts = getattr(owner, what), []
    batches = models.tiny_batches(models.tiny_bert(), sizes=(2,))

    def interrupted(*args, **kwargs):
        counts[-1] -= 1
        done = None if what == "remove" and counts[-1] == 0 else do(*args, **kwargs)
        if counts[-1] == 0:
            raise KeyboardInterrupt
        return done

    def state(model):
        return [
            (m.training, "forward" in vars(m), {k: len(v) for k, v in vars(m).items() if "_hooks" in k and v})
            for m in model.modules()
        ]

    monkeypatch.setattr(owner, what, interrupted)
    counts.append(-1)
    expected = state(models.tiny_bert().train())
    prune(models.tiny_bert(), 0.5, criterion="wanda", calibration=batches, **settings)
    total = -1 - counts[0]
    assert total > 3
    for number in {1, total // 3, 2 * total // 3, total}:
        counts.append(number)
        model = models.tiny_bert().train()
        with pytest.raises(KeyboardInterrupt):
            prune(model, 0.5, criterion="wanda", calibration=batches, **settings)
        assert state(model) == expected, number


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="only Linux says what can be written to")
@pytest.mark.parametrize("settings", [{}, {"repair": "least_squares"}, {"granularity": "head"}], ids=str)
def test_weights_that_are_a_file_mapped_for_reading_are_refused(tmp_path, settings):
    """Writing to them would kill the process."""
    model = models.tiny_bert()
    weight = model.bert.encoder.layer[1].output.dense.weight
    weight.detach().numpy().tofile(tmp_path / "weight")
    mapped = numpy.memmap(tmp_path / "weight", numpy.float32, "r", shape=tuple(weight.shape))
    weight.data = torch.from_numpy(mapped)
    with pytest.raises(PlanError, match=r"layer\.1\.output\.dense\.weight lies in memory that cannot be written to"):
        prune(model, 0.5, calibration=models.tiny_batches(model), **settings)
    assert MaskStore.of(model) is None
    weight.data = weight.data.clone()
    prune(model, 0.5, calibration=models.tiny_batches(model), **settings)
    private = numpy.memmap(tmp_path / "weight", numpy.float32, "c", shape=tuple(weight.shape))
    other = models.tiny_bert()
    other.bert.encoder.layer[1].output.dense.weight.data = torch.from_numpy(private)
    prune(other, 0.5)
