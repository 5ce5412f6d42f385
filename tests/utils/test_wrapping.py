"""Masks belong to the weights of a model: whatever is around it, inside it, or only a part of it, they are the same."""

import copy
import pickle

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    PreTrainedConfig,
    PreTrainedModel,
)

import hf_prune
from hf_prune import (
    ArchitectureError,
    AutoPrunedModelForCausalLM,
    AutoPrunedModelForSequenceClassification,
    CalibrationError,
    CheckpointError,
    MaskError,
    MaskStore,
    PlanError,
    drop_masks,
    merge_lora,
    prunable,
    prune,
    shrink,
    sparsity_report,
)
from tests import models

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft


class Holder(nn.Module):
    """What people write around a model."""

    def __init__(self, model):
        super().__init__()
        self.inner = model
        self.head = models.fill(nn.Linear(16, 4), 1)


@pytest.fixture
def ddp():
    """DistributedDataParallel of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield DistributedDataParallel
    torch.distributed.destroy_process_group()


def zeros(model):
    return {name: int((parameter == 0).sum()) for name, parameter in model.named_parameters()}


def tiny_llava():
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=16,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=59)
    return models.fill(LlavaForConditionalGeneration(config).eval())


# --- around a model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_wrapper_is_not_there(wrap):
    model, plain = prunable(models.tiny_bert()), prunable(models.tiny_bert()).prune(0.5)
    wrapped = wrap(model)
    assert prune(wrapped, 0.5, target_modules=r"bert\..*|classifier") is wrapped  # by the names of the model inside
    assert model.masks.keys() == plain.masks.keys()
    assert all(torch.equal(model.masks[name], mask) for name, mask in plain.masks.items())
    assert str(prune(wrapped, 0.6, dry_run=True)) == str(model.plan(0.6))
    assert sparsity_report(wrapped).target_sparsity == model.sparsity_report().target_sparsity


def test_distributed_data_parallel_is_not_there(ddp):
    model = prunable(models.tiny_bert())
    prune(ddp(model), 0.5)
    assert zeros(model) == zeros(prune(models.tiny_bert(), 0.5))
    assert len(model.masks) == 14


def test_a_head_of_units_is_found_through_what_holds_the_model():
    for wrap in (nn.DataParallel, Holder, lambda m: nn.ModuleDict({"encoder": m}), nn.Sequential):
        model = models.tiny_bert()
        held = wrap(model)
        before = sum(p.numel() for p in model.parameters())
        prune(held, 0.5, granularity="head")
        assert shrink(held) is held
        assert sum(p.numel() for p in model.parameters()) < before
        assert model.config.pruned_structure
    two = nn.ModuleDict({"a": models.tiny_bert(), "b": models.tiny_bert()})
    with pytest.raises(ArchitectureError, match=r"has no entry for 'a model without config\.model_type'"):
        prune(two, 0.5, granularity="head")


@pytest.mark.parametrize("wrap", [Holder, lambda m: nn.ModuleDict({"encoder": m}), nn.Sequential])
def test_a_model_has_the_masks_whatever_holds_it(tmp_path, wrap):
    model = prunable(models.tiny_bert())
    held = prune(wrap(model), 0.5, keep_dense=True)
    assert len(model.masks) == 14
    assert all(not model.get_parameter(name).detach()[~mask].any() for name, mask in model.masks.items())
    prefix = next(name for name, module in held.named_modules() if module is model)
    outside, inside = MaskStore.of(held).masks.packed, MaskStore.of(model).masks.packed
    assert all(outside[f"{prefix}.{name}"] is mask for name, mask in inside.items())
    model.save_pretrained(tmp_path / "m")
    loaded = type(model).from_pretrained(tmp_path / "m")
    assert loaded.masks.keys() == model.masks.keys()
    model.discard_masks()
    models.assert_unchanged(model, models.snapshot(models.tiny_bert()))
    left = MaskStore.of(held)
    assert left is None or list(left.masks) == ["head.weight"]


def test_the_output_layer_of_a_model_that_is_held_stays():
    model = models.tiny_llama()
    prune(nn.ModuleDict({"decoder": model}), 0.5)
    assert zeros(model)["lm_head.weight"] == 0
    assert zeros(model)["model.layers.0.mlp.up_proj.weight"] > 0


# --- parts of a model ---------------------------------------------------------------------------------------------


def test_two_handles_make_one_set_of_masks(tmp_path):
    model = prunable(tiny_llava())
    part, other = model.model.language_model, model.model.vision_tower
    prune(part, 0.3)
    first = dict(model.masks)
    assert first
    assert all(name.startswith("model.language_model.") for name in first)
    prune(model, 0.5, target_modules=["q_proj", "fc1"])
    whole = dict(model.masks)
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not (whole[name] & ~first[name]).any()  # what is gone stays gone
    bits = MaskStore.of(model).masks.packed[name]
    assert MaskStore.of(part).masks.packed["layers.0.self_attn.q_proj.weight"] is bits
    assert any("vision_tower" in each for each in whole)
    prune(other, 0.9, target_modules=["fc1"])
    assert whole.keys() == model.masks.keys()
    fc1 = next(each for each in whole if each.endswith("fc1.weight"))
    assert int((~model.masks[fc1]).sum()) > int((~whole[fc1]).sum())
    assert model.pruning_config.sparsity == 0.9  # the last one
    counts = zeros(model)
    assert all(counts[each] == int((~mask).sum()) for each, mask in model.masks.items())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert {n: m.tolist() for n, m in again.masks.items()} == {n: m.tolist() for n, m in model.masks.items()}
    MaskStore.of(part).make_permanent(part)
    assert model.masks
    assert not any("language_model" in each for each in model.masks)
    assert zeros(model) == counts


def test_dense_weights_come_back_of_a_part_and_of_the_whole_only_where_they_were_kept():
    model = prunable(tiny_llava())
    before = models.snapshot(model)
    part = model.model.language_model
    prune(part, 0.5, keep_dense=True)
    model.prune(0.6, target_modules=["fc1"])  # kept as well, as after any pruning that keeps
    prune(model, 0.7)
    model.discard_masks()
    models.assert_unchanged(model, before)
    prune(model.model.vision_tower, 0.5)
    prune(part, 0.5, keep_dense=True)
    with pytest.raises(MaskError, match="the dense weights were not kept"):
        model.discard_masks()
    with pytest.raises(MaskError, match="keep_dense=True, but the model was pruned before without it"):
        prune(model, 0.7, keep_dense=True)
    MaskStore.of(part).discard(part)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if "language_model" in n)
    assert all("vision_tower" in name for name in model.masks)


def test_a_tied_weight_has_one_mask():
    model = models.tiny_llama(tie_word_embeddings=True)
    prune(model.lm_head, 0.5)
    (name,) = MaskStore.of(model).masks
    assert name == "model.embed_tokens.weight"
    prune(model, 0.7, target_modules=["lm_head"])
    assert MaskStore.of(model.lm_head).masks.packed["weight"] is MaskStore.of(model).masks.packed[name]
    assert float((model.lm_head.weight == 0).float().mean()) == pytest.approx(0.7, abs=0.01)


def test_a_tied_weight_keeps_its_mask_as_long_as_one_holds_it():
    model = prune(models.tiny_llama(tie_word_embeddings=True), 0.5, target_modules=["lm_head"])
    (mask,) = MaskStore.of(model).masks.values()
    model.lm_head = nn.Linear(16, models.VOCAB, bias=False)
    assert MaskStore.of(model).masks.keys() == {"model.embed_tokens.weight"}
    MaskStore.of(model).apply(model)
    assert model.lm_head.weight.all()
    assert torch.equal(model.model.embed_tokens.weight != 0, mask)
    model.model.embed_tokens = nn.Embedding(models.VOCAB, 16)
    with pytest.raises(MaskError, match=r"the mask of 'model.embed_tokens.weight' .* has another module there"):
        MaskStore.of(model).apply(model)


def test_masks_of_what_earlier_versions_pickled():
    """There what was pruned had one object with all masks, which had fewer fields, as an attribute."""
    part = prune(models.mlp(), 0.5)
    masks = {name: mask.clone() for name, mask in MaskStore.of(part).masks.items()}
    MaskStore.detach(part)
    old = MaskStore(dict(masks))
    del old.replaced
    part.__dict__["_hf_prune_masks"] = old
    assert MaskStore.of(copy.deepcopy(part)).masks.keys() == masks.keys()
    holder = Holder(part)
    models.assert_same_masks(part, MaskStore(masks))
    assert MaskStore.of(holder).masks.keys() == {f"inner.{name}" for name in masks}
    prune(holder, 0.7)
    assert zeros(part)["fc1.weight"] > 0.6 * part.fc1.weight.numel()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_shares_nothing(copied):
    model = prunable(models.tiny_bert())
    holder = nn.ModuleDict({"encoder": model})
    prune(holder, 0.5)
    twin = copied(holder)
    inner = twin["encoder"]
    assert {n: m.tolist() for n, m in inner.masks.items()} == {n: m.tolist() for n, m in model.masks.items()}
    early = {name: mask.clone() for name, mask in model.masks.items()}
    inner.prune(0.8)
    inner.make_permanent()
    assert all(torch.equal(mask, early[name]) for name, mask in model.masks.items())
    assert not inner.masks


def test_a_module_that_is_replaced_is_noticed_and_its_mask_does_not_fall_on_the_new_one():
    model = prune(models.mlp(), 0.5)
    model.fc2 = models.fill(nn.Linear(12, 3), 1)
    with pytest.raises(MaskError, match=r"the mask of 'fc2.weight' .* the model has another module there"):
        prune(model, 0.6)
    assert zeros(model)["fc2.weight"] == 0
    drop_masks(model, "fc2.weight")
    prune(model, 0.6)
    assert zeros(model)["fc2.weight"] == 22
    part = models.tiny_bert()
    holder = Holder(part)
    prune(part, 0.5)
    part.classifier = nn.Linear(16, 2)
    with pytest.raises(MaskError, match=r"the mask of 'inner.classifier.weight'"):
        prune(holder, 0.6)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_layers_that_are_wrapped_are_saved_under_their_own_names(tmp_path, compressed, given):
    """As by ``torch.compile`` of each layer, which is how people compile only what is repeated."""
    model = prunable(models.tiny_llama(tie_word_embeddings=True, num_hidden_layers=2)).prune(0.5)
    plain, masks = models.snapshot(model), dict(model.masks)
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    model.save_pretrained(tmp_path, compressed=compressed, state_dict=model.state_dict() if given else None)
    again = AutoPrunedModelForCausalLM.from_pretrained(tmp_path)
    models.assert_unchanged(again, plain)
    assert again.masks.keys() == masks.keys()
    assert all(torch.equal(again.masks[name], mask) for name, mask in masks.items())


def test_masks_of_weights_that_would_be_random_are_not_blamed(tmp_path):
    model = prunable(models.tiny_bert()).prune(0.5)
    model.save_pretrained(tmp_path)
    tensors = {
        name.replace("layer.0", "layer.0._orig_mod"): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    match = (
        r"has masks for 6 weights that are not in its files, such as 'bert.*, and 'bert.*_orig_mod.*save the checkpoint"
    )
    for load in (type(model), AutoPrunedModelForSequenceClassification):
        with pytest.raises(CheckpointError, match=match) as caught:
            load.from_pretrained(tmp_path)
        assert "delete" not in str(caught.value)


def test_a_composite_model_loads_with_a_part_that_was_shrunk(tmp_path):
    model = prunable(tiny_llava())
    inner = model.model.language_model
    prune(inner, 0.5, target_modules=["q_proj", "up_proj"])
    shrink(prune(inner, 0.6, granularity=("head", "neuron", "layer"), scope="global"))
    model.save_pretrained(tmp_path / "m")
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "m")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    base = LlavaModel.from_pretrained(tmp_path / "m")
    assert {n: p.shape for n, p in base.named_parameters()} == {n: p.shape for n, p in model.model.named_parameters()}
    again = type(model).from_pretrained(tmp_path / "m")
    assert again.masks.keys() == model.masks.keys() != set()
    again.save_pretrained(tmp_path / "again")
    models.assert_unchanged(type(model).from_pretrained(tmp_path / "again"), models.snapshot(model))
    again.save_pretrained(tmp_path / "small", compressed=True)
    models.assert_unchanged(LlavaForConditionalGeneration.from_pretrained(tmp_path / "small"), models.snapshot(model))


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("granularity", ["neuron", "layer"])
def test_an_encoder_decoder_loads_with_a_part_that_was_shrunk(tmp_path, part, granularity):
    bert = models.tiny_bert().config
    config = EncoderDecoderConfig.from_encoder_decoder_configs(bert, BertConfig.from_dict(bert.to_dict()))
    model = prunable(models.fill(EncoderDecoderModel(config)))
    inner = getattr(model, part)
    inner.config = copy.deepcopy(inner.config)  # as models make them that copy their configs
    shrink(prune(inner, 0.5, granularity=granularity, criterion="random", scope="global"))
    model.save_pretrained(tmp_path)
    models.assert_unchanged(EncoderDecoderModel.from_pretrained(tmp_path), models.snapshot(model))


def test_a_part_that_no_config_describes_is_not_saved(tmp_path):
    class Mine(PreTrainedModel):
        config_class = BertConfig

        def __init__(self, config):
            super().__init__(config)
            self.inner = BertModel(BertConfig(**{**models.tiny_bert().config.to_dict(), "num_hidden_layers": 2}))
            self.post_init()

    model = prunable(Mine(PreTrainedConfig()))
    shrink(prune(model.inner, 0.5, granularity="layer", criterion="random", scope="global"))
    with pytest.raises(CheckpointError, match=r"inner\.encoder\.layer.* could not be loaded: nothing was saved"):
        model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


# --- adapters -------------------------------------------------------------------------------------------------


@pytest.fixture
def lora():
    """A model with LoRA adapters and a trained copy of its classifier."""
    peft = pytest.importorskip("peft", reason="needs peft")

    def make(model, **settings):
        config = peft.LoraConfig(
            **{"r": 4, "target_modules": ["query", "value"], "init_lora_weights": False, **settings}
        )
        return peft.get_peft_model(model, config)

    return make


ADAPTED = "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.weight"


COPIED = "ignore:Not pruned, since modules_to_save trains copies of them:UserWarning"


@pytest.mark.filterwarnings(COPIED)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"granularity": "2:4"},
        {"criterion": "random", "scope": "global"},
        {"target_modules": ".*"},
        {"target_modules": ["query"]},
        {"target_modules": r"bert\.encoder.*\.query"},
    ],
)
def test_adapters_are_no_targets(lora, settings):
    wrapped = lora(models.tiny_bert(), modules_to_save=["classifier"])
    prune(wrapped, **({} if "granularity" in settings else {"sparsity": 0.5}), **settings)
    found = zeros(wrapped)
    assert found[ADAPTED] == (120 if "scope" in settings else 128)
    assert not any(count for name, count in found.items() if "lora_" in name or "modules_to_save" in name)
    same = prune(models.tiny_bert(), **({} if "granularity" in settings else {"sparsity": 0.5}), **settings)
    base = wrapped.get_base_model()
    assert len(MaskStore.of(base).masks) == len(MaskStore.of(same).masks.keys() - {"classifier.weight"})


def test_a_module_that_does_not_run_is_no_target_and_its_trained_copy_stays_as_it_is(lora):
    wrapped = lora(models.tiny_bert(), modules_to_save=["classifier"])
    with pytest.warns(
        UserWarning, match=r"^Not pruned, since modules_to_save trains copies of them: \S*classifier; prune"
    ):
        prune(wrapped, 0.5)
    assert not any("classifier" in name for name in MaskStore.of(wrapped).masks)
    report = sparsity_report(wrapped)
    assert any("Not pruned, since modules_to_save" in note for note in report.notes)
    trained = wrapped.base_model.model.classifier.modules_to_save["default"].weight
    trained.data += 1
    assert torch.equal(merge_lora(wrapped).model.classifier.weight, trained)
    wrapped = lora(prune(models.tiny_bert(), 0.5), modules_to_save=["classifier"])
    assert not sparsity_report(wrapped).notes  # pruned before
    with pytest.raises(PlanError, match=r"no target .* and modules_to_save trains copies of \S*classifier"):
        prune(wrapped, 0.6, target_modules=["classifier"])


@pytest.mark.parametrize("criterion", ["wanda", "taylor", "sparsegpt"])
def test_adapters_are_no_targets_of_criteria_that_look_at_data(lora, criterion):
    wrapped = lora(models.tiny_bert())
    prune(wrapped, 0.5, criterion=criterion, calibration=models.tiny_batches(models.tiny_bert()))
    found = zeros(wrapped)
    assert found[ADAPTED] == 128
    assert not any(count for name, count in found.items() if "lora_" in name)


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig", "OFTConfig", "IA3Config", "VeraConfig", "AdaLoraConfig"])
def test_adapters_of_other_kinds_are_no_targets(kind):
    peft = pytest.importorskip("peft", reason="needs peft")
    settings = {
        "IA3Config": {"feedforward_modules": []},
        "AdaLoraConfig": {"total_step": 10},
        "OFTConfig": {"oft_block_size": 4},
    }
    config = getattr(peft, kind)(target_modules=["query", "value"], **settings.get(kind, {}))
    wrapped = peft.get_peft_model(models.tiny_bert(), config)
    before = zeros(wrapped)
    prune(wrapped, 0.5, target_modules=".*")
    changed = {name for name, count in zeros(wrapped).items() if count != before[name]}
    assert changed == {name for name in MaskStore.of(wrapped).masks}
    assert len(changed) == 14


@pytest.mark.filterwarnings(COPIED)
@pytest.mark.parametrize("order", ["before", "through", "inside", "twice"])
def test_merging_finds_the_masks_whichever_handle_was_pruned(lora, tmp_path, order):
    model = models.tiny_bert()
    if order in ("before", "twice"):
        prune(model, 0.5, criterion="random")
    wrapped = lora(model, modules_to_save=["classifier"])
    if order == "through":
        prune(wrapped, 0.5)
    if order in ("inside", "twice"):
        prune(wrapped.get_base_model(), 0.6)
    report = merge_lora(wrapped)
    merged = report.model
    assert report.sparsity == pytest.approx(0.5 if order in ("before", "through") else 0.6, abs=0.01)
    assert wrapped.merge_and_unload() is merged
    assert len(merged.masks) == (14 if order in ("before", "twice") else 13)
    assert all(not merged.get_parameter(name).detach()[~mask].any() for name, mask in merged.masks.items())
    assert not any("base_layer" in name for name in merged.state_dict())
    merged.save_pretrained(tmp_path / "m")
    assert type(merged).from_pretrained(tmp_path / "m").masks.keys() == merged.masks.keys()


def test_masks_stay_with_the_weights_that_adapters_are_laid_around(lora):
    model = prunable(models.tiny_bert()).prune(0.5)
    wrapped = lora(model)
    with torch.no_grad():
        wrapped.get_parameter(ADAPTED).fill_(1.0)
    model.apply_masks()
    assert zeros(wrapped)[ADAPTED] == 128
    assert wrapped.unload() is model
    assert model.masks.keys() == prunable(models.tiny_bert()).prune(0.5).masks.keys()


def test_a_model_with_adapters_is_not_saved_as_a_plain_one(lora, tmp_path):
    model = prunable(models.tiny_bert()).prune(0.5)
    wrapped = lora(model)
    with pytest.raises(CheckpointError, match=r"query carries adapters, .*: merge them first, with"):
        model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    wrapped.save_pretrained(tmp_path / "adapters")
    assert (tmp_path / "adapters" / "adapter_config.json").exists()


@pytest.mark.parametrize("act", [lambda m: prune(m, 0.5, granularity="head"), shrink])
def test_units_are_not_taken_out_under_adapters(lora, act):
    wrapped = lora(models.tiny_bert())
    before = models.snapshot(wrapped)
    with pytest.raises(ArchitectureError, match=r"query carries adapters, .*; merge them first"):
        act(wrapped)
    models.assert_unchanged(wrapped, before)


class Pipeline:
    """Holds a model, as pipelines of transformers do."""

    def __init__(self):
        self.model = models.mlp()


@pytest.mark.parametrize(
    ("passed", "message"),
    [
        ("acme/model", r"found 'acme/model', of type str: expected a model, .*from_pretrained\('acme/model'\)"),
        (None, "found None, of type NoneType: expected a model, .*; load one with hf_prune.AutoPrunedModelFor"),
        (3, "found 3, of type int: expected a model"),
        (
            BertConfig(),
            "found a BertConfig: expected a model, .*; create a model from it, or load one",
        ),
        (Pipeline(), "found a Pipeline: expected a model, .*; pass the model that it holds, its .model"),
    ],
)
@pytest.mark.parametrize(
    "act",
    [
        lambda m: prune(m, 0.5),
        lambda m: prune(m, 0.5, granularity="neuron", scope="global"),
        hf_prune.adopt_zeros,
        hf_prune.drop_masks,
        hf_prune.explain_speed,
        hf_prune.from_torch_prune,
        hf_prune.prunable,
        hf_prune.merge_lora,
        hf_prune.shrink,
        hf_prune.sparsity_report,
        hf_prune.structure_report,
        lambda m: hf_prune.export_model(m, "nowhere.onnx"),
        lambda m: hf_prune.keep_sparse(m, torch.optim.SGD([torch.zeros(1)])),
        lambda m: hf_prune.trim_vocabulary(m, models.tiny_tokenizer(), ["a"]),
        lambda m: hf_prune.trim_hidden(m, 8, calibration=[]),
        lambda m: hf_prune.evaluate_perplexity(m, models.tiny_tokenizer(), ["a b c d"]),
        lambda m: hf_prune.evaluate_classification(m, models.tiny_tokenizer(), Dataset.from_dict({"label": [0]})),
        lambda m: hf_prune.measure_latency({"a": m, "b": m}),
    ],
)
def test_what_is_no_model_is_refused(passed, message, act):
    with pytest.raises(hf_prune.ModelTypeError, match=message):
        act(passed)


def test_two_models_are_not_shrunk_at_once():
    with pytest.raises(TypeError, match=r"found a ModuleDict: expected .*pass what is inside, one model at a time"):
        shrink(nn.ModuleDict({"a": models.tiny_bert(), "b": models.tiny_bert()}))


# --- calibration through them ------------------------------------------------------------------------------------


class Features(nn.Sequential):
    """Takes the batch in one piece and adds to it, as a SentenceTransformer does."""

    def __init__(self, model):
        super().__init__(model, models.fill(nn.Linear(16, 4), 1))

    def forward(self, input, **options):
        hidden = self[0](input_ids=input["input_ids"], attention_mask=input["attention_mask"]).last_hidden_state
        input["embedding"] = self[1](hidden[:, 0])
        return input


def features():
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in models.tiny_batches(bert())]


def bert():
    return models.fill(BertModel(models.tiny_bert().config, add_pooling_layer=False)).eval()


@pytest.mark.parametrize("settings", [{"criterion": "wanda", "scope": "row"}, {"criterion": "sparsegpt"}])
def test_what_takes_a_batch_in_one_piece_is_calibrated_with_it(settings):
    holder, plain, batches = Features(bert()), bert(), features()
    prune(holder, 0.5, calibration=batches, **settings)
    prune(plain, 0.5, calibration=features(), **settings)
    found, expected = MaskStore.of(holder[0]).masks, MaskStore.of(plain).masks
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    assert "1.weight" in MaskStore.of(holder).masks
    assert all(batch.keys() == {"input_ids", "attention_mask"} for batch in batches)


def test_a_holder_that_does_not_take_the_batch_names_what_it_holds():
    holder = Holder(bert())
    before = models.snapshot(holder)
    with pytest.raises(CalibrationError, match=r"Holder cannot run .*; or pass what it holds as 'inner', a BertModel"):
        prune(holder, 0.5, criterion="wanda", scope="row", calibration=features())
    models.assert_unchanged(holder, before)


@pytest.mark.filterwarnings("ignore:One of the base layers adapted", "ignore:Sparse invariant checks")  # by peft
@pytest.mark.parametrize("kind", ["HRAConfig", "ShiraConfig"])
def test_adapters_that_do_not_call_what_they_adapt_are_not_calibrated_through(kind):
    peft = pytest.importorskip("peft", reason="needs peft")
    model = peft.get_peft_model(models.tiny_llama(), getattr(peft, kind)(r=2, target_modules=["q_proj", "v_proj"]))
    before, batches = models.snapshot(model), models.tiny_batches(models.tiny_llama())
    message = r"reached 4 of 14 targets .*: the adapters around them \(peft.tuners.* read their weights without calling"
    with pytest.raises(CalibrationError, match=message):
        prune(model, 0.5, criterion="wanda", scope="row", calibration=batches)
    models.assert_unchanged(model, before)
    prune(model, 0.5)  # needs no inputs
    assert sum("base_layer" in name for name in MaskStore.of(model).masks) == 4


class Reads(nn.Module):
    """Multiplies with the weight of a Linear that it never calls."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(x, self.inner.weight)


class AroundReads(nn.Module):
    def __init__(self):
        super().__init__()
        self.reads, self.out = Reads(), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.reads(x))


@pytest.mark.filterwarnings("ignore:.* stay dense")
def test_a_module_that_reads_the_weights_of_others_is_named_in_the_warning():
    batches = [{"x": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))}]
    message = r"reached 1 of 2 targets \(reads.inner.weight\): .*Reads ran without calling"
    with pytest.warns(UserWarning, match=message):
        prune(models.fill(AroundReads()), 0.5, criterion="wanda", scope="row", calibration=batches)
