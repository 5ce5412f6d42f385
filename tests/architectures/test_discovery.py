"""Discovery: what the table says is found without it, what is wrong is refused, and nothing leaks out of a proof."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers

from hf_prune import ArchitectureError, prunable, prune, shrink
from hf_prune.architectures.bypass import bypass
from hf_prune.architectures.discovery import find
from hf_prune.architectures.discovery.partition import _components, _part_widths
from hf_prune.architectures.discovery.proof import groups_in, layers_failure, unit_failure
from hf_prune.architectures.discovery.sample import make_sample, plain_surroundings
from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.architectures.small_models import small_config
from tests.architecture_models import MODELS, tiny

_SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}


def neox() -> transformers.GPTNeoXForCausalLM:
    config = transformers.GPTNeoXConfig(vocab_size=60, **_SMALL)
    return transformers.GPTNeoXForCausalLM(config).eval()


@pytest.mark.parametrize("model_type", [name for name in MODELS if name not in ("deit", "ernie", "mt5", "smollm3")])
def test_what_the_table_says_is_found_without_it(model_type, monkeypatch):
    model, _ = tiny(model_type)
    by_table = find_unit_groups(model)
    stacks = find.discover(model).stacks
    with monkeypatch.context() as patch:
        patch.setattr("hf_prune.architectures.entries.is_in_table", lambda model: False)
        found = find_unit_groups(model)
    assert all(group.is_found for group in found)

    def essence(group):
        slices = frozenset(group.producers), frozenset(group.consumers)
        return group.name, group.kind, group.units, group.layers, *slices

    assert set(map(essence, found)) == set(map(essence, by_table))
    assert all(stack.config for stack in stacks)
    expected = {group.name: (group.config, group.per_unit, group.size) for group in by_table if group.config}
    assert {g.name: (g.config, g.per_unit, g.size) for g in found if g.name in expected and g.config} == expected


def test_a_wrong_layout_is_refused():
    model = neox()
    with plain_surroundings():
        sample = make_sample(transformers.GPTNeoXModel, small_config(model.config))
        (stack,) = find.discover(model).stacks
        heads = next(units for units in stack.units if units.kind == "head")
        right = groups_in(sample.model, replace(stack, units=(heads,)))
        thirds = tuple(replace(piece, wide=(True, True, True)) for piece in heads.producers)  # as in GPT-2
        wrong = groups_in(sample.model, replace(stack, units=(replace(heads, producers=thirds),)))
        dense = sample.outputs()
        assert unit_failure(sample, right, dense) is None
        assert unit_failure(sample, wrong, dense) == "outputs are others without them than with zeros"
        without_bias = [replace(group, producers=group.producers[:1]) for group in right]
        assert "the code does not run without them" in unit_failure(sample, without_bias, dense)
        assert all(torch.equal(one, other) for one, other in zip(sample.outputs(), dense, strict=True))


def test_heads_that_code_outside_counts_are_refused_with_the_reason():
    config = transformers.BloomConfig(vocab_size=60, hidden_size=64, n_head=4, n_layer=2)
    found = find.discover(transformers.BloomModel(config))
    assert "4 units of width 16 were found, but the code does not run" in found.refused["h.0.self_attention.dense"]
    assert [units.kind for units in found.stacks[0].units] == ["neuron"]


def _described(model_class, **settings):
    with torch.device("meta"):
        model = model_class(model_class.config_class(**settings))
    found = find.discover(model)
    return [stack.config for stack in found.stacks], found.refused


@pytest.mark.parametrize(
    ("model_class", "settings"),
    [
        (transformers.GPTNeoXForCausalLM, {}),
        (transformers.GPTNeoXForSequenceClassification, {}),  # without a padding token
        (transformers.ModernBertForSequenceClassification, {}),
        (transformers.BartForConditionalGeneration, {}),
        (transformers.BartForSequenceClassification, {}),  # which looks for the end of the text
        (transformers.Wav2Vec2ForSequenceClassification, {}),
    ],
)
def test_layers_under_a_head_that_reads_the_last_hidden_states_can_go(model_class, settings):
    counts, _ = _described(model_class, **settings)
    assert all(counts)


@pytest.mark.parametrize(
    ("model_class", "settings", "layers"),
    [
        (
            transformers.DPTForDepthEstimation,
            {"num_hidden_layers": 6, "backbone_out_indices": [1, 2, 3, 4]},
            "encoder.layer",
        ),
        (transformers.CLIPSegForImageSegmentation, {"extract_layers": [1, 2, 3]}, "vision_model.encoder.layers"),
        (transformers.Data2VecVisionForSemanticSegmentation, {}, "encoder.layer"),
        (transformers.Wav2Vec2ForSequenceClassification, {"use_weighted_layer_sum": True}, "encoder.layers"),
    ],
)
def test_layers_under_a_head_that_picks_hidden_states_by_number_stay(model_class, settings, layers):
    counts, refused = _described(model_class, **settings)
    assert not any(counts)
    assert f"its layers stay: with the head of {model_class.__name__}, " in refused[layers]
    assert "without layer 0" in refused[layers]


def test_layers_under_a_head_that_cannot_be_run_small_stay(monkeypatch):
    def make(model_class, config):
        if model_class is transformers.GPTNeoXForCausalLM:
            raise ValueError("no such inputs")
        return make_sample(model_class, config)

    monkeypatch.setattr(find, "_FOUND", {})
    monkeypatch.setattr("hf_prune.architectures.discovery.proof.make_sample", make)
    found = find.discover(neox())
    assert [stack.config for stack in found.stacks] == [""]
    assert found.refused["layers"] == (
        "its layers stay: with the head of GPTNeoXForCausalLM, a small model could not be run to prove that they can "
        "go (ValueError: no such inputs)"
    )


def test_every_layer_is_tried_in_a_longer_model():
    class ReadsTheThirdLast(transformers.GPTNeoXModel):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids, attention_mask, output_hidden_states=True).hidden_states[-3]

    config, stack = small_config(neox().config), find.discover(neox()).stacks[0]
    with plain_surroundings():
        assert layers_failure(transformers.GPTNeoXModel, config, stack) is None
        failure = layers_failure(ReadsTheThirdLast, config, stack)
    assert failure == "outputs are others without layer 2 than when it is bypassed"


def test_layers_that_number_themselves_by_another_name_are_renumbered(tmp_path):
    config = transformers.GPTNeoConfig(
        **{"vocab_size": 60, "hidden_size": 32, "num_heads": 4, "num_layers": 4, "window_size": 4},
        **{"attention_types": [[["global", "local"], 2]], "bos_token_id": None, "eos_token_id": None},
    )
    torch.manual_seed(0)
    model = transformers.GPTNeoForCausalLM(config).eval()
    for layer in model.transformer.h[1:3]:
        bypass(layer)
    shrink(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.GPTNeoForCausalLM.from_pretrained(tmp_path).eval()
    settings = {"max_new_tokens": 8, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    outputs = [each.generate(torch.arange(3, 9)[None], **settings, pad_token_id=0) for each in (model, loaded)]
    assert [layer.attn.attention.layer_id for layer in model.transformer.h] == [0, 1]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert all(torch.equal(one, other) for one, other in zip(outputs[0].scores, outputs[1].scores, strict=True))


def test_a_model_without_units_says_why_and_stays_as_it_was():
    model = transformers.BitModel(
        transformers.BitConfig(embedding_size=32, hidden_sizes=[32], depths=[1], num_groups=8)
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ArchitectureError, match=r"no entry for 'bit' .*nothing was found .*register_architecture\('bit'"
    ):
        shrink(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_cannot_be_run_small_says_why(monkeypatch):
    def fail(*args):
        raise ValueError("no such inputs")

    monkeypatch.setattr(find, "make_sample", fail)
    monkeypatch.setattr(find, "_FOUND", {})
    with pytest.raises(ArchitectureError, match=r"could not be run to find them \(ValueError: no such inputs\)"):
        find_unit_groups(neox())


def test_it_is_found_once_for_each_architecture_of_any_size(monkeypatch):
    config = transformers.GPTNeoXConfig(vocab_size=1000, num_hidden_layers=3)
    with torch.device("meta"):
        assert len(find_unit_groups(transformers.GPTNeoXForCausalLM(config))) == 6
        monkeypatch.setattr(find, "make_sample", None)  # would fail if it was called
        ratio = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
        config = transformers.GPTNeoXConfig(num_hidden_layers=2, **ratio)
        groups = find_unit_groups(transformers.GPTNeoXForCausalLM(config))
        assert [(group.kind, group.units) for group in groups] == [("head", 12), ("neuron", 3072)] * 2
        assert [piece.width for piece in groups[0].slices] == [192, 192, 64]
        config.architectures, config.dtype, config.name_or_path = ["GPTNeoXForCausalLM"], torch.float16, "saved"
        monkeypatch.setattr(find, "_discovered", pytest.fail)
        assert find_unit_groups(transformers.GPTNeoXForCausalLM(config)) == groups  # as if it had been saved and loaded


def test_nothing_around_matters_and_nothing_is_left(monkeypatch):
    monkeypatch.setattr(find, "_FOUND", {})
    dtype, threads, state = torch.get_default_dtype(), torch.get_num_threads(), torch.get_rng_state()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"), torch.inference_mode():
            model = neox()
            assert len(find_unit_groups(model)) == 4
            assert torch.get_default_dtype() == torch.bfloat16
            assert torch.empty(1).is_meta
            assert torch.is_inference_mode_enabled()
    finally:
        torch.set_default_dtype(dtype)
    assert torch.get_num_threads() == threads
    torch.set_rng_state(state)


def test_components_by_hand():
    # inputs 0 and 2 are reached by row 0, input 1 by row 1, input 3 by rows 1 and 2
    touched = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 1]], dtype=torch.bool)
    assert _components(touched).tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("owners", "widths"),
    [
        ([0, 0, 1, 1], (2,)),  # one after the other
        ([0, 1, 0, 1], (1, 1)),  # two parts, each with both units
        ([0, 0, 1, 1, 0, 1], (2, 1)),  # queries and a narrower part
        ([0, 1, 1, 0], None),
        ([1, 0], None),
    ],
)
def test_part_widths_by_hand(owners, widths):
    assert _part_widths(owners, 2) == widths


def test_fused_grouped_queries_keep_the_size_of_a_head_in_the_config(tmp_path):
    """As in Phi-4: a number of queries for each key is no number of heads, and fewer heads are not wider ones."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = transformers.Phi3ForCausalLM(
        transformers.Phi3Config(vocab_size=50, num_hidden_layers=2, pad_token_id=0, **sizes)
    ).eval()
    prune(model, 0.5, granularity="head")
    shrink(model)
    names = ("num_attention_heads", "num_key_value_heads", "head_dim")
    assert [getattr(model.config, name) for name in names] == [4, 1, 8]
    ids = torch.arange(10)[None]
    expected = model(ids).logits
    prunable(model).save_pretrained(tmp_path)
    loaded = transformers.Phi3ForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, expected)
