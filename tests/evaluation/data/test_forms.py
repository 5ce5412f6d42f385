"""Data in the files that people have, with columns by their usual names."""

import json
import math
import struct
import wave

import numpy as np
import pytest
from PIL import Image

from hf_prune.errors import DataError
from hf_prune.evaluation.data.loading import column_names, load_classification, read_split
from hf_prune.evaluation.tasks import ClassificationTask, LanguageModelingTask

ROWS = [("good, really", 1), ('so "bad"', 0), ("fine", 1)]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


FILES = {
    "comma.csv": 'text,stars,label\n"good, really",5,1\n"so ""bad""",1,0\nfine,4,1\n',
    "semicolon.csv": 'text;stars;label\n"good, really";5;1\n"so ""bad""";1;0\nfine;4;1\n',
    "tab.csv": 'text\tstars\tlabel\n"good, really"\t5\t1\n"so ""bad"""\t1\t0\nfine\t4\t1\n',
    "pipe.csv": 'text|stars|label\ngood, really|5|1\n"so ""bad"""|1|0\nfine|4|1\n',
    "spaced.csv": 'text, stars, label\n"good, really", 5, 1\n"so ""bad""", 1, 0\nfine, 4, 1\n',
    "bom.csv": '\N{BOM}text;label\n"good, really";1\n"so ""bad""";0\nfine;1\n',
    "glue.tsv": 'text\tlabel\ngood, really\t1\nso "bad"\t0\nfine\t1\n',  # quotes have no meaning
    "list.json": json.dumps([{"text": a, "label": b} for a, b in ROWS]),
    "data.json": json.dumps({"version": 1, "data": [{"text": a, "label": b} for a, b in ROWS]}),
    "lines.json": "\n".join(json.dumps({"text": a, "label": b}) for a, b in ROWS),
    "lines.jsonl": "\n".join(json.dumps({"text": a, "label": b}) for a, b in ROWS) + "\n",
}


@pytest.mark.parametrize("name", FILES)
def test_one_file_of_any_kind(tmp_path, name):
    source = write(tmp_path / name, FILES[name])
    data = load_classification(source, "train", text_columns=("text",))
    assert list(zip(data["text"], data["label"], strict=True)) == ROWS


def test_columns_are_found_by_their_usual_names(tmp_path):
    task = ClassificationTask(write(tmp_path / "some.csv", "id;review;sentiment\n1;good;1\n2;bad;0\n"))
    assert task.columns == {"text_columns": ("review",), "label_column": "sentiment"}
    assert task.load("train")["review"][:] == ["good", "bad"]
    pairs = ClassificationTask(write(tmp_path / "pairs.csv", "premise,hypothesis,label\na,b,1\n"))
    assert pairs.columns["text_columns"] == ("premise", "hypothesis")
    chosen = ClassificationTask(str(tmp_path / "some.csv"), ("id",), "review")  # named, so nothing is read
    assert chosen.columns == {"text_columns": ("id",), "label_column": "review"}
    language = LanguageModelingTask(write(tmp_path / "texts.csv", "content,n\nsome words,1\n"))
    assert language.load("train") == ["some words"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"has the columns a, b, and none with a usual name for texts \(sentence, text, .*text_column"),
        ("text,b\n1,2\n", r"has the columns text, b, and none with a usual name for labels .*label_column"),
        ("text,label\n1,2,3\n", r"row 1 of .* has 3 fields, but the header has 2 \(text, label\): repair that row"),
    ],
)
def test_files_without_them_say_what_is_there(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        ClassificationTask(write(tmp_path / "some.csv", text)).load("train")


@pytest.mark.parametrize(
    ("text", "message"),
    [("3", "holds a JSON int: expected a list of objects"), ("[1]", "holds a JSON list: expected a list of objects")],
)
def test_json_of_other_things(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        load_classification(write(tmp_path / "x.json", text), "train")


def test_a_limit_takes_the_first_examples(tmp_path):
    source = write(tmp_path / "some.csv", "text,label\na,1\nb,0\nc,1\n")
    assert ClassificationTask(source, limit=2).load_scored("train")["text"][:] == ["a", "b"]
    assert len(ClassificationTask(source, limit=9).load_scored("train")) == 3


# --- images and sounds -----------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        for kind in ("cat", "dog"):
            folder = tmp_path / "images" / split / kind
            folder.mkdir(parents=True)
            for i in range(2):
                Image.fromarray(rng.integers(0, 255, (9, 7, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "images"


def tone(path, seconds=0.02, rate=16_000, width=2):
    samples = [int(9000 * math.sin(i / 9)) for i in range(int(seconds * rate))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(
            struct.pack(f"<{len(samples)}{'h' if width == 2 else 'b'}", *(s >> 8 * (2 - width) for s in samples))
        )


def test_a_folder_of_images(images, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    content, where = read_split(str(images), "validation", texts=False)
    assert where == f"split 'validation' of {str(images)!r}"
    assert content["image"][0].size == (7, 9)
    assert content.features["label"].names == ["cat", "dog"]
    assert content["label"][:] == [0, 0, 1, 1]
    assert column_names(str(images)) == ["image", "label"]
    assert not list((tmp_path / "cache").glob("**/*.arrow"))  # the user's cache is not filled
    with pytest.raises(DataError, match=r"no split 'test' in .*: it has train, validation"):
        read_split(str(images), "test", texts=False)


def test_a_folder_of_sounds(tmp_path):
    for kind in ("low", "high"):
        tone(tmp_path / "sounds" / kind / "a.wav")
    content, _ = read_split(str(tmp_path / "sounds"), "train", texts=False)
    (sound, _), names = content["audio"][:], content.column_names
    assert (sound["sampling_rate"], len(sound["array"]), "label" in names) == (16_000, 320, True)
    assert sound["array"][1] == pytest.approx(9000 * math.sin(1 / 9) / 32768, abs=1e-4)


@pytest.mark.skipif(__import__("importlib").util.find_spec("soundfile") is not None, reason="soundfile reads these")
def test_sounds_that_need_another_package(tmp_path):
    tone(tmp_path / "sounds" / "a" / "a.wav", width=1)
    with pytest.raises(DataError, match="has 8 bits a sample: expected 16, or install soundfile"):
        read_split(str(tmp_path / "sounds"), "train", texts=False)
    (tmp_path / "sounds" / "a" / "a.wav").write_bytes(b"no sound")
    with pytest.raises(DataError, match=r"is not a WAV file .*, and soundfile, which reads others, is not installed"):
        read_split(str(tmp_path / "sounds"), "train", texts=False)


def test_a_folder_of_nothing(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"x")
    with pytest.raises(DataError, match=r"no data files in .* \(found: x.bin\): expected one file per split"):
        read_split(str(tmp_path), "train", texts=False)
