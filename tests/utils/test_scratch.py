"""Temporary files that save memory go to a disk."""

import tempfile
from pathlib import Path

import pytest
import torch

from hf_prune.utils import scratch
from hf_prune.utils.offload_cache import OffloadCache
from hf_prune.utils.scratch import is_in_memory, scratch_folder


@pytest.fixture
def mounts(tmp_path, monkeypatch):
    """Write a table of mounts, where /var/tmp is a folder of the test."""
    monkeypatch.setattr(scratch, "_MOUNTS", tmp_path / "mounts")
    scratch._warn_once.cache_clear()

    def write(*lines: tuple[str, str]) -> None:
        table = [("/", "ext4"), *lines]
        text = "".join(f"x {str(point).replace(' ', chr(92) + '040')} {kind} rw 0 0\n" for point, kind in table)
        (tmp_path / "mounts").write_text(text)

    write()
    yield write
    scratch._warn_once.cache_clear()


def test_the_innermost_mount_counts_and_the_last_of_one_place(mounts, tmp_path):
    spaced = tmp_path / "with space"
    mounts((tmp_path, "tmpfs"), (tmp_path / "disk", "xfs"), (spaced, "ext4"), (spaced, "ramfs"))
    assert is_in_memory(tmp_path)
    assert is_in_memory(tmp_path / "other" / "deep")
    assert not is_in_memory(tmp_path / "disk" / "deep")
    assert not is_in_memory("/")
    assert not is_in_memory(str(tmp_path) + "2")
    assert is_in_memory(spaced / "x")


def test_links_lead_to_where_the_files_are(mounts, tmp_path):
    (tmp_path / "memory").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "memory")
    mounts((tmp_path / "memory", "tmpfs"))
    assert is_in_memory(tmp_path / "link")


def test_without_a_table_of_mounts_nothing_is_said(mounts, tmp_path):
    (tmp_path / "mounts").unlink()
    assert not is_in_memory("/dev/shm")


def test_a_system_folder_in_memory_is_avoided(mounts, tmp_path, monkeypatch):
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    system, home = tmp_path / "system", tmp_path / "home"
    system.mkdir()
    (home / ".cache").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(system))
    monkeypatch.setenv("HOME", str(home))
    assert scratch_folder() == str(system)
    mounts((system, "tmpfs"))
    assert scratch_folder() == "/var/tmp"
    cache = OffloadCache(0)
    cache.put("a", torch.ones(3))
    assert not list(system.iterdir())
    cache.close()
    mounts((system, "tmpfs"), ("/var/tmp", "tmpfs"))
    assert scratch_folder() == str(home / ".cache")
    mounts((system, "tmpfs"), ("/var/tmp", "tmpfs"), (home, "tmpfs"))
    with pytest.warns(UserWarning, match=r"lies in memory \(no folder on a disk was found\).*set TMPDIR"):
        assert scratch_folder() == str(system)
    assert scratch_folder() == str(system)  # said once


def test_a_folder_that_was_asked_for_is_taken(mounts, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    mounts((tmp_path, "tmpfs"))
    with pytest.warns(UserWarning, match=r"lies in memory \(TMPDIR says so\)"):
        assert scratch_folder() == str(tmp_path)
    assert Path(scratch_folder()).is_dir()
