"""What may be written into, what comes along, and what is said of the rest."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_prune import (
    AutoPrunedModelForSequenceClassification,
    CheckpointError,
    PruningConfig,
    compress_checkpoint,
    decompress_checkpoint,
    migrate_checkpoint,
    prunable,
    prune_stream,
    run_sweep,
)
from hf_prune.checkpoint.companions import copy_companions, has_tokenizer
from hf_prune.checkpoint.files import MASK_FILE
from hf_prune.checkpoint.staging import staged_checkpoint
from hf_prune.cli.main import main
from hf_prune.cli.workflows.prune import prune_checkpoint
from hf_prune.cli.workflows.train import train_checkpoint
from hf_prune.cli.workflows.trim_vocab import trim_checkpoint
from hf_prune.utils import locks as locks_module
from hf_prune.utils.figures import save_figure
from hf_prune.utils.files import write_json
from hf_prune.utils.folders import MARK, is_left_out, is_never_uploaded
from hf_prune.utils.output_folder import check_file, check_output
from hf_prune.utils.staging import staged_folder
from tests import models

HALF = PruningConfig(sparsity=0.5)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {MARK}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("outputs") / "dense"
    models.tiny_classifier().save_pretrained(folder)
    models.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def source(dense, tmp_path) -> Path:
    return Path(shutil.copytree(dense, tmp_path / "source"))


def torch_pruned(source: Path) -> Path:
    """The same as another tool would have left it."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith("query.weight") or name.endswith("q_lin.weight"))
    weight = tensors.pop(name)
    tensors |= {f"{name}_orig": weight, f"{name}_mask": torch.ones_like(weight)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


WRITERS: dict[str, Callable[..., Any]] = {
    "prune": lambda source, out, **o: prune_checkpoint(str(source), HALF, out, **o),
    "prune --stream": lambda source, out, **o: prune_stream(source, HALF, out, **o),
    "trim-vocab": lambda source, out, **o: trim_checkpoint(str(source), out, ["w1 w2"], **o),
    "compress": compress_checkpoint,
    "decompress": decompress_checkpoint,
    "migrate": migrate_checkpoint,
}


def prepared(command: str, source: Path) -> Path:
    """A source that a command takes."""
    if command == "decompress":
        shutil.move(source, source.with_name("plain"))
        compress_checkpoint(source.with_name("plain"), source)
    return torch_pruned(source) if command == "migrate" else source


@pytest.mark.parametrize("command", WRITERS)
def test_an_output_is_new_or_empty_or_was_written_by_the_same_command(command, source, tmp_path, caplog):
    write, source, out = WRITERS[command], prepared(command, source), tmp_path / "out"
    name = command.partition(" ")[0]
    before = contents(source)
    (tmp_path / "link").symlink_to(source)
    for there in (source, tmp_path / "link", tmp_path / "none" / ".." / "source"):
        for overwrite in (False, True):
            with pytest.raises(CheckpointError, match="would replace itself: name another folder"):
                write(source, there, overwrite=overwrite)
    with pytest.raises(CheckpointError, match=r"inner is inside .*source, which is read: name a folder elsewhere"):
        write(source, source / "deep" / "inner", overwrite=True)
    with pytest.raises(CheckpointError, match=r"holds files of .*source, which is read"):
        write(source, tmp_path, overwrite=True)
    assert contents(source) == before

    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    (out / "config.json").write_text("mine")
    with pytest.raises(CheckpointError, match=rf"out holds config\.json, thesis\.txt, which hf-prune {name} did not"):
        write(source, out)
    assert contents(out) == {"thesis.txt": b"mine", "config.json": b"mine"}

    write(source, out, overwrite=True)
    assert (out / "thesis.txt").read_text() == "mine"
    assert f"Replaced in {out}: config.json." in caplog.text
    first = contents(out)
    write(source, out)  # over its own
    assert contents(out) == first
    with pytest.raises(CheckpointError, match=rf"out was written by hf-prune {name}, not by hf-prune bake: name"):
        check_output(out, "bake")

    with (out / "model.safetensors").open("ab") as file:  # somebody trained it, say
        file.write(b"x")
    changed = contents(out)
    with pytest.raises(CheckpointError, match=rf"changed since hf-prune {name} wrote it, see model.safetensors: name"):
        write(source, out)
    assert contents(out) == changed
    assert contents(source) == before
    assert not list(tmp_path.glob(".*"))


def test_what_the_same_command_had_written_before_goes(source, tmp_path):
    """Files of another model's tokenizer do not stay beside those of this one."""
    (source / "spm.model").write_text("of the first")
    out = tmp_path / "out"
    prune_checkpoint(str(source), HALF, out)
    (out / "notes").write_text("mine")
    (source / "spm.model").unlink()
    prune_checkpoint(str(source), HALF, out)
    assert "spm.model" not in names(out)
    assert (out / "notes").read_text() == "mine"


def test_a_copy_of_an_output_is_one_and_a_damaged_mark_is_none(source, tmp_path):
    prune_checkpoint(str(source), HALF, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "copy", copy_function=shutil.copyfile)
    prune_checkpoint(str(source), HALF, tmp_path / "copy")
    before, again = contents(tmp_path / "out"), contents(tmp_path / "copy")
    named = {"README.md", "pruning_card.json", MARK}  # a card names its folder
    assert {k: v for k, v in again.items() if k not in named} == {k: v for k, v in before.items() if k not in named}
    assert again.keys() == before.keys()
    for damage in ("", "[]", '{"kind": "hf_prune.output", "version": 1, "files": {"../x": [1, ""]}}', "[" * 100_000):
        (tmp_path / "copy" / MARK).write_text(damage)
        with pytest.raises(CheckpointError, match="which hf-prune prune did not write"):
            check_output(tmp_path / "copy", "prune")


def test_links_in_a_source_may_not_lead_into_the_output(source, tmp_path):
    prune_checkpoint(str(source), HALF, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / "linked")
    (tmp_path / "linked" / "model.safetensors").unlink()
    (tmp_path / "linked" / "model.safetensors").symlink_to(tmp_path / "out" / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds files of"):
        prune_checkpoint(str(tmp_path / "linked"), HALF.replace(sparsity=0.7), tmp_path / "out", overwrite=True)


def test_what_gets_in_the_way_during_a_run_stays_and_the_result_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"out holds thesis.txt.* The result is in (\S+)") as caught:  # noqa: PT012
        with staged_checkpoint(tmp_path / "out", "prune") as staging:
            (staging / "config.json").write_text("{}")
            (tmp_path / "out" / "thesis.txt").write_text("mine")
    kept = Path(str(caught.value).rpartition("The result is in ")[2])
    assert contents(tmp_path / "out") == {"thesis.txt": b"mine"}
    assert contents(kept) == {"config.json": b"{}"}


def run(*arguments: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == code


def test_the_commands_take_overwrite_and_say_what_it_did(source, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("mine")
    (source / "README.md").write_text("mine")
    run("prune", source, "--out", out, code=1)
    assert "holds model.safetensors, which hf-prune prune did not write" in capsys.readouterr().err
    run("prune", source, "--out", out, "--overwrite")
    printed = capsys.readouterr().out
    assert f"Replaced in {out}: model.safetensors." in printed
    assert f"Not copied from {source}: README.md." in printed
    run("prune", source, "--out", out, "--json")
    printed = capsys.readouterr()
    assert json.loads(printed.out)
    assert f"Replaced in {out}: " in printed.err
    run("report", out, "--plots", source, code=1)
    assert "source holds" in capsys.readouterr().err
    run("report", out, "--plots", out, code=1)
    assert "would replace itself" in capsys.readouterr().err
    for _ in range(2):  # over its own
        run("report", out, "--plots", tmp_path / "plots")
    (tmp_path / "plots" / "layers.png").write_text("mine")
    capsys.readouterr()
    run("report", out, "--plots", tmp_path / "plots", code=1)
    assert "plots holds layers.png" in capsys.readouterr().err
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "thesis.txt").write_text("mine")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dev.tsv").write_text("sentence\tlabel\nw1\t0\nw2\t1\n")
    run("sweep", source, "--data", tmp_path / "data", "--out", tmp_path / "sweep", code=1)
    assert "sweep holds thesis.txt, which hf-prune sweep did not write" in capsys.readouterr().err
    (tmp_path / "model.onnx").write_text("mine")
    run("export", source, tmp_path / "model.onnx", code=1)
    assert "model.onnx exists already: name another file" in capsys.readouterr().err
    assert (tmp_path / "model.onnx").read_text() == "mine"


def test_files(tmp_path):
    with pytest.raises(CheckpointError, match="is a folder: expected a file to write"):
        check_file(tmp_path)
    (tmp_path / "a").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="a exists already"):
        check_file(tmp_path / "a")
    assert check_file(tmp_path / "a", overwrite=True) == tmp_path / "a"
    assert check_file(tmp_path / "b") == tmp_path / "b"


# --- one writer at a time --------------------------------------------------------------------------

OWNER = """
import sys
from hf_prune.utils.locks import output_lock
with output_lock(sys.argv[1], sys.argv[2]):
    print("locked", flush=True)
    sys.stdin.readline()
    if sys.argv[3:]:
        import os
        os._exit(9)
"""


@contextlib.contextmanager
def other_process(out: Path, command: str, *end: str) -> Iterator[subprocess.Popen[str]]:
    """One that writes into a folder, until the block ends or it is told."""
    words = [sys.executable, "-c", OWNER, str(out), command, *end]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        with contextlib.suppress(ValueError):  # which the block has told
            process.communicate("go on\n")


@pytest.mark.skipif(sys.platform != "linux", reason="locks of POSIX")
def test_two_runs_do_not_write_into_one_folder(source, tmp_path):
    out = tmp_path / "new" / "out"
    with other_process(out, "train") as other:
        who = rf"out is being written by process {other.pid} \(hf-prune train\): wait until it is done"
        for write in (
            lambda: prune_checkpoint(str(source), HALF, out),
            lambda: prune_stream(source, HALF, out),
            lambda: trim_checkpoint(str(source), out, ["w1"]),
            lambda: compress_checkpoint(source, out),
            lambda: run_sweep(models.tiny_classifier(), models.tiny_tokenizer(), None, out=out),
            lambda: train_checkpoint(str(source), HALF, out, None),
            lambda: pruned().save_pretrained(out),
            lambda: pruned().save_pretrained(out, compressed=True),
        ):
            with pytest.raises(CheckpointError, match=who):
                write()
        assert [path.name for path in out.parent.iterdir()] == [".out.lock"]
    assert not out.parent.exists()  # which the other one had made, and used for nothing
    prune_checkpoint(str(source), HALF, out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="locks of POSIX")
def test_saving_waits_for_another_save_and_a_killed_process_owns_nothing(tmp_path):
    out = tmp_path / "out"
    with other_process(out, "save_pretrained") as other:
        threading.Timer(0.3, lambda: other.communicate("go on\n")).start()
        pruned().save_pretrained(out)
        other.wait()
    with other_process(out, "prune", "killed") as other:
        (tmp_path / ".out.0123456789ab.tmp").mkdir()  # as it leaves it
        other.communicate("go on\n")
    pruned().save_pretrained(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="locks of POSIX")
def test_threads_that_save_into_one_folder_take_turns(tmp_path):
    threads = [threading.Thread(target=lambda: pruned().save_pretrained(tmp_path / "out")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path / "out").masks


@pytest.mark.skipif(sys.platform != "linux", reason="locks of POSIX")
@pytest.mark.parametrize("place", ["the owner is written", "the lock is removed", "the new folder is removed"])
def test_ctrl_c_leaves_no_lock_behind_and_nothing_that_the_next_save_keeps(place, tmp_path, monkeypatch):
    stop = unittest.mock.Mock(side_effect=KeyboardInterrupt)
    with monkeypatch.context() as patch:
        if place == "the owner is written":
            patch.setattr(json, "dumps", stop)
        elif place == "the lock is removed":
            patch.setattr(locks_module, "_remove_lock", stop)
        else:
            (tmp_path / "out").mkdir()
            patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt), locks_module.output_lock(tmp_path / "out", "prune"):
            with staged_folder(tmp_path / "out") as staging:
                (staging / "a").write_text("new")
    assert stop.called
    with locks_module.output_lock(tmp_path / "out", "prune"):
        pass
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}


def test_what_has_the_name_of_a_lock_stays(source, tmp_path):
    lock, elsewhere = tmp_path / ".out.lock", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for make in (lambda: lock.write_text("mine"), lambda: lock.symlink_to(elsewhere)):
        make()
        with pytest.raises(CheckpointError, match="is a file with the name of a lock"):
            WRITERS["prune"](source, tmp_path / "out")
        assert list(elsewhere.iterdir()) == []
        lock.unlink()
    lock.mkdir()
    (lock / "mine.txt").write_text("mine")
    WRITERS["prune"](source, tmp_path / "out")
    assert [path.name for path in lock.iterdir()] == ["mine.txt"]


def test_the_root_of_the_file_system_is_no_output(source):
    with pytest.raises(CheckpointError, match="is the root of the file system"):
        WRITERS["prune"](source, "/")


def test_where_there_are_no_locks_it_goes_without(tmp_path, monkeypatch):
    from hf_prune.utils import locks as locks_module

    if locks_module.fcntl is not None:

        def refuse(*args):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(locks_module.fcntl, "flock", refuse)
    pruned().save_pretrained(tmp_path / "out")
    monkeypatch.setattr(locks_module, "fcntl", None)
    pruned().save_pretrained(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- save_pretrained -------------------------------------------------------------------------------


def pruned(seed: int = 0) -> Any:
    return prunable(models.tiny_bert(seed=seed)).prune(0.5)


def test_a_variant_lies_beside_the_full_weights(tmp_path):
    model = pruned()
    model.save_pretrained(tmp_path)
    (tmp_path / "sparsity_report.json").write_text("of both")
    half = pruned().half()
    half.save_pretrained(tmp_path, variant="fp16")
    assert names(tmp_path) == {
        "config.json", "model.safetensors", "model.fp16.safetensors", MASK_FILE, "sparsity_report.json"
    }  # fmt: skip
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size="6KB")
    assert "model.safetensors.index.fp16.json" in names(tmp_path)
    assert {"model.safetensors", "model.fp16-00001-of-00003.safetensors"} <= names(tmp_path) | {
        f"model.fp16-00001-of-{n:05}.safetensors" for n in range(2, 9)
    }
    half.save_pretrained(tmp_path, variant="fp16")
    assert sorted(name for name in names(tmp_path) if name.startswith("model")) == [
        "model.fp16.safetensors",
        "model.safetensors",
    ]
    for variant, dtype in ((None, torch.float32), ("fp16", torch.float16)):
        loaded = AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path, variant=variant, dtype=dtype)
        assert loaded.masks.keys() == model.masks.keys()


@pytest.mark.parametrize("change", ["other masks", "no masks"])
def test_a_variant_has_the_masks_of_the_full_weights(change, tmp_path):
    pruned().save_pretrained(tmp_path)
    before = contents(tmp_path)
    other = pruned(seed=1) if change == "other masks" else pruned().make_permanent()
    with pytest.raises(CheckpointError, match=r"holds model\.safetensors, whose masks are not those of this model"):
        other.save_pretrained(tmp_path, variant="fp16")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("compressed", [False, True])
def test_saving_deletes_no_weights_of_others(compressed, tmp_path):
    models.tiny_bert().save_pretrained(tmp_path, max_shard_size="6KB")  # plain transformers
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds model-00001-of-.* would delete and did not write: save into ano"):
        pruned().save_pretrained(tmp_path, compressed=compressed)
    assert contents(tmp_path) == before
    pruned().save_pretrained(tmp_path, compressed=compressed, overwrite=True)
    assert not list(tmp_path.glob("model-*"))
    others = {"model.ema.safetensors", "model_old.safetensors", "model-lora.safetensors", "adapter_model.safetensors"}
    for name in others:
        (tmp_path / name).write_text("mine")
    pruned(seed=1).save_pretrained(tmp_path, compressed=compressed, max_shard_size="6KB")  # over one of ours
    pruned(seed=2).save_pretrained(tmp_path, compressed=compressed)
    assert {name for name in names(tmp_path) if (tmp_path / name).read_bytes() == b"mine"} == others
    AutoPrunedModelForSequenceClassification.from_pretrained(tmp_path)


def test_what_has_no_weights_of_a_model_replaces_none(tmp_path):
    """Adapters that are saved beside a model, say."""
    pruned().save_pretrained(tmp_path)
    before = contents(tmp_path)
    with staged_checkpoint(tmp_path) as staging:
        (staging / "adapter_model.safetensors").write_text("new")
    after = contents(tmp_path)
    assert after.pop("adapter_model.safetensors") == b"new"
    assert after | {MARK: b""} == before | {MARK: b""}


def test_weights_that_somebody_changed_are_not_ours(tmp_path):
    pruned().save_pretrained(tmp_path)
    models.tiny_bert(seed=3).save_pretrained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds model\.safetensors, which this save would delete"):
        pruned().save_pretrained(tmp_path, max_shard_size="6KB")
    assert contents(tmp_path) == before


# --- companions ------------------------------------------------------------------------------------

CARRIED = {
    "spm.model", "source.spm", "bpe.codes", "normalizer.json", "preprocessor_config.json", "chat_template.jinja",
    "chat_template.json", "additional_chat_templates/rag.jinja", "modules.json", "1_Pooling/config.json",
    "2_Dense/config.json", "2_Dense/model.safetensors", "config_sentence_transformers.json", "LICENSE",
    "sentence_bert_config.json", "modeling_mine.py", "lib/more.py", "question_encoder_tokenizer/vocab.txt",
}  # fmt: skip
LEFT = {
    "README.md", "pytorch_model.bin", "tokenizer.pkl", "2_Dense/pytorch_model.bin", "onnx/model.onnx", ".hidden",
    "model.gguf", "adapter_model.safetensors", "model.fp16.safetensors", "checkpoint-7",
}  # fmt: skip
OURS = {"pruning_card.json", "training_report.json", "weights.png", "ticket.safetensors"}


def furnished(source: Path) -> Path:
    for name in (*CARRIED, *(LEFT - {"checkpoint-7"}), *OURS, "checkpoint-7/model.safetensors"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (source / "modules.json").write_text(json.dumps(modules))
    return source


@pytest.mark.parametrize("command", ["prune", "prune --stream", "trim-vocab"])
def test_what_a_model_needs_comes_along_or_is_named(command, source, tmp_path, caplog):
    furnished(source)
    (tmp_path / "key").write_text("secret")
    (source / "link.txt").symlink_to(tmp_path / "key")
    WRITERS[command](source, tmp_path / "out")
    found = names(tmp_path / "out")
    tokenizers = {"spm.model", "source.spm", "bpe.codes", "normalizer.json", "chat_template.jinja"}
    carried = CARRIED - tokenizers if command == "trim-vocab" else CARRIED  # which has a tokenizer of its own
    assert carried <= found
    written = {"README.md", "pruning_card.json"} if command == "prune" else set()  # its own card
    assert not found & ((LEFT | OURS) - written | {"link.txt"})
    assert (source / "README.md").read_bytes() not in contents(tmp_path / "out").values()
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in carried)
    assert f"Not copied from {source}: {', '.join(sorted(LEFT | {'link.txt'}))}." in caplog.text
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_stream_copies_nothing_that_a_link_points_to_elsewhere(name, source, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes((source / "config.json").read_bytes())
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=rf"{name} links to a file outside of .*source, .*secret: copy that"):
        prune_stream(source, HALF, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret", "source"]


def test_links_that_lead_out_are_neither_pushed_nor_written_through(source, tmp_path):
    from hf_prune import push_checkpoint
    from hf_prune.hub.describe import describe_model

    out, secret = tmp_path / "out", tmp_path / "secret"
    prune_checkpoint(str(source), HALF, out)
    secret.write_text("secret")
    (out / "README.md").unlink()
    (out / "README.md").symlink_to(secret)
    before = sorted(contents(out))
    model = AutoPrunedModelForSequenceClassification.from_pretrained(out)
    for write in (lambda: describe_model(model, out), lambda: push_checkpoint(out, "me/it", dry_run=True)):
        with pytest.raises(CheckpointError, match=r"README\.md links to a file outside of .*out, .*secret: copy"):
            write()
    assert sorted(contents(out)) == before
    (out / "README.md").unlink()
    for target in (tmp_path, "nowhere"):
        (out / "link").symlink_to(target)
        if target == tmp_path:
            with pytest.raises(CheckpointError, match="link links to a file outside"):
                push_checkpoint(out, "me/it", dry_run=True)
        else:
            assert push_checkpoint(out, "me/it", dry_run=True).skipped == ("link",)
        (out / "link").unlink()
    (out / "results.json").symlink_to(secret)
    write_json(out / "results.json", {})
    assert not (out / "results.json").is_symlink()
    assert secret.read_text() == "secret"


def test_very_large_files_are_named(source, tmp_path):
    with (source / "corpus.txt").open("wb") as file:
        file.truncate(200_000_000)
    (tmp_path / "out").mkdir()
    assert copy_companions(str(source), tmp_path / "out") == ("corpus.txt",)


def test_companions_of_a_cached_model(source, tmp_path, monkeypatch):
    """A snapshot of the Hub's cache is a folder of links to blobs."""
    furnished(source)
    snapshot = tmp_path / "models--me--it" / "snapshots" / "abc"
    shutil.copytree(source, tmp_path / "models--me--it" / "blobs")
    for path in (path for path in source.rglob("*") if path.is_file()):
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(tmp_path / "models--me--it" / "blobs" / path.relative_to(source))
    monkeypatch.setattr("hf_prune.checkpoint.companions.check_model_source", lambda source: True)
    monkeypatch.setattr("hf_prune.checkpoint.companions.find_file", lambda source, name, hub: str(snapshot / name))
    (tmp_path / "out").mkdir()
    assert set(copy_companions("me/it", tmp_path / "out")) == LEFT
    assert names(tmp_path / "out") >= CARRIED


# transformers has a stand-in for the class where the library is not installed, which knows of no files.
SENTENCEPIECE = pytest.mark.skipif(
    importlib.util.find_spec("sentencepiece") is None, reason="sentencepiece is not installed"
)


@pytest.mark.parametrize(
    ("kind", "files", "expected"),
    [
        ("DebertaV2Tokenizer", ["spm.model"], True),
        ("DebertaV2TokenizerFast", ["spm.model"], True),
        ("DebertaV2Tokenizer", [], False),
        pytest.param("MarianTokenizer", ["source.spm"], True, marks=SENTENCEPIECE),
        pytest.param("MarianTokenizer", ["sentencepiece.bpe.model"], False, marks=SENTENCEPIECE),
        ("PhobertTokenizer", ["bpe.codes"], True),
        ("ByT5Tokenizer", [], True),  # bytes are its vocabulary
        ("BertTokenizer", ["tokenizer.json"], True),
        ("NobodysTokenizer", ["spiece.model"], True),
        (None, [], False),
        (None, ["vocab.txt"], True),  # as the config says, which is of BERT
    ],
)
def test_the_class_of_a_tokenizer_says_whether_it_is_there(kind, files, expected, tmp_path):
    models.tiny_bert().config.save_pretrained(tmp_path)
    if kind is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    for name in files:
        (tmp_path / name).write_text("x")
    assert has_tokenizer(str(tmp_path)) is expected


def test_a_tokenizer_with_code_of_its_own(tmp_path):
    models.tiny_bert().config.save_pretrained(tmp_path)
    auto = {"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(auto))
    assert has_tokenizer(str(tmp_path))


def test_the_mark_is_neither_copied_nor_uploaded(source, tmp_path):
    from hf_prune import push_checkpoint

    prune_checkpoint(str(source), HALF, tmp_path / "out")
    report = compress_checkpoint(tmp_path / "out", tmp_path / "small")
    assert report.left == ()
    assert json.loads((tmp_path / "small" / MARK).read_text())["command"] == "compress"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    result = push_checkpoint(tmp_path / "out", "me/it", dry_run=True)
    assert MARK not in result.files
    assert result.skipped == ()


def test_pictures_are_known_by_what_drew_them(tmp_path):
    from matplotlib.figure import Figure

    from hf_prune.utils.figures import is_drawn

    assert is_drawn(save_figure(Figure(), tmp_path / "a.png"))
    Figure().savefig(tmp_path / "b.png")
    assert not is_drawn(tmp_path / "b.png")
    assert not is_drawn(tmp_path / "c.png")


@pytest.mark.parametrize(
    ("name", "copied", "uploaded"),
    [
        ("vocab.txt", True, True),
        ("1_Pooling/config.json", True, True),
        ("checkpoint-5.json", True, True),
        ("checkpoint-5/config.json", False, False),
        ("onnx/checkpoint-5/config.json", False, False),
        (".git/config", False, False),
        ("training_args.bin", False, False),
        ("tf_model.h5", False, True),
    ],
)
def test_copies_and_pushes_leave_out_the_same_files(name, copied, uploaded):
    assert is_left_out(Path(name)) is not copied
    assert is_never_uploaded(Path(name)) is not uploaded
