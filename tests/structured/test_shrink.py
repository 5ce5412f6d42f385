"""Whatever is pruned as a whole can be taken out: masked == shrunk == reloaded, for every architecture in the table."""

import copy
import json

import pytest
import torch
import transformers
from torch import nn

import hf_prune
from hf_prune import ArchitectureError, CheckpointError, Heads, Neurons, Stack, prunable, prune, shrink
from hf_prune.architectures.bypass import bypass, bypassed_layers, restore
from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.architectures.layers import layer_lists
from hf_prune.pruning.mask_store import MaskStore
from tests.architecture_models import MODELS, tiny
from tests.architectures.test_channels import REGISTERED
from tests.models import tiny_bert, tiny_llama

CACHED = ("gpt2", "opt", "llama", "qwen2", "qwen3", "gemma", "t5", "whisper")


@torch.no_grad()
def cut(model, counts=None):
    """Set the weights to zero that consume some units: other numbers in every site, and all of some."""
    generator = torch.Generator().manual_seed(1)
    for i, site in enumerate(find_unit_groups(model)):
        # the heads of the second layer and the neurons of the first go altogether
        number = site.units if i in (1, 2) else site.units // 2 - i % 2
        number = number if counts is None else counts(site)
        gone = torch.randperm(site.units, generator=generator)[:number]
        for part in site.consumers:
            model.get_parameter(part.name).data.index_fill_(part.dim, part.index(gone), 0)


@torch.no_grad()
def logits(model, inputs):
    cast = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs().items()}
    return model(**cast).logits


def test_every_entry_of_the_table_has_a_model():
    registered = {name for name in hf_prune.list_architectures() if name not in ("mine", "odd", "odd_channels")}
    assert registered == set(MODELS) | REGISTERED


@pytest.mark.covering(1)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", MODELS)
def test_outputs_are_the_same_when_shrunk_and_when_reloaded(model_type, attention, tmp_path):
    model, inputs = tiny(model_type, attention)
    cut(model)
    last = layer_lists(model)[-1]
    bypass(last.layers[-1])
    masked, before = logits(model, inputs), model.num_parameters()
    units = {site.name: site.units for site in find_unit_groups(model)}
    parameters = dict(model.named_parameters())
    gone = sum(
        site.units * site.parameters_per_unit(parameters)
        for site in find_unit_groups(model)
        if site.layers[-1] == (last.name, len(last.layers) - 1) and len(site.layers) == 1
    )

    shrunk = shrink(copy.deepcopy(model))

    assert (logits(shrunk, inputs) - masked).abs().max() <= 1e-5
    left = {site.name: site.units for site in find_unit_groups(shrunk)}
    assert len(left) < len(units)
    assert all(left[name] < units[name] for name in left)
    assert shrunk.num_parameters() < before - gone
    assert not bypassed_layers(shrunk)
    assert len(layer_lists(shrunk)[-1].layers) == len(last.layers) - 1
    assert shrunk.config.pruned_structure["parameters_before"] == sum(p.numel() for p in model.parameters())

    shrunk.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    loaded = type(model).from_pretrained(tmp_path / "a", attn_implementation=attention)
    assert torch.equal(logits(loaded, inputs), logits(shrunk, inputs))
    assert "quantization_config" not in loaded.config.to_dict()
    assert not getattr(loaded, "is_quantized", False)
    loaded.save_pretrained(tmp_path / "b")
    again, info = type(model).from_pretrained(
        tmp_path / "b", attn_implementation=attention, device_map="cpu", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(again, inputs), logits(shrunk, inputs))


@pytest.mark.parametrize("model_type", CACHED)
def test_generation_with_caches_is_the_same(model_type):
    model, inputs = tiny(model_type)
    cut(model)
    bypass(layer_lists(model)[-1].layers[-1])
    given = {k: v for k, v in inputs().items() if k != "decoder_input_ids"}
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(**given, **settings, use_cache=False)
    shrunk = shrink(model)
    assert torch.equal(shrunk.generate(**given, **settings), expected)
    if not model.config.is_encoder_decoder:
        static = shrunk.generate(**given, **settings, cache_implementation="static")
        assert torch.equal(static, expected)


@pytest.mark.parametrize("model_type", ["bert", "llama", "vit"])
def test_reload_in_half_precision(model_type, tmp_path):
    model, inputs = tiny(model_type)
    cut(model)
    shrink(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded, inputs), logits(model.to(torch.bfloat16), inputs))


def test_the_base_model_of_a_checkpoint_loads_as_well(tmp_path):
    model, inputs = tiny("bert")
    cut(model)
    shrink(model).save_pretrained(tmp_path)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.bert(**inputs()).last_hidden_state
        assert torch.equal(base(**inputs()).last_hidden_state, expected)


def test_uniform_sizes_need_no_plugin(tmp_path, fresh_process):
    model, _ = tiny("llama")
    cut(model, lambda site: site.units // 2)
    bypass(model.model.layers[1])
    shrink(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["intermediate_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (12, 4, 2)
    assert (config["head_dim"], config["num_hidden_layers"]) == (4, 2)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A; m = A.from_pretrained(sys.argv[1]); "
        "print(m(input_ids=torch.arange(3, 9)[None]).logits.double().sum().item()); "
        "assert 'hf_prune' not in sys.modules"
    )
    done = fresh_process.run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = model(input_ids=torch.arange(3, 9)[None]).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, abs=1e-4)


def test_numbers_that_the_class_of_a_config_refuses_are_told_by_the_record(tmp_path):
    model = prunable(tiny_llama(num_key_value_heads=4))
    cut(model, lambda site: 1 if site.kind == "head" else 0)
    shrink(model).save_pretrained(tmp_path)  # LlamaConfig: "The hidden size (16) is not a multiple of ... heads (3)"
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_attention_heads"] == 4
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.layers[0].self_attn.q_proj.weight.shape == (12, 16)
    inputs = torch.arange(3, 9)[None]
    assert torch.equal(loaded(inputs).logits, model.eval()(inputs).logits)


def test_without_the_plugin_a_shrunk_checkpoint_is_refused_and_never_random(tmp_path, fresh_process):
    model, _ = tiny("bert")
    cut(model)
    shrink(model).save_pretrained(tmp_path)
    code = "import sys; from transformers import AutoModel as A; A.from_pretrained(sys.argv[1])"
    done = fresh_process.run(code, tmp_path)
    assert done.returncode != 0
    assert "hf_prune" in done.stderr
    code = "import hf_prune, " + code.removeprefix("import ")
    done = fresh_process.run(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_pipeline_loads_a_shrunk_checkpoint(tmp_path):
    from tests.models import tiny_tokenizer

    model = tiny_bert()
    cut(model, lambda site: 1)
    bypass(model.bert.encoder.layer[0])
    shrink(model).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = transformers.pipeline("text-classification", str(tmp_path))("w1 w2")
    assert set(found[0]) == {"label", "score"}


def test_a_shrunk_model_trains_and_is_pruned_again(tmp_path):
    model, inputs = tiny("bert")
    cut(model)
    shrink(model)
    loss = model(**inputs(), labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert all(p.grad is not None for p in model.bert.encoder.layer[0].parameters())
    model.prune(0.5, exclude_modules=[name for name, m in model.named_modules() if _empty(m)])
    model.save_pretrained(tmp_path)
    loaded = hf_prune.AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.masks.keys() == model.masks.keys()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def _empty(module):
    return isinstance(module, nn.Linear) and not module.weight.numel()


def test_masks_on_what_stays_follow_their_weights():
    model, inputs = tiny("bert")
    prune(model, 0.5, keep_dense=True)
    cut(model, lambda site: site.units // 2)
    masked, zeros = logits(model, inputs), {}
    shrink(model)
    assert (logits(model, inputs) - masked).abs().max() <= 1e-5
    store = MaskStore.of(model)
    store.check(model)
    assert store.dense is None
    parameters = dict(model.named_parameters())
    for name, mask in store.masks.items():
        assert not bool(parameters[name][~mask].any()), name
        zeros[name] = int((~mask).sum())
    assert sum(zeros.values()) > 0


def test_rows_and_values_of_zero_are_dead_as_well():
    model, inputs = tiny("bert")
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.weight[:3] = 0
        layer.intermediate.dense.bias[:2] = 0  # the third neuron puts out gelu(bias)
        layer.attention.self.value.weight[:8] = 0
        layer.attention.self.value.bias[:8] = 0
    masked = logits(model, inputs)
    shrink(model)
    assert layer.intermediate.dense.out_features == 22
    assert layer.attention.self.query.out_features == 24
    assert (logits(model, inputs) - masked).abs().max() <= 1e-5


def test_rows_of_zero_stay_where_the_activation_maps_zero_to_something_else():
    model, _ = tiny("bert", hidden_act="sigmoid")
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight[:3] = 0
        model.bert.encoder.layer[0].intermediate.dense.bias[:3] = 0
    shrink(model)
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == 24


def test_gated_networks_lose_neurons_of_which_either_factor_is_zero():
    model, inputs = tiny("llama")
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate_proj.weight[:2] = 0
        mlp.up_proj.weight[3] = 0
    masked = logits(model, inputs)
    shrink(model)
    assert mlp.down_proj.in_features == 21
    assert (logits(model, inputs) - masked).abs().max() <= 1e-5


def test_groups_go_as_a_whole():
    model, _ = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, :8] = 0  # both query heads of the first group
        model.model.layers[1].self_attn.o_proj.weight[:, :4] = 0  # only one of them
    shrink(model)
    assert model.model.layers[0].self_attn.k_proj.out_features == 12
    assert model.model.layers[1].self_attn.k_proj.out_features == 16


def test_shrinking_twice_records_both():
    model, _ = tiny("bert")
    cut(model, lambda site: 2)
    bypass(model.bert.encoder.layer[0])
    shrink(model)
    total = model.config.pruned_structure["parameters_before"]
    cut(model, lambda site: 1)
    bypass(model.bert.encoder.layer[1])
    shrink(model)
    record = model.config.pruned_structure
    assert record["parameters_before"] == total
    assert record["layers"] == {"encoder.layer": {"before": 3, "kept": [1]}}
    assert record["units"]["encoder.layer.0.output.dense"] == {"before": 24, "kept": 21}
    assert "encoder.layer.1.output.dense" not in record["units"]


def test_nothing_to_remove_changes_nothing():
    model, inputs = tiny("bert")
    expected = logits(model, inputs)
    shrink(model)
    assert not hasattr(model.config, "pruned_structure")
    assert torch.equal(logits(model, inputs), expected)


# --- refusals -------------------------------------------------------------------------------------------


def test_an_unknown_architecture_says_what_to_register():
    config = transformers.BitConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], num_groups=8)
    model = transformers.BitModel(config)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArchitectureError, match=r"no entry for 'bit' .*register_architecture\('bit', Stack"):
        shrink(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_entry_adds_an_architecture():
    heads = Heads("self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
    stack = Stack("layers", (heads,), Neurons(("mlp.gate_proj",), "mlp.down_proj", "intermediate_size"), "n")
    hf_prune.register_architecture("odd", stack)
    assert "odd" in hf_prune.list_architectures()
    with pytest.raises(ArchitectureError, match="'odd' is registered already"):
        hf_prune.register_architecture("odd", stack)


def test_a_table_that_does_not_fit_is_named():
    model = tiny_llama()
    model.config.model_type = "bert"
    with pytest.raises(ArchitectureError, match=r"no list of layers at model\.encoder\.layer"):
        shrink(model)
    model = tiny_bert()
    del model.bert.encoder.layer[0].attention.self.query
    with pytest.raises(ArchitectureError, match=r"no module bert\.encoder\.layer\.0\.attention\.self\.query"):
        shrink(model)


def test_a_shared_weight_is_named_and_nothing_has_changed():
    model, inputs = tiny("bert")
    layers = model.bert.encoder.layer
    layers[1].output.dense.weight = layers[0].output.dense.weight
    cut(model, lambda site: 2)
    expected = logits(model, inputs)
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(ArchitectureError, match=r"layer\.0\.output\.dense\.weight cannot be made smaller: .* shared"):
        shrink(model)
    assert [p.shape for p in model.parameters()] == shapes
    assert torch.equal(logits(model, inputs), expected)


def test_layers_that_others_need_stay():
    model, _ = tiny("t5")
    bypass(model.encoder.block[0])
    with pytest.raises(ArchitectureError, match=r"encoder\.block\.0 cannot be removed"):
        shrink(model)
    restore(model.encoder.block[0])
    bypass(model.encoder.block[1])
    with pytest.raises(
        ArchitectureError, match=r"encoder\.block would be left with 2 layers and decoder\.block with 3"
    ):
        shrink(model)
    bypass(model.decoder.block[1])
    assert len(shrink(model).encoder.block) == 2


def test_a_bypassed_layer_is_not_saved(tmp_path):
    model = prunable(tiny_bert())
    bypass(model.bert.encoder.layer[0])
    with pytest.raises(CheckpointError, match=r"switched off.*bert\.encoder\.layer\.0; call shrink\(\)"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bypass_survives_a_copy_and_can_be_undone():
    model, inputs = tiny("bert")
    dense = logits(model, inputs)
    bypass(model.bert.encoder.layer[1])
    without = logits(model, inputs)
    assert not torch.equal(without, dense)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, inputs), without)
    restore(model.bert.encoder.layer[1])
    assert torch.equal(logits(model, inputs), dense)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2.*reads 1; update hf_prune"),
        ({"colour": "red"}, "unknown keys colour"),
        ({"structure": {"encoder.layer.0.output.dense": -1}}, "structure in the checkpoint's quantization_config is"),
        ({"structure": {"encoder.layer.9.output.dense": 1}}, "no such group of units"),
        ({"structure": {"encoder.layer.0.output.dense": 99}}, "99 units at .* has 24 units there"),
    ],
)
def test_structures_that_make_no_sense_are_refused(change, message, tmp_path):
    model, _ = tiny("bert")
    cut(model)
    shrink(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((CheckpointError, ArchitectureError), match=message):
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
