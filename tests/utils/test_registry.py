"""Registries find their files by themselves, and a wrong name says what would be right."""

import re
import sys

import pytest

from hf_prune.criteria.registry import CRITERIA
from hf_prune.errors import ConfigError, UnknownNameError
from hf_prune.granularities.registry import GRANULARITIES, parse_granularity
from hf_prune.planning.config import PruningConfig
from hf_prune.utils.registry import _NAMES_ELSEWHERE, Registry, unknown_name


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with two entries, each in its own file."""
    folder = tmp_path / "some_entries"
    folder.mkdir()
    (folder / "__init__.py").write_text("LOADED = []\n")
    for name in ("b", "a"):
        (folder / f"{name}.py").write_text(f"from some_entries import LOADED\nLOADED.append({name!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "some_entries"
    for name in [name for name in sys.modules if name.partition(".")[0] == "some_entries"]:
        del sys.modules[name]


def test_entries_are_found_sorted_and_loaded_once(package):
    registry = Registry("thing", package)
    registry.register("z")(int)
    registry.register("2:4")(float)
    assert registry.names() == ("2:4", "z")
    assert registry.get("2:4") is float
    assert sorted(sys.modules[package].LOADED) == ["a", "b"]


def test_an_entry_that_is_not_listed_is_an_entry_all_the_same(package):
    registry = Registry("thing", package, listed=lambda entry: issubclass(entry, int))
    registry.register("z")(int)
    registry.register("w")(float)
    assert registry.names() == ("z",)
    assert registry.entries() == {"w": float, "z": int}
    with pytest.raises(UnknownNameError, match=r"unknown thing 'w': expected one of z\."):
        registry.get("w")
    with pytest.raises(ValueError, match="'w' is already registered"):
        registry.register("w")(float)


def test_nothing_is_imported_before_the_first_look_up(package):
    Registry("thing", package).register("z")(int)
    assert package not in sys.modules


def test_a_taken_name_is_refused_and_keeps_its_entry(package):
    registry = Registry("thing", package)
    assert registry.register("z")(int) is int
    with pytest.raises(ValueError, match=r"thing 'z' is already registered by builtins: choose another name"):
        registry.register("z")(float)
    assert registry.get("z") is int


@pytest.mark.parametrize("name", ["y", None, 3, ["z"], {}])
def test_an_unknown_name_lists_the_valid_ones(package, name):
    registry = Registry("thing", package)
    registry.register("z")(int)
    registry.register("w")(int)
    with pytest.raises(UnknownNameError, match=r"unknown thing .*: expected one of w, z\."):
        registry.get(name)


def test_the_closest_name_is_suggested_only_if_it_is_close():
    assert str(unknown_name("fruit", "aple", ["pear", "apple"])) == (
        "unknown fruit 'aple': expected one of pear, apple. Did you mean 'apple'?"
    )
    assert "Did you mean" not in str(unknown_name("fruit", "xyz", ["pear", "apple"]))
    assert isinstance(unknown_name("fruit", 1, iter(["a"])), ConfigError)


@pytest.mark.parametrize(
    ("settings", "meant"),
    [
        ({"granularity": "structured"}, "'head', 'neuron' or 'layer'"),
        ({"granularity": "heads"}, "'head'"),
        ({"granularity": ("attention_heads", "neuron")}, "'head'"),
        ({"granularity": "random_unstructured"}, "'unstructured'"),
        ({"granularity": "Semi-Structured"}, "'2:4'"),
        ({"granularity": "filters"}, "'channel'"),
        ({"criterion": "l1"}, "'magnitude'"),
        ({"criterion": "L1_Unstructured"}, "'magnitude'"),
        ({"criterion": "random_unstructured"}, "'random'"),
        ({"criterion": "ln_structured"}, "'magnitude' with granularity 'row', 'column' or 'channel'"),
        ({"criterion": "global_unstructured"}, "'magnitude' with scope='global'"),
        ({"criterion": "l2", "granularity": "head"}, "'magnitude'"),
        ({"scope": "local"}, "'layer'"),
        ({"amount": 0.5}, "'sparsity'"),
        ({"pruning_ratio": 0.5}, "'sparsity'"),
        ({"ignore": ["head"]}, "'exclude_modules'"),
        ({"magnitud": 1}, None),
        ({"criterion": "magnitud"}, "'magnitude'"),  # the closest, as ever
    ],
)
def test_words_of_other_libraries_lead_to_ours(settings, meant):
    with pytest.raises(UnknownNameError) as caught:
        PruningConfig.from_dict(settings)
    said = str(caught.value)
    assert said.endswith(f" Did you mean {meant}?") if meant else "Did you mean" not in said


def test_what_other_libraries_say_is_none_of_our_words():
    """Else the suggestion would never be seen; and what is suggested exists."""
    for criterion, words in {"criterion": CRITERIA.names(), "granularity": GRANULARITIES.names()}.items():
        assert not set(_NAMES_ELSEWHERE[criterion]) & (set(words) - {"block", "n:m"})
    for suggestion in _NAMES_ELSEWHERE["criterion"].values():
        first = re.match("'(\\w+)'", suggestion)
        assert first is not None
        assert first[1] in CRITERIA.names()


def test_what_the_library_offers():
    assert {"magnitude", "random", "snip", "taylor"} <= set(CRITERIA.names())
    assert {"unstructured", "n:m", "block"} <= set(GRANULARITIES.names())


@pytest.mark.parametrize(
    ("text", "spec", "block", "pool", "fixed"),
    [
        ("unstructured", "unstructured", (1, 1), None, None),
        ("2:4", "2:4", (1, 1), 4, 0.5),
        ("1:4", "1:4", (1, 1), 4, 0.75),
        ("02:16", "2:16", (1, 1), 16, 0.875),
        ("block:16x1", "block:16x1", (16, 1), None, None),
        ("4x8", "block:4x8", (4, 8), None, None),
    ],
)
def test_parse_granularity(text, spec, block, pool, fixed):
    granularity = parse_granularity(text)
    assert (granularity.spec, granularity.block, granularity.pool) == (spec, block, pool)
    assert granularity.fixed_sparsity == fixed


@pytest.mark.parametrize(
    "text", ["unstructred", "2-4", "2:4:8", "-2:4", "2.0:4", " 2:4", "2:4\n", "block", "block:4", "4X8", "", None, 24]
)
def test_an_unreadable_granularity_lists_the_spellings(text):
    expected = r"unknown granularity .*: expected one of block:RxC \(such as block:16x1\), channel, column, N:M \(such"
    with pytest.raises(UnknownNameError, match=expected + r" as 2:4\), row, unstructured"):
        parse_granularity(text)


@pytest.mark.parametrize("text", ["4:4", "5:4", "0:4", "0:0"])
def test_n_m_needs_something_to_keep_and_something_to_remove(text):
    with pytest.raises(ConfigError, match=rf"granularity '{text}': expected N:M with 1 <= N < M, such as 2:4"):
        parse_granularity(text)


@pytest.mark.parametrize("text", ["0x4", "block:4x0"])
def test_a_block_needs_an_area(text):
    with pytest.raises(ConfigError, match=r"granularity 'block:\dx\d': expected at least 1 output and 1 input"):
        parse_granularity(text)
