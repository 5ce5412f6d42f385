"""Finding models and data: local folders of every kind, the cache, and a Hub that does not answer."""

import csv
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_prune.checkpoint.sources import check_model_source, model_class
from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation.data.checks import rows_named
from hf_prune.evaluation.data.files import refuse_same_split
from hf_prune.evaluation.data.loading import fingerprint, load_classification, load_sst2, load_texts
from hf_prune.evaluation.data.sources import check_data_source, check_text_source
from hf_prune.utils.hub_access import check_hub_reachable, local_folder

ROWS = [("a charming film", 1), ('he said " no', 0), ("dull", 0)]
BOUND = 1.5  # seconds: the promise is one, the rest is for a busy machine


def write_tsv(path: Path, rows=ROWS, header=("sentence", "label")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join("\t".join(map(str, row)) for row in [header, *rows]) + "\n", encoding="utf-8")
    return path


def write_parquet(path: Path, rows=ROWS, label=None) -> Path:
    features = Features({"sentence": Value("string"), "label": label or Value("int64")})
    columns = {"sentence": [row[0] for row in rows], "label": [row[1] for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    import pyarrow.parquet as pq

    pq.write_table(Dataset.from_dict(columns, features=features).data.table, path)
    return path


def rows_of(dataset) -> list[tuple]:
    return list(zip(dataset["sentence"], dataset["label"], strict=True))


@pytest.fixture
def online(monkeypatch):
    """Nothing in the environment says that the Hub is not to be asked, and no proxy is in between."""
    import huggingface_hub

    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.endswith("_OFFLINE") or name == "HF_PRUNE_HUB_TIMEOUT":
            monkeypatch.delenv(name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()  # the client reads the proxies when it is made
    yield monkeypatch
    huggingface_hub.close_session()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "empty-cache")


@pytest.fixture
def closed_port(online):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    online.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")


@pytest.fixture
def silent_server(online):
    with socket.create_server(("127.0.0.1", 0)) as server:  # the kernel accepts, nobody answers
        online.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield


@pytest.fixture(params=[200, 404, 503])
def answering_server(online, request):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(request.param)
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        online.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        yield
        server.shutdown()
        thread.join()


def fails_fast(call, match):
    start = time.perf_counter()
    with pytest.raises(DataError, match=match) as caught:
        call()
    assert time.perf_counter() - start < BOUND
    return str(caught.value)


# --- the Hub ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("closed_port")
def test_refused_connection_is_reported_at_once():
    message = fails_fast(lambda: check_hub_reachable("model 'a/b'"), "the connection was refused")
    assert "cannot get model 'a/b' from the Hugging Face Hub at http://127.0.0.1:" in message
    assert "Pass a local folder" in message


@pytest.mark.usefixtures("silent_server")
def test_silence_is_reported_within_a_second():
    fails_fast(lambda: check_hub_reachable("x"), r"no answer within 0\.8 s \(HF_PRUNE_HUB_TIMEOUT")


@pytest.mark.usefixtures("silent_server")
def test_timeout_can_be_set(monkeypatch):
    monkeypatch.setenv("HF_PRUNE_HUB_TIMEOUT", "0.1")
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"no answer within 0\.1 s"):
        check_hub_reachable("x")
    assert time.perf_counter() - start < 0.6


def test_name_resolution_that_hangs_is_cut_off(online):
    released = threading.Event()
    online.setenv("HF_ENDPOINT", "http://hub.example")
    online.setenv("HF_PRUNE_HUB_TIMEOUT", "0.2")

    def hang(*args, **kwargs):
        released.wait(30)
        raise socket.gaierror("released")

    online.setattr(socket, "getaddrinfo", hang)
    try:
        fails_fast(lambda: check_hub_reachable("x"), r"no answer within 0\.2 s")
    finally:
        released.set()
        for thread in threading.enumerate():
            if thread.name == "hf_prune-hub-check":
                thread.join(5)


def test_unknown_host_is_reported(online):
    def unknown(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    online.setenv("HF_ENDPOINT", "http://hub.example")
    online.setattr(socket, "getaddrinfo", unknown)
    fails_fast(lambda: check_hub_reachable("x"), "at http://hub.example: the host name cannot be resolved")


def test_other_failures_are_named(online):
    online.setenv("HF_ENDPOINT", "ftp://hub.example")
    fails_fast(lambda: check_hub_reachable("x"), "UnsupportedProtocol: ")


@pytest.mark.usefixtures("answering_server")
def test_any_http_answer_counts():
    assert check_hub_reachable("x") is None
    assert check_model_source("owner/not-cached-anywhere") is False


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.usefixtures("answering_server")
def test_offline_variable_forbids_the_request(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    fails_fast(lambda: check_hub_reachable("x"), f"{name} is set. Unset it, or pass a local folder")


def test_offline_mode_read_at_import_counts(online):
    online.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails_fast(lambda: check_hub_reachable("x"), "HF_HUB_OFFLINE is set")


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
def test_bad_timeout(online, value):
    online.setenv("HF_PRUNE_HUB_TIMEOUT", value)
    with pytest.raises(DataError, match=f"HF_PRUNE_HUB_TIMEOUT is '{value}': expected a positive number of seconds"):
        check_hub_reachable("x")


# --- models ----------------------------------------------------------------------------------------


def test_model_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert check_model_source(str(tmp_path)) is False
    assert check_model_source(tmp_path) is False


def test_model_folder_without_config(tmp_path):
    for i in range(10):
        (tmp_path / f"{i}.bin").touch()
    with pytest.raises(DataError, match=r"without config\.json \(found: 0\.bin, .*, 7\.bin and 2 more\): pass the"):
        check_model_source(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"without config\.json \(found: nothing\)"):
        check_model_source(tmp_path / "empty")


@pytest.mark.parametrize("path", ["./gone", "/gone", "a/b/c", "../gone", "", "~/gone"])
def test_missing_folder(path):
    with pytest.raises(DataError, match=f"no such folder: '{re.escape(path)}'.*Pass a folder"):
        check_model_source(path)


def test_home_is_not_expanded():
    with pytest.raises(DataError, match="write the home folder in full: '~' is not expanded"):
        check_model_source("~/gone")


def test_model_that_is_a_file(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(DataError, match=r"model\.safetensors' is a file: pass the folder that holds a model"):
        check_model_source(tmp_path / "model.safetensors")


def test_malformed_hub_id():
    with pytest.raises(DataError, match="'no spaces' is neither a folder nor a Hub id of a model"):
        check_model_source("no spaces")


@pytest.mark.usefixtures("closed_port")
def test_unreachable_model_fails_fast(tmp_path):
    fails_fast(lambda: check_model_source("owner/name", cache_dir=tmp_path), "cannot get model 'owner/name'")


@pytest.mark.usefixtures("closed_port")
def test_cached_model_needs_no_hub(tmp_path):
    repo = tmp_path / "models--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "snapshots" / "abc" / "config.json").write_text("{}")
    assert check_model_source("owner/name", cache_dir=tmp_path) is True
    fails_fast(lambda: check_model_source("owner/name", revision="v2", cache_dir=tmp_path), "connection was refused")


# --- SST-2 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "data", "SST-2", "sst2"])
@pytest.mark.parametrize("split", ["validation", "dev", "val", "valid"])
def test_sst2_tsv_folder(tmp_path, folder, split):
    write_tsv(tmp_path / folder / "dev.tsv")
    dataset = load_sst2(split, tmp_path)
    assert dataset.column_names == ["sentence", "label"]
    assert rows_of(dataset) == ROWS


def test_quotes_in_tsv_are_plain_characters(tmp_path):
    rows = [('"', 1), ('"open', 0), ("it 's", 1), ('"a"b', 0)]
    write_tsv(tmp_path / "train.tsv", rows)
    assert rows_of(load_sst2("train", tmp_path)) == rows


@pytest.mark.parametrize("name", ["validation.parquet", "validation-00000-of-00001.parquet", "dev.parquet"])
def test_sst2_parquet_folder(tmp_path, name):
    write_parquet(tmp_path / "data" / name)
    assert rows_of(load_sst2("validation", str(tmp_path))) == ROWS


def test_shards_are_joined_in_order(tmp_path):
    for i, row in enumerate(ROWS):
        write_parquet(tmp_path / f"train-0000{i}-of-00003.parquet", [row])
    assert rows_of(load_sst2("train", tmp_path)) == ROWS
    (tmp_path / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match=r"split 'train' in .* has 2 of 3 files: found train-00000-of-00003"):
        load_sst2("train", tmp_path)


def test_class_names_of_parquet_are_kept(tmp_path):
    write_parquet(tmp_path / "validation.parquet", label=ClassLabel(names=["negative", "positive"]))
    dataset = load_sst2("validation", tmp_path)
    assert dataset.features["label"].names == ["negative", "positive"]
    assert rows_of(dataset) == ROWS


def test_unknown_split_lists_the_splits(tmp_path):
    write_tsv(tmp_path / "dev.tsv")
    write_tsv(tmp_path / "train.tsv")
    with pytest.raises(DataError, match=r"no split 'holdout' in .*: it has dev, train"):
        load_sst2("holdout", tmp_path)


def test_exact_split_name_wins_over_its_aliases(tmp_path):
    write_tsv(tmp_path / "dev.tsv", [("from dev", 0)])
    write_tsv(tmp_path / "val.tsv", [("from val", 0)])
    assert rows_of(load_sst2("val", tmp_path)) == [("from val", 0)]


def test_split_in_two_formats(tmp_path):
    write_tsv(tmp_path / "train.tsv")
    write_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"more than once \(train\.parquet, train\.tsv\): keep one of them"):
        load_sst2("train", tmp_path)


def test_unlabelled_test_split(tmp_path):
    write_tsv(tmp_path / "test.tsv", [(0, "dull"), (1, "fine")], header=("index", "sentence"))
    with pytest.raises(DataError, match=r"no column 'label' \(found: index, sentence\), and without labels it cannot"):
        load_sst2("test", tmp_path)
    (tmp_path / "test.tsv").unlink()
    write_parquet(tmp_path / "test.parquet", [("dull", -1), ("fine", -1)])
    with pytest.raises(DataError, match=r"unlabelled \(every label is -1\).*use a labelled split"):
        load_sst2("test", tmp_path)


def test_folder_without_data(tmp_path):
    (tmp_path / "notes.md").touch()
    with pytest.raises(DataError, match=r"no data files in .* \(found: notes\.md\): expected one file per split"):
        load_sst2("validation", tmp_path)


def test_missing_data_folder():
    with pytest.raises(DataError, match=r"no such folder: './gone'\. Pass a folder that holds data"):
        load_sst2("validation", "./gone")


def cache_sst2(cache: Path, tmp_path: Path) -> None:
    """What ``load_dataset("nyu-mll/glue", "sst2")`` leaves behind, made from a local file."""
    from datasets.packaged_modules.parquet.parquet import Parquet

    file = write_parquet(tmp_path / "source" / "validation.parquet")
    builder = Parquet(
        cache_dir=str(cache),
        dataset_name="glue",
        config_name="sst2",
        hash="abc",
        data_files={"validation": [str(file)]},
    )
    builder.download_and_prepare()
    config = Path(builder.cache_dir).parents[1]
    config.rename(config.parent / "sst2")
    config.parent.rename(cache / "nyu-mll___glue")


@pytest.mark.usefixtures("closed_port")
def test_cached_sst2_needs_no_hub(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache_sst2(cache, tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    assert rows_of(load_sst2("dev")) == ROWS
    check_data_source("glue/sst2")  # nothing is raised: it is cached
    with pytest.raises(DataError, match="no split 'train' in 'glue/sst2': it has validation"):
        load_sst2("train")
    with pytest.raises(DataError, match="cannot get data set 'glue/mrpc'"):
        load_classification("glue/mrpc", "train")


@pytest.mark.usefixtures("closed_port")
def test_damaged_cache_is_reported(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache_sst2(cache, tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    (arrow,) = cache.rglob("*.arrow")
    arrow.unlink()
    with pytest.raises(DataError, match=r"cached copy of data set 'nyu-mll/glue' in .* cannot be read .*: delete that"):
        load_sst2("dev")


@pytest.mark.usefixtures("closed_port", "empty_cache")
def test_unreachable_data_fails_fast():
    fails_fast(lambda: check_data_source("glue/sst2"), "cannot get data set 'glue/sst2' .* the connection was refused")
    fails_fast(load_sst2, "cannot get data set 'glue/sst2' .* the connection was refused")


@pytest.mark.usefixtures("silent_server", "empty_cache")
def test_silent_hub_fails_fast_for_data():
    fails_fast(load_sst2, "cannot get data set 'glue/sst2' .* no answer within")


@pytest.mark.parametrize("answering_server", [404], indirect=True)
@pytest.mark.usefixtures("answering_server")
def test_data_that_the_hub_does_not_have(tmp_path):
    # The Hub's address is read at import: only another process can be sent to the local server.
    code = "import hf_prune; hf_prune.load_classification('owner/none:part', 'train')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[3],
        env={**os.environ, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "DataError: data set 'owner/none:part' cannot be loaded from the Hugging Face Hub: " in done.stderr


def test_malformed_data_id():
    with pytest.raises(DataError, match="'no spaces' is neither a folder nor a Hub id of data"):
        load_classification("no spaces", "train")


# --- other data ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("'sentence','label'\n'good, really',1\n'it''s bad',0\n", ["good, really", "it's bad"]),
        ("sentence;label\n'good; really';'1'\n'bad';'0'\n", ["good; really", "bad"]),
        ("sentence,label\n'good' film,1\n'tis bad,0\n", ["'good' film", "'tis bad"]),
        ("sentence,label\n'good',1\nbad,0\nnot 'bad',1\n", ["'good'", "bad", "not 'bad'"]),
        ("sentence,label\n\"'good', really\",1\n\"'bad'\",0\n", ["'good', really", "'bad'"]),
    ],
)
def test_single_quotes_are_quotes_where_they_are_around_fields_of_all_rows(tmp_path, text, sentences):
    (tmp_path / "train.csv").write_text(text)
    assert load_classification(tmp_path, "train")["sentence"][:] == sentences


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "json"])
def test_files_with_a_mark_of_their_encoding(tmp_path, encoding, suffix):
    mark = "" if encoding in ("utf-16", "utf-32", "utf-8-sig") else "\ufeff"
    texts = {"tsv": "sentence\tlabel\ncafé\t1\n", "csv": "sentence,label\ncafé,1\n"}
    row = '{"sentence": "café", "label": 1}'
    text = {**texts, "jsonl": f"{row}\n", "json": f"[{row}]"}[suffix]
    (tmp_path / f"train.{suffix}").write_bytes((mark + text).encode(encoding))
    assert load_classification(tmp_path, "train")[0] == {"sentence": "café", "label": 1}


def test_another_encoding_is_named_and_how_to_convert_it(tmp_path):
    (tmp_path / "train.csv").write_bytes("sentence,label\ncafé,1\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"train.csv cannot be read as UTF-8 CSV: .*Latin-1.* iconv -f WINDOWS-1252"):
        load_classification(tmp_path, "train")


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "json"])
def test_an_empty_file_is_called_empty(tmp_path, suffix):
    (tmp_path / f"train.{suffix}").touch()
    with pytest.raises(DataError, match=rf"train.{suffix} is empty: expected"):
        load_classification(tmp_path, "train")


def test_rows_in_errors_say_whose_they_are(tmp_path):
    path = tmp_path / "rows.csv"
    path.touch()
    for message, said in (
        ("row 3: label 7 is none", f"row 3 of '{path}': label 7 is none"),
        ("row 1, word 2: no label", f"row 1, word 2 of '{path}': no label"),
        ("row 3 of x: no label", "row 3 of x: no label"),
    ):
        with pytest.raises(DataError) as caught, rows_named(path, "train"):
            raise DataError(message)
        assert str(caught.value) == said
    with pytest.raises(DataError, match="row 3 of split 'train' of 'a/b': no"), rows_named("a/b", "train"):
        raise DataError("row 3: no")


def test_a_folder_that_is_not_there_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    with pytest.raises(
        DataError, match=r"no such folder: 'm/nosuch', though 'm' is one\. Pass a folder that holds a mod"
    ):
        local_folder("m/nosuch", "a model")
    assert local_folder("n/nosuch", "a model") is None


def test_csv_with_quoting_and_pairs(tmp_path):
    (tmp_path / "train.csv").write_text('first,second,gold,extra\n"a, b",c,yes,1\nd,"e ""f""",no,2\n')
    dataset = load_classification(tmp_path, "train", text_columns=("first", "second"), label_column="gold")
    assert dataset[:] == {"first": ["a, b", "d"], "second": ["c", 'e "f"'], "gold": ["yes", "no"]}


def test_jsonl(tmp_path):
    lines = [{"sentence": "ä", "label": 1, "id": 7}, {"sentence": "b", "label": 0}]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert rows_of(load_classification(tmp_path, "validation")) == [("ä", 1), ("b", 0)]


def test_byte_order_mark_is_no_part_of_the_header(tmp_path):
    (tmp_path / "train.csv").write_bytes("\ufeffsentence,label\r\na,1\r\n".encode())
    assert rows_of(load_classification(tmp_path, "train")) == [("a", 1)]


def test_string_labels_are_kept(tmp_path):
    write_tsv(tmp_path / "train.tsv", [("a", "POSITIVE"), ("b", "NEGATIVE")])
    assert load_classification(tmp_path, "train")["label"][:] == ["POSITIVE", "NEGATIVE"]


def test_a_file_is_a_split_whatever_its_name(tmp_path):
    tsv, parquet = write_tsv(tmp_path / "my reviews.tsv"), write_parquet(tmp_path / "other.parquet")
    for path in (tsv, parquet):
        check_data_source(path)
        assert rows_of(load_classification(path, "validation")) == rows_of(load_classification(str(path), "train"))
    assert rows_of(load_classification(tsv, "dev")) == ROWS


def test_a_file_that_is_no_table(tmp_path):
    (tmp_path / "all.txt").write_text("a\n")
    for call in (check_data_source, lambda path: load_classification(path, "train")):
        with pytest.raises(DataError, match=r"all\.txt' is not a table, and labels are needed: expected a file that"):
            call(str(tmp_path / "all.txt"))
    with pytest.raises(DataError, match=r"no such file or folder: 'none\.csv'\. Pass a file"):
        check_data_source("none.csv")


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.jsonl"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\n \n\r\n"])
def test_long_texts_and_blank_lines_at_the_end(tmp_path, name, end):
    """Python's reader stops at 131,072 characters; what it is set to for others stays."""
    long = "word " * 40_000
    lines = [("sentence", "label"), (long, "1"), ("b", "0")]
    separator = "\t" if name.endswith("tsv") else ","
    text = "\n".join(separator.join(line) for line in lines)
    if name.endswith("jsonl"):
        text = "\n".join(json.dumps({"sentence": sentence, "label": int(label)}) for sentence, label in lines[1:])
    (tmp_path / name).write_text(text + end)
    before = csv.field_size_limit()
    assert rows_of(load_classification(tmp_path, "train")) == [(long, 1), ("b", 0)]
    assert csv.field_size_limit() == before


def test_a_blank_line_within_is_a_broken_row(tmp_path):
    (tmp_path / "train.csv").write_text("sentence,label\na,1\n\nb,0\n")
    with pytest.raises(DataError, match=r"row 2 of .* has 0 fields, but the header has 2"):
        load_classification(tmp_path, "train")


def test_texts_without_any_are_texts(tmp_path):
    (tmp_path / "train.csv").write_text('text\na\n" "\n""\n')
    assert load_texts(tmp_path, "train") == ["a", " ", ""]


def test_class_numbers_that_a_table_wrote_with_a_point(tmp_path):
    write_tsv(tmp_path / "train.tsv", [("a", "1.0"), ("b", "0.0")])
    assert rows_of(load_classification(tmp_path, "train")) == [("a", 1), ("b", 0)]
    (tmp_path / "dev.jsonl").write_text('{"sentence": "a", "label": 1.0}\n')
    assert rows_of(load_classification(tmp_path, "dev")) == [("a", 1)]


def test_two_splits_that_are_the_same(tmp_path):
    with pytest.raises(ConfigError, match="the split 'dev' is scored twice: expected two; it lies"):
        refuse_same_split(str(tmp_path), "dev", "validation", "scored twice", "it lies")
    refuse_same_split(str(tmp_path), "dev", "train", "scored twice", "it lies")
    path = write_tsv(tmp_path / "train.tsv")
    with pytest.raises(
        ConfigError, match=r"the file '.*train\.tsv' is scored twice: expected two splits, so pass a folder"
    ):
        refuse_same_split(str(path), "dev", "train", "scored twice", "it lies")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [("a", "3.8"), ("b", "1.25")],
            r"row 1 of .*: label '3\.8' is not an integer: .* \(regression\) has no classes",
        ),
        ([("a", 1), ("b", "")], "row 2 of split 'train' of .*: 'label' is empty, expected a label"),
        ([("a", 1), ("b", 0), ("c", "x")], "row 3 of .*: label 'x' is not an integer: repair or drop"),
        ([("a", 1), ("b", "0.5")], "row 2 of .*: label '0.5' is not an integer"),
        ([("a", "yes"), ("b", 1)], "row 2 of .*: label '1' is a number, but row 1 has the string 'yes'"),
        ([("a", 1), ("b", -1)], "row 2 of .*: label -1 is negative, expected 0 or more: drop unlabelled rows"),
        ([("a", 1), ("b", 0, 5)], r"row 2 of .* has 3 fields, but the header has 2 \(sentence, label\)"),
        ([("a", 1), ("b",)], "row 2 of .* has 1 fields"),
        ([], "split 'train' of .* has no rows: expected at least one"),
    ],
)
def test_wrong_rows(tmp_path, rows, message):
    write_tsv(tmp_path / "train.tsv", rows)
    with pytest.raises(DataError, match=message):
        load_classification(tmp_path, "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"sentence": "a", "label": 1}\nnot json', "row 2 of .* is not JSON .*: expected one object a line"),
        ("[1, 2]", r"row 1 of .* is '\[1, 2\]': expected a JSON object"),
        ('{"sentence": "a", "label": 1}\n{"label": 1}', "row 2 of .*: 'sentence' is None, expected text"),
        ('{"sentence": "a", "label": 1}\n{"sentence": "b"}', "row 2 of .*: 'label' is empty"),
        ('{"sentence": 5, "label": 1}', "row 1 of .*: 'sentence' is 5, expected text"),
        ('{"sentence": "a", "label": 0.5}', "row 1 of .*: label 0.5 is not an integer.* has no classes"),
        ('{"sentence": "a", "label": 1}\n{"sentence": "b", "label": "x"}', "a column mixes types"),
    ],
)
def test_wrong_jsonl(tmp_path, text, message):
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        load_classification(tmp_path, "train")


@pytest.mark.parametrize("source", ["one.txt", "", "notes.md"])
def test_lines_of_text_files_are_texts_without_labels(tmp_path, source):
    for name in ("one.txt", "notes.md", "train.txt"):
        (tmp_path / name).write_text("good film\n\n  \nbad film\n")
    dataset = load_classification(tmp_path / source, "train", text_columns=("any",), label_column=None)
    assert dataset.to_dict() == {"any": ["good film", "bad film"]}


def test_text_files_without_lines_or_for_pairs(tmp_path):
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"a\.txt' has no text: expected at least one line that is not blank"):
        load_classification(tmp_path / "a.txt", "train", label_column=None)
    with pytest.raises(DataError, match=r"which has no columns, and text_columns names 2 of them: name one, or"):
        load_classification(tmp_path / "a.txt", "train", text_columns=("a", "b"), label_column=None)


def test_missing_text_column(tmp_path):
    write_tsv(tmp_path / "train.tsv")
    with pytest.raises(DataError, match=r"split 'train' of .* has no column 'text' \(found: sentence, label\): name"):
        load_classification(tmp_path, "train", text_columns=("text",))


def test_shards_with_other_columns(tmp_path):
    write_tsv(tmp_path / "train-00000-of-00002.tsv")
    write_tsv(tmp_path / "train-00001-of-00002.tsv", header=("text", "label"))
    with pytest.raises(DataError, match=r"has the columns text, label, but train-.* has sentence, label"):
        load_classification(tmp_path, "train")


def test_unreadable_files(tmp_path):
    (tmp_path / "train.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n")
    with pytest.raises(DataError, match=r"train\.tsv cannot be read as UTF-8 TSV"):
        load_classification(tmp_path, "train")
    (tmp_path / "dev.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"dev\.parquet cannot be read as parquet"):
        load_classification(tmp_path, "dev")


# --- fingerprint and imports -----------------------------------------------------------------------


def test_fingerprint_sees_contents_and_order_only(tmp_path):
    columns = ["sentence", "label"]
    write_tsv(tmp_path / "train.tsv")
    write_parquet(tmp_path / "dev.parquet", label=ClassLabel(names=["n", "p"]))
    write_tsv(tmp_path / "test.tsv", ROWS[::-1])
    train, dev, test = (fingerprint(load_sst2(split, tmp_path), columns) for split in ("train", "dev", "test"))
    assert re.fullmatch("[0-9a-f]{16}", train)
    assert train == dev != test
    dataset = load_sst2("train", tmp_path)
    assert fingerprint(dataset.with_format("torch"), columns) == train
    assert fingerprint(dataset, ["sentence"]) != train
    assert fingerprint(dataset.select([0, 1]), columns) != train


def test_fingerprint_keeps_values_apart():
    split, joined = Dataset.from_dict({"a": ["x", "y"]}), Dataset.from_dict({"a": ["xy"]})
    assert fingerprint(split, ["a"]) != fingerprint(joined, ["a"])
    with pytest.raises(DataError, match=r"the data set has no column 'b' \(found: a\)"):
        fingerprint(split, ["b"])


def test_import_is_cheap():
    code = (
        "import sys, hf_prune.evaluation.accuracy, hf_prune.evaluation.data.loading\n"
        "print(*[m for m in ('datasets', 'evaluate', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


# --- plain texts -----------------------------------------------------------------------------------

WIKI = " \n = A title = \n \n Some words .\u2028 And more . \n\n"


def test_a_text_file_is_one_text(tmp_path):
    (tmp_path / "book.md").write_text(WIKI, encoding="utf-8-sig")
    assert load_texts(tmp_path / "book.md") == [WIKI]


@pytest.mark.parametrize("name", ["wiki.test.raw", "wiki.train.first1M.raw", "wiki.valid.tokens"])
def test_files_of_wikitext_are_read_as_the_hub_has_them(tmp_path, name):
    (tmp_path / name).write_text(WIKI, encoding="utf-8")
    assert load_texts(str(tmp_path / name)) == ["", " = A title = \n", "", " Some words .\u2028 And more . \n", ""]


def test_folders_of_text_files(tmp_path):
    for name in ("train.txt", "wiki.test.raw", "wiki.valid.raw", "notes.md"):
        (tmp_path / name).write_text(f"{name}\n")
    assert load_texts(tmp_path) == ["train.txt\n"]
    assert load_texts(tmp_path, "test") == ["wiki.test.raw\n"]
    assert load_texts(tmp_path, "validation") == ["wiki.valid.raw\n"]
    with pytest.raises(DataError, match=r"no split 'dev2' in .*: it has test, train, valid"):
        load_texts(tmp_path, "dev2")
    (tmp_path / "test.txt").write_text("x")
    with pytest.raises(DataError, match=r"'test' is in .* more than once \(test.txt, wiki.test.raw\): pass one of the"):
        load_texts(tmp_path, "test")
    (tmp_path / "deep" / "data").mkdir(parents=True)
    (tmp_path / "deep" / "data" / "train.txt").write_text("below")
    assert load_texts(tmp_path / "deep") == ["below"]


def test_columns_of_text(tmp_path):
    write_parquet(tmp_path / "a" / "train-00000-of-00001.parquet")
    sentences = [row[0] for row in ROWS]
    (tmp_path / "a" / "readme.txt").write_text("not a split where there are tables")
    assert load_texts(tmp_path / "a", "train", text_column="sentence") == sentences
    assert load_texts(tmp_path / "a" / "train-00000-of-00001.parquet", text_column="sentence") == sentences
    assert load_texts(write_tsv(tmp_path / "any.tsv"), text_column="sentence") == sentences
    with pytest.raises(
        DataError, match=r"split 'train' of .* has no column 'text' \(found: sentence, label\): name it with text_col"
    ):
        load_texts(tmp_path / "a")
    with pytest.raises(DataError, match=r"any.tsv' has no column 'text' \(found: sentence, label\): name it with te"):
        load_texts(tmp_path / "any.tsv")
    with pytest.raises(DataError, match=r"row 1 of .*'label' is 1, expected text"):
        load_texts(tmp_path / "a", text_column="label")
    with pytest.raises(DataError, match=r"none.tsv' has no rows: expected at least one"):
        load_texts(write_tsv(tmp_path / "none.tsv", []), text_column="sentence")


def test_texts_that_cannot_be_read(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\x00")
    with pytest.raises(DataError, match=r"binary.txt cannot be read as UTF-8 text: .*0xff"):
        load_texts(tmp_path / "binary.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"binary.txt begins as UTF-16 text does, and cannot be read as such"):
        load_texts(tmp_path / "binary.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no data files in .*empty"):
        load_texts(tmp_path / "empty")
    with pytest.raises(DataError, match=r"no such folder: './nothing'"):
        load_texts("./nothing")


def test_texts_without_labels(tmp_path):
    write_tsv(tmp_path / "train.tsv", [(row[0],) for row in ROWS], header=("sentence",))
    data = load_classification(tmp_path, "train", label_column=None)
    assert data.column_names == ["sentence"]
    assert list(data["sentence"]) == [row[0] for row in ROWS]


def test_text_sources_are_checked_before_any_work(tmp_path, empty_cache, closed_port):
    (tmp_path / "book").write_text("x")
    for source in (tmp_path, str(tmp_path / "book")):
        assert check_text_source(source) is None
    for source in ("none.txt", "a/wiki.test.raw", tmp_path / "none.parquet"):
        with pytest.raises(
            DataError, match=r"no such file or folder: '.*(none|wiki).*'. Pass a text file, a folder that"
        ):
            check_text_source(source)
    fails_fast(lambda: check_text_source("owner/data"), "cannot get data set 'owner/data'")


def test_model_class_is_read_from_the_config(tmp_path, closed_port):
    def of(text: str) -> str:
        (tmp_path / "config.json").write_text(text)
        return model_class(tmp_path)

    assert of('{"architectures": ["LlamaForCausalLM"]}') == "LlamaForCausalLM"
    assert of('{"architectures": null}') == of("{}") == ""
    for text in ("[]", "no"):
        with pytest.raises(DataError, match=r"the config.json of .* does not describe a model"):
            of(text)
    with pytest.raises(DataError, match=r"no such folder: '\./nothing'"):
        model_class("./nothing")
    fails_fast(lambda: model_class("owner/name"), "cannot get model 'owner/name'")
