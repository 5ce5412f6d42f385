"""The objective "loss": layers match the dense model's outputs, and tokens count as the predictions depend on them."""

import copy

import pytest
import torch
from torch import nn

from hf_prune.calibration import output_matching as matching
from hf_prune.calibration.input_reader import CACHE_BYTES, InputReader
from hf_prune.calibration.output_matching import OutputMatcher
from hf_prune.calibration.predictions import sampled_prediction
from hf_prune.calibration.sensitivity import measure_sensitivity
from hf_prune.errors import CalibrationError, ConfigError
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import make_plan
from hf_prune.planning.plan import targets_of
from hf_prune.pruning.mask_store import MaskStore
from tests import models
from tests.calibration.test_statistics import Interrupted, state, unusual
from tests.models import assert_unchanged, snapshot, tiny_batches

BUILD = {**models.TRANSFORMERS, "vit": models.tiny_vit, "tied": models.tied_linears, "mlp": models.mlp}
del BUILD["resnet"]
LOSS = PruningConfig(criterion="alps", objective="loss")

# What is added to a residual stream, and where the sum is seen.
SUMS = {
    "bert": {"attention.output.dense": "attention.output.LayerNorm", "0.output.dense": "output.LayerNorm"},
    "distilbert": {"out_lin": "sa_layer_norm", "lin2": "output_layer_norm"},
    "gpt2": {"attn.c_proj": "ln_2", "mlp.c_proj": "h.0"},
    "llama": {"o_proj": "post_attention_layernorm", "down_proj": "layers.0"},
    "vit": {"o_proj": "layernorm_after", "fc2": "layers.0"},
}


def begun(model, plan, batches, stack):
    reader = stack.enter_context(InputReader(model, targets_of(plan), batches))
    steps = reader.order()
    sensitivity = measure_sensitivity(reader, 0)
    stack.callback(sensitivity.close)
    return reader, steps, stack.enter_context(OutputMatcher(model, targets_of(plan), batches, sensitivity, CACHE_BYTES))


@pytest.fixture
def stack():
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("kind", sorted(BUILD))
def test_the_outputs_to_match_are_those_of_a_dense_copy(kind, stack, monkeypatch):
    """On the inputs of a model in which the weights before each target have changed."""
    monkeypatch.setattr(matching, "TOKEN_SHARE", 0.0)
    model = BUILD[kind]()
    dense, batches = copy.deepcopy(model), tiny_batches(model, sizes=(4, 2))
    plan = make_plan(model, LOSS)
    reader, steps, matcher = begun(model, plan, batches, stack)
    names = {id(module): name for name, module in model.named_modules()}
    for segment in matcher.segments(steps):
        for step in segment:
            found = matcher.gather(reader, step)
            for target in step:
                name = target.name
                point = matcher._points[name]
                inputs, now = watched(model, batches, names, reader.holders[name], point)
                _, then = watched(dense, batches, names, reader.holders[name], point)
                expected = (then - now).t() @ inputs / len(inputs)
                values = found[name]
                torch.testing.assert_close(values["change_products"], expected, rtol=1e-3, atol=1e-5)
                torch.testing.assert_close(values["output_change"], (then - now).mean(0), rtol=1e-3, atol=1e-5)
                torch.testing.assert_close(values["input_mean"], inputs.mean(0), rtol=1e-3, atol=1e-6)
                gram = inputs.t() @ inputs / len(inputs)
                torch.testing.assert_close(values["input_gram"], gram, rtol=1e-3, atol=1e-6)
            for target in step:
                with torch.no_grad():
                    model.get_parameter(target.name).mul_(-1.5)
            reader.finish(step)
    assert {t.target.name for t in plan.tensors} == matcher._points.keys()


def watched(model, batches, names, holders, point):
    """Inputs of some modules, and what is seen at their point, of all calls, from plain hooks."""
    modules = dict(model.named_modules())
    inputs, seen = [], []

    def rows(x):
        return x.reshape(-1, x.shape[-1])

    own = [modules[names[id(module)]] for module in holders]
    at = None if point is None else modules[names[id(point.module)]]
    handles = [m.register_forward_pre_hook(lambda _, args: inputs.append(rows(args[0]))) for m in own]
    if at is None:
        handles += [m.register_forward_hook(lambda _, args, out: seen.append(rows(out))) for m in own]
    elif point.output:
        take = lambda _, args, out: seen.append(rows(out if isinstance(out, torch.Tensor) else out[0]))  # noqa: E731
        handles.append(at.register_forward_hook(take))
    else:
        handles.append(at.register_forward_pre_hook(lambda _, args: seen.append(rows(args[0]))))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return torch.cat(inputs), torch.cat(seen)


@pytest.mark.parametrize("kind", sorted(SUMS))
def test_what_is_added_to_a_residual_stream_is_compared_as_a_sum(kind, stack):
    model = BUILD[kind]()
    plan = make_plan(model, LOSS)
    _, steps, matcher = begun(model, plan, tiny_batches(model), stack)
    names = {id(module): name for name, module in model.named_modules()}
    next(matcher.segments(steps))  # the first block
    own = {t.target.name: t.target.module for t in plan.tensors}
    found = {name: names[id(a.module)] if a is not None else own[name] for name, a in matcher._points.items()}
    for name, place in found.items():
        wanted = [at for target, at in SUMS[kind].items() if name.removesuffix(".weight").endswith(target)]
        if kind == "bert" and name.endswith("attention.output.dense.weight"):
            wanted = ["attention.output.LayerNorm"]
        assert place.endswith(wanted[0] if wanted else name.removesuffix(".weight")), (name, place)


class Block(nn.Module):
    """What each layer puts out is changed in place by the next one, if asked for."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.up, self.act, self.down, self.inplace = nn.Linear(8, 16), nn.ReLU(inplace), nn.Linear(16, 8), inplace

    def forward(self, x):
        y = self.down(self.act(self.up(x)))
        return y.add_(x) if self.inplace else y + x


class InPlace(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block(inplace) for _ in range(2))
        self.last, self.inplace = nn.Linear(8, 3), inplace

    def forward(self, x, labels=None):
        x = self.first(x)
        for block in self.blocks:
            y = block(x)
            x = y.mul_(1.5) if self.inplace else y * 1.5
        return {"logits": self.last(x)}


@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "alps", "objective": "loss", "repair": "least_squares"},
        {"polish": {"epochs": 2, "learning_rate": 1e-3}},
    ],
)
def test_outputs_may_be_changed_in_place(settings):
    found = []
    for inplace in (False, True):
        model = models.fill(InPlace(inplace)).double()  # of which nothing is computed in bfloat16
        batches = [{"x": b["x"].double()} for b in tiny_batches(model, sizes=(16, 16, 16))]
        found.append(prune(model, 0.6, target_modules=r"blocks\..*", calibration=batches, **settings))
    for (name, a), b in zip(found[0].named_parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


class Skips(nn.Module):
    """A target before the blocks, whose output goes past them as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.last = nn.Linear(16, 3)

    def forward(self, x, labels=None):
        y = h = self.first(x)
        for block in self.blocks:
            y = block(y)
        return {"logits": self.last(torch.cat([h, y], -1))}


def test_what_goes_past_the_blocks_is_dense_too(stack, monkeypatch):
    monkeypatch.setattr(matching, "TOKEN_SHARE", 0.0)
    model = models.fill(Skips())
    dense, batches = copy.deepcopy(model), tiny_batches(model, sizes=(8, 8))
    _, steps, matcher = begun(model, make_plan(model, LOSS), batches, stack)
    (segment,) = matcher.segments(steps)
    assert [t.name for step in segment for t in step][::4] == ["first.weight", "last.weight"]
    with torch.no_grad():
        model.first.weight.mul_(-1)
        expected = torch.cat([dense(**b)["logits"] for b in batches])
        torch.testing.assert_close(torch.cat([matcher._outputs.get(("last.weight", i))[0] for i in range(2)]), expected)


def test_padding_changes_nothing():
    model = models.tiny_bert()
    batches = [{k: v for k, v in b.items() if k != "labels"} for b in tiny_batches(model, length=5)]
    wide = []
    for batch in batches:
        pad = torch.full((len(batch["input_ids"]), 3), 7)
        ids = torch.cat([batch["input_ids"], pad], 1)
        wide.append({"input_ids": ids, "attention_mask": torch.cat([batch["attention_mask"], pad * 0], 1)})
    # In float64: on some CPUs float32 rounds differently at another width, and the solver enlarges that.
    found = [prune(models.tiny_bert().double(), LOSS, calibration=each) for each in (batches, wide)]
    for (name, a), b in zip(found[0].named_parameters(), found[1].parameters(), strict=True):
        assert torch.equal(a == 0, b == 0), name
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("kind", "criterion"),
    [
        ("bert", "alps"),
        ("gpt2", "magnitude"),
        ("gpt2", "wanda"),
        ("llama", "wanda"),
        ("t5", "sparsegpt"),
        ("vit", "magnitude"),
    ],
)
def test_outputs_come_closer_to_those_of_the_dense_model(kind, criterion):
    """Than with the objective of each layer by itself; on the calibration batches, over several models."""
    totals = {"layer": 0.0, "loss": 0.0}
    for seed in range(3):
        dense = BUILD[kind](seed=seed)
        with torch.no_grad():
            for name, parameter in dense.named_parameters():
                if parameter.dim() == 2 and "embed" not in name:
                    parameter.mul_(6)  # so that layers matter
        batches = tiny_batches(dense, sizes=(8, 8, 8, 8), seed=seed)
        for objective in totals:
            model = copy.deepcopy(dense)
            settings = {"criterion": criterion, "objective": objective, "repair": "least_squares"}
            prune(model, 0.6, **settings, calibration=batches)
            with torch.no_grad():
                errors = [((model(**b).logits - dense(**b).logits) ** 2).mean() for b in batches]
                totals[objective] += float(sum(errors) / sum(dense(**b).logits.var() for b in batches))
    assert totals["loss"] < totals["layer"]


@pytest.mark.covering(1)
@pytest.mark.parametrize("granularity", ["unstructured", "2:4", "block:2x2"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "albert", "resnet"])
def test_counts_are_exact_and_dense_weights_come_back(kind, granularity):
    model = models.TRANSFORMERS[kind]()
    before, batches = snapshot(model), tiny_batches(model)
    modules = ".*convolution" if kind == "resnet" else "all-linear"
    plan = make_plan(
        model,
        LOSS.replace(
            granularity=granularity,
            target_modules=modules,
            exclude_modules=["embedder.convolution"] if kind == "resnet" else (),
        ),
    )
    prune(model, plan.config, calibration=batches, keep_dense=True, repair="least_squares")
    masks = MaskStore.of(model).masks
    for t in plan.tensors:
        size = t.target.size // t.units
        assert int((~masks[t.target.name]).sum()) == t.remove * size
        assert not model.get_parameter(t.target.name)[~masks[t.target.name]].any()
    MaskStore.of(model).discard(model)
    assert_unchanged(model, before)


def test_the_same_call_gives_the_same_weights():
    found = [prune(models.tiny_bert(), LOSS, calibration=tiny_batches(models.tiny_bert())) for _ in range(2)]
    assert_unchanged(found[0], snapshot(found[1]))


def test_experts_are_solved_on_their_own():
    """A router may send them other tokens than in the dense model: these cannot be compared."""
    model = models.tiny_moe()
    batches = tiny_batches(model, sizes=(8, 8))
    plan = make_plan(model, LOSS)
    with InputReader(model, targets_of(plan), batches) as reader:
        reader.order()
        sensitivity = measure_sensitivity(reader, 0)
        sensitivity.close()
        reader.tokens.clear()
    experts = {t.target.name for t in plan.tensors if ".experts." in t.target.name}
    assert experts
    assert sensitivity.misplaced == experts


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_an_exception_midway_leaves_the_model_bit_for_bit(error, monkeypatch):
    model = prune(unusual(models.tiny_bert()), 0.1)
    before, was, store = snapshot(model), state(model), MaskStore.of(model)
    gather, calls = OutputMatcher.gather, [0]

    def stop(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 6:
            raise error
        return gather(*args, **kwargs)

    monkeypatch.setattr(OutputMatcher, "gather", stop)
    with pytest.raises(error):
        prune(model, LOSS.replace(repair="least_squares"), calibration=tiny_batches(model))
    assert calls == [6]
    assert_unchanged(model, before)
    assert state(model) == was
    assert MaskStore.of(model).masks.packed == store.masks.packed  # the very same
    assert not models.forward_hooks(model)


# --- sensitivity ------------------------------------------------------------------------------------


def test_sensitivities_by_hand():
    """(∂ prediction / ∂ output)² of an MLP; of two classes, only their difference counts."""
    model = models.mlp(labels=2)
    batches = tiny_batches(model, sizes=(3, 2))
    with InputReader(model, targets_of(make_plan(model, LOSS)), batches) as reader:
        reader.order()
        found = measure_sensitivity(reader, 0)
    contrast = torch.tensor([1.0, -1.0]) / 2**0.5
    x = torch.cat([batch["x"] for batch in batches])
    hidden = model.fc1(x) > 0
    gradient = (hidden * (contrast @ model.fc2.weight)).detach()  # (5, hidden)
    torch.testing.assert_close(found.outputs["fc1.weight"], gradient.square().mean(0))
    torch.testing.assert_close(found.outputs["fc2.weight"], torch.full((2,), 0.5))
    tokens = torch.cat([found.weights("fc1.weight", i, 0) for i in range(2)])
    torch.testing.assert_close(tokens, gradient.square().sum(1) / gradient.square().sum(1).mean())
    torch.testing.assert_close(found.weights("fc2.weight", 1, 0), torch.ones(2))
    found.close()


def test_a_language_model_samples_its_own_labels():
    """The mean square of ∂ log p(label) / ∂ logit is p (1 - p) at the logits."""
    logits = torch.randn(400, 50, 3, requires_grad=True)
    value = sampled_prediction({"logits": logits}, None, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(value, logits)
    p = logits.detach().softmax(-1)
    torch.testing.assert_close(gradient.square().mean((0, 1)), (p * (1 - p)).mean((0, 1)), rtol=0.05, atol=0)
    mask = torch.ones(400, 50)
    mask[:, 25:] = 0
    value = sampled_prediction({"logits": logits}, mask, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(value, logits)
    assert not gradient[:, 25:].any()
    assert gradient[:, :25].any()


@pytest.mark.parametrize("outputs", ["tensor", "tuple", "list", "namespace", "hidden"])
def test_any_output_will_do(outputs):
    from types import SimpleNamespace

    y = torch.randn(2, 5, requires_grad=True)
    given = {
        "tensor": y,
        "tuple": (y, None),
        "namespace": SimpleNamespace(logits=y),
        "hidden": {"last_hidden_state": y},
        "list": [y],
    }
    value = sampled_prediction(given[outputs], None, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(value, y)
    torch.testing.assert_close(gradient.norm(dim=1), torch.ones(2))
    centred = outputs == "namespace"
    assert (float(gradient.sum(1).abs().max()) < 1e-6) == centred


def test_a_prediction_that_depends_on_no_target_is_refused():
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, labels=None):
            self.fc(x)
            return x

    model = Deaf()
    before = snapshot(model)
    with pytest.raises(CalibrationError, match="depend on none of the weights to be pruned: check target_modules"):
        prune(model, LOSS, calibration=[{"x": torch.randn(2, 4)}])
    assert_unchanged(model, before)


def test_gradients_that_are_not_finite_are_refused():
    class Wild(models.MLP):
        def forward(self, x, labels=None):
            out = super().forward(x)
            out.logits = (out.logits - out.logits.detach()).sqrt()
            return out

    model = models.fill(Wild())
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=r"the gradient of the predictions at fc1\.weight is not finite"):
        prune(model, LOSS, calibration=tiny_batches(model))
    assert_unchanged(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "lost"}, r"unknown objective 'lost': expected one of layer, loss. Did you mean 'loss'"),
        ({"objective": "loss"}, r"objective='loss' contradicts criterion 'magnitude' without a repair"),
        (
            {"objective": "loss", "criterion": "alps", "calibration_order": "one_pass"},
            r"objective='loss' contradicts calibration_order='one_pass': it compares layers",
        ),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        PruningConfig(**settings)


def test_the_plan_names_the_objective():
    assert "alps, unstructured, scope layer, allocation uniform, objective loss" in str(
        make_plan(models.tiny_bert(), LOSS)
    )
