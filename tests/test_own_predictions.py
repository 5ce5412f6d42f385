"""Losses against labels that a model draws from its own predictions."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertModel

from hf_prune.calibration import own_loss, squared_gradients
from hf_prune.errors import CalibrationError
from tests import models
from tests.models import mlp, same_bits, tiny_batches


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unlabelled(batches: list[dict]) -> list[dict]:
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]


class Says(nn.Module):
    """Puts out what it is told, scaled by a weight of one."""

    def __init__(self, values: torch.Tensor, problem_type: str | None = None, name: str = "logits") -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.values, self.names = values, [name] if isinstance(name, str) else name
        self.config = SimpleNamespace(problem_type=problem_type)

    def forward(self, x, **_):
        return SimpleNamespace(**{name: self.values * self.scale for name in self.names})


def says(values, seed=0, batch=None, **settings) -> float:
    model = Says(torch.tensor(values), **settings)
    return own_loss(model, {"x": torch.ones(1, 1), **(batch or {})}, generator(seed)).item()


def test_a_sure_prediction_is_its_own_label():
    assert says([[100.0, 0.0], [0.0, 100.0]]) == pytest.approx(0, abs=1e-6)


def test_classes_are_drawn_as_often_as_they_are_likely():
    losses = [says([[0.0, 1.0]], seed) for seed in range(600)]
    likely = float(torch.tensor(1.0).sigmoid())
    drawn = sum(loss == pytest.approx(-float(torch.tensor(likely).log())) for loss in losses)
    assert drawn / 600 == pytest.approx(likely, abs=0.05)
    assert sum(loss == pytest.approx(-float(torch.tensor(1 - likely).log())) for loss in losses) == 600 - drawn


def test_squared_gradients_are_the_fisher_matrix_in_expectation():
    """All classes by their probability, as the matrix is defined, against many draws."""
    model = mlp()
    for parameter in model.parameters():
        parameter.data.mul_(8)
    x = torch.randn(1, 8)
    logits = model(x).logits[0]
    expected = torch.zeros_like(model.fc1.weight)
    for i, p in enumerate(logits.softmax(-1).tolist()):
        (gradient,) = torch.autograd.grad(-logits.log_softmax(-1)[i], [model.fc1.weight], retain_graph=True)
        expected += p * gradient**2
    found = squared_gradients(model, ["fc1.weight"], [{"x": x.expand(1500, -1).contiguous()}])["fc1.weight"]
    assert float((found - expected).norm() / expected.norm()) < 0.1


def test_several_labels_each_are_drawn_by_themselves():
    assert says([[100.0, -100.0, 100.0]], problem_type="multi_label_classification") == pytest.approx(0, abs=1e-6)
    values = {round(says([[1.0, -1.0]], s, problem_type="multi_label_classification"), 3) for s in range(40)}
    assert len(values) == 3


@pytest.mark.parametrize("settings", [{"problem_type": "regression"}, {}])
def test_numbers_are_drawn_around_the_prediction(settings):
    """Half the square of a standard normal number, whatever the prediction."""
    values = [[5.0], [-3.0]]
    losses = torch.tensor([says(values, seed, **settings) for seed in range(400)])
    assert float(losses.mean()) == pytest.approx(0.5, abs=0.06)


def test_start_and_end_of_an_answer():
    names = ["start_logits", "end_logits"]
    assert says([[100.0, 0.0, 0.0]], name=names) == pytest.approx(0, abs=1e-6)
    uniform = says([[0.0, 0.0, 0.0]], name=names)
    assert uniform == pytest.approx(float(torch.tensor(3.0).log()))


def test_padding_does_not_count():
    tokens = [[[100.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]
    mask = {"attention_mask": torch.tensor([[1, 0], [1, 1]])}
    half = float(torch.tensor(2.0).log()) / 2
    assert says(tokens, batch=mask) == pytest.approx(half)  # the mean over examples of the mean over tokens
    assert says(tokens) == pytest.approx(1.5 * half)


def test_labels_in_the_batch_have_no_say():
    model = models.tiny_bert()
    (batch,) = tiny_batches(model, sizes=(3,))
    assert own_loss(model, batch, generator()) == own_loss(model, unlabelled([batch])[0], generator())


@pytest.mark.parametrize("kind", ["bert", "bert_mlm", "gpt2", "llama", "albert", "resnet", "t5"])
def test_every_head_draws_the_same_for_a_seed(kind):
    model = models.TRANSFORMERS[kind]()
    batches = unlabelled(tiny_batches(model))
    if kind == "t5":
        batches = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in batches]
    name = next(n for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n and "shared" not in n)
    found = []
    for seed in (0, 0, 1):
        found.append(squared_gradients(model, [name], batches, seed=seed)[name])
        torch.rand(3)  # the global random state must not matter
    assert same_bits(found[0], found[1])
    assert not same_bits(found[0], found[2])
    assert bool(found[0].any())


def test_what_an_example_draws_does_not_depend_on_the_others():
    model = mlp()
    batches = unlabelled(tiny_batches(model, sizes=(3, 2)))
    whole = squared_gradients(model, ["fc1.weight"], batches)["fc1.weight"]
    first = squared_gradients(model, ["fc1.weight"], [{"x": batches[0]["x"]}])["fc1.weight"]
    only = [{"x": batches[0]["x"][:0].new_zeros(1, 8)}, batches[1]]
    second = squared_gradients(model, ["fc1.weight"], only)["fc1.weight"]
    zero = squared_gradients(model, ["fc1.weight"], only[:1])["fc1.weight"]
    torch.testing.assert_close(whole * 5, first * 3 + second * 3 - zero)


def test_a_model_without_a_head_is_refused():
    model = BertModel(models.tiny_bert().config)
    message = (
        r"BertModel returned neither a loss nor logits for a batch with attention_mask, input_ids: expected labels"
    )
    with pytest.raises(CalibrationError, match=message):
        own_loss(model, unlabelled(tiny_batches(models.tiny_bert()))[0], generator())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[float("nan"), 1.0]], r"the logits of a calibration batch are not finite: check the model and the batches"),
        (
            [[[[1.0, 2.0]]]],
            r"logits of shape \(1, 1, 1, 2\): expected \(batch, classes\) or \(batch, tokens, classes\)",
        ),
    ],
)
def test_logits_that_nothing_can_be_drawn_from_are_refused(values, message):
    with pytest.raises(CalibrationError, match=message):
        says(values)
