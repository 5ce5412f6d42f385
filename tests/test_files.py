"""Files and folders appear whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_prune import files
from hf_prune.files import atomic_path, staged_folder, write_json, write_text

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
    swap, fsync, replace = files._swap_names(), os.fsync, Path.replace

    def exchange(*paths):
        happened.append("in place")
        return swap(*paths)

    def replaced(path, target):
        happened.append("in place")
        return replace(path, target)

    def synced(descriptor):
        happened.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(files, "_swap_names", lambda: exchange if way == "swap" else None)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    with staged_folder(tmp_path / "out", STALE, LAST) as staging:
        put(staging, {"w1.bin": "new", "config": "new", "sub/x": "new"})
    assert set(happened[: happened.index("in place")]) >= {"w1.bin", "config", "x"}


KILLED = """
import os, sys
from pathlib import Path
from hf_prune import files
from hf_prune.files import staged_folder

out, steps, swaps = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "swap"
swap = files._swap_names() if swaps else None

def step(real):
    def do(*args, **kwargs):
        global steps
        if steps == 0:
            os._exit(9)
        steps -= 1
        return real(*args, **kwargs)
    return do

files._swap_names = lambda: swap and step(swap)
with staged_folder(out, ("w*.bin",), ("w*.index", "masks", "config")) as staging:
    for name in ("w1.bin", "w.index", "masks", "config", "extra"):
        (staging / name).write_text("new")
    for place, name in ((Path, "unlink"), (Path, "replace"), (os, "link"), (os, "rmdir"), (files, "sync")):
        setattr(place, name, step(getattr(place, name)))
"""


@pytest.mark.parametrize("way", ["swap", "one by one"])
def test_killed_at_any_step_the_folder_is_old_incomplete_or_new(tmp_path, way):
    """By one rename where the system has it; else what completes the set goes first and comes last."""
    states = []
    for steps in range(30):
        out = tmp_path / str(steps) / "out"
        names = ("w1.bin", "w2.bin", "w.index", "masks", "config", "notes", "sub/notes")
        put(out, dict.fromkeys(names, "old"))
        before = contents(out)
        code = subprocess.run([sys.executable, "-c", KILLED, str(out), str(steps), way], check=False).returncode
        after = contents(out)
        if after == before:
            states.append("old")
        elif "config" not in after:
            states.append("incomplete")
        else:
            new = dict.fromkeys(["config", "extra", "masks", "w.index", "w1.bin"], "new")
            assert after == {**new, "notes": "old", "sub/notes": "old"}
            states.append("new")
        if code == 0:
            break
        assert code == 9
    assert states.count("old") > 5
    assert sorted(set(states), key=states.index) == ["old", *([] if way == "swap" else ["incomplete"]), "new"]
    assert states == sorted(states, key=["old", "incomplete", "new"].index)
