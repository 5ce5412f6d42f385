"""Packed experts are pruned like lists of expert modules: the same masks and weights, from the same tokens."""

import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_prune.architectures import experts
from hf_prune.auto import AutoPrunedModelForCausalLM
from hf_prune.calibration.input_reader import InputReader
from hf_prune.errors import CalibrationError
from hf_prune.mixin import prunable
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import make_plan
from hf_prune.planning.plan import targets_of
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.training.trainer import PruningTrainer
from tests.models import VOCAB, assert_unchanged, snapshot
from tests.moe_models import FAMILIES, experts_of, packed, tiny_mixture, twin

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*experts that saw (fewer|no) calibration token",
    "ignore:no calibration batch reached",
    "ignore:the predictions depend on no weight of",
)
LISTS = [family for family in FAMILIES if family != "jetmoe"]
TRANSPOSED = {"gpt_oss", "llama4"}


def batches(padding: int = 0, number: int = 3):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCAB, (2, 10), generator=generator) for _ in range(number)]
    masks = [torch.ones_like(x) for x in ids]
    for mask in masks:
        mask[1, 10 - padding :] = 0
    return [{"input_ids": x, "attention_mask": m, "labels": x} for x, m in zip(ids, masks, strict=True)]


def pruned_pair(family, data=None, **settings):
    """The packed model and its twin, pruned with the same settings."""
    model, listed = tiny_mixture(family), twin(family)
    prune(model, calibration=data, **settings)
    prune(listed, calibration=data, **settings)
    return model, listed


def assert_same(family, model, listed, tolerance=0.0):
    """The same zeros in every expert, and the same values up to rounding."""
    for name in packed(model):
        weight = model.get_parameter(name).detach()
        expected = experts_of(listed, name, family in TRANSPOSED)
        assert torch.equal(weight == 0, expected == 0), name
        assert torch.allclose(weight, expected, rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_every_expert_goes_and_plain_transformers_loads_the_rest(family, tmp_path):
    model = prunable(tiny_mixture(family))
    model.prune(0.5)
    assert packed(model)
    for name in packed(model):
        assert [int((expert == 0).sum()) for expert in model.get_parameter(name)] == [
            model.get_parameter(name)[0].numel() // 2
        ] * 4
    before, masks = snapshot(model), dict(model.masks)
    model.save_pretrained(tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert_unchanged(loaded, before)
    again = AutoPrunedModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert masks.keys() == again.masks.keys()
    assert all(torch.equal(mask, again.masks[name]) for name, mask in masks.items())
    model.save_pretrained(tmp_path / "packed", compressed=True)
    unpacked = AutoPrunedModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert_unchanged(unpacked, before)
    assert all(torch.equal(mask, unpacked.masks[name]) for name, mask in masks.items())


@pytest.mark.parametrize("family", LISTS)
def test_like_a_list_of_expert_modules(family):
    """``test_like_a_list_in_every_setting`` has the other criteria."""
    criterion = ("sparsegpt", "wanda")[LISTS.index(family) % 2]
    model, listed = pruned_pair(family, batches(), sparsity=0.5, criterion=criterion)
    assert_same(family, model, listed, 1e-5)


def test_each_expert_gets_its_own_sparsity_where_it_is_learned() -> None:
    model = tiny_mixture("mixtral")
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.down_proj[2] *= 1e-3  # what it adds hardly counts
    prune(model, 0.5, allocation="fisher", calibration=batches())
    zeros = [int((expert == 0).sum()) for expert in experts.down_proj]
    assert zeros[2] == max(zeros) > min(zeros)
    plan = prune(tiny_mixture("mixtral"), 0.5, allocation="fisher", calibration=batches(), dry_run=True)
    tensor = next(t for t in plan.tensors if t.target.name.endswith("experts.down_proj"))
    assert sum(tensor.by_slab) == tensor.remove
    assert len(set(tensor.by_slab)) > 1


SETTINGS = [
    {"criterion": "alps"},
    {"criterion": "snip"},
    {"criterion": "taylor"},
    {"criterion": "fisher"},
    {"criterion": "fisher_diagonal", "scope": "global"},
    {"criterion": "magnitude", "scope": "global"},
    {"criterion": "magnitude", "scope": "row"},
    {"criterion": "magnitude", "allocation": "erk"},
    {"criterion": "magnitude", "granularity": "block:4x2"},
    {"criterion": "magnitude", "granularity": "row"},
    {"criterion": "magnitude", "granularity": "column"},
    {"criterion": "wanda", "granularity": "2:4", "sparsity": None},
    {"criterion": "sparsegpt", "granularity": "2:4", "sparsity": None},
    {"criterion": "wanda", "calibration_order": "one_pass"},
    {"criterion": "wanda", "repair": "least_squares"},
    {"criterion": "magnitude", "repair": "least_squares", "scope": "global"},
    {"criterion": "wanda", "objective": "loss"},
    {"criterion": "sparsegpt", "objective": "loss", "repair": "least_squares"},
    {"criterion": "wanda", "allocation": "owl"},
    {"criterion": "magnitude", "allocation": "fisher"},
    {"criterion": "magnitude", "allocation": "fisher", "scope": "row"},
    {"criterion": "sparsegpt", "allocation": "fisher"},
    {"criterion": "fisher", "allocation": "fisher", "steps": 2},
]


@pytest.mark.parametrize("number", range(len(SETTINGS)), ids=lambda n: "-".join(map(str, SETTINGS[n].values())))
def test_like_a_list_in_every_setting(number):
    """The three layouts take turns."""
    family, settings = ("mixtral", "gpt_oss", "llama4")[number % 3], SETTINGS[number]
    model, listed = pruned_pair(family, batches(), **{"sparsity": 0.5, **settings})
    assert_same(family, model, listed, 5e-3 if "alps" in settings.values() else 1e-4)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4", "nemotron_h"])
def test_padding_that_a_router_gathers_does_not_count(family):
    """The same texts in batches of one, without padding."""
    padded = batches(padding=4)
    apart = []
    for batch in padded:
        for i in (0, 1):
            kept = batch["attention_mask"][i].bool()
            apart.append({name: value[i : i + 1, kept] for name, value in batch.items()})
    names = {}
    for data in (padded, apart):
        model = tiny_mixture(family)
        plan = make_plan(model, PruningConfig(0.5, criterion="wanda"))
        with InputReader(model, targets_of(plan), data) as reader:
            reader.order()
            names[len(data)] = reader.gather(reader.targets, frozenset({"input_gram"})), dict(reader.tokens)
    (with_padding, counts), (without, expected) = names.values()
    assert counts == expected
    for name in packed(model):
        assert sum(counts[name]) > 0
        difference = (with_padding[name]["input_gram"] - without[name]["input_gram"]).abs().max()
        assert difference <= 1e-5 * without[name]["input_gram"].abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_computes_what_the_model_computes(family):
    """Every expert's product goes through a module that hooks can see, bit for bit."""
    model = tiny_mixture(family)
    plan = make_plan(model, PruningConfig(0.5, criterion="wanda"))
    expected = model(**{k: v for k, v in batches()[0].items() if k != "labels"}).logits
    with InputReader(model, targets_of(plan), batches()) as reader, torch.no_grad():
        found = reader.forward({k: v for k, v in batches()[0].items() if k != "labels"}).logits
    assert torch.equal(found, expected)


def test_every_implementation_of_experts_is_left_as_it_was():
    model = tiny_mixture("mixtral")
    model.set_experts_implementation("grouped_mm")
    prune(model, 0.5, criterion="wanda", calibration=batches())
    assert model.config._experts_implementation == "grouped_mm"
    eager = tiny_mixture("mixtral")
    prune(eager, 0.5, criterion="wanda", calibration=batches())
    for name in packed(model):
        assert torch.equal(model.get_parameter(name), eager.get_parameter(name))


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt", "alps", "taylor", "snip", "fisher", "fisher_diagonal"])
def test_an_expert_without_tokens_is_pruned_by_magnitude_and_named(criterion):
    """Others saw a few tokens, and are warned of once."""
    model = tiny_mixture("deepseek_v3")
    for layer in model.model.layers:
        layer.mlp.gate.e_score_correction_bias[:2] += 100  # the last two are never chosen
    name = "model.layers.1.mlp.experts.gate_up_proj"
    plain = prune(tiny_mixture("deepseek_v3"), 0.5).get_parameter(name)
    if criterion.startswith("fisher"):
        prune(model, 0.5, criterion=criterion, calibration=batches())
    else:
        words = "saw no calibration token" if criterion in ("wanda", "sparsegpt", "alps") else "depend on no weight of"
        with pytest.warns(UserWarning, match=words) as caught:
            prune(model, 0.5, criterion=criterion, calibration=batches())
        assert len([w for w in caught if words in str(w.message)]) == 1
    for expert in (2, 3):
        assert torch.equal(model.get_parameter(name)[expert] == 0, plain[expert] == 0)
    assert not torch.equal(model.get_parameter(name)[0] == 0, plain[0] == 0)


def test_a_layout_that_is_not_as_declared_is_refused():
    model = tiny_mixture("mixtral")
    for module in model.modules():
        if hasattr(module, "is_transposed"):
            module.is_transposed = True
    before = snapshot(model)
    with pytest.raises(
        CalibrationError, match=r"MixtralExperts multiplies with a part of .*gate_up_proj .*as they are declared"
    ):
        prune(model, 0.5, criterion="wanda", calibration=batches())
    assert_unchanged(model, before)
    assert MaskStore.of(model) is None


def test_the_parts_of_a_mixture_can_be_named():
    model = tiny_mixture("mixtral")
    names = [t.target.name for t in make_plan(model, PruningConfig(0.5, target_modules=["down_proj"])).tensors]
    assert names == [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)]
    both = [t.target.name for t in make_plan(model, PruningConfig(0.5, target_modules=["experts"])).tensors]
    assert both == packed(model)
    rest = [t.target.name for t in make_plan(model, PruningConfig(0.5, exclude_modules=["experts"])).tensors]
    assert rest
    assert not set(rest) & set(both)
    plan = make_plan(model, PruningConfig(0.5, allocation={"down_proj": 0.25}))
    assert {t.sparsity for t in plan.tensors if t.target.name.endswith("down_proj")} == {0.25}
    assert re.search(r"experts\.down_proj +4x16x24", str(plan))


@pytest.mark.parametrize(
    ("family", "criterion"), [("mixtral", "movement"), ("llama4", "movement"), ("mixtral", "taylor")]
)
def test_a_training_holds_the_same_zeros_as_with_a_list(family, criterion, tmp_path):
    examples = [{k: v[i] for k, v in batch.items()} for batch in batches(number=6) for i in (0, 1)]
    trained = []
    for model in (tiny_mixture(family), twin(family)):
        options = {"report_to": [], "save_strategy": "no", "seed": 1, "dataloader_pin_memory": False}
        arguments = TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=4, **options)
        config = PruningConfig(0.5, criterion=criterion, schedule="cubic")
        PruningTrainer(model=model, args=arguments, train_dataset=examples, pruning_config=config).train()
        trained.append(model.eval())
    assert_same(family, *trained, 1e-4)
    name = packed(trained[0])[0]
    assert [int((expert == 0).sum()) for expert in trained[0].get_parameter(name)] == [384] * 4


def test_a_polish_trains_what_is_left_of_experts():
    data = batches(number=8)
    model = prune(tiny_mixture("mixtral"), 0.5, calibration=data, polish={"epochs": 8, "learning_rate": 1e-2})
    plain = prune(tiny_mixture("mixtral"), 0.5)
    changed = [name for name in packed(model) if not torch.equal(model.get_parameter(name), plain.get_parameter(name))]
    assert changed == packed(model)
    for name in changed:
        assert torch.equal(model.get_parameter(name) == 0, plain.get_parameter(name) == 0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft reads it
def test_experts_under_adapters_are_pruned():
    peft = pytest.importorskip("peft")
    model = tiny_mixture("mixtral")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    prune(adapted, 0.5, criterion="wanda", calibration=batches())
    names = packed(model)
    assert all(int((model.get_parameter(name) == 0).sum()) * 2 == model.get_parameter(name).numel() for name in names)


PRODUCTS = {  # how a class multiplies its experts, and the shape of what it is given
    "matmul": (lambda x, w, b: torch.matmul(x, w), (4, 16, 8)),
    "one input for all": (lambda x, w, b: torch.matmul(x, w), (16, 8)),
    "one of one": (lambda x, w, b: x @ w, (1, 16, 8)),
    "bmm": (lambda x, w, b: torch.bmm(x, w), (4, 16, 8)),
    "baddbmm": (lambda x, w, b: torch.baddbmm(b[:, None], x, w), (4, 16, 8)),
    "addmm": (lambda x, w, b: torch.stack([torch.addmm(b[i], x[i], w[i]) for i in range(4)]), (4, 16, 8)),
    "four dimensions": (lambda x, w, b: torch.matmul(x[:, :, None], w[None]).squeeze(2), (16, 4, 8)),
    "a scalar for each": (lambda x, w, b: torch.matmul(x, w), (8,)),
    "four inputs for one": (lambda x, w, b: torch.matmul(x, w[:1]), (4, 16, 8)),
}


class BatchedExperts(nn.Module):
    """Four matrices in a parameter, multiplied at once."""

    def __init__(self, multiply) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.w = nn.Parameter(torch.randn(4, 8, 6, generator=generator))
        self.b = nn.Parameter(torch.randn(4, 6, generator=generator))
        self.multiply = multiply

    def forward(self, x):
        return self.multiply(x, self.w, self.b)


experts.register_packed("BatchedExperts", experts.Layout("w", "conv1d", "b"))


@pytest.mark.parametrize("kind", PRODUCTS)
def test_products_of_all_experts_at_once(kind):
    """Every expert sees the inputs that it is multiplied with, or the product is refused."""
    multiply, shape = PRODUCTS[kind]
    model = nn.Sequential(BatchedExperts(multiply))
    generator = torch.Generator().manual_seed(1)
    data = [{"input": torch.randn(shape, generator=generator)} for _ in range(3)]
    if kind in ("a scalar for each", "four inputs for one"):
        with pytest.raises(
            CalibrationError, match=r"BatchedExperts multiplies an input of shape .*: expected one input"
        ):
            prune(model, 0.5, criterion="wanda", calibration=data)
        return
    expected = model(data[0]["input"])
    plan = make_plan(model, PruningConfig(0.5, criterion="wanda"))
    with InputReader(model, targets_of(plan), data) as reader, torch.no_grad():
        assert torch.equal(reader.forward(data[0]), expected)
        reader.order()
        statistics = reader.gather(reader.targets, frozenset({"input_gram"}))
        assert reader.tokens["0.w"] == (48,) * 4
    inputs = torch.stack([batch["input"] for batch in data])
    for number, gram in enumerate(statistics["0.w"]["input_gram"]):
        given = {"four dimensions": inputs[:, :, number] if inputs.dim() == 4 else inputs}.get(kind)
        if given is None:
            given = inputs if shape == (16, 8) else inputs[:, number if shape[0] == 4 else 0]
        rows = given.reshape(-1, 8)
        assert torch.allclose(gram, rows.T @ rows / 48, rtol=1e-4, atol=1e-4)


def test_what_calibration_does_not_reach_is_told_by_its_reason():
    recurrent = nn.LSTM(8, 8)
    with pytest.warns(UserWarning, match=r"recurrent layers \(0\) multiply inside one operator$"):
        prune(nn.Sequential(recurrent), 0.5, criterion="wanda", calibration=[{"input": torch.randn(4, 8)}])
    model = nn.Sequential(BatchedExperts(lambda x, w, b: torch.einsum("eni,eio->eno", x, w)))
    with pytest.warns(UserWarning, match=r"BatchedExperts ran, and multiplies in a way that calibration cannot follow"):
        prune(model, 0.5, criterion="wanda", calibration=[{"input": torch.randn(4, 16, 8)}])
