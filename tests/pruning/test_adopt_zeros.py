"""Zeros that another tool left become masks, those that nobody meant do not, and whatever comes later keeps them."""

import copy
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune as torch_prune
from typer.testing import CliRunner

from hf_prune import (
    AutoPrunedModelForSequenceClassification,
    ConfigError,
    MaskError,
    MaskStore,
    PlanError,
    adopt_zeros,
    keep_sparse,
    prunable,
    prune,
    sparsity_report,
)
from hf_prune.checkpoint.mask_file import load_masks
from hf_prune.cli.main import app
from tests import models
from tests.models import assert_unchanged, conv_net, mlp, same_bits, snapshot

WRAPPERS = [nn.DataParallel, partial(torch.compile, backend="eager"), lambda model: nn.ModuleDict({"inner": model})]
NAME = "bert.encoder.layer.0.intermediate.dense.weight"


def emptied(model, name, share=0.6, seed=0):
    """The model, with so much of a weight set to zero, one of them negative; and where."""
    weight = model.get_parameter(name)
    gone = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < share
    with torch.no_grad():
        weight[gone] = 0.0
        weight.view(-1)[gone.view(-1).nonzero()[0]] = -0.0
    return gone


def test_exactly_the_zeros_of_what_can_be_pruned_become_masks():
    model = models.tiny_bert()
    gone = emptied(model, NAME)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "LayerNorm.weight")) or "embeddings" in name:
                parameter.view(-1)[0] = 0.0  # nobody's pruning
    values = {name: value + 0 for name, value in snapshot(model).items()}  # -0.0 becomes +0.0
    report = adopt_zeros(model)
    store = MaskStore.of(model)
    assert store.masks.keys() == report.adopted.keys() == {NAME}
    assert torch.equal(store.masks[NAME], ~gone)
    assert store.config is None
    assert_unchanged(model, values)
    zeros, size = int(gone.sum()), gone.numel()
    assert (report.zeros, report.weights, report.left) == (zeros, size, {})
    share = f"{100 * zeros / size:.2f}"
    assert f"{zeros:,} of {size:,} weights ({share} %). Tensors: 1, with {share} to {share} % zeros." in str(report)
    assert json.loads(json.dumps(report.to_dict()))["adopted"][NAME] == pytest.approx(zeros / size)
    assert sparsity_report(model).removed == zeros


def test_convolutions_conv1d_and_patterns_are_adopted_as_well():
    for model, name in ((conv_net(), "conv2d.weight"), (models.tiny_gpt2(), "transformer.h.0.attn.c_attn.weight")):
        gone = emptied(model, name)
        adopt_zeros(model)
        assert torch.equal(MaskStore.of(model).masks[name], ~gone)
    model = prune(models.tiny_bert(), granularity="2:4")
    MaskStore.of(model).make_permanent(model)
    adopt_zeros(model)
    assert "2:4" in sparsity_report(model).nm_patterns


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_whatever_lies_around_the_model(wrap):
    model = mlp()
    gone = emptied(model, "fc1.weight")
    adopt_zeros(wrap(model))
    assert MaskStore.of(model).masks.keys() == {"fc1.weight"}
    assert torch.equal(MaskStore.of(model).masks["fc1.weight"], ~gone)


def test_what_comes_later_keeps_them(tmp_path):
    model = prunable(models.tiny_bert())
    gone = emptied(model, NAME)
    model.adopt_zeros()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    keep_sparse(model, optimizer)
    model(**models.tiny_batches(model)[0]).logits.sum().backward()
    optimizer.step()
    assert not model.get_parameter(NAME)[gone].any()
    assert model.get_parameter(NAME)[~gone].all()
    model.prune(0.7)
    assert not (model.masks[NAME] & gone).any()
    assert sparsity_report(model).target_sparsity == pytest.approx(0.7, abs=0.01)
    model.save_pretrained(tmp_path)
    again = AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(again.masks[NAME], model.masks[NAME])


def test_masks_that_are_there_stay():
    model = prune(mlp(), 0.5, exclude_modules=["fc2"])
    old = MaskStore.of(model).masks["fc1.weight"].clone()
    config = MaskStore.of(model).config
    with torch.no_grad():
        model.fc1.weight[0] = 0.0
        model.fc2.weight[:, 0] = 0.0
    adopt_zeros(model)
    new = MaskStore.of(model).masks
    assert torch.equal(new["fc1.weight"], old & (model.fc1.weight != 0))
    assert torch.equal(new["fc2.weight"], model.fc2.weight != 0)
    assert not new["fc1.weight"][0].any()
    assert MaskStore.of(model).config == config
    before = {name: mask.clone() for name, mask in new.items()}
    adopt_zeros(model)  # again: nothing more
    assert all(torch.equal(mask, before[name]) for name, mask in MaskStore.of(model).masks.items())


def test_zeros_that_nobody_meant_are_left_and_said():
    model = models.tiny_bert_mlm()
    emptied(model, NAME)
    start, few = "bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.1.output.dense.weight"
    with torch.no_grad():
        model.get_parameter(start).zero_()  # as a layer that is yet to be trained
        model.get_parameter(few).view(-1)[0] = 0.0  # as rounding does
        model.get_output_embeddings().weight[:3] = 0.0  # padding rows, tied to the embeddings
    report = adopt_zeros(copy.deepcopy(model))
    assert report.adopted.keys() == {NAME}
    assert "word_embeddings.weight, of which 6.25 % is zero: embeddings are not taken unless named" in str(report)
    assert f"Left as it is: {start}, which is zero throughout, as if it were yet to be trained" in str(report)
    assert f"{few}, of which 0.195 % is zero, less than min_sparsity=0.01" in str(report)
    assert adopt_zeros(copy.deepcopy(model), min_sparsity=0).adopted.keys() == {NAME, few}
    assert adopt_zeros(model, target_modules=["output.dense"], exclude_modules=["1.output.dense"]).adopted == {start: 1}


def test_matrices_that_cannot_be_pruned_are_named():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.fused = nn.Parameter(torch.tensor([[[0.0, 1.0], [2.0, 3.0]]]))
            self.router = nn.Linear(2, 2)

    model = Experts()
    model.router.weight.data[0, 0] = 0
    report = adopt_zeros(model)
    assert report.left == {"fused": "of which 25.00 % is zero, and which is of no kind that can be pruned"}
    assert report.adopted == {"router.weight": 0.25}


def test_what_cannot_be_adopted_is_refused_and_nothing_changes():
    model = mlp()
    before = snapshot(model)
    with pytest.raises(MaskError, match=r"no zeros to adopt in the 2 weights of this MLP .* of which none has a zero"):
        adopt_zeros(model)
    with pytest.raises(ConfigError, match=r"min_sparsity is 50: expected a share from 0 to 1; did you mean 0\.5"):
        adopt_zeros(model, min_sparsity=50)
    with pytest.raises(PlanError, match="target_modules: unknown module 'fc3'"):
        adopt_zeros(model, target_modules=["fc3"])
    assert_unchanged(model, before)
    model.fc1.weight.data[0, 0] = 0
    with pytest.raises(MaskError, match=r"fc1\.weight, of which 1\.042 % is zero, less than min_sparsity=0\.1"):
        adopt_zeros(model, min_sparsity=0.1)
    torch_prune.l1_unstructured(model.fc1, "weight", amount=0.5)
    with pytest.raises(PlanError, match=r"call hf_prune\.from_torch_prune"):
        adopt_zeros(model)
    assert MaskStore.of(model) is None


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def sparse(tmp_path):
    """A checkpoint in bfloat16 with zeros and a note beside it, and where the zeros are."""
    model = models.tiny_bert().bfloat16()
    gone = emptied(model, NAME)
    model.save_pretrained(tmp_path / "sparse")
    models.tiny_tokenizer().save_pretrained(tmp_path / "sparse")
    (tmp_path / "sparse" / "notes.txt").write_text("mine")
    return gone


def test_the_command_writes_the_masks_beside_the_same_weights(tmp_path, sparse):
    source, out = tmp_path / "sparse", tmp_path / "out"
    result = CliRunner().invoke(app, ["migrate", str(source), str(out), "--adopt-zeros"])
    assert result.exit_code == 0, result.output
    assert "Zeros that are masks now" in result.output
    assert torch.equal(load_masks(out / "pruning_masks.safetensors").masks[NAME], ~sparse)
    old, new = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(same_bits(new[name], tensor + 0.0) for name, tensor in old.items())
    assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()} | {
        "pruning_masks.safetensors",
        ".hf_prune.json",
        "hf_prune_run.yaml",
    }
    again = CliRunner().invoke(app, ["prune", str(out), "--sparsity", "0.7", "--out", str(tmp_path / "more")])
    assert again.exit_code == 0, again.output
    assert not (load_masks(tmp_path / "more" / "pruning_masks.safetensors").masks[NAME] & sparse).any()


def test_shards_that_became_one_file_are_not_called_left(tmp_path, sparse):
    source, out = tmp_path / "shards", tmp_path / "out"
    models.tiny_bert().bfloat16().from_pretrained(tmp_path / "sparse").save_pretrained(source, max_shard_size="5KB")
    (source / "model.fp16.safetensors").write_bytes(b"another variant")
    assert len(list(source.glob("model-*"))) > 1
    result = CliRunner().invoke(app, ["migrate", str(source), str(out), "--adopt-zeros"])
    assert result.exit_code == 0, result.output
    left = [line for line in result.output.splitlines() if line.startswith("Left")]
    assert left == ["Left as it is: model.fp16.safetensors, which was not carried over."]
    assert len(list(out.glob("model*"))) == 1


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--min-sparsity", "0.5"], "add --adopt-zeros, or leave it out"),
        (["--adopt-zeros", "--min-sparsity", "0.9"], "less than --min-sparsity=0.9"),
        ([], "become masks with hf-prune migrate --adopt-zeros"),
    ],
)
def test_the_command_refuses_and_writes_nothing(tmp_path, sparse, arguments, match):
    result = CliRunner().invoke(app, ["migrate", str(tmp_path / "sparse"), str(tmp_path / "out"), *arguments])
    assert match in str(result.exception)
    assert not (tmp_path / "out").exists()
