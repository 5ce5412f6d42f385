"""Channels inside convolutional blocks: masks silence them altogether, and shrink() takes them out."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_prune import ArchitectureError, Channels, MaskStore, PlanError, prune, register_architecture, shrink
from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.cli.main import main
from hf_prune.evaluation.structure_report import structure_report

RESNET = {"embedding_size": 8, "depths": [1, 2], "num_labels": 3}
MODELS = {
    "resnet": lambda: ResNetForImageClassification(ResNetConfig(hidden_sizes=[16, 32], **RESNET)),
    "resnet_basic": lambda: ResNetForImageClassification(
        ResNetConfig(hidden_sizes=[8, 16], layer_type="basic", **RESNET)
    ),
    "mobilenet_v1": lambda: MobileNetV1ForImageClassification(MobileNetV1Config(depth_multiplier=0.25, num_labels=3)),
    "mobilenet_v2": lambda: MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.35, num_labels=3)),
    "convnext": lambda: ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, num_labels=3)
    ),
}
REGISTERED = {"resnet", "mobilenet_v1", "mobilenet_v2", "convnext"}
# Filters of one convolution each; of ConvNeXt, whose inner channels are features of matrices, what reads them.
SETTINGS = {name: {"granularity": "channel", "target_modules": ("convolution",)} for name in MODELS}
SETTINGS["convnext"] = {"granularity": "column", "target_modules": ("pwconv2",)}


def tiny(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
        for key, buffer in model.named_buffers():
            if key.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 1.5)
    return model


@torch.no_grad()
def logits(model):
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    return model(pixels.to(next(model.parameters()).dtype)).logits


@pytest.mark.parametrize("name", MODELS)
def test_masked_is_shrunk_is_reloaded(name, tmp_path):
    model = tiny(name)
    dense = logits(model)
    prune(model, 0.5, **SETTINGS[name])
    masked = logits(model)
    assert not torch.allclose(masked, dense, atol=1e-3)

    shrunk = shrink(copy.deepcopy(model))

    torch.testing.assert_close(logits(shrunk), masked, rtol=0, atol=1e-5)
    before = {site.name: site.units for site in find_unit_groups(model)}
    after = {site.name: site.units for site in find_unit_groups(shrunk)}
    assert after == {name: units // 2 for name, units in before.items()}
    assert shrunk.num_parameters() < 0.75 * model.num_parameters()
    report = structure_report(shrunk)
    assert report.parameters == shrunk.num_parameters()
    assert {site.name: (site.before, site.units) for site in report.sites if site.kind == "channel"} == {
        name: (units, after[name]) for name, units in before.items()
    }
    shrunk.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded), logits(shrunk))
    half = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert logits(half).isfinite().all()
    prune(loaded, 0.75, **SETTINGS[name])  # half of a half
    torch.testing.assert_close(logits(shrink(copy.deepcopy(loaded))), logits(loaded), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2"])
def test_training_goes_on(name):
    model = shrink(prune(tiny(name), 0.5, **SETTINGS[name])).train()
    loss = model(torch.randn(2, 3, 64, 64), labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean.shape == module.weight.shape == (module.num_features,), name


def test_norms_and_depthwise_convolutions_follow():
    model = tiny("mobilenet_v2")
    names = ["expand_1x1.convolution", "expand_1x1.normalization", "conv_3x3.convolution", "conv_3x3.normalization"]
    block = "mobilenet_v2.layer.4"
    plan = prune(model, 0.5, granularity="channel", target_modules=("convolution",), dry_run=True)
    targets = {tensor.target.module for tensor in plan.tensors}
    assert {f"{block}.expand_1x1.convolution", f"{block}.reduce_1x1.convolution"} <= targets
    assert f"{block}.conv_3x3.convolution" not in targets
    prune(model, 0.5, granularity="channel", target_modules=("convolution",), keep_dense=True)
    masks = MaskStore.of(model).masks
    kept = masks[f"{block}.expand_1x1.convolution.weight"].flatten(1).any(1)
    assert 0 < kept.sum() < len(kept)
    for name in names:
        module = model.get_submodule(f"{block}.{name}")
        for key, parameter in module.named_parameters():
            mask = masks[f"{block}.{name}.{key}"]
            assert torch.equal(mask.flatten(1).any(1) if mask.ndim > 1 else mask, kept)
            assert not parameter[~kept].any()
    MaskStore.of(model).discard(model)
    assert torch.equal(logits(model), logits(tiny("mobilenet_v2")))


def test_a_channel_whose_norm_still_adds_a_constant_stays():
    model = tiny("resnet")
    layer = model.resnet.encoder.stages[0].layers[0].layer
    with torch.no_grad():
        layer[0].convolution.weight[0] = 0
    masked = logits(model)
    assert shrink(copy.deepcopy(model)).num_parameters() == model.num_parameters()
    with torch.no_grad():  # nothing reads it
        layer[1].convolution.weight[:, 0] = 0
    masked = logits(model)
    shrunk = shrink(copy.deepcopy(model))
    assert shrunk.num_parameters() < model.num_parameters()
    torch.testing.assert_close(logits(shrunk), masked, rtol=0, atol=1e-5)


def test_all_channels_of_a_block_leave_one():
    model = tiny("resnet")
    layer = model.resnet.encoder.stages[0].layers[0].layer
    with torch.no_grad():
        layer[1].convolution.weight.zero_()
    masked = logits(model)
    shrunk = shrink(copy.deepcopy(model))
    assert shrunk.resnet.encoder.stages[0].layers[0].layer[0].convolution.out_channels == 1
    torch.testing.assert_close(logits(shrunk), masked, rtol=0, atol=1e-5)


def test_command(tmp_path, capsys):
    tiny("resnet").save_pretrained(tmp_path / "dense")
    command = ["prune", str(tmp_path / "dense"), "--granularity", "channel", "--target-modules", "convolution"]
    for option in ("--shrink", "--no-shrink"):
        with pytest.raises(SystemExit) as ended:
            main([*command, option, "--details", "--out", str(tmp_path / option)])
        assert ended.value.code == 0
        out = capsys.readouterr().out
        assert ("Shrunk: " in out) == (option == "--shrink")
    sizes = {p.name: AutoModelForImageClassification.from_pretrained(p).num_parameters() for p in tmp_path.iterdir()}
    assert sizes["--shrink"] < 0.75 * sizes["--no-shrink"]
    assert sizes["--no-shrink"] == sizes["dense"]


def test_shrinking_what_has_no_entry_is_refused_before_the_work(tmp_path):
    model = tiny("resnet")
    model.config.model_type = "regnet"
    dense = logits(model)
    with pytest.raises(ArchitectureError, match="Channels"):
        shrink(model)
    assert torch.equal(logits(prune(model, 0.5, **SETTINGS["resnet"])), logits(model))  # masks all the same
    assert not torch.equal(logits(model), dense)


def test_heads_and_neurons_of_a_convolutional_model_are_refused():
    with pytest.raises(PlanError, match="granularity='channel'"):
        prune(tiny("resnet"), 0.5, granularity=("head", "neuron"))


def test_an_entry_that_does_not_fit_is_refused():
    register_architecture(
        "odd_channels", Channels("encoder.stages.*.layers.*", ((("shortcut.convolution",), "layer.1.convolution"),))
    )
    model = tiny("resnet")
    model.config.model_type = "odd_channels"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArchitectureError, match=r"layer\.1\.convolution reads 4 channels, and what computes them has"):
        shrink(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
