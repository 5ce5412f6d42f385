"""Files and folders appear whole or not at all."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_prune.errors import CheckpointError, DataError
from hf_prune.utils import files
from hf_prune.utils import json_files as json_files_module
from hf_prune.utils import staging as staging_module
from hf_prune.utils.files import atomic_path, write_json, write_text
from hf_prune.utils.staging import staged_folder

STALE, LAST = ("w*.bin",), ("w*.index", "masks", "config")


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_atomic_path_makes_folders_and_leaves_one_file(tmp_path):
    with atomic_path(tmp_path / "a" / "b.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a" / "b.txt").exists()
    assert contents(tmp_path) == {"a/b.txt": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_path_keeps_the_old_file_when_the_block_fails(tmp_path, error):
    put(tmp_path, {"a.txt": "old"})
    with pytest.raises(error), atomic_path(tmp_path / "a.txt") as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert contents(tmp_path) == {"a.txt": "old"}


def test_atomic_path_without_a_file_is_an_error_that_changes_nothing(tmp_path):
    put(tmp_path, {"a.txt": "old"})
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.txt"):
        pass
    assert contents(tmp_path) == {"a.txt": "old"}


def test_write_text_and_json(tmp_path):
    write_text(tmp_path / "t", "ä\n")
    assert (tmp_path / "t").read_bytes() == b"\xc3\xa4\n"
    assert write_json(tmp_path / "j", {"b": [1, 2.5, None]}) == tmp_path / "j"
    assert json.loads((tmp_path / "j").read_text()) == {"b": [1, 2.5, None]}
    assert (tmp_path / "j").read_text().endswith("}\n")


def test_write_json_of_something_else_keeps_the_old_file(tmp_path):
    put(tmp_path, {"j": "old"})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "j", {"x": object()})
    assert contents(tmp_path) == {"j": "old"}


def test_new_folder_appears_at_once(tmp_path):
    with staged_folder(tmp_path / "deep" / "out", STALE, LAST) as staging:
        put(staging, {"w.bin": "1", "sub/x": "2"})
        assert not (tmp_path / "deep" / "out").exists()
    assert contents(tmp_path) == {"deep/out/w.bin": "1", "deep/out/sub/x": "2"}


def test_existing_folder_keeps_other_files_and_loses_stale_ones(tmp_path):
    out = tmp_path / "out"
    put(out, {"w1.bin": "old", "w2.bin": "old", "w.index": "old", "masks": "old", "config": "old", "notes": "mine"})
    with staged_folder(out, STALE, LAST) as staging:
        put(staging, {"w1.bin": "new", "config": "new", "sub/x": "new"})
    assert contents(out) == {"w1.bin": "new", "config": "new", "sub/x": "new", "notes": "mine"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [False, True])
def test_failing_block_changes_nothing(tmp_path, error, exists):
    if exists:
        put(tmp_path / "out", {"w1.bin": "old", "config": "old"})
    before = contents(tmp_path)
    with pytest.raises(error), staged_folder(tmp_path / "out", STALE, LAST) as staging:  # noqa: PT012
        put(staging, {"w1.bin": "new", "config": "new"})
        raise error
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if exists else [])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", ["swap", "one by one"])
def test_every_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch, way):
    put(tmp_path / "out", {"w1.bin": "old"})
    happened = []
    swap, fsync, replace = staging_module._swap_names(), os.fsync, Path.replace

    def exchange(*paths):
        happened.append("in place")
        return swap(*paths)

    def replaced(path, target):
        happened.append("in place")
        return replace(path, target)

    def synced(descriptor):
        happened.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(staging_module, "_swap_names", lambda: exchange if way == "swap" else None)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    with staged_folder(tmp_path / "out", STALE, LAST) as staging:
        put(staging, {"w1.bin": "new", "config": "new", "sub/x": "new"})
    assert set(happened[: happened.index("in place")]) >= {"w1.bin", "config", "x"}


CHANGES = [
    (Path, "rename"),
    (Path, "unlink"),
    (Path, "replace"),
    (Path, "mkdir"),
    (os, "link"),
    (staging_module, "sync"),
    (files, "sync"),
    (staging_module, "_copy_owner"),
    (staging_module, "write_json"),
]
OLD = dict.fromkeys(("w1.bin", "w2.bin", "w.index", "masks", "config", "notes", "sub/notes", "sub/shared"), "old")
NEW = dict.fromkeys(("w1.bin", "w.index", "masks", "config", "extra", "sub/shared", "sub/new"), "new")
AFTER = {**NEW, "notes": "old", "sub/notes": "old"}
WAYS = ["swap", "one by one", "no links"]


def save(out: Path, way: str, steps: int, fault: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Save a new set over an old one, with a fault after so many changes of the disk."""
    swap = staging_module._swap_names() if way == "swap" else None
    left = iter(range(steps))

    def step(real):
        def do(*args, **kwargs):
            if next(left, None) is None:
                fault()
            return real(*args, **kwargs)

        return do

    def refuse(*args, **kwargs):
        raise OSError("Operation not supported")

    patch.setattr(os, "fsync", lambda descriptor: None)  # nobody pulls the plug
    patch.setattr(staging_module, "_swap_names", lambda: swap and step(swap))
    if way == "no links":
        patch.setattr(os, "link", refuse)
    with staged_folder(out, STALE, LAST) as staging:
        put(staging, NEW)
        for place, name in CHANGES:
            patch.setattr(place, name, step(getattr(place, name)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_at_any_step_the_folder_is_old_or_new(tmp_path, monkeypatch, way, error):
    """What was taken out of it is put back, and nothing is left beside it."""

    def fault():
        if not raised:
            raised.append(True)
            raise error("disk full")

    states = []
    for steps in range(200):
        out, raised = tmp_path / str(steps) / "out", []
        put(out, OLD)
        with monkeypatch.context() as patch:
            try:
                save(out, way, steps, fault, patch)
            except error:
                states.append("error")
            else:
                states.append("saved")
        assert contents(out) in ([OLD, AFTER] if states[-1] == "error" else [AFTER])
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        if not raised:
            break
    assert not raised
    assert states.count("error") > 5
    print(f"{len(states) - 1} faults, {states.count('error')} of them errors: the old set or the new one was there")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process to kill")
@pytest.mark.parametrize("way", WAYS)
def test_killed_at_any_step_the_old_set_or_the_new_one_is_whole(tmp_path, monkeypatch, way):
    """In the folder, or beside it until the next process writes there; never a mixture that somebody could read."""
    states = []
    for steps in range(200):
        out = tmp_path / str(steps) / "out"
        put(out, OLD)
        if (child := os.fork()) == 0:
            code = 1
            try:
                save(out, way, steps, lambda: os._exit(9), monkeypatch)
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        after = contents(out)
        states.append("old" if after == OLD else "new" if after == AFTER else "incomplete")
        if states[-1] == "incomplete":
            assert "config" not in after
            beside = [contents(path) for path in out.parent.glob(".out.*.tmp")]
            assert way == "no links" or NEW in beside
        staging_module.remove_leftovers(out)
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        assert contents(out) == (AFTER if states[-1] == "new" else OLD)
        if code == 0:
            break
    assert code == 0
    assert states.count("old") > 5
    assert ("incomplete" in states) is (way != "swap")
    assert states == sorted(states, key=["old", "incomplete", "new"].index)
    print(f"{len(states) - 1} kills: the old set or the new one was there, or was put back")


def test_what_cannot_be_put_back_is_kept_and_named(tmp_path, monkeypatch):
    out = tmp_path / "out"
    put(out, OLD)
    monkeypatch.setattr(staging_module, "_swap_names", lambda: None)

    def full(*args):
        raise OSError("Input/output error")

    def fail(patch):
        with staged_folder(out, STALE, LAST) as staging:
            put(staging, NEW)
            patch.setattr(staging_module, "_link_or_rename", full)
            patch.setattr(
                staging_module, "put_back", lambda *args: full() if staging_module._old(args[0]).exists() else None
            )

    with pytest.raises(CheckpointError, match="could not be put back") as caught, monkeypatch.context() as patch:
        fail(patch)
    (kept,) = tmp_path.glob(".out.*.tmp")
    assert contents(kept) == NEW
    assert str(kept) in str(caught.value)
    assert str(kept) + ".old" in str(caught.value)
    staging_module.remove_leftovers(out)  # as the next run does
    assert contents(tmp_path) == {f"out/{name}": text for name, text in OLD.items()}


def test_leftovers_of_others_stay(tmp_path):
    put(tmp_path, {".out.mine.tmp/x": "1", ".other.0123456789ab.tmp/x": "1", ".out.0123456789ab.tmp": "a file"})
    before = contents(tmp_path)
    staging_module.remove_leftovers(tmp_path / "out")
    assert contents(tmp_path) == before


def test_a_folder_in_the_place_of_a_file_stays(tmp_path):
    put(tmp_path, {"out/config/mine": "old"})
    with pytest.raises(CheckpointError, match="config is a folder: expected a file, or nothing"):
        with staged_folder(tmp_path / "out", STALE, LAST) as staging:
            put(staging, NEW)
    assert contents(tmp_path) == {"out/config/mine": "old"}


# --- what is not ours ------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="modes and owners of POSIX")
@pytest.mark.parametrize("way", WAYS)
def test_modes_owners_and_times_stay(tmp_path, monkeypatch, way):
    out = tmp_path / "out"
    put(out, OLD)
    for name, mode in ((".", 0o2700), ("sub", 0o750), ("config", 0o600), ("sub/shared", 0o640), ("notes", 0o604)):
        (out / name).chmod(mode)
    others = (1234, 2345) if os.getuid() == 0 else (os.getuid(), os.getgid())
    for name in (".", "sub", "config"):
        os.chown(out / name, *others)
    (out / ".").chmod(0o2700)
    os.utime(out / "sub", (1e9, 1e9))
    save(out, way, 10_000, lambda: None, monkeypatch)
    monkeypatch.undo()
    assert contents(out) == AFTER
    for name, mode in ((".", 0o2700), ("sub", 0o750), ("config", 0o600), ("sub/shared", 0o640), ("notes", 0o604)):
        assert (out / name).stat().st_mode & 0o7777 == mode, name
    for name in (".", "sub", "config"):
        assert ((out / name).stat().st_uid, (out / name).stat().st_gid) == others
    assert (out / "extra").stat().st_gid == others[1]  # as in a setgid folder
    if way == "swap":
        assert (out / "sub").stat().st_mtime == 1e9


def test_a_subfolder_that_may_not_be_listed_keeps_what_it_has(tmp_path, monkeypatch):
    put(tmp_path / "out", {**OLD, "closed/x": "old"})
    scandir = os.scandir

    def listed(path="."):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", listed)
        with staged_folder(tmp_path / "out", STALE, LAST) as staging:
            put(staging, NEW)
    assert contents(tmp_path / "out") == {**AFTER, "closed/x": "old"}


# --- JSON of others --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON: .*recursion"),
        (b'{"a":' * 100_000, "not valid JSON: .*recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON: .*digits"),
        (b"null", "holds a JSON NoneType: expected an object"),
        (b"[]", "holds a JSON list: expected an object"),
        (b"5", "holds a JSON int"),
        (b'"x"', "holds a JSON str"),
        (b"true", "holds a JSON bool"),
        (b"NaN", "holds a JSON float"),
        (b" " * 2000, "it has more than 1,000 bytes"),
    ],
)
@pytest.mark.parametrize("error", [CheckpointError, DataError])
def test_json_of_others_is_an_object_of_bounded_size_or_our_error(tmp_path, monkeypatch, text, message, error):
    if len(text) == 2000:
        monkeypatch.setattr(json_files_module, "_LARGEST_JSON", 1000)
    path = tmp_path / "config.json"
    path.write_bytes(text)
    for read in (json_files_module.read_json_object, json_files_module.read_config):
        with pytest.raises(error, match=rf"config\.json is damaged and .*{message}"):
            read(path, error)
    with pytest.raises(error, match="is missing: expected a whole checkpoint"):
        json_files_module.read_json_object(tmp_path / "nothing.json", error)
    with pytest.raises(error, match=r"nothing\.json is missing: expected scores$"):
        json_files_module.read_json_object(tmp_path / "nothing.json", error, "scores")
    with pytest.raises(error, match=rf"^{tmp_path} is a folder: expected a JSON file"):
        json_files_module.read_json_object(tmp_path, error)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        *(("architectures", value, "a list of names") for value in (5, -1, "BertModel", {}, [1], [None], [["x"]])),
        *(("model_type", value, "a name") for value in (5, [1], {"a": 1}, False)),
        *(("quantization_config", value, "an object") for value in (5, [1], "x", True)),
        ("auto_map", [1], "an object"),
        ("hf_prune", "x", "an object"),
    ],
)
def test_configs_of_other_shapes_are_our_errors(tmp_path, key, value, expected):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match=rf"its {key} is .*, expected {expected}; download"):
        json_files_module.read_config(path)
    path.write_text(json.dumps({key: None}))
    assert json_files_module.read_config(path) == {key: None}
