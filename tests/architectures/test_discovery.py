"""Discovery: what the table says is found without it, what is wrong is refused, and nothing leaks out of a proof."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers

from hf_prune import ArchitectureError, shrink
from hf_prune.architectures.discovery import find
from hf_prune.architectures.discovery.partition import _components, _part_widths
from hf_prune.architectures.discovery.proof import groups_in, unit_failure
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
