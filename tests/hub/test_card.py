"""Cards say what was measured and nothing else; verify finds every number that is not so."""

import dataclasses
import datetime
import hashlib
import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from hf_prune import (
    CheckpointError,
    DataError,
    PruningCardData,
    PruningConfig,
    prunable,
    read_card_data,
    render_card,
    shrink,
    sparsity_report,
    verify_checkpoint,
    write_card,
)
from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.checkpoint.shards import Shards
from hf_prune.conversion.compression import compress_checkpoint
from hf_prune.hub.card import merge_cards, without_facts
from hf_prune.hub.card_data import _without_examples, load_card_data
from hf_prune.hub.card_metadata import our_part, read_facts
from hf_prune.hub.card_renewal import renew_card
from hf_prune.hub.card_surroundings import BEGIN, END, surroundings
from hf_prune.hub.card_text import _auto_class
from hf_prune.hub.card_words import _speed
from hf_prune.hub.check_card import check_card
from hf_prune.hub.checksums import checksums, weights_digest
from hf_prune.hub.describe import describe_model
from hf_prune.utils.front_matter import MOST_OF_A_CARD, join_card, split_card
from tests import models
from tests.support.command_line import exit_code


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Checkpoints by the command, one with zeros and one with fewer neurons, and the scores of the first."""
    root = tmp_path_factory.mktemp("cards")
    models.save_classifier_and_data(root, seed=4)
    for words in (
        ["prune", root / "dense", "--granularity", "2:4", "--out", root / "pruned", "--plots"],
        ["prune", root / "dense", "--granularity", "head,neuron", "--scope", "global", "--out", root / "small"],
    ):
        assert exit_code(*words) == 0
    for card in (*root.glob("*/README.md"), *root.glob("*/pruning_card.json")):  # the tests write their own
        card.unlink()
    return root


@pytest.fixture(scope="module")
def evaluated():
    """What the evaluation of the pruned checkpoint printed, once a test has asked for it."""
    return []


@pytest.fixture
def scores(made, run, evaluated, tmp_path):
    if not evaluated:
        words = ("--against", made / "dense", "--data", made / "data", "--json")
        evaluated.append(run("evaluate", made / "pruned", *words))
    (tmp_path / "scores.json").write_text(evaluated[0])
    return tmp_path / "scores.json"


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made / "pruned", tmp_path / "checkpoint")


def front(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_everything_that_was_measured_is_there(made, scores):
    data = read_card_data(
        made / "pruned",
        evaluation=scores,
        base_model="me/dense",
        dataset="me/data",
        license="mit",
        command="hf-prune x",
    )
    text = render_card(data)
    found = json.loads(scores.read_text())
    accuracy = found["evaluation"]["accuracy"]
    assert f"| this model | {100 * accuracy:.2f} % ± {100 * found['evaluation']['standard_error']:.2f} | 40 |" in text
    assert f"| dense | {100 * found['dense']['accuracy']:.2f} %" in text
    assert f"the drop is {found['comparison']['drop']:.2f} points" in text
    assert "Han et al. 2015, arXiv:1506.02626" in text
    assert "Mishra et al. 2021" in text
    assert "has the pattern 2:4" in text
    assert "Zeros alone bring no speed-up" in text
    assert "<code>hf-prune x</code>" in text
    for name, text_of in (("layers.png", "Sparsity by layer"), ("weights.png", "Histogram of the weights")):
        assert f"![{text_of}]({name})" in text
    metadata = front(text)
    assert metadata["base_model"] == "me/dense"
    assert metadata["license"] == "mit"
    assert metadata["datasets"] == ["me/data"]
    assert "pruned" in metadata["tags"]
    (entry,) = metadata["model-index"]
    assert entry["results"][0]["metrics"][0] == {"type": "accuracy", "value": accuracy}
    assert metadata["hf_prune"]["score"]["n"] == 40


@pytest.mark.parametrize(
    ("field", "trace"),
    [
        ("evaluation", "What it costs"),
        ("base_model", "me/dense"),
        ("dataset", "me/data"),
        ("license", "license:"),
        ("command", "Command:"),
        ("pictures", "!["),
        ("config", "arXiv"),
        ("latency", "Timed in turns"),
    ],
)
def test_what_is_missing_is_left_out(made, scores, field, trace):
    point = {"model": "x/dense", "batch_size": 1, "length": 8, "median": 0.1, "against": None}
    latency = {"points": [point], "rounds": 9, "threads": 1, "dtype": "float32", "device": "cpu", "torch": "2"}
    data = read_card_data(
        made / "pruned",
        evaluation=scores,
        latency=latency,
        base_model="me/dense",
        dataset="me/data",
        license="mit",
        command="hf-prune x",
    )
    assert trace in render_card(data)
    empty = {} if field == "pictures" else None
    less = render_card(dataclasses.replace(data, **{field: empty}))
    assert trace not in less
    assert "None" not in less


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: mit\n---\n# x", {"license": "mit"}),
        ("---\nlicense: 'all rights: mine'\n---", {}),
        ("---\nlicense: [mit, apache-2.0]\n---", {}),
        ("---\nlicense: true\n---", {}),
        ("---\n{a: [\n---\n", {}),
        ("no metadata", {}),
        (None, {}),
        (
            "---\nlicense: other\nlicense_name: x-1\nlicense_link: https://x.org/l\n---",
            {"license": "other", "license_name": "x-1", "license_link": "https://x.org/l"},
        ),
        ("---\nlicense: other\nlicense_link: LICENSE\nlicense_name: <b>\n---", {"license": "other"}),
    ],
)
def test_the_license_is_that_of_the_base_model(made, tmp_path, card, found):
    base = tmp_path / "base"
    base.mkdir()
    if card is not None:
        (base / "README.md").write_text(card)
    data = read_card_data(made / "pruned", base_model=str(base))
    assert {k: v for k, v in vars(data).items() if k.startswith("license") and v is not None} == found
    metadata = front(render_card(data))
    assert {k: v for k, v in metadata.items() if k.startswith("license")} == found
    assert "base_model" not in metadata  # a folder is no Hub id
    assert read_card_data(made / "pruned", base_model=str(base), license="gpl-3.0").license == "gpl-3.0"


def test_without_the_hub_no_license_is_made_up(made, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    begin = time.perf_counter()
    data = read_card_data(made / "pruned", base_model="me/nobody-has-this")
    assert time.perf_counter() - begin < 5
    assert (data.license, data.base_model) == (None, "me/nobody-has-this")


def test_shrunk_models_say_how_they_load(made):
    text = render_card(read_card_data(made / "small"))
    assert "import hf_prune  #" in text
    assert "Whole units were taken out" in text
    assert "Zeros alone" not in text
    assert "import hf_prune  #" not in render_card(read_card_data(made / "pruned"))


def test_compressed_models_say_how_they_load(made, tmp_path):
    for remote_code in (False, True):
        compress_checkpoint(made / "pruned", tmp_path / "packed", remote_code=remote_code)
        text = render_card(read_card_data(tmp_path / "packed"))
        assert "import hf_prune  #" in text
        assert ("trust_remote_code=True" in text) is remote_code
        assert "Criterion magnitude (Han et al. 2015" in text  # the settings are in the weights then


def test_the_class_that_loads_a_model_is_named():
    classes = {"GPT2LMHeadModel": "ForCausalLM", "T5ForConditionalGeneration": "ForSeq2SeqLM", "BertModel": ""}
    assert {name: _auto_class(name).removeprefix("AutoModel") for name in classes} == classes


def test_the_least_speed_up_is_the_headline():
    points = [{"against": {"value": value, "is_real": True}} for value in (3.0, 2.0, 4.0)]
    assert _speed(SimpleNamespace(latency={"points": points})) == "2.0× as fast"


def test_rows_of_examples_stay_out():
    assert _without_examples({"value": 0.5, "kept": [[1.0, 0.0]]}) == {"value": 0.5}


def test_the_authors_own_words_and_metadata_stay(folder):
    own = "---\nlicense: apache-2.0\nlanguage: en\ntags:\n- mine\n---\n# My model\n\nWords before.\n"
    (folder / "README.md").write_text(own)
    data = read_card_data(folder, license="mit")
    write_card(folder, data)
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(f"{text}\nWords after.\n")
    write_card(folder, dataclasses.replace(data, command="hf-prune again"))
    text = (folder / "README.md").read_text()
    assert text.index(BEGIN) < text.index("hf-prune again") < text.index(END) < text.index("Words before.")
    assert text.index("Words before.") < text.index("Words after.")
    assert text.count(BEGIN) == 1
    metadata = front(text)
    assert (metadata["license"], metadata["language"]) == ("apache-2.0", "en")
    assert metadata["tags"] == ["mine", "pruned", "sparse", "hf_prune"]
    write_card(folder, dataclasses.replace(data, command="hf-prune again"))
    assert (folder / "README.md").read_text() == text


def test_nothing_from_outside_becomes_markup(made):
    data = read_card_data(made / "pruned", name="a|b`<script>\n# x", command="`rm` | <b>\n---")
    assert "![x](" not in render_card(dataclasses.replace(data, name="![x](http://x.org/pixel.png) [y](javascript:z)"))
    text = render_card(data)
    assert "<script>" not in text
    assert "<b>" not in text
    assert "\n# x" not in text
    assert "a&#124;b&#96;&lt;script&gt; # x" in text


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"license": "all rights: mine"}, "license is"),
        ({"license_link": "javascript:x"}, "license_link is"),
        ({"base_model": "../no-folder-of-this-name"}, "base_model is"),
        ({"base_model": "/home/me/model"}, "base_model is"),
        ({"dataset": "a/b/c"}, "dataset is"),
    ],
)
def test_metadata_that_the_hub_would_refuse(made, more, match):
    with pytest.raises(DataError, match=match):
        render_card(read_card_data(made / "pruned", **more))
    with pytest.raises(DataError, match="is not valid YAML"):
        render_card(read_card_data(made / "pruned"), "---\n{a: [\n---\n")


def test_folders_without_a_report(tmp_path):
    with pytest.raises(CheckpointError, match="whose numbers were counted"):
        read_card_data(tmp_path)
    with pytest.raises(CheckpointError, match="no card with facts"):
        verify_checkpoint(str(tmp_path))


def change_weight(folder, change):
    weights = load_file(folder / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    change(weights[name])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def refill(weight):
    weight[weight == 0] = 1.0


def one_more_zero(weight):
    weight.view(-1)[(weight.view(-1) != 0).nonzero()[0]] = 0


def test_verify_finds_what_differs(folder, run, scores, made):
    run("card", folder, "--evaluation", scores, "--dataset", "me/data", "--write")
    said = run("verify", folder, "--evaluate", "--data", made / "data")
    assert "What was counted is right." in said
    for change, name in ((one_more_zero, "nonzero"), (refill, "nonzero")):
        (folder / "pruning_masks.safetensors").rename(folder / "masks")
        change_weight(folder, change)
        assert "DIFFERENT" in run("verify", folder, code=1)
        result = verify_checkpoint(str(folder))
        assert name in [fact.name for fact in result.facts if not fact.is_same]
        shutil.copy(made / "pruned" / "model.safetensors", folder)
        (folder / "masks").rename(folder / "pruning_masks.safetensors")
    assert verify_checkpoint(str(folder)).is_right
    change_weight(folder, refill)  # the masks say otherwise
    with pytest.raises(CheckpointError, match="not those of its weights"):
        verify_checkpoint(str(folder))
    shutil.copy(made / "pruned" / "model.safetensors", folder)
    text = (folder / "README.md").read_text()
    facts = read_facts(text)
    (folder / "README.md").write_text(text.replace(f"removed: {facts['removed']}", "removed: 7"))
    assert [f.name for f in verify_checkpoint(str(folder)).facts if not f.is_same] == ["removed"]
    (folder / "README.md").write_text(text.replace(f"accuracy: {facts['score']['accuracy']}", "accuracy: 0.125"))
    wrong = run("verify", folder, "--evaluate", "--data", made / "data", "--json", code=1)
    wrong_names = [f["name"] for f in json.loads(wrong)["facts"] if f["said"] != f["found"]]
    assert wrong_names == ["score", "accuracy"]


def different(folder):
    return [fact.name for fact in verify_checkpoint(str(folder)).facts if not fact.is_same]


def test_verify_finds_an_edited_checksum_beside_the_card(folder):
    write_card(folder, read_card_data(folder))
    edit(folder / "pruning_card.json", lambda v: v["checksums"].update({"model.safetensors": "0" * 64}))
    assert different(folder) == ["SHA-256 of model.safetensors in pruning_card.json"]
    edit(folder / "pruning_card.json", lambda v: v["checksums"].pop("model.safetensors"))
    assert different(folder) == ["SHA-256 of model.safetensors in pruning_card.json"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_verify_finds_a_byte_that_changes_neither_counts_nor_sizes(folder, name):
    write_card(folder, read_card_data(folder))
    assert different(folder) == []
    data = bytearray((folder / name).read_bytes())
    if name == "config.json":
        data[-1:] = b" "
    else:
        data[Shards([folder / name]).entries["bert.embeddings.LayerNorm.weight"].start] ^= 1
    (folder / name).write_bytes(data)
    assert different(folder) == [f"SHA-256 of {name}"]


def test_verify_finds_words_that_are_wrong(folder, run, scores):
    run("card", folder, "--evaluation", scores, "--dataset", "me/data", "--write")
    card = (folder / "README.md").read_text()
    facts = read_facts(card)
    matrix = "bert.encoder.layer.0.output.dense.weight"
    row = next(line for line in card.splitlines() if line.startswith(f"| {matrix}"))
    accuracy = facts["score"]["accuracy"]
    text, line, index = "SHA-256 of the text", "line of the text", "model-index in the metadata"
    other = "another result on the same data"
    for old, new, names in (
        (row, row.replace("50.00 %", "90.00 %"), [text, line]),
        (f"| this model | {facts['parameters']:,} |", "| this model | 1 |", [text, line]),
        (f"* {facts['removed']:,} of", "* 9 of", [text, line]),
        ("pattern 2:4", "pattern 1:4", [text, line]),
        (f"| this model | {100 * accuracy:.2f}", "| this model | 99.99", [text, line]),
        ("Nothing was timed.", "It is twice as fast.", [text, line]),
        (f"value: {accuracy}", "value: 0.99", [index]),
        ("    metrics:", "    figures:", [index, "a result that is not as the Hub has it"]),
        ("\n      type: me/data", "\n      type: me/other", [index, other]),
        ("  removed:", "  gone:", ["removed", "gone"]),
        ("  - '2:4'\n", "", ["nm_patterns"]),
        ("  sha256:\n    config.json", "  sha256:\n    x", ["SHA-256 of config.json", "SHA-256 of x"]),
        ("  text:", "  more:", [text, "more"]),
        ("  files:\n", "  files: 7\n  more:\n", [*(f"bytes of {name}" for name in facts["files"]), "more"]),
        ("    standard_error: ", "    standard_error: about ", ["score"]),
        ("library_name: transformers\n", "", ["library_name in the metadata"]),
        ("- sparse\n", "", ["tags in the metadata"]),
        ("datasets:\n- me/data\n", "", ["datasets in the metadata"]),
        ("datasets:\n- me/data\n", "datasets:\n- me/other\n", ["datasets in the metadata"]),
    ):
        assert card.count(old) == 1, old
        (folder / "README.md").write_text(card.replace(old, new))
        found = dict.fromkeys(re.sub(r"line \d+ of", "line of", name) for name in different(folder))
        assert list(found) == names


def reseal(folder, change):
    """What somebody does who knows the format: change our part, and write its SHA-256 anew."""
    card = (folder / "README.md").read_text()
    ours = our_part(card)
    new = card.replace(ours, changed := change(ours))
    facts = read_facts(card)
    (folder / "README.md").write_text(new.replace(facts["text"], hashlib.sha256(changed.encode()).hexdigest()))


LIES = {
    "in a comment": lambda ours: ours.replace("## Size", "99 %\n<!--\n## Size").replace("## Speed", "-->\n## Speed"),
    "one more line": lambda ours: ours.replace("## Size", "It is as good as the dense model.\n\n## Size"),
    "one line less": lambda ours: ours.replace("  and may change answers for some groups", ""),
    "speed": lambda ours: ours.replace("Nothing was timed.", "It is twice as fast."),
    "the dense model": lambda ours: re.sub(r"\| dense \| [\d.]+ %", "| dense | 12.00 %", ours),
    "paper": lambda ours: ours.replace("Han et al. 2015", "Me et al. 2026"),
    "name": lambda ours: ours.replace("# checkpoint", "# another"),
    "license of words": lambda ours: ours.replace("The limits, biases and", "No limits, biases or"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_verify_renders_the_card_anew(folder, scores, lie):
    """Every counted line is there, and its SHA-256 right: what else is said is a lie all the same."""
    write_card(folder, read_card_data(folder, evaluation=scores, dataset="me/data"))
    before = (folder / "README.md").read_text()
    assert different(folder) == []
    reseal(folder, LIES[lie])
    assert (folder / "README.md").read_text() != before
    found = different(folder)
    assert found
    assert all(re.fullmatch(r"line \d+ of the text|lines of the text|text", name) for name in found)
    with pytest.raises(CheckpointError, match=r"README\.md is not right: (line \d+ of the )?text: "):
        check_card(folder)


BEFORE = [
    "<details>", "<div style='display:none'>", "<!-- -->", "<!--><details>-->", "text <!-- and", "<?", "<![CDATA[",
    "<!A", "````\ncode\n```",
    "~~~", "`\n\n<div hidden>\n\n`", "$$", "[^1]:\n\n    x", "[a]: <", "[![", ":::", "> a", "- a",
    "* a", "+ a", "1. a", "1) a", "    a", "\ta", " a", "a | b", "| a |", "&lt;", "\\", "#a", "####### a", "===", "---",
    "a\u202eb", "a\u200bb", "\u2028", "# <li hidden>", "{a", "a\n" * 2000, "x" * 3000, "\x00", "[a](b)",
]  # fmt: skip


def test_nothing_may_hide_our_part(folder):
    """Readers of Markdown and HTML differ, so none is imitated: before our part stands plain text, or nothing."""
    write_card(folder, read_card_data(folder))
    card = (folder / "README.md").read_text()
    front_, begin, rest = card.partition(BEGIN)
    data = load_card_data(folder)
    assert different(folder) == []
    for words in ("", "\n\n", '# Title\n\nA few words: 99 %, "so" (they) say; it\'s R&D.\nMore of it!\n\n', "Über\n"):
        text = f"{front_}{words}{begin}{rest}"
        assert [each for each in surroundings(text) if each[1] != each[2]] == []
        assert render_card(data, text) == f"{front_}{words.lstrip()}{begin}{rest}"  # it stays where it is
    for words in BEFORE:
        text = f"{front_}{words}\n\n{begin}{rest}"
        assert [name for name, there, expected in surroundings(text) if there != expected] == ["text before our part"]
        again = render_card(data, text)
        assert again.startswith(f"{front_}{begin}"), words
        assert again.rstrip().endswith(f"{END}\n\n{words}".rstrip())
        assert [each for each in surroundings(again) if each[1] != each[2]] == []
    for words in (" ", "\t", "words "):
        found = [name for name, there, expected in surroundings(f"{front_}{words}{begin}{rest}") if there != expected]
        assert found == ["text before our part"]
    for words in ("<style>h1 {display: none}</style>", "< SCRIPT>", "<LINK rel=x>", "<base href=x>", "</style>",
                  "<p style='position: fixed; top: 0'>99 %</p>", "<p style=pos&#105;tion:fixed>",
                  "<p style='posi\\74ion:fixed'>", "<p style='position/**/:fixed'>", "<meta http-equiv=refresh>",
                  '<img STYLE="margin-top:-900px">'):  # fmt: skip
        found = [name for name, there, expected in surroundings(f"{card}\n{words}\n") if there != expected]
        assert found == ["tags that change our part"]
    for words in (
        '<p style="text-align: center; text-transform: none">',
        'style="x"; transform("\\n")',
        "<b>position: 1, style=y</b>",
    ):
        assert [each for each in surroundings(f"{card}\n{words}\n") if each[1] != each[2]] == []
    (folder / "README.md").write_text(f"{front_}<details>\n\n{begin}{rest}\n{BEGIN}\nAll is well.\n{END}\n")
    found = different(folder)
    assert {"text before our part", "marks hf_prune: begin", "marks hf_prune: end"} <= set(found)
    with pytest.raises(CheckpointError, match=r"README\.md is not right: marks"):
        check_card(folder)
    (folder / "README.md").write_text(f"{front_}<details>\n\n{begin}{rest}")
    with pytest.raises(CheckpointError, match=r"text before our part: '<details>', which can hide it: move it below"):
        check_card(folder)


def test_a_body_of_any_kind_is_read_in_linear_time(folder):
    """Half a megabyte of what made readers of markup slow; without an end if any step were quadratic."""
    write_card(folder, read_card_data(folder))
    card = (folder / "README.md").read_text()
    front_, begin, rest = card.partition(BEGIN)
    for piece in (
        "<!--",
        "```a\n",
        "<a ",
        "<a style=",
        "<a style='",
        '<a style=" ',
        "style=",
        " style='",
        "<",
        "x\n",
        "# ",
        "[",
        BEGIN,
        END,
    ):
        words = piece * (450_000 // len(piece))
        for text in (f"{front_}{words}{begin}{rest}", f"{card}{words}"):
            assert list(surroundings(text))
    (folder / "README.md").write_text(card.replace(END, "x\ny\n" * 100_000 + END))
    assert "lines of the text" in different(folder)
    (folder / "README.md").write_text(card + "x" * MOST_OF_A_CARD)
    with pytest.raises(DataError, match=r"characters: expected at most 500,000; correct README\.md first"):
        verify_checkpoint(str(folder))
    (folder / "README.md").write_text(card + "x" * 5 * MOST_OF_A_CARD)
    with pytest.raises(DataError, match=r"README\.md has 2,50.* bytes: expected a text of at most 2,000,000"):
        verify_checkpoint(str(folder))


@pytest.mark.parametrize(
    "result",
    [
        "{dataset: {type: me/data}, metrics: [{type: Accuracy, value: 0.99}]}",
        "{dataset: {type: ME/Data}, metrics: [{type: accuracy, value: 0.99}]}",
        "{dataset: {type: glue, config: data}, metrics: [{type: acc, value: 0.99}]}",
        "{dataset: {type: x, name: 'me: data'}, metrics: [{type: top-1, value: 0.99}]}",
        "{dataset: me/data, metrics: [{type: accuracy, value: 0.99}]}",
        "{dataset: {type: me/data}, metrics: [{type: accuracy, value: 0.99}]}",
    ],
)
def test_a_second_result_on_the_same_data(folder, scores, result):
    write_card(folder, read_card_data(folder, evaluation=scores, dataset="me/data"))
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("  results:\n", f"  results:\n  - {result}\n"))
    assert set(different(folder)) & {
        "another result on the same data",
        "a result that is not as the Hub has it",
        "model-index in the metadata",
    }
    other = "{dataset: {type: me/other}, metrics: [{type: accuracy, value: 0.5}]}"
    (folder / "README.md").write_text(
        card.replace("model-index:\n", f"model-index:\n- {{name: a, results: [{other}]}}\n")
    )
    assert different(folder) == []


OURS = {"dataset": {"type": "me/sst2", "name": "me/sst2"}, "metrics": [{"type": "accuracy", "value": 0.75}]}


def theirs(type_="x", metrics=({"type": "acc", "value": 0.99},), **more):
    return {"dataset": {"type": type_, **more}, "metrics": list(metrics)}


def result_lies(*results, **metadata):
    score = {"accuracy": 0.75, "dataset": "me/sst2"}
    index = [{"name": "a", "results": list(results)}]
    text = join_card({"model-index": index, **metadata, "hf_prune": {"score": score}}, f"{BEGIN}\n{END}\n")
    return [name for name, there, expected in surroundings(text) if there != expected]


def test_results_are_compared_by_structure_and_in_any_order():
    same, odd = "another result on the same data", "a result that is not as the Hub has it"
    for spelled in (
        theirs("ｓｓｔ２"),
        theirs("ѕst2"),
        theirs("SST-2"),
        theirs("you/sst_2"),
        theirs("glue", config="sst2"),
        theirs(name="SST2 (validation)"),
        theirs(name="SЅT-2"),
        theirs(name="dev set: ＳＳＴ２"),
        theirs(args={"of": ["stanfordnlp/sst2"]}),
        theirs("me/sst2", metrics=[]),
        theirs(name="Stanford Sentiment Treebank v2"),
        theirs(name="Stanford Sentiment Treebank 2 (validation)"),
        theirs(name="The Stanford Sentiment Treebank (v2)"),
        theirs(name="Stanford Sentiment Treebank"),
        theirs(name="SST-2 dev accuracy"),
        theirs("glue/sst2"),
        theirs(name="GLUE SST-2"),
        theirs(name="the SST2 benchmark, binary, English".removeprefix("the ")),
        theirs(name="ѕѕт2"),  # no letter of which is Latin
        theirs(name="śst2"),
        {**theirs(), "task": {"type": "text-classification", "name": "Sentiment (SST-2)"}},
        theirs(metrics=[{"type": "acc", "name": "Accuracy on SST 2", "value": 0.99}]),
    ):
        assert result_lies(spelled, OURS) == result_lies(OURS, spelled) == [same], spelled
    for shape in (
        {"metrics": []},
        {**theirs(), "dataset": None},
        {**theirs(), "dataset": [theirs()["dataset"]]},
        [theirs()],
        {"a": theirs()},
        None,
        "sst2",
        {**theirs(), "accuracy": 1},
        theirs(metrics=[["acc", 1]]),
        theirs(3),
        theirs(metrics=[{"type": "acc"}]),
        theirs(name=["sst2"]),
        theirs(more="sst2"),
    ):
        assert result_lies(shape, OURS) == result_lies(OURS, shape) == [odd], shape
    for honest in (
        theirs("imdb", name="IMDb"),
        theirs("glue", name="GLUE", config="mnli", split="test"),
        theirs("ru", name="Русский SuperGLUE"),
        theirs("me/sst2-german", args={"num_fewshot": 5}),
        theirs("you/sst5", name="Stanford Sentiment Treebank v5"),
        {**theirs("imdb"), "task": {"type": "text-classification", "name": "Text Classification"}},
    ):
        assert result_lies(honest, OURS) == result_lies(OURS, honest) == [], honest
    entry = {"name": "b", "results": [theirs("imdb")]}
    own = {"name": "a", "results": [OURS]}
    for index in (
        {"a": own},
        [[own]],
        [own, {**entry, "accuracy": 1}],
        [own, {"name": "b", "results": {"a": theirs()}}],
        "99 %",
    ):
        assert odd in result_lies(**{"model-index": index}), index
    for key in ("Model-Index", "model_index", "eval_results", "Results", "accuracy", "METRICS"):
        assert result_lies(OURS, **{key: [theirs()]}) == [f"results under {key!r} in the metadata"]
    for value in (["accuracy: 0.99"], [0.99], {"accuracy": 0.99}, 0.99, ["0.99"]):
        assert result_lies(OURS, metrics=value) == ["results under 'metrics' in the metadata"]
    assert result_lies(OURS, metrics=["accuracy", "f1", "evaluate-metric/rouge"]) == []
    assert result_lies({**OURS, "metrics": [*OURS["metrics"], {"type": "acc", "value": 1}]}) == [
        "metrics of our result"
    ]


def test_results_of_the_author_on_other_data_stand_anywhere(folder, scores):
    write_card(folder, read_card_data(folder, evaluation=scores, dataset="me/data", license="mit"))
    path = folder / "README.md"
    metadata, body = split_card(path.read_text())
    (ours,) = metadata["model-index"]
    other = theirs("imdb", name="IMDb")
    for index in (
        [{"name": "b", "results": [other]}, ours],
        [ours, {"name": "b", "results": [other]}],
        [{**ours, "results": [*ours["results"], other]}],
        [{**ours, "results": [other, *ours["results"]]}],
    ):
        path.write_text(join_card({**metadata, "model-index": index}, body))
        verified = verify_checkpoint(str(folder))
        assert verified.is_right, index
        assert "the author's result on IMDb" in verified.claims
        check_card(folder)
    path.write_text(join_card({**metadata, "when": datetime.date(2024, 2, 29), "a": {1: [None]}}, body))
    said = {
        fact["name"]: fact["said"] for fact in json.loads(json.dumps(verify_checkpoint(str(folder)).to_dict()))["facts"]
    }
    assert (said["when in the metadata"], said["a in the metadata"]) == ("2024-02-29", {"1": [None]})
    path.write_text(join_card({**metadata, "license": "apache-2.0"}, body))
    assert "license in the metadata" in different(folder)
    with pytest.raises(CheckpointError, match=r"license in the metadata: apache-2\.0, expected mit"):
        check_card(folder)


def test_a_second_metric_in_our_result(folder, scores):
    write_card(folder, read_card_data(folder, evaluation=scores, dataset="me/data"))
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(
        card.replace("    metrics:\n", "    metrics:\n    - {type: Accuracy, value: 0.99}\n")
    )
    assert different(folder) == ["model-index in the metadata", "metrics of our result"]


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


STORED = {
    "accuracy": lambda v: v.update(evaluation={"evaluation": {**v["evaluation"]["evaluation"], "accuracy": 0.99,
                                                             "standard_error": (0.99 * 0.01 / 40) ** 0.5}}),
    "report": lambda v: v["report"].update(polish="It was trained."),
    "name": lambda v: v.update(name="me/better"),
    "command": lambda v: v.update(command="hf-prune prune other"),
    "speed": lambda v: v.update(latency={"points": [{"model": "a", "batch_size": 1, "length": 8, "median": 0.001}],
                                         "rounds": 3, "threads": 1, "dtype": "float32", "device": "cpu", "torch": "2"}),
}  # fmt: skip


@pytest.mark.parametrize("what", STORED)
def test_an_edited_source_of_the_card_is_found_and_not_published(folder, scores, run, what):
    write_card(folder, read_card_data(folder, evaluation=scores, dataset="me/data"))
    edit(folder / "pruning_card.json", STORED[what])
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert different(folder)
    assert "README.md is not right: " in run("push", folder, "me/x", "--dry-run", code=1)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


COUNTED = {
    "bytes": lambda r: r.update(bytes=7),
    "remaining": lambda r: r.update(remaining=7),
    "target_sparsity": lambda r: r.update(target_sparsity=0.9),
    "model": lambda r: r.update(model="BertModel"),
    "nm_patterns[i]": lambda r: r.update(nm_patterns=["1:4"]),
    "tensors[i].bytes": lambda r: r["tensors"][0].update(bytes=True),
    "tensors[i].name": lambda r: r["tensors"][0].update(name="another"),
    "tensors[i].parameters": lambda r: [
        r["tensors"][i].update(parameters=r["tensors"][i]["parameters"] + d, nonzero=r["tensors"][i]["nonzero"] + d)
        for i, d in ((0, 1), (1, -1))
    ],
    "tensors[i].sparsity": lambda r: r["tensors"][0].update(sparsity=float("nan")),
    "tensors[i].after.max": lambda r: next(t for t in r["tensors"] if t["is_target"])["after"].update(max=9.0),
    "more": lambda r: r.update(more=1),
}


@pytest.mark.parametrize("what", COUNTED)
def test_a_report_that_was_edited_before_the_card_was_made_is_found_and_not_published(folder, run, what):
    """The card, its facts and its digests are those of the edited report: only counting tells."""
    write_card(folder, read_card_data(folder))
    check_card(folder)
    edit(folder / "pruning_card.json", lambda v: COUNTED[what](v["report"]))
    write_card(folder, load_card_data(folder))
    assert f"{what} in pruning_card.json" in [re.sub(r"\[\d+\]", "[i]", name) for name in different(folder)]
    assert "README.md is not right: " in run("push", folder, "me/x", "--dry-run", code=1)


def test_structures_are_counted_again(made, tmp_path):
    folder = shutil.copytree(made / "small", tmp_path / "small")
    write_card(folder, read_card_data(folder))
    check_card(folder)
    edit(folder / "pruning_card.json", lambda v: v["report"]["structure"].update(bytes=7))
    write_card(folder, load_card_data(folder))
    assert "bytes in pruning_card.json" in different(folder)
    with pytest.raises(CheckpointError, match=r"README\.md is not right: .*7"):
        check_card(folder)


def test_a_license_is_claimed_beside_that_of_the_base_model(folder, monkeypatch):
    write_card(folder, read_card_data(folder, base_model="me/base", license="mit"))
    for card, claim in (
        (None, "the license (mit)"),
        ("---\nlicense: apache-2.0\n---\n", "the license (mit; the card of me/base says apache-2.0)"),
    ):
        monkeypatch.setattr("hf_prune.hub.licenses.card_of_base", lambda _, card=card: card)
        verified = verify_checkpoint(str(folder))
        assert verified.is_right
        assert claim in verified.claims
        rows = [line.split() for line in str(verified).splitlines() if line.startswith("license")]
        assert rows
        assert all(row[-2:] == ["mit", "claimed"] for row in rows), rows
        assert {fact["claimed"] for fact in verified.to_dict()["facts"] if "license" in fact["name"]} == {True}
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("license: mit\n", "license: gpl-3.0\n"))
    assert {"license", "license in the metadata"} & set(different(folder))
    edit(folder / "pruning_card.json", lambda v: v.update(license=None))  # the author's own words then
    (folder / "README.md").write_text("---\nlicense: gpl-3.0\n---\n")
    write_card(folder, load_card_data(folder))
    assert "the license (gpl-3.0; the card of me/base says apache-2.0)" in verify_checkpoint(str(folder)).claims


def test_scores_of_data_without_an_id_are_compared_by_its_name(folder, scores):
    edit(scores, lambda v: v["evaluation"].update(source="/data/sst2"))
    write_card(folder, read_card_data(folder, evaluation=scores))
    card = (folder / "README.md").read_text()
    index = (
        "model-index:\n- {name: a, results: [{dataset: {type: glue, name: SST-2}, metrics: [{type: acc, value: 1}]}]}\n"
    )
    (folder / "README.md").write_text(card.replace("---\n", f"---\n{index}", 1))
    assert different(folder) == ["another result on the same data"]
    with pytest.raises(CheckpointError, match="another result on the same data"):
        check_card(folder)
    (folder / "README.md").write_text(card.replace("---\n", f"---\n{index.replace('SST-2', 'MNLI')}", 1))
    assert "the author's result on MNLI" in verify_checkpoint(str(folder)).claims
    (folder / ".eval_results").mkdir()
    assert "the results in .eval_results" in verify_checkpoint(str(folder)).claims


@pytest.mark.parametrize(
    ("theirs", "name"),
    [
        ("# Words\n\n<style>h1 {display: none}</style>\n", "tags that change our part: <style"),
        ("# Words\n\n<div style='position: absolute'>\n", "tags that change our part: <div style='position:"),
        ("---\nmodel-index:\n- {name: a, results: [{dataset: {type: DATA}, metrics: [{type: acc, value: 1}]}]}\n"
         "---\n", "another result on the same data"),
        ("---\nResults: 99 %\n---\n", "results under 'Results' in the metadata"),
        (f"Words\n{END}\n{BEGIN}\n", "marks hf_prune: begin: 2"),
    ],
)  # fmt: skip
def test_words_of_the_hub_are_checked_after_they_were_merged(folder, scores, theirs, name):
    from hf_prune.hub import push

    data = read_card_data(folder, evaluation=scores, dataset="me/data")
    for card in (data, None):  # made just now, and written before
        with pytest.raises(
            CheckpointError, match=rf"the text of the card that me/x has is not right: .*{re.escape(name)}"
        ):
            push._card(folder, "me/x", card, theirs)
        assert push._card(folder, "me/x", card, "# Words\n\n<b>bold</b>\n")[0].endswith("<b>bold</b>\n")
        write_card(folder, data)


def test_a_card_need_not_be_read_to_be_too_large(folder, made, tmp_path, monkeypatch):
    """A terabyte that is not there: who reads it whole has no memory left."""
    from hf_prune.evaluation.data import hub as data_hub
    from hf_prune.hub import client as hub

    base = tmp_path / "base"
    base.mkdir()
    huge = base / "README.md"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    assert read_card_data(folder, base_model=str(base)).license is None
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: str(huge))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(huge))
    monkeypatch.setattr(hub, "check_hub_reachable", lambda _: None)
    assert read_card_data(folder, base_model="me/base").license is None
    with pytest.raises(
        DataError, match=r"README\.md has 1,099,511,627,776 bytes: expected a text of at most 2,000,000"
    ):
        data_hub.check_data_card("me/data")
    write_card(folder, read_card_data(folder))
    with (folder / "README.md").open("r+b") as file:
        file.truncate(1 << 40)
    said, _ = renew_card(folder, folder, "x")
    assert "was not changed, even where it is wrong now" in said
    assert (folder / "README.md").stat().st_size == 1 << 40


def test_a_card_needs_what_it_was_rendered_from(folder, run):
    write_card(folder, read_card_data(folder))
    edit(folder / "pruning_card.json", lambda v: v["report"].update(nonzero=3))
    assert different(folder) == ["what the card is rendered from"]
    assert "nonzero is 3, and the tensors of the report have" in run("push", folder, "me/x", "--dry-run", code=1)
    (folder / "pruning_card.json").unlink()
    assert different(folder) == ["what the card is rendered from"]
    assert "is missing" in run("push", folder, "me/x", "--dry-run", code=1)
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card[card.index(BEGIN) :])
    assert "describes other files" in run("push", folder, "me/x", "--dry-run", code=1)


def test_a_pushed_card_is_rendered_from_what_goes_with_it(folder, monkeypatch, tmp_path):
    from hf_prune.hub import push

    write_card(folder, read_card_data(folder))
    text, data = push._card(folder, "me/x", None, None)
    out = shutil.copytree(folder, tmp_path / "out")
    (out / "README.md").write_text(text)
    (out / "pruning_card.json").write_text(json.dumps(data.to_dict()))
    assert data.name == "me/x"
    assert different(out) == []


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "sparsity_report.json", "layers.png"])
def test_tokenizer_report_and_pictures_are_covered(folder, name):
    write_card(folder, read_card_data(folder))
    data = (folder / name).read_bytes()
    for change in (lambda path: path.write_bytes(data + b"\n"), Path.unlink):
        change(folder / name)
        assert f"SHA-256 of {name}" in different(folder)
        with pytest.raises(CheckpointError, match=f"describes other files than those beside it .{name}.: edit it, or"):
            check_card(folder)
        (folder / name).write_bytes(data)
    assert different(folder) == []
    (folder / "added_tokens.json").write_text('{"w1": 7}')
    assert different(folder) == ["SHA-256 of added_tokens.json"]


def test_a_tokenizer_that_comes_later_is_no_lie(folder):
    """As with model.push_to_hub() and then tokenizer.push_to_hub()."""
    kept = {p.name: p.read_bytes() for p in folder.glob("tokenizer*")}
    for name in kept:
        (folder / name).unlink()
    write_card(folder, read_card_data(folder))
    for name, data in kept.items():
        (folder / name).write_bytes(data)
    assert different(folder) == []


def test_a_forged_record_of_what_was_taken_out(made, tmp_path, run):
    folder = shutil.copytree(made / "small", tmp_path / "small")
    honest = json.loads((folder / "config.json").read_text())["pruned_structure"]
    speed = {"asked": 250.0, "predicted": 250.0, "low": 249.0, "high": 251.0, "rounds": 9, "batch_size": 1, "length": 8,
             "threads": 1, "dtype": "float32", "device": "cpu"}  # fmt: skip
    for forged, name in (
        ({"parameters_before": 1_000_000_000}, "parameters before, in config.json"),
        ({"parameters_before": honest["parameters_before"] + 1}, "parameters before, in config.json"),
        ({"parameters_before": "many"}, None),
        ({"speed": {**speed, "measured": 250.0}}, "speed-up, in config.json"),
        ({"speed": {**speed, "measured": -2.0}}, None),
        ({"speed": {**speed, "measured": 1.5}}, ""),
    ):
        edit(folder / "config.json", lambda v, forged=forged: v.update(pruned_structure={**honest, **forged}))
        if name is None:
            assert "the report of a card cannot be true" in run("card", folder, "--write", code=1)
            continue
        run("card", folder, "--write")
        assert different(folder) == ([name] if name else [])
    assert "timings" in verify_checkpoint(str(folder)).claims


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": 7.0}, "accuracy is 7.0: expected a number from 0 to 1"),
        ({"accuracy": float("nan")}, "accuracy is nan: expected a number from 0 to 1"),
        ({"accuracy": -0.1}, "accuracy is -0.1"),
        ({"accuracy": True}, "accuracy is True"),
        ({"n": -5}, "n is -5: expected a whole number, 1 to 1,000,000,000,000"),
        ({"n": 40.5}, "n is 40.5"),
        ({"n": 41}, "n is 41, and there are 40 predictions of 40 labels"),
        ({"accuracy": 0.99}, "accuracy is 0.99, and the predictions give"),
        ({"standard_error": float("inf")}, "standard_error is inf"),
        ({"standard_error": 0.0001}, "standard_error is 0.0001, and accuracy and n give"),
    ],
)
def test_scores_that_cannot_be(folder, scores, run, changes, message):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for part in ("evaluation", "dense"):
        values = json.loads(scores.read_text())
        values[part] |= changes
        path = scores.with_name(f"{part}.json")
        path.write_text(json.dumps(values))
        error = run("card", folder, "--evaluation", path, "--write", code=1)
        assert f"{path} cannot be true: {message}" in error
        with pytest.raises(DataError, match=re.escape(message)):
            dataclasses.replace(read_card_data(folder), evaluation=values)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": -40.5}, "drop is -40.5, and the accuracies give"),
        ({"interval": [5.0, -5.0]}, "interval is [5.0, -5.0]: expected two numbers from -100 to 100"),
        ({"interval": [-1.0, 1.0]}, "an end of the interval is -1.0, and the examples that only one model gets right"),
        ({"p_value": 2}, "p_value is 2: expected a number from 0 to 1"),
        ({"n": 9}, "the comparison has n = 9, and the scores "),
        ({"only_pruned_right": 40}, "only_pruned_right is 40"),
        ({"confidence": 1.0}, "confidence is 1.0"),
    ],
)
def test_comparisons_that_cannot_be(folder, scores, run, changes, message):
    edit(scores, lambda v: v["comparison"].update(changes))
    assert message in run("card", folder, "--evaluation", scores, code=1)


def test_a_drop_that_says_nothing_is_said_to(folder, scores):
    assert "Warning" not in render_card(read_card_data(folder, evaluation=scores))
    edit(scores, lambda v: v["comparison"].update(doubt="the labels | are reversed"))
    assert "Warning: the labels &#124; are reversed." in render_card(read_card_data(folder, evaluation=scores))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"perplexity": 0.5}, "perplexity is 0.5: expected a number of 1 or more"),
        ({"perplexity": float("inf")}, "perplexity is inf"),
        ({"n_tokens": 0}, "n_tokens is 0"),
        ({"window_nll": [1.0], "window_tokens": [7]}, "and the windows give"),
    ],
)
def test_perplexities_that_cannot_be(folder, changes, message):
    score = {"perplexity": 20.0, "n": 3, "n_tokens": 30, "standard_error": None}
    assert read_card_data(folder, evaluation={"evaluation": score}).evaluation
    with pytest.raises(DataError, match=re.escape(message)):
        read_card_data(folder, evaluation={"evaluation": {**score, **changes}})


def test_timings_that_cannot_be(folder):
    point = {"model": "dense", "batch_size": 1, "length": 8, "median": 0.1, "against": None}
    faster = {**point, "model": "pruned", "median": 0.05, "against": {"value": 2.1, "is_real": True}}
    how = {"rounds": 9, "threads": 1, "dtype": "float32", "device": "cpu", "torch": "2"}
    assert read_card_data(folder, latency={"points": [point, faster], **how}).latency
    for wrong, message in (
        ({"points": [], **how}, "expected at least one timing"),
        ({"points": [{**point, "median": 0.0}], **how}, "median is 0.0: expected a number above 0"),
        ({"points": [point], **how, "rounds": 0}, "rounds is 0"),
        ({"points": [point, {**faster, "against": {"value": 250.0, "is_real": True}}], **how}, "and the times give 2"),
        ({"points": [{}], **how}, "not as hf_prune writes it: KeyError"),
    ):
        with pytest.raises(DataError, match=message):
            read_card_data(folder, latency=wrong)


def test_measurements_of_odd_shapes_are_refused_in_words(folder):
    def score(k=75, n=100, **more):
        accuracy = k / n
        return {"accuracy": accuracy, "n": n, "standard_error": (accuracy * (1 - accuracy) / n) ** 0.5, **more}

    even = {"drop": 0.0, "interval": [-3, 3], "confidence": 0.95, "p_value": 1.0}
    assert read_card_data(folder, evaluation={"evaluation": score(), "dense": score(), "comparison": even}).evaluation
    for part, message in (
        ({"evaluation": score(accuracy=0.7501)}, "the nearest share of 100 examples is 0.75"),
        ({"evaluation": {**score(), "n": 10**400}}, "n is 1000"),
        ({"evaluation": score(perplexity=5.0)}, "it has an accuracy and a perplexity"),
        ({"evaluation": score(predictions="x" * 100, labels="x" * 100)}, "predictions is 'xxx"),
        ({"evaluation": score(1, 1, predictions=[True], labels=[1])}, r"predictions is \[True\]: expected a list"),
        ({"evaluation": score(1, 1, labels=[1])}, "predictions is None"),
        ({"evaluation": score(split=["a"])}, r"split is \['a'\]: expected one line"),
        ({"evaluation": score(source="a\nb")}, "source is 'a.*expected one line"),
        ({"evaluation": score(), "dense": score(n=200)}, "n is 100, and 200 for the dense model: expected the same"),
        ({"evaluation": score(), "dense": {"perplexity": 3.0}}, "dense has another kind of score"),
        ({"evaluation": score(), "dense": [1]}, "not as hf_prune writes it"),
        ({"evaluation": score(), "comparison": even}, "there is a comparison without the score of the dense model"),
        ({"evaluation": score(), "dense": score(), "comparison": {**even, "p_value": 0.1}}, "the drop is 0"),
        ({"evaluation": score(), "dense": score(), "comparison": {**even, "interval": [1, 2]}}, "around the drop, 0"),
        ({"evaluation": score(), "dense": score(), "comparison": {**even, "interval": "01"}}, "expected two numbers"),
        ({"evaluation": score(), "dense": score(), "comparison": {**even, "interval": [False, True]}}, "interval is F"),
        ({"evaluation": score(), "dense": score(), "comparison": {**even, "confidence": 0.1}}, "confidence is 0.1"),
        ({"evaluation": score(), "dense": score(), "comparison": {**even, "doubt": {}}}, "doubt is {}"),
        ({"evaluation": score(70), "dense": score(), "comparison": {**even, "drop": 5.0, "interval": [-2, 12],
          "only_dense_right": 5, "only_pruned_right": 0, "p_value": 0.9}}, "p_value is 0.9, and the examples"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=f"cannot be true: .*{message}|{message}"):
            read_card_data(folder, evaluation=part)
    how = {"rounds": 9, "threads": 1, "dtype": "float32", "device": "cpu", "torch": "2"}
    point = {"model": "dense", "batch_size": 1, "length": 8, "median": 0.01}
    faster = {**point, "model": "pruned", "median": 0.005, "against": {"value": 2.0, "is_real": True}}
    for points, message in (
        ([faster], "the model that it is against has no time"),
        ([faster, point], "the model that it is against has no time"),
        ([point, {**faster, "against": {"value": 3.1, "is_real": True}}], "and the times give 2"),
        ([point, {**faster, "against": {"value": 2.0, "is_real": "no"}}], "is_real is 'no'"),
        ([point, {**faster, "low": 9, "high": 1}], "median is 0.005: expected it between 9 and 1"),
        ([{**point, "model": {}}], "model is {}"),
        ([{**point, "model": None}], "model is None"),
        ([{**point, "length": 10**30}], "length is 1000"),
    ):
        with pytest.raises(DataError, match=message):
            read_card_data(folder, latency={"points": points, **how})


@pytest.mark.parametrize("part", ["evaluation", "latency"])
def test_what_was_measured_says_of_which_weights(folder, part):
    """Who takes the digest out of ``pruning_card.json`` publishes nothing by it."""
    found = {"evaluation": {"evaluation": {"accuracy": 0.5, "n": 4, "standard_error": 0.25}},
             "latency": {"points": [{"model": "a", "batch_size": 1, "length": 8, "median": 0.1}], "rounds": 9,
                         "threads": 1, "dtype": "float32", "device": "cpu", "torch": "2"}}[part]  # fmt: skip
    weights = weights_digest(checksums(folder))
    said = weights if part == "evaluation" else {"a": weights}
    write_card(folder, read_card_data(folder, **{part: {**found, "weights": said}}))
    assert different(folder) == []
    check_card(folder)
    edit(folder / "pruning_card.json", lambda v: v[part].pop("weights"))
    assert different(folder) == [f"SHA-256 of the weights of the {part}"]
    with pytest.raises(CheckpointError, match=f"SHA-256 of the weights of the {part}: none, expected {weights[:16]}"):
        check_card(folder)


def test_scores_and_timings_of_other_weights_are_refused(made, folder, scores, run, tmp_path):
    weights = json.loads(scores.read_text())["weights"]
    sums = "".join(f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in ["model.safetensors"])
    assert weights == hashlib.sha256(sums.encode()).hexdigest()  # by hand
    assert json.loads(scores.read_text())["against_weights"] != weights
    bench = run("bench", made / "dense", folder, "--rounds", 3, "--length", 8, "--json")
    (tmp_path / "bench.json").write_text(bench)
    run("card", folder, "--evaluation", scores, "--latency", tmp_path / "bench.json", "--write")
    assert different(folder) == []
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for path, option in ((scores, "--evaluation"), (tmp_path / "bench.json", "--latency")):
        error = run("card", made / "small", option, path, "--write", code=1)
        assert f"{path} was measured on other weights than those of {made / 'small'}" in error
        edit(path, lambda v: v.pop("weights"))
        assert "does not say that it was measured on the weights of" in run(
            "card", folder, option, path, "--write", code=1
        )
    assert not (made / "small" / "README.md").exists()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    compress_checkpoint(folder, tmp_path / "small")
    assert different(tmp_path / "small") == []
    assert read_facts((tmp_path / "small" / "README.md").read_text())["score"]


def test_verify_reads_cards_with_other_line_ends(folder):
    text = write_card(folder, read_card_data(folder))
    (folder / "README.md").write_bytes(text.replace("\n", "\r\n").encode())
    assert different(folder) == []


def test_what_was_measured_stays_as_long_as_the_files_do(folder, scores):
    write_card(folder, read_card_data(folder, evaluation=scores, dataset="me/data", base_model="me/first"))
    first = (folder / "README.md").read_text()
    write_card(folder, read_card_data(folder, base_model="me/second", command="hf-prune x"))
    text = (folder / "README.md").read_text()
    assert front(text)["model-index"] == front(first)["model-index"]
    assert read_facts(text)["score"] == read_facts(first)["score"]
    assert front(text)["base_model"] == "me/second"
    change_weight(folder, one_more_zero)
    (folder / "pruning_masks.safetensors").unlink()
    write_card(folder, read_card_data(folder))
    text = (folder / "README.md").read_text()
    assert "model-index" not in front(text)
    assert "score" not in read_facts(text)
    assert "hf-prune x" not in text


def test_metadata_of_the_author(folder, scores):
    own = """---
model-index:
- name: mine
  results:
  - {task: {type: x}, dataset: {name: y, type: me/other}, metrics: [{type: accuracy, value: 0.5}]}
base_model: [me/second, me/third]
tags: mine
language: no
---
"""
    data = read_card_data(folder, base_model="me/second")
    metadata = front(render_card(data, own))
    assert metadata["base_model"] == ["me/second", "me/third"]
    assert metadata["tags"] == ["mine", "pruned", "sparse", "hf_prune"]
    assert metadata["language"] == "no"
    scored = read_card_data(folder, evaluation=scores, dataset="me/data", license="mit")
    both = render_card(scored, own)
    assert [entry["name"] for entry in front(both)["model-index"]] == ["mine", "checkpoint"]
    assert render_card(scored, both) == both
    assert [entry["name"] for entry in front(render_card(data, both))["model-index"]] == ["mine"]
    assert "model-index" not in front(without_facts(render_card(scored)))
    assert "\N{BOM}" not in render_card(data, "\N{BOM}" + own)
    same = render_card(scored, own.replace("me/other", "me/data"))
    assert [entry["name"] for entry in front(same)["model-index"]] == ["checkpoint"]


def test_licenses_come_and_go_whole(folder):
    ours = render_card(read_card_data(folder, license="other", license_name="gemma", license_link="https://x.org/l"))
    assert front(ours)["license_name"] == "gemma"
    again = front(render_card(read_card_data(folder, license="mit"), ours))
    assert {k: v for k, v in again.items() if k.startswith("license")} == {"license": "mit"}
    theirs = front(merge_cards(ours, "---\nlicense: apache-2.0\n---\n"))
    assert {k: v for k, v in theirs.items() if k.startswith("license")} == {"license": "apache-2.0"}


def test_cards_that_cannot_be_read(folder, run):
    (folder / "README.md").write_bytes(b"\xff\xfe\x00#")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for words in (("card", folder, "--write"), ("verify", folder), ("push", folder, "me/x", "--dry-run")):
        assert "is not in UTF-8" in run(*words, code=1)
    (folder / "README.md").write_text("---\na: [\n---\n")
    model = prunable(models.tiny_classifier()).prune(0.5)
    with pytest.raises(DataError, match="is not valid YAML"):
        describe_model(model, folder)
    (folder / "README.md").write_bytes(before["README.md"])
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.parametrize("bomb", ["a: &a [x, x]\nb: [*a, *a]", "a: &a {k: 1}\nb: {<<: [*a, *a]}", "a: " + "[" * 5000])
def test_yaml_bombs_of_a_base_model_and_of_a_card(folder, run, tmp_path, bomb):
    """Half a kilobyte of aliases stands for gigabytes, and brackets for an endless recursion."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(f"---\nlicense: mit\n{bomb}\n---\n")
    assert "license:" not in run("card", folder, "--base-model", base)
    (folder / "README.md").write_text(f"---\nhf_prune: {{}}\n{bomb}\n---\n")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for words in (
        ("card", folder),
        ("card", folder, "--write"),
        ("verify", folder),
        ("push", folder, "me/x", "--dry-run"),
    ):
        assert "which no card needs" in run(*words, code=1)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    run("compress", folder, tmp_path / "small")
    assert (tmp_path / "small" / "README.md").read_bytes() == before["README.md"]


def test_the_command_counts_and_does_not_believe_reports(folder, run):
    """A report of other weights, and one of a training on others."""
    report = json.loads((folder / "sparsity_report.json").read_text())
    trained = {"sparsity": {**report, "nonzero": 1}, "steps": 3, "dense": None, "comparison": None}
    trained["pruned"] = {"accuracy": 0.99, "standard_error": 0.00995, "n": 100}
    (folder / "training_report.json").write_text(json.dumps(trained))
    assert "training_report.json cannot be true: nonzero is 1" in run("card", folder, "--write", code=1)
    (folder / "training_report.json").unlink()
    (folder / "sparsity_report.json").write_text(json.dumps({**report, "nonzero": 5, "removed": 6}))
    run("card", folder, "--write")
    assert "99.00" not in (folder / "README.md").read_text()
    assert read_facts((folder / "README.md").read_text())["nonzero"] == report["nonzero"]
    assert "What was counted is right." in run("verify", folder)
    assert "has no revisions" in run("verify", folder, "--revision", "x", code=1)


def test_scores_measured_again_may_round_otherwise(folder, scores):
    write_card(folder, read_card_data(folder, evaluation=scores))
    said = read_facts((folder / "README.md").read_text())["score"]
    for shift, right in ((0.05, True), (0.2, False)):
        found = {**said, "accuracy": said["accuracy"] + shift * said["standard_error"]}
        assert verify_checkpoint(str(folder), score=lambda _, found=found: found).is_right is right


def test_cards_are_merged_and_taken_apart(folder, scores):
    data = read_card_data(folder, evaluation=scores, dataset="me/data", license="mit")
    mine = render_card(data)
    theirs = "---\nlanguage: en\nlicense: apache-2.0\n---\n\n# Words\n"
    merged = merge_cards(mine, theirs)
    assert merged == render_card(data, theirs)
    assert merge_cards(mine, merged) == merged
    assert front(merged)["license"] == "apache-2.0"
    assert merge_cards(f"{mine}\nMy own words.\n", theirs).endswith("My own words.\n")
    assert merge_cards("# Mine\n", theirs) == "# Mine\n"
    left = without_facts(merged)
    assert left.endswith("---\n\n# Words\n")
    assert not {"hf_prune", "model-index"} & set(front(left))
    assert without_facts(theirs) == theirs


def test_pictures_of_described_models(tmp_path):
    model = prunable(models.tiny_classifier())
    model.save_pretrained(tmp_path)
    (tmp_path / "layers.png").write_bytes(b"of an earlier model")
    assert "![" not in describe_model(model, tmp_path)
    assert not (tmp_path / "layers.png").exists()
    model.prune(0.5).save_pretrained(tmp_path)
    assert describe_model(model, tmp_path).count("![") == 2
    assert {"layers.png", "weights.png"} <= {p.name for p in tmp_path.iterdir()}
    assert verify_checkpoint(str(tmp_path)).is_right


def test_what_rounding_made_zero_is_counted(tmp_path):
    model = prunable(models.tiny_classifier()).prune(0.5)
    model.classifier.weight.data[0, model.masks["classifier.weight"][0].nonzero()[0]] = 1e-6
    model.save_pretrained(tmp_path, compressed=True, values="int8")
    card = describe_model(model, tmp_path)
    assert read_facts(card)["nonzero"] == sparsity_report(model).nonzero - 1
    assert "were rounded to int8" in card
    assert verify_checkpoint(str(tmp_path)).is_right


def test_marks_in_the_wrong_order_cost_no_words(folder):
    own = f"{END}\nMy first words.\n{BEGIN}\nMy last words.\n"
    text = render_card(read_card_data(folder), own)
    assert own.strip() in text
    assert "## Size" in text


@pytest.mark.parametrize("option", ["evaluation", "latency"])
def test_files_that_are_no_measurements(folder, tmp_path, option):
    for text in ("[]", '{"accuracy": 1.0}', '{"evaluation": {}, "points": 1}', '{"evaluation": {"accuracy": "1"}}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(DataError, match=r"is not what hf-prune|holds a JSON list"):
            read_card_data(folder, **{option: tmp_path / "x.json"})


def test_verify_shrunk_models(made, tmp_path, run):
    folder = shutil.copytree(made / "small", tmp_path / "small")
    run("card", folder, "--write")
    assert "What was counted is right." in run("verify", folder)


CARDS = sorted(p.parent for p in (Path(__file__).parents[2] / "model_cards").glob("*/card.json"))


def test_there_are_cards_of_real_runs():
    assert len(CARDS) >= 4


@pytest.mark.parametrize("folder", CARDS, ids=lambda p: p.name)
def test_cards_of_real_runs_are_what_their_facts_say(folder):
    data = PruningCardData.from_dict(json.loads((folder / "card.json").read_text()))
    assert render_card(data) == (folder / "README.md").read_text()
    assert all((folder / name).is_file() for name in data.pictures)
    if "sst2" in folder.name:
        assert data.evaluation["comparison"]["n"] == 872
    if data.example is not None:
        assert data.example["output"] in (folder / "README.md").read_text().replace("\n# ", "\n")


@pytest.mark.parametrize("model_type", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("kind", ["head", "neuron"])
def test_a_layer_that_lost_all_units_is_no_lie(model_type, kind, tmp_path):
    model = prunable(getattr(models, f"tiny_{model_type}")())
    site = [site for site in find_unit_groups(model) if site.kind == kind][-1]
    with torch.no_grad():
        for part in site.slices:
            model.get_parameter(part.name).mul_(1e-4)
    model.prune(PruningConfig(granularity=(kind,), sparsity=0.5, scope="global"))
    shrink(model)
    left = next(each.units for each in find_unit_groups(model) if each.name == site.name)
    assert left == site.minimum
    model.save_pretrained(tmp_path / "small")
    describe_model(model, tmp_path / "small", plots=False)
    assert different(tmp_path / "small") == []


@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        ("config.json", None, [None, [], 5, "x", True]),
        ("config.json", "architectures", [[1], -1, "x"]),
        ("config.json", "quantization_config", [5, [1], "x"]),
        ("training_report.json", None, [None, [], 5, {}, {"steps": 1}, {"steps": 1, "sparsity": 5}]),
        ("sparsity_report.json", None, [None, [], 5, {}]),
        ("sparsity_report.json", "nm_patterns", [-1, [1], "2:4"]),
        ("sparsity_report.json", "tensors", [-1, [1], None, {}]),
    ],
)
def test_json_that_is_not_ours_makes_no_card(folder, name, key, values):
    path = folder / name
    whole = json.loads(path.read_text()) if path.is_file() else {}
    for value in values:
        told = value if key is None else {**whole, key: value}
        path.write_text(json.dumps(told))
        with pytest.raises((CheckpointError, DataError), match=re.escape(name)):
            read_card_data(folder)
        path.write_text("[" * 50_000)
        with pytest.raises(DataError, match="not valid JSON"):
            read_card_data(folder)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("name", [5, None, [1]]),
        ("files", [[1], 5, None, "x", {"a": "b"}]),
        ("checksums", [None, [1], "x", -1, {"a": 1}]),
        ("training", [{}, 5, {"steps": "x"}]),
        ("versions", [None, {"torch": 2}]),
        ("tokens", ["yes", 1]),
    ],
)
def test_facts_of_cards_have_types(folder, key, values):
    write_card(folder, read_card_data(folder))
    path = folder / "pruning_card.json"
    told = json.loads(path.read_text())
    for value in values:
        path.write_text(json.dumps({**told, key: value}))
        with pytest.raises(DataError, match=rf"does not hold the facts of a card: the {key} of a card"):
            load_card_data(folder)
        assert read_card_data(folder).name == folder.name  # made anew


def test_dates_and_nan_of_the_author_are_right_and_have_a_place_in_json(folder, run):
    write_card(folder, read_card_data(folder))
    path = folder / "README.md"
    path.write_text(
        path.read_text().replace("---\n", "---\ndate: 2024-01-02\nx: .nan\ny: [.inf, 2024-01-02T03:04:05Z]\n", 1)
    )
    check_card(folder)
    assert json.loads(run("verify", folder, "--json"), parse_constant=pytest.fail)["is_right"]
    path.write_text(path.read_text().replace("hf_prune:\n", "hf_prune:\n  removed_on: 2024-01-02\n", 1))
    found = json.loads(run("verify", folder, "--json", code=None), parse_constant=pytest.fail)
    assert not found["is_right"]
    assert "2024-01-02" in [fact["said"] for fact in found["facts"]]


# --- the top of a card -----------------------------------------------------------------------------


def facts_of(folder: str = "minilm-sst2-2x", **more: object) -> PruningCardData:
    values = json.loads((CARDS[0].parent / folder / "card.json").read_text())
    return PruningCardData.from_dict({**values, **more})


def test_the_headline_says_what_was_measured():
    assert "**2.0× as fast, 70 % of the parameters, 97.8 % of the dense model's accuracy**" in render_card(facts_of())
    best = facts_of("minilm-sst2-best-80")
    assert "**80 % of the pruned weights are zero, 97.6 % of the dense model's accuracy**" in render_card(best)
    packed = dataclasses.replace(best, files={"model.safetensors": best.report["bytes"] // 2})
    assert "**files 2.0× smaller, 97.6 %" in render_card(packed)
    alone = {"evaluation": best.evaluation["evaluation"]}
    assert "dense model's accuracy" not in render_card(dataclasses.replace(best, evaluation=alone))


def test_a_speed_that_may_be_noise_is_no_headline():
    point = {"model": "dense", "batch_size": 1, "length": 64, "task": "forward", "median": 0.02}
    ratio = {"value": 1.02, "low": 0.98, "high": 1.05, "is_real": False}
    how = {"rounds": 30, "threads": 1, "dtype": "float32", "device": "cpu", "torch": "2.13.0"}
    timed = {**how, "points": [{**point, "against": None}, {**point, "model": "pruned", "against": ratio}]}
    data = facts_of()
    assert "× as fast" not in render_card(dataclasses.replace(data, latency=timed)).split("## Speed")[0]


def test_the_first_lines_name_task_and_labels_and_the_example_has_its_output():
    example = {"input": 'A "good" film', "output": "[{'label': 'POSITIVE', 'score': 0.9}]"}
    data = facts_of(
        labels="NEGATIVE, POSITIVE", language="en", example=example, calibration="512 samples of sst2, train"
    )
    card = render_card(data)
    metadata, body = split_card(card)
    assert (metadata["pipeline_tag"], metadata["language"]) == ("text-classification", "en")
    assert "A BertForSequenceClassification for text classification (NEGATIVE, POSITIVE), pruned with" in body
    code = body.split("```python\n")[1].split("```")[0]
    assert code.index("import hf_prune") < code.index("from transformers import pipeline")
    assert "pipe(\"A \\\"good\\\" film\")\n# [{'label': 'POSITIVE', 'score': 0.9}]\n" in code
    compile(code, "card", "exec")
    assert "* Calibrated on 512 samples of sst2, train." in body
    assert "| dense | 22,713,986 |" in body
    assert body.count("<details>") == body.count("</details>") == 1
    assert body.index("<details>") < body.index("encoder.layer.0.attention")
    assert "@software{hf_prune" in body
    assert "The criterion: Kwon et al. 2022, arXiv:2204.09656." in body


def test_the_card_command_runs_the_example(made, tmp_path, run):
    folder = shutil.copytree(made / "pruned", tmp_path / "pruned")
    run("card", folder, "--write", "--language", "en", "--example", "w1 w2")
    data = load_card_data(folder)
    assert data.example["input"] == "w1 w2"
    assert data.example["output"].startswith("[{'label': 'LABEL_")
    assert data.calibration is None  # it learned from nothing
    assert "What was counted is right." in run("verify", folder)
