"""Checkpoints of other tools become ours: the same weights, with masks, and what could not be migrated is named."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune as torch_prune
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from hf_prune import (
    AutoPrunedModelForSequenceClassification,
    CheckpointError,
    MaskStore,
    migrate_checkpoint,
    prunable,
    shrink,
)
from hf_prune.cli.main import main
from hf_prune.utils.folders import MARK
from tests import models

NAMES = ["bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.1.output.dense.weight"]


@pytest.fixture
def dense(tmp_path):
    """A plain checkpoint with zeros, and the masks that made them."""
    model = models.tiny_bert()
    masks = {}
    for i, name in enumerate(NAMES):
        weight = model.get_parameter(name)
        masks[name] = torch.rand(weight.shape, generator=torch.Generator().manual_seed(i)) > 0.5
        weight.data[~masks[name]] = 0
    model.save_pretrained(tmp_path / "plain")
    return model, masks


def rewrite(folder, source, change):
    """Another checkpoint with other tensors."""
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    (folder / "vocab.txt").write_text("words")


def as_torch(name, weight, mask):
    return {f"{name}_orig": torch.where(mask, weight, 9.0), f"{name}_mask": mask.float()}


def as_parametrization(name, weight, mask):
    module = name.removesuffix(".weight")
    base = f"{module}.parametrizations.weight"
    return {f"{base}.original": torch.where(mask, weight, 9.0), f"{base}.0.mask": mask}


def as_bitmask(name, weight, mask):
    bits = torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    offsets = mask.sum(1).cumsum(0) - mask.sum(1)
    values = {"bitmask": bits, "compressed": weight[mask], "row_offsets": offsets, "shape": torch.tensor(weight.shape)}
    return {f"{name}.{key}": value for key, value in values.items()}


@pytest.mark.parametrize(
    ("kind", "write"),
    [("torch.nn.utils.prune", as_torch), ("parametrizations", as_parametrization), ("sparse-bitmask", as_bitmask)],
)
def test_weights_and_masks_are_carried_over(tmp_path, dense, kind, write):
    model, masks = dense

    def change(tensors):
        for name, mask in masks.items():
            tensors |= write(name, tensors.pop(name), mask)

    rewrite(tmp_path / "old", tmp_path / "plain", change)
    report = migrate_checkpoint(tmp_path / "old", tmp_path / "new")
    assert (report.formats, report.masks, report.left) == ((kind,), 2, ())
    loaded = AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path / "new")
    for name, value in model.state_dict().items():
        assert models.same_bits(loaded.state_dict()[name], value)
    found = MaskStore.of(loaded).masks
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values())
    assert (tmp_path / "new" / "vocab.txt").read_text() == "words"


def test_what_torch_itself_saves(tmp_path):
    model = models.tiny_bert()
    for module in (model.bert.encoder.layer[0].intermediate.dense, model.classifier):
        torch_prune.l1_unstructured(module, "weight", amount=0.5)
    (tmp_path / "old").mkdir()
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "old" / "model.safetensors")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "old")
    assert migrate_checkpoint(tmp_path / "old", tmp_path / "new").masks == 2
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new")
    batch = models.tiny_batches(model)[0]
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_pruned_heads_of_transformers_4(tmp_path):
    """Smaller matrices, and a config that names the heads which are gone."""
    model = prunable(models.tiny_bert(num_attention_heads=4))
    with torch.no_grad():
        for part in ("query", "key", "value"):  # the second and the last head of the first layer
            module = model.bert.encoder.layer[0].attention.self.get_submodule(part)
            for head in (1, 3):
                module.weight[head * 4 : head * 4 + 4] = 0
                module.bias[head * 4 : head * 4 + 4] = 0
        for head in (1, 3):
            model.bert.encoder.layer[0].attention.output.dense.weight[:, head * 4 : head * 4 + 4] = 0
    batch = models.tiny_batches(model)[0]
    with torch.no_grad():
        expected = model(**batch).logits
    small = shrink(model)
    small.save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("quantization_config", "pruned_structure")}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps({**config, "pruned_heads": {"0": [1, 3]}}))
    (tmp_path / "old" / "model.safetensors").write_bytes((tmp_path / "ours" / "model.safetensors").read_bytes())
    report = migrate_checkpoint(tmp_path / "old", tmp_path / "new")
    assert report.heads == 2
    assert "2 heads are removed" in str(report)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=1e-6)


def test_a_weight_without_a_mask_is_carried_over_and_what_is_left_is_no_weight(tmp_path, dense):
    model, masks = dense

    def change(tensors):
        for name, mask in masks.items():
            tensors |= as_torch(name, tensors.pop(name), mask)
        tensors["classifier.weight_orig"] = tensors.pop("classifier.weight")
        tensors["classifier.bias_mask"] = torch.ones(2)
        tensors["classifier.attn_mask"] = torch.ones(2)

    rewrite(tmp_path / "old", tmp_path / "plain", change)
    (tmp_path / "old" / "training_args.bin").write_bytes(b"a pickle")
    report = migrate_checkpoint(tmp_path / "old", tmp_path / "new")
    assert set(report.left) == {"classifier.attn_mask", "classifier.bias_mask", "training_args.bin"}
    assert (report.masks, report.unmasked) == (2, ("classifier.weight",))
    assert "Migrated without a mask, since there was none: classifier.weight.\nNot migrated: " in str(report)
    assert not (tmp_path / "new" / "training_args.bin").exists()
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values())
    for name, value in model.state_dict().items():
        assert models.same_bits(loaded.state_dict()[name], value)


def test_weights_without_any_mask(tmp_path, dense):
    def change(tensors):
        tensors["classifier.weight_orig"] = tensors.pop("classifier.weight")

    rewrite(tmp_path / "old", tmp_path / "plain", change)
    report = migrate_checkpoint(tmp_path / "old", tmp_path / "new")
    assert (report.masks, report.formats, report.left) == (0, ("torch.nn.utils.prune",), ())
    _, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values())


ONLY = "that is not a single mask: make it permanent first, with remove_parametrizations"


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        (["parametrizations.weight.original"], ONLY),
        (["parametrizations.weight.original", "parametrizations.weight.1.mask"], ONLY),
        (["parametrizations.weight.original", "parametrizations.weight.0.mask", "parametrizations.weight.1.k"], ONLY),
        (
            ["parametrizations.weight.original", "parametrizations.weight.0.mask", "parametrizations.weight.1.mask"],
            ONLY,
        ),
        (["parametrizations.weight.original0", "parametrizations.weight.original1"], ONLY),
        (["weight_orig", "weight_u"], r"belongs to a spectral norm, as classifier\.weight_u shows"),
        (["weight_mask"], "is a mask without a weight"),
        (["weight.compressed", "weight.bitmask", "weight.shape"], "belongs to a sparse-bitmask weight without one of"),
    ],
)
def test_what_is_no_weight_any_more_is_refused(tmp_path, dense, parts, match):
    """Left out, transformers would make up random weights in its place."""
    _, masks = dense

    def change(tensors):
        tensors |= as_torch(NAMES[0], tensors.pop(NAMES[0]), masks[NAMES[0]])
        weight = tensors.pop("classifier.weight")
        tensors |= {f"classifier.{part}": weight.clone() for part in parts}

    rewrite(tmp_path / "old", tmp_path / "plain", change)
    with pytest.raises(CheckpointError, match=rf"classifier\.weight cannot be recovered: .*{match}"):
        migrate_checkpoint(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_parametrizations_of_transformers_own_stay(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_conv_pos_embedding_groups": 2}
    sizes |= {"num_conv_pos_embeddings": 4, "classifier_proj_size": 8}
    model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**sizes)).eval()
    torch_prune.l1_unstructured(model.projector, "weight", amount=0.5)
    tensors = {n: t.contiguous() for n, t in model.state_dict().items()}
    assert any(".parametrizations.weight.original1" in name for name in tensors)
    (tmp_path / "old").mkdir()
    save_file(tensors, tmp_path / "old" / "model.safetensors")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "old")
    report = migrate_checkpoint(tmp_path / "old", tmp_path / "new")
    assert (report.masks, report.left) == (1, ())
    loaded, info = AutoModelForAudioClassification.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values())
    sound = torch.randn(1, 400)
    with torch.no_grad():
        assert torch.equal(loaded(sound).logits, model(sound).logits)


def pruned_by_torch(tmp_path, dense):
    """A checkpoint whose first weight has a mask."""
    _, masks = dense

    def change(tensors):
        tensors |= as_torch(NAMES[0], tensors.pop(NAMES[0]), masks[NAMES[0]])

    rewrite(tmp_path / "old", tmp_path / "plain", change)
    return tmp_path / "old"


def test_files_that_are_missing_are_missed(tmp_path, dense):
    """Their weights would be made up too."""
    old = pruned_by_torch(tmp_path, dense)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    (old / "model.safetensors").rename(old / first)
    tensors = load_file(old / first)
    index = {"metadata": {}, "weight_map": {**dict.fromkeys(tensors, first), "classifier.weight": second}}
    (old / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({n: t for n, t in tensors.items() if n != "classifier.weight"}, old / first)
    with pytest.raises(CheckpointError, match=r"names classifier\.weight, and no file has it: download or save"):
        migrate_checkpoint(old, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    save_file({"classifier.weight": tensors["classifier.weight"]}, old / second)
    assert migrate_checkpoint(old, tmp_path / "new").masks == 1


def test_the_original_is_not_replaced(tmp_path, dense):
    old = pruned_by_torch(tmp_path, dense)
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    (tmp_path / "link").symlink_to(old)
    for out in (old, tmp_path / "link", tmp_path / "plain" / ".." / "old"):
        with pytest.raises(CheckpointError, match="would replace itself: name another folder"):
            migrate_checkpoint(old, out)
    with pytest.raises(CheckpointError, match="is a file: expected a folder to save into"):
        migrate_checkpoint(old, old / "vocab.txt")
    with pytest.raises(CheckpointError, match=r"is not a folder: expected one with config\.json"):
        migrate_checkpoint(tmp_path / "nowhere", tmp_path / "new")
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before


def test_soft_masks_scale_weights_as_torch_does(tmp_path):
    """What torch computes with is the product; where the mask is 0, it is 0, whatever the weight was."""
    model = models.tiny_bert()
    module = model.bert.encoder.layer[0].intermediate.dense
    mask = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    mask[0, :4] = torch.tensor([0.0, 0.0, 0.5, -2.0])
    torch_prune.custom_from_mask(module, "weight", mask)
    with torch.no_grad():
        module.weight_orig[0, :2] = torch.tensor([-1.0, torch.nan])
    (tmp_path / "old").mkdir()
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "old" / "model.safetensors")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path / "old")
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    report = migrate_checkpoint(tmp_path / "old", tmp_path / "new")
    assert report.scaled == (name,)
    assert f"scaled their weights, as in torch.nn.utils.prune, and keep those that are not 0: {name}." in str(report)
    expected = torch.where(mask == 0, 0.0, module.weight_orig.detach() * mask)
    for folder in ("new", "old"):  # and so when it is loaded without being migrated
        loaded = AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path / folder)
        assert models.same_bits(loaded.get_parameter(name).detach(), expected)
        assert torch.equal(MaskStore.of(loaded).masks[name], mask != 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_masks_that_are_not_finite_are_refused(tmp_path, dense, value):
    _, masks = dense

    def change(tensors):
        tensors |= as_torch(NAMES[0], tensors.pop(NAMES[0]), masks[NAMES[0]])
        tensors[f"{NAMES[0]}_mask"][0, 0] = value

    rewrite(tmp_path / "old", tmp_path / "plain", change)
    with pytest.raises(CheckpointError, match=r"the mask of .* has values that are not finite"):
        migrate_checkpoint(tmp_path / "old", tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"the mask of .* has values that are not finite"):
        AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path / "old")
    assert not (tmp_path / "new").exists()


def test_a_soft_mask_of_a_parametrization_is_refused(tmp_path, dense):
    _, masks = dense

    def change(tensors):
        tensors |= as_parametrization(NAMES[0], tensors.pop(NAMES[0]), masks[NAMES[0]])
        tensors[f"{NAMES[0].removesuffix('.weight')}.parametrizations.weight.0.mask"] = masks[NAMES[0]] * 0.5

    rewrite(tmp_path / "old", tmp_path / "plain", change)
    with pytest.raises(CheckpointError, match="how its parametrization uses them is not known"):
        migrate_checkpoint(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


GROUPS = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}}
SPARSE = {"format": "sparse-bitmask", "global_sparsity": 0.5, "sparsity_structure": "unstructured"}


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "is quantized with 'awq', as the quantization_"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": GROUPS,
                                     "format": "float-quantized", "sparsity_config": SPARSE}},
            "is quantized with 'compressed-tensors', as the quantization_config says: only sparsity can be migrated",
        ),
        ({"compression_config": {"config_groups": GROUPS, "sparsity_config": SPARSE}}, "the compression_config says"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "kv_cache_scheme": {"bits": 8}}}, "is quant"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors",
                                     "sparsity_config": {**SPARSE, "format": "sparse-24-bitmask"}}},
            "weights in the format 'sparse-24-bitmask', as the quantization_config says: expected sparse-bitmask",
        ),
        ({"sparsity_config": {"format": "marlin-24"}}, "weights in the format 'marlin-24'"),
        ({"quantization_config": {"quant_method": "hf_prune", "compressed": 1}}, "of hf_prune already"),
        ({"compression_config": [1]}, r"the compression_config of .* is \[1\]: expected an object"),
        ({"pruned_heads": [1]}, r"pruned_heads in the config of .* is \[1\]: expected numbers of heads by layer"),
        ({"pruned_heads": {"0": [7]}}, r"pruned_heads has \[7\] for layer 0: expected numbers below 2"),
        ({"pruned_heads": {"0": [1]}, "model_type": "none"}, "describes no model that transformers knows"),
    ],
)  # fmt: skip
def test_what_is_quantized_or_odd_is_refused(tmp_path, dense, settings, match):
    _, masks = dense

    def change(tensors):
        tensors |= as_bitmask(NAMES[0], tensors.pop(NAMES[0]), masks[NAMES[0]])

    rewrite(tmp_path / "old", tmp_path / "plain", change)
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(CheckpointError, match=match):
        migrate_checkpoint(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {},
                                 "sparsity_config": SPARSE}},
        {"compression_config": {"sparsity_config": SPARSE}},
        {"sparsity_config": SPARSE},
    ],
)  # fmt: skip
def test_a_config_that_speaks_of_sparsity_alone_loses_it(tmp_path, dense, settings):
    _, masks = dense

    def change(tensors):
        tensors |= as_bitmask(NAMES[0], tensors.pop(NAMES[0]), masks[NAMES[0]])

    rewrite(tmp_path / "old", tmp_path / "plain", change)
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    (tmp_path / "old" / "config.json").write_text(json.dumps(config | settings))
    assert migrate_checkpoint(tmp_path / "old", tmp_path / "new").masks == 1
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == config


@pytest.mark.parametrize("way", ["scale", "values"])
def test_quantized_weights_are_refused_whatever_the_config_says(tmp_path, dense, way):
    _, masks = dense

    def change(tensors):
        tensors |= as_bitmask(NAMES[0], tensors.pop(NAMES[0]), masks[NAMES[0]])
        if way == "scale":
            tensors[f"{NAMES[0]}_scale"] = torch.ones(1)
        else:
            tensors[f"{NAMES[0]}.compressed"] = tensors[f"{NAMES[0]}.compressed"].to(torch.float8_e4m3fn)

    rewrite(tmp_path / "old", tmp_path / "plain", change)
    with pytest.raises(CheckpointError, match="quantized"):
        migrate_checkpoint(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_other_files_come_along_and_what_does_not_is_named(tmp_path, dense):
    _, masks = dense

    def change(tensors):
        tensors |= as_torch(NAMES[0], tensors.pop(NAMES[0]), masks[NAMES[0]])

    old, new = tmp_path / "old", tmp_path / "new"
    rewrite(old, tmp_path / "plain", change)
    carried = {"model_card.md", "modeling_x.py", "model.onnx", "1_Pooling/config.json", "onnx/deep/model.onnx"}
    left = {"model.fp16.safetensors", "pruning_masks.safetensors", "pytorch_model.BIN", "1_Pooling/rng.pth"}
    left |= {".gitignore", "checkpoint-5", "tf_model.h5", "1_Pooling/.hidden"}
    for name in (*carried, *(left - {"checkpoint-5"}), "checkpoint-5/model.safetensors"):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_text(name)
    (tmp_path / "secret").write_text("secret")
    (old / "link.txt").symlink_to(tmp_path / "secret")
    (old / "folder").symlink_to(tmp_path)
    (old / "inner.txt").symlink_to(old / "vocab.txt")
    report = migrate_checkpoint(old, new)
    assert set(report.left) == left | {"link.txt", "folder"}
    written = {"config.json", "model.safetensors", "pruning_masks.safetensors"}
    found = {path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file()}
    assert found - {MARK} == written | carried | {"vocab.txt", "inner.txt"}
    assert all((new / name).read_text() == name for name in carried)


def cut_values(tensors):
    tensors[f"{NAMES[0]}.compressed"] = tensors[f"{NAMES[0]}.compressed"][:-1].clone()


def lie_about_shape(tensors):
    tensors[f"{NAMES[0]}.shape"] = torch.tensor([1 << 20, 1 << 20])


def other_mask(tensors):
    tensors[f"{NAMES[1]}_mask"] = torch.ones(3, 3)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (cut_values, "values, and its bitmask marks"),
        (lie_about_shape, "expected a byte for every eight columns"),
        (other_mask, r"the mask of .* has shape \(3, 3\)"),
    ],
)
def test_damaged_files_are_refused(tmp_path, dense, damage, match):
    _, masks = dense

    def change(tensors):
        for name, write in zip(NAMES, (as_bitmask, as_torch), strict=True):
            tensors |= write(name, tensors.pop(name), masks[name])
        damage(tensors)

    rewrite(tmp_path / "old", tmp_path / "plain", change)
    with pytest.raises(CheckpointError, match=match):
        migrate_checkpoint(tmp_path / "old", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_command_and_what_needs_no_migration(tmp_path, dense, capsys):
    _, masks = dense
    with pytest.raises(CheckpointError, match="needs no migration"):
        migrate_checkpoint(tmp_path / "plain", tmp_path / "new")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pickle"):
        migrate_checkpoint(tmp_path / "pickled", tmp_path / "new")

    def change(tensors):
        tensors |= as_torch(NAMES[0], tensors.pop(NAMES[0]), masks[NAMES[0]])

    rewrite(tmp_path / "old", tmp_path / "plain", change)
    with pytest.raises(SystemExit) as ended:
        main(["migrate", str(tmp_path / "old"), str(tmp_path / "new")])
    assert not ended.value.code
    assert "Found: torch.nn.utils.prune. 1 weights have a mask now." in capsys.readouterr().out
