"""Checkpoints: native weights, masks in a side file, and models pruned with torch.nn.utils.prune."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune as torch_prune
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    PreTrainedModel,
    ViTForImageClassification,
)

from hf_prune import (
    AutoPrunedModel,
    AutoPrunedModelForCausalLM,
    AutoPrunedModelForImageClassification,
    AutoPrunedModelForMaskedLM,
    AutoPrunedModelForSequenceClassification,
    MaskStore,
    PrunedModelMixin,
    PruningConfig,
    prunable,
)
from hf_prune.auto import load_native
from hf_prune.checkpoint.files import MASK_FILE
from hf_prune.checkpoint.mask_file import load_masks, mask_metadata, save_masks
from hf_prune.checkpoint.native import load_tokenizer
from hf_prune.checkpoint.staging import staged_checkpoint
from hf_prune.errors import CheckpointError, DataError
from hf_prune.utils import staging as staging_module
from hf_prune.utils.folders import MARK
from hf_prune.utils.locks import output_lock
from tests import models
from tests.models import assert_unchanged, same_bits, snapshot
from tests.support.damaged_files import replace_bytes

CONFIG = PruningConfig(sparsity=0.3, scope="global", exclude_modules=["classifier"], seed=5)


class OwnBert(PrunedModelMixin, BertForSequenceClassification):
    """A class of one's own."""


class OwnVit(PrunedModelMixin, ViTForImageClassification):
    """One whose checkpoints have other names than its parameters."""


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {MARK}


def load(folder: Any, **options: Any) -> Any:
    return AutoPrunedModelForSequenceClassification.from_pretrained(folder, **options)


def assert_same_model(model: Any, other: Any) -> None:
    assert_unchanged(model, snapshot(other))
    assert_same_masks(model, other)


def assert_same_masks(model: Any, other: Any) -> None:
    assert model.masks.keys() == other.masks.keys()
    assert [name for name, mask in model.masks.items() if not torch.equal(mask, other.masks[name])] == []


@pytest.fixture
def pruned() -> Any:
    return prunable(models.tiny_bert()).prune(CONFIG)


@pytest.fixture
def saved(pruned, tmp_path) -> Path:
    pruned.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# --- the side file ---------------------------------------------------------------------------------


def test_masks_round_trip(tmp_path):
    masks = {"a": torch.tensor([[True, False, True], [False, False, True]]), "b": torch.ones(17, dtype=torch.bool)}
    save_masks(MaskStore(masks, config=CONFIG), tmp_path / "m")
    store = load_masks(tmp_path / "m")
    assert store.masks.keys() == masks.keys()
    assert all(torch.equal(store.masks[name], mask) for name, mask in masks.items())
    assert store.config == CONFIG
    assert store.dense is None


def test_masks_take_one_bit_per_weight(tmp_path):
    save_masks(MaskStore({"a": torch.ones(800, 100, dtype=torch.bool)}), tmp_path / "m")
    assert 10_000 < (tmp_path / "m").stat().st_size < 10_400
    assert load_masks(tmp_path / "m").config is None


def test_save_and_load_continues_where_it_was(pruned, saved):
    assert names(saved) == {"config.json", "model.safetensors", MASK_FILE}
    loaded = load(saved)
    assert loaded.pruning_config == CONFIG
    assert_same_model(loaded, pruned)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("settings", [{}, {"scope": "global"}, {"scope": "row"}, {"granularity": "block:2x4"}])
def test_pruning_in_two_sittings_equals_once(tmp_path, settings):
    prunable(models.tiny_bert()).prune(0.3, **settings).save_pretrained(tmp_path)
    twice = load(tmp_path).prune(0.5, **settings)
    assert_same_model(twice, prunable(models.tiny_bert()).prune(0.5, **settings))


def test_kept_zeros_stay_kept(tmp_path):
    """Masks are not guessed from the weights."""
    model = prunable(models.tiny_bert()).prune(0.3)
    name = next(iter(model.masks))
    with torch.no_grad():
        model.get_parameter(name)[model.masks[name]] = 0
    model.save_pretrained(tmp_path)
    assert_same_masks(load(tmp_path), model)
    assert load(tmp_path).masks[name].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(tmp_path, dtype):
    model = prunable(models.tiny_bert().to(dtype)).prune(0.3)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert_same_model(loaded, model)
    assert_same_masks(load(tmp_path, dtype=torch.float32), model)


def test_subfolder(pruned, tmp_path):
    pruned.save_pretrained(tmp_path / "inner" / "model")
    assert_same_model(load(tmp_path / "inner", subfolder="model"), pruned)
    assert_same_model(OwnBert.from_pretrained(str(tmp_path / "inner"), subfolder="model"), pruned)


def test_output_loading_info(pruned, saved):
    for loader in (AutoPrunedModelForSequenceClassification, OwnBert):
        model, info = loader.from_pretrained(saved, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert_same_model(model, pruned)


def test_state_dict_instead_of_a_folder(pruned):
    loaded = OwnBert.from_pretrained(None, config=pruned.config, state_dict=pruned.state_dict())
    assert_unchanged(loaded, snapshot(pruned))
    assert dict(loaded.masks) == {}


def test_reports_on_earlier_weights_go(pruned, tmp_path):
    pruned.save_pretrained(tmp_path)
    for name in ("sparsity_report.json", "training_report.json", "pruning_card.json", "README.md"):
        (tmp_path / name).write_text("of the first weights")
    pruned.prune(0.7, scope="global").save_pretrained(tmp_path)
    assert names(tmp_path) == {"config.json", "model.safetensors", MASK_FILE, "README.md"}


def test_shards_and_back_leave_nothing_stale(pruned, tmp_path):
    pruned.save_pretrained(tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    assert names(tmp_path) == {"config.json", "model.safetensors.index.json", MASK_FILE, *shards}
    assert_same_model(load(tmp_path), pruned)

    pruned.prune(0.5, scope="global").save_pretrained(tmp_path, max_shard_size="12KB")
    fewer = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert 1 < len(fewer) < len(shards)
    assert names(tmp_path) == {"config.json", "model.safetensors.index.json", MASK_FILE, *fewer}
    assert_same_model(load(tmp_path), pruned)

    pruned.prune(0.7, scope="global").save_pretrained(tmp_path)
    assert names(tmp_path) == {"config.json", MASK_FILE, "model.safetensors"}
    assert_same_model(load(tmp_path), pruned)

    pruned.prune(0.8, scope="global").save_pretrained(tmp_path, max_shard_size="4KB")
    assert names(tmp_path) == {"config.json", "model.safetensors.index.json", MASK_FILE, *shards}
    assert_same_model(load(tmp_path), pruned)


def test_make_permanent_removes_an_old_side_file(pruned, saved):
    (saved / "notes.txt").write_text("mine")
    pruned.make_permanent().save_pretrained(saved)
    assert names(saved) == {"config.json", "model.safetensors", "notes.txt"}
    loaded = load(saved)
    assert dict(loaded.masks) == {}
    assert_unchanged(loaded, snapshot(pruned))


def test_dense_model_over_a_pruned_one(saved):
    """Masks of the old weights on new, dense ones would be refused or would destroy them."""
    dense = prunable(models.tiny_bert(seed=1))
    dense.save_pretrained(saved)
    assert MASK_FILE not in names(saved)
    assert_same_model(load(saved), dense)


def test_plain_save_over_a_pruned_one_is_noticed(saved):
    models.tiny_bert(seed=1).save_pretrained(saved)
    with pytest.raises(CheckpointError, match="not those of its weights"):
        load(saved)


def test_saving_into_a_file(pruned, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"file is a file: expected a folder to save into"):
        pruned.save_pretrained(tmp_path / "file")
    with pytest.raises(CheckpointError, match="expected a folder"), staged_checkpoint(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"
    assert names(tmp_path) == {"file"}


def test_saving_does_not_change_the_model(pruned, saved):
    before, kind = snapshot(pruned), type(pruned)
    pruned.save_pretrained(saved)
    assert type(pruned) is kind
    assert_unchanged(pruned, before)


def test_only_the_main_process_writes(pruned, tmp_path):
    pruned.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not list(tmp_path.rglob("*.safetensors"))


# --- failures while saving -------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["weights", "masks"])
def test_failure_while_writing_leaves_the_old_checkpoint(pruned, saved, monkeypatch, where, error):
    before, kind = files(saved), type(pruned)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("disk full")

    if where == "masks":
        monkeypatch.setattr("hf_prune.checkpoint.save.save_masks", fail)
    else:
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(error, match="disk full"):
        pruned.prune(0.6, scope="global").save_pretrained(saved)
    assert files(saved) == before
    assert names(saved.parent) == {saved.name}
    assert type(pruned) is kind


def interrupt_after(steps: int, folder: Path, patch: pytest.MonkeyPatch, lasting: bool) -> None:
    """Raise KeyboardInterrupt at a change of a folder, or of one beside it, after so many; perhaps at all later."""
    left = iter([*range(steps), None, *(() if lasting else range(1000))])

    def wrap(do: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Path, *args: Any, **kwargs: Any) -> Any:
            if Path(path).is_relative_to(folder.parent) and next(left, None) is None:
                raise KeyboardInterrupt
            return do(path, *args, **kwargs)

        return wrapped

    patch.setattr(Path, "rename", wrap(Path.rename))
    patch.setattr(os, "link", wrap(os.link))


@pytest.mark.covering(1, "crash")
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("shards", [("1GB", "1GB"), ("4KB", "1GB"), ("1GB", "12KB"), ("4KB", "12KB")])
def test_failure_while_replacing_one_by_one_never_leaves_a_mixture(tmp_path, monkeypatch, shards, lasting):
    """Whatever step fails, the folder loads as the old model or as the new one; or both are beside it, and named."""
    monkeypatch.setattr(staging_module, "_swap_names", lambda: None)
    old = prunable(models.tiny_bert(num_labels=2)).prune(0.3)
    new = prunable(models.tiny_bert(seed=1, num_labels=3)).prune(0.5, scope="global")
    outcomes = []
    for steps in range(60):
        folder = tmp_path / str(steps) / "model"
        old.save_pretrained(folder, max_shard_size=shards[0])
        with monkeypatch.context() as patch:
            interrupt_after(steps, folder, patch, lasting)
            try:
                new.save_pretrained(folder, max_shard_size=shards[1])
                finished = True
            except KeyboardInterrupt:
                finished = False
            except CheckpointError as error:
                assert lasting
                kept = [Path(place) for place in re.findall(r"/\S+\.tmp(?:\.old/files)?", str(error))]
                assert_same_model(load(kept[1]), new)
                finished = None
        if finished is None:
            with pytest.raises((OSError, ValueError)):
                load(folder)
            with output_lock(folder, "save_pretrained"):  # as the next one that writes there does
                pass
        assert names(folder.parent) == {"model"}
        loaded = load(folder)
        expected = old if loaded.config.num_labels == 2 else new
        outcomes.append("old" if expected is old else "new")
        assert_same_model(loaded, expected)
        if finished:
            break
    assert finished
    assert outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, key=["old", "new"].index)
    assert outcomes.count("old") > 5


# --- damage ----------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict, dict], None]) -> None:
    """Change a side file's tensors and header, and write a valid safetensors file again."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["hf_prune"])
    tensors = load_file(path)
    change(tensors, header)
    save_file(tensors, path, {"hf_prune": json.dumps(header)})


def flip_bit(tensors: dict, header: dict) -> None:
    tensors[min(tensors)][0] ^= 1


def swap_bits(tensors: dict, header: dict) -> None:
    """As many kept weights as before, but others."""
    name = min(tensors)
    tensors[name] = tensors[name].flip(0)


def change_entry(tensors: dict, header: dict, **values: Any) -> None:
    header["masks"][min(header["masks"])] |= values


def rename(tensors: dict, header: dict) -> None:
    entries, name = header["masks"], min(tensors)
    entries["elsewhere.weight"], tensors["elsewhere.weight"] = entries.pop(name), tensors.pop(name)


DAMAGE: dict[str, tuple[Callable[[dict, dict], Any], str]] = {
    "flipped bit": (flip_bit, r"is damaged: .*kept weights where the header says"),
    "other bits": (swap_bits, r"not those of its weights: 'bert.*' has non-zero weights that its mask removes"),
    "wrong count": (lambda t, h: change_entry(t, h, kept=3), r"is damaged: .*kept weights where the header says 3"),
    "wrong shape": (lambda t, h: change_entry(t, h, shape=[1, 2]), r"is damaged: .*for a mask of shape \[1, 2\]"),
    "turned shape": (lambda t, h: change_entry(t, h, shape=[8, 32]), r"do not fit the model: .*\(8, 32\).*\(16, 16\)"),
    "shape of text": (lambda t, h: change_entry(t, h, shape="no"), r"is damaged"),
    "unknown key": (lambda t, h: change_entry(t, h, colour="red"), r"is damaged: .*colour"),
    "no entries": (lambda t, h: h.pop("masks"), r"is damaged: KeyError\('masks'\)"),
    "a list": (lambda t, h: h.update(masks=[]), r"is damaged: AttributeError"),
    "lost tensor": (lambda t, h: t.pop(min(t)), r"is damaged: KeyError"),
    "extra tensor": (lambda t, h: t.update(x=torch.zeros(1)), r"its header does not name x"),
    "other dtype": (lambda t, h: t.update({min(t): t[min(t)].float()}), r"is damaged: .*float32 bits"),
    "8-bit dtype": (lambda t, h: t.update({min(t): t[min(t)].to(torch.float8_e4m3fn)}), r"is damaged: "),
    "endless text": (lambda t, h: change_entry(t, h, shape=["no", 1 << 70]), r"is damaged: OverflowError"),
    "bad config": (lambda t, h: h.update(config={"sparsity": 7}), r"is damaged: ConfigError.*sparsity is 7"),
    "newer version": (lambda t, h: h.update(version=2), r"format and version .*2.*expected .*1.*update hf_prune"),
    "foreign format": (lambda t, h: h.update(format="pt"), r"format and version \('pt', 1\): expected"),
    "no format": (lambda t, h: h.clear(), r"format and version \(None, None\)"),
    "other names": (rename, r"do not fit the model: 'elsewhere.weight'.*no such parameter.*delete pruning_masks"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_side_file_is_refused(saved, damage):
    change, message = DAMAGE[damage]
    rewrite(saved / MASK_FILE, change)
    before = files(saved)
    for loader in (AutoPrunedModelForSequenceClassification, OwnBert):
        with pytest.raises(CheckpointError, match=message):
            loader.from_pretrained(saved)
    assert files(saved) == before
    (saved / MASK_FILE).unlink()  # as the messages say
    assert dict(load(saved).masks) == {}


@pytest.mark.parametrize("header", ["{", "[]", "[" * 100_000])
def test_side_file_whose_header_is_no_object(saved, header):
    save_file(load_file(saved / MASK_FILE), saved / MASK_FILE, {"hf_prune": header})
    with pytest.raises(CheckpointError, match="is damaged: its header is not a JSON object"):
        load(saved)


def test_equal_masks_are_equal_bytes(pruned, tmp_path):
    contents = []
    for name in "abc":
        save_masks(MaskStore.of(pruned), tmp_path / name)
        contents.append((tmp_path / name).read_bytes())
    assert len(set(contents)) == 1


@pytest.mark.parametrize("content", ["empty", "truncated", "text", "header"])
def test_side_file_that_is_no_safetensors(saved, content):
    data = (saved / MASK_FILE).read_bytes()
    broken = {"empty": b"", "truncated": data[:-7], "text": b"not at all", "header": data[:20] + b"\xff" + data[21:]}
    replace_bytes(saved / MASK_FILE, broken[content])
    with pytest.raises(CheckpointError, match=r"pruning_masks.safetensors cannot be read as safetensors"):
        load(saved)


@pytest.mark.parametrize("shape", [[-1, -8], [1 << 62, 1 << 62, 0], [1 << 70, 0], [2.0, 4], "ab", None, [[8]]])
def test_side_file_whose_shapes_make_no_sense(tmp_path, shape):
    empty = shape not in ([-1, -8], [2.0, 4], [[8]])
    tensors = {"w": torch.zeros(0 if empty else 1, dtype=torch.uint8)}
    save_file(tensors, tmp_path / MASK_FILE, mask_metadata({"w": {"shape": shape, "kept": 0}}, None))
    with pytest.raises(CheckpointError, match=r"pruning_masks.safetensors is damaged: .*; restore it, or delete it"):
        load_masks(tmp_path / MASK_FILE)


def test_the_header_of_a_side_file_is_read_once(tmp_path, monkeypatch):
    masks = {f"layer.{number}": torch.rand(4, 5) > 0.5 for number in range(50)}
    save_masks(MaskStore(masks), tmp_path / MASK_FILE)
    opened = []
    monkeypatch.setattr("hf_prune.checkpoint.shards.safe_open", lambda *args: opened.append(args) or safe_open(*args))
    found = load_masks(tmp_path / MASK_FILE).masks
    assert len(opened) == 1
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())


def test_any_flipped_byte_is_noticed_or_harmless(saved, pruned):
    """No single wrong byte gives other masks or an error that is not ours."""
    data = (saved / MASK_FILE).read_bytes()
    refused = 0
    for position in range(0, len(data), 41):
        replace_bytes(saved / MASK_FILE, data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        try:
            store = load_masks(saved / MASK_FILE)
        except CheckpointError:
            refused += 1
        else:
            renamed = store.masks.keys() != pruned.masks.keys()
            same = all(torch.equal(mask, pruned.masks[name]) for name, mask in store.masks.items() if not renamed)
            assert renamed or (same and store.masks)
    assert refused > 10


def test_damaged_weights_are_refused(saved):
    data = (saved / "model.safetensors").read_bytes()
    replace_bytes(saved / "model.safetensors", data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read as safetensors.*download or save"):
        load(saved)


def test_masks_of_the_encoder_go_to_another_task(pruned, saved):
    """Fine-tuning a pruned encoder for another task: the new head has no mask, the old one's is not needed."""
    encoder = {name: mask for name, mask in pruned.masks.items() if name.startswith("bert.encoder")}
    other = AutoPrunedModelForMaskedLM.from_pretrained(saved)
    assert dict(other.masks).keys() == encoder.keys()
    assert all(torch.equal(other.masks[name], mask) for name, mask in encoder.items())
    base = AutoPrunedModel.from_pretrained(saved)
    assert {f"bert.{name}" for name in base.masks} == {name for name in pruned.masks if name.startswith("bert.")}


def test_masks_of_a_base_model_go_to_a_task(tmp_path):
    base = prunable(models.tiny_bert().bert).prune(0.5)
    base.save_pretrained(tmp_path)
    classifier = load(tmp_path)
    shared = dict(classifier.named_parameters())
    assert dict(classifier.masks).keys() == {f"bert.{name}" for name in base.masks if f"bert.{name}" in shared}
    assert all(torch.equal(classifier.masks[f"bert.{name}"], mask) for name, mask in base.masks.items())


# --- torch.nn.utils.prune --------------------------------------------------------------------------


def torch_pruned(model: PreTrainedModel, kinds: Any = nn.Linear, amount: float = 0.4) -> dict[str, torch.Tensor]:
    """Prune every module of some kinds with torch.nn.utils.prune; return the masks by parameter name."""
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            torch_prune.l1_unstructured(module, "weight", amount)
            masks[f"{name}.weight"] = module.weight_mask.bool()
    return masks


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What the model computes with, under the usual names."""
    state = model.state_dict()
    masked = {
        n.removesuffix("_orig"): t * state[f"{n.removesuffix('_orig')}_mask"] for n, t in state.items() if "_orig" in n
    }
    return {**{n: t for n, t in state.items() if not n.endswith(("_orig", "_mask"))}, **masked}


def assert_adopted(loaded: Any, source: PreTrainedModel, masks: dict[str, torch.Tensor]) -> None:
    assert loaded.masks.keys() == masks.keys()
    assert all(torch.equal(loaded.masks[name], mask) for name, mask in masks.items())
    expected = weights_of(source)
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.pruning_config is None


@pytest.mark.parametrize("size", ["1GB", "4KB"])
@pytest.mark.parametrize("loader", [AutoPrunedModelForSequenceClassification, OwnBert])
def test_checkpoint_of_torch_prune(tmp_path, loader, size):
    source = models.tiny_bert()
    masks = torch_pruned(source)
    source.save_pretrained(tmp_path / "model", max_shard_size=size)
    before = files(tmp_path / "model")
    loaded, info = loader.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_adopted(loaded, source, masks)
    assert files(tmp_path / "model") == before
    loaded.prune(0.6).save_pretrained(tmp_path / "again")
    assert_same_model(load(tmp_path / "again"), loaded)
    plain, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"]
    assert_unchanged(plain, snapshot(loaded))


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_are_refused_unopened(tmp_path, sharded):
    models.tiny_bert().config.save_pretrained(tmp_path)
    name = "pytorch_model.bin.index.json" if sharded else "pytorch_model.bin"
    (tmp_path / name).write_bytes(b"opening this would fail in another way")
    with pytest.raises(CheckpointError, match=rf"weights in {re.escape(name)}, a pickle.*convert it once"):
        load(tmp_path)


def test_kept_zeros_of_torch_prune_stay_kept(tmp_path):
    source = models.tiny_bert()
    with torch.no_grad():
        source.classifier.weight.zero_()
    mask = torch.ones_like(source.classifier.weight)
    mask[0, :4] = 0
    torch_prune.custom_from_mask(source.classifier, "weight", mask)
    source.save_pretrained(tmp_path)
    assert_adopted(load(tmp_path), source, {"classifier.weight": mask.bool()})


def test_mask_that_keeps_everything(tmp_path):
    source = models.tiny_bert()
    torch_prune.identity(source.classifier, "weight")
    source.save_pretrained(tmp_path)
    assert_adopted(load(tmp_path), source, {"classifier.weight": torch.ones(2, 16, dtype=torch.bool)})


def test_checkpoint_of_torch_prune_in_bfloat16(tmp_path):
    source = models.tiny_bert().to(torch.bfloat16)
    masks = torch_pruned(source)
    source.save_pretrained(tmp_path)
    assert_adopted(load(tmp_path), source, masks)


def test_checkpoint_of_torch_prune_with_masks_of_biases(tmp_path):
    source = models.tiny_bert()
    torch_prune.l1_unstructured(source.classifier, "bias", 1)
    source.save_pretrained(tmp_path)
    assert_adopted(load(tmp_path), source, {"classifier.bias": source.classifier.bias_mask.bool()})


def test_checkpoint_of_torch_prune_for_another_task(tmp_path):
    """The new head is random, and must not be taken for a mask; the old head is dropped."""
    source = models.tiny_bert_mlm()
    masks = torch_pruned(source.bert)
    source.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.masks.keys() == {f"bert.{name}" for name in masks}
    assert all(torch.equal(loaded.masks[f"bert.{name}"], mask) for name, mask in masks.items())
    encoder = AutoPrunedModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert encoder.masks.keys() == masks.keys()
    resized = load(tmp_path, num_labels=5)
    assert resized.masks.keys() == loaded.masks.keys()


def test_gpt2_of_torch_prune(tmp_path):
    source = models.tiny_gpt2()
    layer = source.transformer.h[0].mlp.c_fc
    torch_prune.l1_unstructured(layer, "weight", 0.5)
    source.save_pretrained(tmp_path)
    loaded = AutoPrunedModelForCausalLM.from_pretrained(tmp_path)
    assert list(loaded.masks) == ["transformer.h.0.mlp.c_fc.weight"]
    assert torch.equal(loaded.transformer.h[0].mlp.c_fc.weight, layer.weight)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


@pytest.mark.parametrize("loader", [AutoPrunedModelForImageClassification, OwnVit])
def test_vit_of_torch_prune_in_the_layout_of_transformers_4(tmp_path, loader):
    """``weight_orig`` behind names that transformers renames while loading."""
    native = models.tiny_vit()
    native.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old_names = [name for name in weights if "encoder.layer." in name and name.endswith("dense.weight")]
    assert len(old_names) == 6  # not the names that the model itself has
    keep = {}
    for i, name in enumerate(old_names):
        keep[name] = torch.rand(weights[name].shape, generator=torch.Generator().manual_seed(i)) > 0.5
        weights[f"{name}_orig"], weights[f"{name}_mask"] = weights.pop(name), keep[name].float()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert len(loaded.masks) == 6
    assert sum(int(m.sum()) for m in loaded.masks.values()) == sum(int(k.sum()) for k in keep.values())
    for name, parameter in native.named_parameters():
        mask = loaded.masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert same_bits(loaded.get_parameter(name), parameter * mask + 0.0)


def test_names_that_only_look_like_masks(tmp_path):
    """A checkpoint with ``foo_mask`` but no ``foo_orig``, or the reverse, was not pruned with torch."""
    source = models.tiny_bert()
    source.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["classifier.weight_mask"] = torch.zeros(2, 16)
    weights["bert.pooler.dense.weight_orig"] = torch.zeros(16, 16)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load(tmp_path)
    assert dict(loaded.masks) == {}
    assert_unchanged(loaded, snapshot(source))
    del weights["bert.pooler.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"would initialize bert\.pooler\.dense\.weight randomly"):
        load(tmp_path)


# --- companions ------------------------------------------------------------------------------------


def test_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no such folder: .*nothing"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="Unrecognized model"):
        load(tmp_path)


def test_training_steps_do_not_survive_in_the_checkpoint(tmp_path):
    """Something moves removed weights; what is saved has them at zero all the same, and loads."""
    model = prunable(models.tiny_bert()).prune(0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    name, mask = next(iter(model.masks.items()))
    assert model.get_parameter(name).detach()[~mask].any()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for folder, given in (("own", None), ("given", state)):
        with pytest.warns(UserWarning, match="they are zero in the saved model"):
            model.save_pretrained(tmp_path / folder, state_dict=given)
    for folder in ("own", "given"):
        loaded = load(tmp_path / folder)
        assert dict(loaded.masks).keys() == dict(model.masks).keys()
        assert_unchanged(loaded, snapshot(model))
    assert state[name][~mask].any()  # the caller's own tensors are left as they were


def test_new_head_of_another_size(pruned, saved):
    loaded = load(saved, num_labels=5, ignore_mismatched_sizes=True)
    assert dict(loaded.masks).keys() == {name for name in pruned.masks if name != "classifier.weight"}


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "[" * 100_000, '{"vocab_size": 1' + "0" * 5000 + "}", '{"architectures": {"a": 1}}']
)
def test_a_config_that_is_no_config_is_ours_to_name(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load(saved)


def test_a_config_with_a_list_for_a_number_is_ours_to_name(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "vocab_size": ["x"]}))
    with pytest.raises(CheckpointError, match=r"config.json of .* is damaged: .*vocab_size"):
        load(saved)


@pytest.mark.parametrize(("saved_with", "changed"), [(2, 12), (12, 2)])
def test_most_weights_of_another_model_are_refused_and_not_random(tmp_path, saved_with, changed):
    models.tiny_bert(num_hidden_layers=saved_with).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": changed}))
    with pytest.raises(CheckpointError, match=r"hold another model than its config describes: .* of the \d+ weights"):
        load_native(str(tmp_path))


@pytest.mark.parametrize("place", [("model", "vocab", "w39"), ("version",), ("added_tokens",)])
def test_a_tokenizer_that_is_no_tokenizer_is_ours_to_name(tmp_path, place):
    """tokenizers raises bare exceptions."""
    models.tiny_bert().save_pretrained(tmp_path)
    models.tiny_tokenizer().save_pretrained(tmp_path)
    values = part = json.loads((tmp_path / "tokenizer.json").read_text())
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = [[]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"tokenizer of .* cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_unreachable_hub_is_an_error_at_once(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    start = time.perf_counter()
    with pytest.raises(DataError, match="cannot get model 'nope/nope'"):
        load("nope/nope")
    assert time.perf_counter() - start < 5  # seconds of retries would be half a minute


def test_folder_may_be_the_current_one(pruned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pruned.save_pretrained(".")
    assert dict(load(".").masks).keys() == dict(pruned.masks).keys()
    assert not [path.name for path in tmp_path.parent.iterdir() if path.name.endswith(".tmp")]
