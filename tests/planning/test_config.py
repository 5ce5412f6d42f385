"""PruningConfig: everything is checked when it is made, and JSON gives it back."""

import json
import math
from dataclasses import FrozenInstanceError, fields
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_prune.criteria.base import Criterion
from hf_prune.criteria.registry import CRITERIA
from hf_prune.errors import ConfigError, UnknownNameError
from hf_prune.planning.choices import ALLOCATIONS
from hf_prune.planning.config import PruningConfig


def test_defaults():
    config = PruningConfig()
    assert config.to_dict() == {
        "format_version": 1,
        "sparsity": 0.5,
        "criterion": "magnitude",
        "granularity": "unstructured",
        "scope": "layer",
        "allocation": "uniform",
        "target_modules": "all-linear",
        "exclude_modules": [],
        "seed": 0,
        "calibration_order": "sequential",
        "repair": None,
        "objective": "layer",
        "steps": 1,
        "polish": None,
        "target_params": None,
        "target_flops": None,
        "target_speedup": None,
        "workload": None,
        "round_to": 1,
        "schedule": None,
    }


def test_it_is_frozen():
    with pytest.raises(FrozenInstanceError):
        PruningConfig().sparsity = 0.3


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0, 0.25, Fraction(1, 4), np.float64(0.25), np.float32(0.25)])
def test_sparsity_becomes_a_float(value):
    config = PruningConfig(value)
    assert type(config.sparsity) is float
    assert config.sparsity == float(value)


@pytest.mark.parametrize("value", [-0.1, 1.0001, math.nan, math.inf, -math.inf, True, "0.5", [0.5], 0.5j, 1e9])
def test_sparsity_outside_0_to_1_is_refused(value):
    with pytest.raises(ConfigError, match=r"^sparsity is .*: expected a share from 0 to 1") as caught:
        PruningConfig(value)
    assert repr(value) in str(caught.value)
    assert "did you mean" not in str(caught.value)


def test_a_percentage_is_recognised():
    with pytest.raises(ConfigError, match=r"sparsity is 30: expected a share from 0 to 1; did you mean 0\.3\?$"):
        PruningConfig(30)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("criterion", "magnitud", r"unknown criterion 'magnitud': expected one of .*random.* Did you mean 'magnitude'"),
        ("criterion", None, r"unknown criterion None"),
        ("granularity", "unstructered", r"unknown granularity .*Did you mean 'unstructured'\?"),
        ("scope", "tensor", r"unknown scope 'tensor': expected one of row, layer, global\.$"),
        ("scope", 3, r"unknown scope 3"),
        ("granularity", "structured_pruning", r"Did you mean 'head', 'neuron' or 'layer'\?"),
        ("granularity", "structued", r"Did you mean 'head', 'neuron' or 'layer'\?"),
        ("granularity", "width_pruning", r"Did you mean 'head' and 'neuron'\?"),
        ("granularity", "unstructured-pruning", r"Did you mean 'unstructured'\?"),
        ("criterion", "magnitude_pruning", r"Did you mean 'magnitude'\?"),
        ("allocation", "uniforn", r"unknown allocation 'uniforn': .*uniform, erk, owl, fisher, .* Did you mean"),
    ],
)
def test_a_misspelt_name_lists_the_valid_ones(setting, value, message):
    with pytest.raises(UnknownNameError, match=message):
        PruningConfig(**{setting: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, r"seed is -1: expected an integer of at least 0"),
        ({"seed": 1.0}, r"seed is 1\.0: expected an integer"),
        ({"seed": True}, r"seed is True: expected an integer"),
        ({"seed": None}, r"seed is None: expected an integer"),
        ({"target_modules": ()}, r"target_modules is empty: name at least one module, or use 'all-linear'"),
        ({"target_modules": ""}, r"target_modules is empty"),
        ({"target_modules": None}, r"target_modules is empty"),
        ({"target_modules": "(query"}, r"target_modules='\(query' is not a regular expression: "),
        ({"exclude_modules": "*"}, r"exclude_modules='\*' is not a regular expression: "),
        ({"target_modules": 3}, r"target_modules is 3: expected 'all-linear', a regular expression, or a list"),
        ({"target_modules": ["query", 3]}, r"target_modules is \['query', 3\]: expected"),
        ({"exclude_modules": [""]}, r"exclude_modules is \[''\]: expected .* a list of module-name suffixes"),
        ({"allocation": {}}, r"allocation is \{\}: expected 'uniform', 'erk', 'owl', 'fisher' or a non-empty dict"),
        ({"allocation": None}, r"allocation is None: expected"),
        ({"allocation": {"fc": 1.5}}, r"allocation\['fc'\] is 1\.5: expected a share from 0 to 1$"),
        ({"allocation": {3: 0.5}}, r"allocation names the module 3: expected a non-empty string"),
        ({"allocation": {"": 0.5}}, r"allocation names the module '': expected a non-empty string"),
        (
            {"sparsity": 0.6, "granularity": "2:4"},
            r"sparsity=0\.6 contradicts granularity='2:4', which fixes it at 0\.5",
        ),
        ({"scope": "row", "granularity": "2:4"}, r"scope='row' contradicts granularity='2:4'.*leave scope at 'layer'"),
        ({"scope": "global", "granularity": "2:4"}, r"scope='global' contradicts granularity='2:4'"),
        ({"scope": "global", "allocation": "erk"}, r"allocation='erk' contradicts scope='global', which decides by"),
        ({"scope": "global", "allocation": {"a": 0.1}}, r"allocation=\{'a': 0\.1\} contradicts scope='global'"),
        ({"granularity": "2:4", "allocation": "erk"}, r"allocation='erk' contradicts granularity='2:4'.*at 'uniform'"),
    ],
)
def test_a_bad_setting_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        PruningConfig(**settings)


def test_a_scope_that_the_criterion_cannot_rank_in_is_refused(monkeypatch):
    class RowsOnly(Criterion):
        scopes = frozenset({"row", "layer"})

    CRITERIA.names()  # loaded, so that the entry below is the only change
    monkeypatch.setitem(CRITERIA._entries, "rows_only", RowsOnly)
    assert PruningConfig(criterion="rows_only", scope="row").scope == "row"
    with pytest.raises(ConfigError, match=r"'rows_only' cannot rank in scope 'global': expected one of layer, row"):
        PruningConfig(criterion="rows_only", scope="global")


def test_n_m_fixes_the_sparsity():
    assert PruningConfig(granularity="1:4").sparsity == 0.75
    assert PruningConfig(0.75, granularity="1:4").sparsity == 0.75
    assert PruningConfig(0.333333333333, granularity="2:3").sparsity == 1 - 2 / 3


def test_spellings_and_lists_are_normalised():
    config = PruningConfig(granularity="4x2", target_modules=["a", "b"], exclude_modules=None)
    assert (config.granularity, config.target_modules, config.exclude_modules) == ("block:4x2", ("a", "b"), ())


def test_replace_validates_and_keeps_the_rest():
    config = PruningConfig(0.3, seed=4, exclude_modules=["a"])
    assert config.replace(scope="row") == PruningConfig(0.3, seed=4, exclude_modules=["a"], scope="row")
    assert config.seed == 4
    with pytest.raises(ConfigError, match="unknown scope"):
        config.replace(scope="all")
    with pytest.raises(UnknownNameError, match=r"unknown setting 'sparsty': .*Did you mean 'sparsity'\?"):
        config.replace(sparsty=0.4)


def test_replace_forgets_a_sparsity_that_the_old_granularity_fixed():
    assert PruningConfig(granularity="1:4").replace(granularity="2:4").sparsity == 0.5
    assert PruningConfig(granularity="1:4").replace(granularity="unstructured").sparsity == 0.5
    assert PruningConfig(granularity="1:4").replace(granularity="unstructured", sparsity=0.1).sparsity == 0.1
    assert PruningConfig(0.3).replace(granularity="block:2x2").sparsity == 0.3
    assert PruningConfig(0.3).replace(granularity="1:4").sparsity == 0.75
    with pytest.raises(ConfigError, match=r"sparsity=0\.3 contradicts granularity='2:4'"):
        PruningConfig(0.3).replace(granularity="2:4", sparsity=0.3)


def test_equal_configs_have_equal_hashes():
    a = PruningConfig(allocation={"a": 0.1, "b": 0.2})
    b = PruningConfig(allocation={"b": 0.2, "a": 0.1})
    assert a == b
    assert hash(a) == hash(b)
    assert len({a, b, a.replace(seed=1)}) == 2


def test_it_does_not_share_the_callers_dict():
    allocation = {"a": 0.1}
    config = PruningConfig(allocation=allocation)
    allocation["a"] = 0.9
    config.to_dict()["allocation"]["a"] = 0.8
    assert config.allocation == {"a": 0.1}


names = st.text("abc.", min_size=1, max_size=6)
shares = st.floats(0, 1)


@given(
    st.none() | shares,
    st.sampled_from([(name, scope) for name in CRITERIA.names() for scope in CRITERIA.get(name).scopes]),
    st.sampled_from(["unstructured", "block:2x3", "16x1"]),
    st.sampled_from(ALLOCATIONS) | st.dictionaries(names, shares, min_size=1, max_size=4),
    st.just("all-linear") | st.lists(names, min_size=1, max_size=3),
    st.lists(names, max_size=3),
    st.integers(0, 2**64),
)
def test_json_round_trip(sparsity, criterion_and_scope, granularity, allocation, targets, excluded, seed):
    criterion, scope = criterion_and_scope
    if scope == "global":
        allocation = "uniform"
    config = PruningConfig(sparsity, criterion, granularity, scope, allocation, targets, excluded, seed)
    again = PruningConfig.from_json(config.to_json())
    assert again == config
    assert [type(getattr(again, f.name)) for f in fields(config)] == [
        type(getattr(config, f.name)) for f in fields(config)
    ]
    assert again.to_json() == config.to_json()


def test_json_of_n_m():
    config = PruningConfig(granularity="2:4", exclude_modules="classifier")
    assert PruningConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["sparsity"] == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"^not valid JSON: "),
        ("[1]", r"found a JSON list: expected an object of settings"),
        ("null", r"found a JSON NoneType"),
        ('{"sparcity": 0.5}', r"unknown setting 'sparcity': expected one of sparsity, .*Did you mean 'sparsity'\?"),
        ('{"format_version": 2}', r"format_version is 2: this version of hf_prune reads 1; update hf_prune"),
        ('{"sparsity": NaN}', r"sparsity is nan"),
        ('{"sparsity": "0.5"}', r"sparsity is '0\.5'"),
    ],
)
def test_bad_json_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        PruningConfig.from_json(text)


def test_a_dict_without_version_is_read():
    values = {"sparsity": 0.3, "target_modules": ["a"]}
    assert PruningConfig.from_dict(values) == PruningConfig(0.3, target_modules=("a",))
    assert values == {"sparsity": 0.3, "target_modules": ["a"]}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"(a+)+b", "repeats a group that has repetitions or alternatives"),
        (r"(?:.*x)*", "repeats a group"),
        (r"((a|a))*b", "repeats a group"),
        (r"(a|ab){2,}c", "repeats a group"),
        (r"([a-z]+\.)*x", "repeats a group"),
        (r"(a?)*b", "repeats a group"),
        ("[a-z.]?" * 40 + "[a-z.]" * 40, "has more than 10 groups inside one another or 5 repetitions"),
        ("a??" * 6, "or 5 repetitions"),
        (r".*" * 6 + "x", "has more than 10 groups inside one another or 5 repetitions"),
        ("(" * 5000, "is a regular expression of 5,000 characters: expected at most 2,000"),
        ("(" * 500 + ")" * 500, "has more than 10 groups inside one another"),
        ("a" * 2001, "of 2,001 characters"),
        (r"a{99999999999999999999}", "is not a regular expression"),
        (r"(a", "is not a regular expression"),
        ("[a", "is not a regular expression"),
    ],
)
@pytest.mark.parametrize("setting", ["target_modules", "exclude_modules"])
def test_patterns_that_can_take_forever_are_refused(setting, pattern, message):
    """Configs lie in checkpoints of others."""
    with pytest.raises(ConfigError, match=message):
        PruningConfig(**{setting: pattern})


@pytest.mark.parametrize(
    "pattern",
    [
        r".*",
        r".*\.(q|k|v)_proj",
        r"model\.layers\.(1?\d|2[0-3])\.mlp\..*",
        r"(?:.*?\.)?(?P<name>q|k)_proj",
        r"(?!lm_head).*[(+|*]?.*",
        r"(ab){2}\(\+\|\)",
        r"[]*+|)(]x*",
        r"encoder\.layer\.\d+\.(attention\.self\.(query|key)|output\.dense)",
    ],
)
def test_patterns_that_people_write_are_taken(pattern):
    assert PruningConfig(target_modules=pattern).target_modules == pattern


@pytest.mark.parametrize(
    "granularity", ["block:1x" + "9" * 5000, "9" * 5000 + "x1", "2:" + "4" * 5000, "9" * 5000 + ":4"]
)
def test_numbers_in_granularities_that_no_integer_holds(granularity):
    with pytest.raises(ConfigError, match="granularity"):
        PruningConfig(granularity=granularity)
