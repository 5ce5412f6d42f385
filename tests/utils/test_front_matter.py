"""What strangers write into a card's metadata is read in bounded time and memory, or refused in words."""

import datetime

import pytest
import yaml
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hf_prune import DataError
from hf_prune.evaluation.data import loading as data_loading
from hf_prune.hub.licenses import inherited_license
from hf_prune.utils.front_matter import MOST_CHARACTERS, join_card, split_card

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 12)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
BOMBS = {
    "aliases": (LAUGHS, "the anchor or alias 'a', which no card needs"),
    "merge keys": (MERGES, "the anchor or alias 'a'"),
    "merge of a mapping": ("a: {<<: {b: 1}}", "the merge key '<<'"),
    "one anchor": ("license: &x mit", "anchor or alias 'x'"),
    "an alias of nothing": ("license: *x", "anchor or alias 'x'"),
    "a recursive list": ("a: &a [*a]", "anchor or alias 'a'"),
    "deep lists": ("a: " + "[" * 5000, "more than 32 levels"),
    "deep lists that end": ("a: " + "[" * 3000 + "]" * 3000, "more than 32 levels"),
    "deep mappings": ("".join(f"{' ' * i}a:\n" for i in range(400)), "more than 32 levels"),
    "deep sequences": ("- " * 3000 + "a", "more than 32 levels"),
    "deep keys": ("? " * 3000 + "a", "more than 32 levels"),
    "too much": ("a: " + "x" * MOST_CHARACTERS, "expected at most 200,000"),
    "too many values": ("a: [" + "1," * 20_000 + "]", "more than 10,000 values"),
    "a key twice": ("license: mit\nb: 1\nlicense: other", "the key 'license' twice"),
    "a key twice inside": ("a: [{b: 1, 'b': 2}]", "the key 'b' twice"),
    "a number twice": ("1: 1\n1.0: 2", "twice"),
    "an object": ("a: !!python/object/apply:os.system [id]", "the tag 'tag:yaml.org,2002:python/object"),
    "a broken integer": ("a: !!int x", "the tag 'tag:yaml.org,2002:int'"),
    "a broken date": ("a: !!timestamp x", "the tag"),
    "a broken truth": ("a: !!bool x", "the tag"),
    "no such month": ("a: 2024-13-01", "month must be in 1..12"),
    "a list as a key": ("? [a]\n: b", "unhashable key"),
    "two documents": ("a: 1\n...\n--- {b: 2}", "expected a single document"),
    "open brackets": ("a: [", "is not valid YAML"),
    "a control character": ("a: \x00", "special characters are not allowed"),
    "no mapping": ("- a", "is not a mapping"),
    "a text": ("a", "is not a mapping"),
    "a tab": ("a:\n\t- b", "is not valid YAML"),
}  # fmt: skip
OPENINGS = (
    "---\n{}\n---\n",
    "---\r\n{}\r\n---\r\n",
    "---\r{}\r---\r\n",
    "\ufeff---\n{}\n---\n",
    "\n \n---\n{}\n---",
    "---\n{}\n--- \t\n#",
)


def card(name):
    return OPENINGS[0].format(BOMBS[name][0])


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("opening", OPENINGS, ids=range(len(OPENINGS)))
def test_bombs_are_refused_in_words(name, opening):
    text, said = BOMBS[name]
    with pytest.raises(DataError, match=r"correct README\.md") as error:
        split_card(opening.format(text))
    assert said in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("opening", OPENINGS, ids=range(len(OPENINGS)))
def test_metadata_is_found_where_the_hub_finds_it(opening):
    text = opening.format("license: mit")
    assert split_card(text)[0] == {"license": "mit"}
    assert REGEX_YAML_BLOCK.search(text.removeprefix("\ufeff")) is not None
    for other in ("# A card\n---\na: &a 1\n---\n", "----\na: *b\n---\n", "---\na: *b", "--- a: *b\n---\n"):
        assert split_card(other) == ({}, other)
        assert REGEX_YAML_BLOCK.search(other) is None


def test_honest_cards_stay_as_they_are():
    text = (
        "---\nlanguage:\n- no\n- en\nlicense: mit\ntags: [a, 'b: c']\n"
        "values: [1, -2, 0x1f, 1.5, -.5, 1.0e-05, .inf, true, null, ~]\n"
        "texts: [12:30:45, 012, 09, 1_000, on, '1', 1e3x, =, "
        + "9" * 400
        + "]\ndate: 2024-02-29\nlong: |\n  two\n  lines\n---\n\nBody\n"
    )
    metadata, body = split_card(text)
    assert metadata["language"] == ["no", "en"]
    assert metadata["values"] == [1, -2, 31, 1.5, -0.5, 1e-5, float("inf"), True, None, None]
    assert metadata["texts"] == ["12:30:45", "012", "09", "1_000", "on", "1", "1e3x", "=", "9" * 400]
    assert metadata["date"] == datetime.date(2024, 2, 29)
    assert body == "\nBody\n"
    assert split_card(join_card(metadata, body)) == (metadata, body)


def test_what_is_written_can_be_read_although_values_are_shared():
    shared = ["a"]
    text = join_card({"one": shared, "two": shared, "yes": "12:30"}, "Body")
    assert "&" not in text
    assert split_card(text)[0] == yaml.safe_load(text.split("---\n")[1]) == {"one": ["a"], "two": ["a"], "yes": "12:30"}


@pytest.mark.parametrize("name", BOMBS)
def test_a_base_model_with_a_bomb_lends_no_license(name, tmp_path):
    (tmp_path / "README.md").write_text(card(name))
    assert inherited_license(str(tmp_path)) == {}


@pytest.mark.parametrize("place", ["README.md", ".huggingface.yaml"])
def test_data_sets_are_checked_before_datasets_reads_them(place, monkeypatch, tmp_path):
    """``datasets`` reads both by its own means."""

    def download(repo_id, name, repo_type):
        assert (repo_id, repo_type) == ("me/data", "dataset")
        if name != place:
            raise EntryNotFoundError("not there")
        return str(path)

    path = tmp_path / "file"
    path.write_text(card("aliases") if place == "README.md" else LAUGHS)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("datasets.load_dataset", lambda *_: pytest.fail("was read"))
    with pytest.raises(DataError, match=f"{place} of data set 'me/data' .*no card needs"):
        data_loading._download("me/data", None)
    path.write_text("---\nlicense: mit\n---\n" if place == "README.md" else "license: mit")
    monkeypatch.setattr("datasets.load_dataset", lambda *words: {"train": words})
    assert data_loading._download("me/data", None) == {"train": ("me/data", None)}
