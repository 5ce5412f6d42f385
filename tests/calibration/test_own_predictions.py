"""Gradients of single examples without labels: what the model predicts stands in for them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertModel, T5ForConditionalGeneration

from hf_prune.calibration.gradients import squared_gradients
from hf_prune.errors import CalibrationError
from hf_prune.pipeline import prune
from tests import models
from tests.models import mlp, same_bits, tiny_batches


def unlabelled(batches: list[dict]) -> list[dict]:
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]


def test_a_classifier_gives_the_squared_change_of_its_logits():
    """The mean over all directions in which logits differ, exactly, against many draws; however sure it is."""
    model = mlp()
    model.fc2.bias.data[0] += 30
    x = torch.randn(1, 8)
    jacobian = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(model, {"fc1.weight": w}, (x,)).logits[0], model.fc1.weight.detach()
    )  # (labels, out, in)
    centred = jacobian - jacobian.mean(0)
    expected = (centred**2).sum(0) / 2  # a unit vector among three centred numbers
    found = squared_gradients(model, ["fc1.weight"], [{"x": x.expand(1500, -1).contiguous()}])["fc1.weight"]
    assert float((found - expected).norm() / expected.norm()) < 0.1


class Speaks(nn.Module):
    """Puts out the same distribution of tokens at each place."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(1, 3, bias=False)

    def forward(self, x, attention_mask=None):
        """(batch, seq, 1) -> logits (batch, seq, 3)."""
        return SimpleNamespace(logits=self.scores(x), loss=None)


def test_a_language_model_gives_its_fisher_matrix():
    """All tokens by their probability, as the matrix is defined, against many draws; padding has no say."""
    model = Speaks()
    model.scores.weight.data = torch.tensor([[1.0], [0.0], [-1.0]])
    p = model.scores.weight.detach()[:, 0].softmax(0)
    batch = {"x": torch.ones(2000, 2, 1), "attention_mask": torch.tensor([[1, 0]]).expand(2000, -1)}
    found = squared_gradients(model, ["scores.weight"], [batch])["scores.weight"]
    torch.testing.assert_close(found[:, 0], p * (1 - p), rtol=0.1, atol=0)
    both = squared_gradients(model, ["scores.weight"], [{"x": batch["x"]}])["scores.weight"]
    torch.testing.assert_close(both[:, 0], 2 * p * (1 - p), rtol=0.1, atol=0)  # of two tokens


@pytest.mark.parametrize("kind", ["bert", "bert_mlm", "gpt2", "resnet"])
def test_labels_change_nothing(kind):
    model = models.TRANSFORMERS[kind]()
    batches = tiny_batches(model, sizes=(3,))
    name = next(name for name, p in model.named_parameters() if p.dim() > 1)
    found = [squared_gradients(model, [name], b)[name] for b in (batches, unlabelled(batches))]
    assert same_bits(*found)
    assert bool(found[0].any())


class ShiftsInside(T5ForConditionalGeneration):
    """Tells nobody how it makes its decoder's inputs of labels."""

    prepare_decoder_input_ids_from_labels = None


@pytest.mark.parametrize("build", [T5ForConditionalGeneration, ShiftsInside])
def test_the_labels_of_a_decoder_are_its_inputs_and_no_more(build):
    model = models.fill(build(models.tiny_t5().config))
    name = "decoder.block.0.layer.1.EncDecAttention.q.weight"
    (batch,) = tiny_batches(model, sizes=(3,))
    shifted = torch.cat([torch.zeros(3, 1, dtype=torch.long), batch["labels"][:, :-1]], dim=1)
    (inputs,) = unlabelled([batch])
    expected = squared_gradients(model, [name], [{**inputs, "decoder_input_ids": shifted}])[name]
    assert bool(expected.any())
    assert same_bits(squared_gradients(model, [name], [batch])[name], expected)
    other = {**batch, "decoder_input_ids": shifted, "labels": batch["labels"].flip(0)}
    assert same_bits(squared_gradients(model, [name], [other])[name], expected)


def test_padding_of_the_labels_of_a_decoder_does_not_count():
    model = models.tiny_t5()
    name = "decoder.block.0.layer.1.EncDecAttention.q.weight"
    (batch,) = tiny_batches(model, sizes=(1,))
    short = {**batch, "labels": batch["labels"][:, :4]}
    padded = {**batch, "labels": torch.cat([short["labels"], torch.full((1, 2), -100)], dim=1)}
    found = [squared_gradients(model, [name], [b])[name] for b in (short, padded)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["bert", "bert_mlm", "gpt2", "llama", "albert", "resnet", "t5"])
def test_every_head_draws_the_same_for_a_seed(kind):
    model = models.TRANSFORMERS[kind]()
    batches = unlabelled(tiny_batches(model))
    if kind == "t5":
        batches = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in batches]
    linears = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    name = f"{linears[0]}.weight"
    found = []
    for seed in (0, 0, 1):
        found.append(squared_gradients(model, [name], batches, seed=seed)[name])
        torch.rand(3)  # the global random state must not matter
    assert same_bits(found[0], found[1])
    assert bool(found[0].any())
    two_classes = kind == "bert"  # of which there is only one direction, up to its sign
    assert torch.allclose(found[0], found[2], rtol=1e-4, atol=0) == (two_classes or kind == "albert")


def test_what_an_example_draws_does_not_depend_on_the_others():
    model = mlp()
    batches = unlabelled(tiny_batches(model, sizes=(3, 2)))
    whole = squared_gradients(model, ["fc1.weight"], batches)["fc1.weight"]
    first = squared_gradients(model, ["fc1.weight"], batches[:1])["fc1.weight"]
    blank = {"x": torch.zeros(1, 8)}
    second = squared_gradients(model, ["fc1.weight"], [blank, batches[1]])["fc1.weight"]
    zero = squared_gradients(model, ["fc1.weight"], [blank])["fc1.weight"]
    torch.testing.assert_close(whole * 5, first * 3 + second * 3 - zero)


@pytest.mark.parametrize("criterion", ["fisher", "fisher_diagonal"])
def test_a_model_without_a_head_changes_its_first_output(criterion):
    model = models.fill(BertModel(models.tiny_bert().config))
    prune(model, 0.5, criterion=criterion, calibration=unlabelled(tiny_batches(models.tiny_bert())))
    assert float((model.encoder.layer[0].output.dense.weight == 0).float().mean()) == 0.5


def test_a_model_that_puts_out_nothing_finite_is_refused():
    model = Speaks()
    with pytest.raises(CalibrationError, match=r"the model's outputs for a calibration batch are not finite"):
        squared_gradients(model, ["scores.weight"], [{"x": torch.full((1, 2, 1), float("nan"))}])
