"""Weights in another number format are refused in the same words, whatever they claim to be and wherever they come."""

import json

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import BitsAndBytesConfig, LlamaForCausalLM, QuantoConfig

from hf_prune import (
    AutoPrunedModelForSequenceClassification,
    CheckpointError,
    DataError,
    MaskError,
    PlanError,
    PruningConfig,
    evaluate_perplexity,
    explain_speed,
    export_model,
    from_torch_prune,
    prunable,
    prune,
    shrink,
    sparsity_report,
    structure_report,
)
from hf_prune.auto import load_native
from hf_prune.cli.workflows.bench import zero_notes
from hf_prune.conversion.streaming.meta_model import load_meta_model
from hf_prune.structured.vocabulary.rows import find_vocabulary
from hf_prune.training.pruner import TrainingPruner
from hf_prune.utils.number_formats import refuse_quantized
from tests import models

WORDS = "expected float32, float64, float16 or bfloat16; prune before quantizing"


class Rounded(torch.Tensor):
    """Eight bits and a scale that say they are float32, as quanto's and torchao's tensors do."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32, device=values.device)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __repr__(self):
        return "Rounded(...)"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def plain(x):
            return x.values * x.scale if isinstance(x, cls) else x

        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        return func(*pytree.tree_map(plain, args), **pytree.tree_map(plain, kwargs or {}))


def rounded(model, name="model.layers.0.mlp.up_proj"):
    module = model.get_submodule(name)
    scale = module.weight.detach().abs().max() / 127
    module.weight = nn.Parameter(Rounded((module.weight.detach() / scale).to(torch.int8), scale), requires_grad=False)
    return model


class Packed(nn.Module):
    """As GPTQ's: no weight at all."""

    def __init__(self):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 16, dtype=torch.int32))


def packed(model):
    model.model.layers[0].mlp.up_proj = Packed()
    return model


def said(attribute, value):
    def change(model):
        setattr(model.config if attribute == "quantization_config" else model, attribute, value)
        return model

    return change


def with_dtype(dtype):
    def change(model):
        module = model.model.layers[0].mlp.up_proj
        module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
        return model

    return change


def in_layout(layout):
    def change(model):
        module = model.model.layers[0].mlp.up_proj
        module.weight = nn.Parameter(module.weight.detach().to_sparse(layout=layout), requires_grad=False)
        return model

    return change


FORMATS = [
    (rounded, r"up_proj\.weight is a Rounded, which says torch\.float32"),
    (packed, r"up_proj is a Packed, which has qweight for a weight"),
    (said("quantization_config", {"quant_method": "gptq"}), r"LlamaForCausalLM.* is quantized with 'gptq'"),
    (said("is_quantized", True), r"LlamaForCausalLM.* is quantized with 'an unnamed method'"),
    (with_dtype(torch.float8_e4m3fn), r"up_proj\.weight is torch\.float8_e4m3fn"),
    *(
        (with_dtype(dtype), rf"up_proj\.weight is {dtype}")
        for dtype in (torch.uint8, torch.int16, torch.int32, torch.complex64, torch.bool)
    ),
]
FOUND = [(change, f"{found}.*{WORDS}") for change, found in FORMATS] + [
    (in_layout(layout), rf"up_proj\.weight is stored as {layout}: expected a dense tensor; call to_dense\(\) on it")
    for layout in (torch.sparse_coo, torch.sparse_csr)
]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize(("change", "message"), FOUND)
@pytest.mark.parametrize(
    "act",
    [
        lambda m: prune(m, 0.5),
        lambda m: prune(m, 0.5, dry_run=True),
        lambda m: prune(nn.ModuleDict({"inner": m}), 0.5, target_modules=["q_proj"]),
        lambda m: prune(m, 0.5, granularity=("head", "neuron"), scope="global"),
        shrink,
        find_vocabulary,
        from_torch_prune,
        lambda m: export_model(m, "nowhere"),
        lambda m: TrainingPruner(m, PruningConfig(0.5), 10),
        lambda m: TrainingPruner(m, PruningConfig(0.5, granularity="neuron"), 10),
        sparsity_report,
        structure_report,
        explain_speed,
    ],
)
def test_other_formats_are_refused_everywhere(change, message, act):
    model = change(models.tiny_llama())
    state = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(PlanError, match=message):
        act(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == state
    assert not (model.lm_head.weight == 0).any()


def test_what_is_plain_is_not_refused():
    class Tagged(nn.Parameter):
        """Says nothing of how it computes."""

    model = prunable(models.tiny_llama())
    model.model.layers[0].mlp.up_proj.weight = Tagged(model.model.layers[0].mlp.up_proj.weight.detach())
    model.register_parameter("steps", nn.Parameter(torch.zeros(2, 2, dtype=torch.int64), requires_grad=False))
    model.register_buffer("weight", torch.zeros(4, dtype=torch.int64))
    model.register_buffer("causal", torch.ones(1, 1, 4, 4, dtype=torch.uint8))
    model.is_quantized = False  # as dequantize=True leaves it
    model.config.quantization_config = {"quant_method": "hf_prune", "format_version": 1, "structure": {}}
    model.prune(0.5)
    assert model.masks
    refuse_quantized(models.tiny_bert().half())
    refuse_quantized(models.tiny_bert().bfloat16())


def test_quanto(tmp_path):
    pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    models.tiny_llama().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8"))
    for act in (lambda m: prune(m, 0.5), sparsity_report):
        with pytest.raises(PlanError, match=f"is quantized with 'quanto': {WORDS}"):
            act(model)
    del model.hf_quantizer, model.config.quantization_config
    model.is_quantized = False
    with pytest.raises(PlanError, match=f"weight is a .*Tensor, which says torch.float32: {WORDS}"):
        prune(model, 0.5)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "how", [{"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, {"load_in_8bit": True}]
)
def test_a_sparse_checkpoint_is_not_loaded_quantized(tmp_path, compressed, how):
    prunable(models.tiny_bert()).prune(0.5).save_pretrained(tmp_path, compressed=compressed)
    with pytest.raises(CheckpointError, match=r"is sparse, and .* would quantize it"):
        AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path, **how)


def test_masks_do_not_meet_quantized_weights(tmp_path):
    prunable(models.tiny_bert()).prune(0.5).save_pretrained(tmp_path)

    class Loaded(type(models.tiny_bert())):
        """As if the config had said so."""

        def post_init(self):
            super().post_init()
            self.is_quantized = True

    with pytest.raises(CheckpointError, match="is sparse, and its config would quantize it"):
        type(prunable(Loaded(models.tiny_bert().config))).from_pretrained(tmp_path)


def test_streaming_refuses_quantized_checkpoints(tmp_path):
    models.tiny_llama().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(CheckpointError, match=f"is quantized with 'fp8': {WORDS}"):
        load_meta_model(str(tmp_path))


def test_adapters_alone_are_no_model(tmp_path):
    settings = {"base_model_name_or_path": "acme/base", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    message = r"holds the adapters of a PeftModel and no model .*: load their base model, acme/base, "
    for load in (AutoPrunedModelForSequenceClassification.from_pretrained, load_native):
        with pytest.raises(DataError, match=message):
            load(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(DataError, match="does not name"):
        load_native(str(tmp_path))


def test_quantized_models_are_timed_without_a_word_on_zeros():
    sparse, quantized = prunable(models.tiny_llama()).prune(0.5), with_dtype(torch.float8_e4m3fn)(models.tiny_llama())
    (note,) = zero_notes({"sparse": sparse, "quantized": quantized})
    assert note.startswith("In sparse, 50.0 % of the weights")


def test_a_model_that_was_quantized_after_pruning_is_scored_and_keeps_its_zeros_and_is_not_saved_with_masks(tmp_path):
    model = rounded(prunable(models.tiny_llama()).prune(0.5))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not (model.get_parameter(name).dequantize()[~model.masks[name]] != 0).any()
    windows = ["a few words that are read", "and some more of them"] * 8
    assert evaluate_perplexity(model, models.tiny_tokenizer(), windows, window=8).perplexity > 1
    for call in (lambda: model.save_pretrained(tmp_path), model.apply_masks, model.make_permanent):
        with pytest.raises(
            MaskError, match=r"up_proj\.weight has become a Rounded.*save the pruned model before quantizing"
        ):
            call()
    assert not list(tmp_path.iterdir())
