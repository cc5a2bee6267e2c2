"""Files that are whole or not there, and what is left of writers that were killed."""

import os
import time

import pytest

from equipoise.io.atomic_files import STALE, atomic_write


def interrupted_write(folder, name, age):
    path = folder / name
    path.write_text("half of")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_file_is_old_or_new_after_interruption(tmp_path, monkeypatch):
    path = atomic_write(tmp_path / "sub" / "a.json", "old")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_temporary_files_of_killed_writers_are_removed(tmp_path):
    stale = [interrupted_write(tmp_path, f".r[1].json.{number}.tmp", 2 * STALE) for number in (7, 4294967295)]
    kept = [
        interrupted_write(tmp_path, ".r[1].json.8.tmp", STALE / 2),  # may still be in use by its writer
        interrupted_write(tmp_path, ".other.json.7.tmp", 2 * STALE),
        interrupted_write(tmp_path, ".r[1].json.mine.tmp", 2 * STALE),
        interrupted_write(tmp_path, "r[1].json.7.tmp", 2 * STALE),
    ]
    atomic_write(tmp_path / "r[1].json", "whole")
    assert not any(path.exists() for path in stale)
    assert all(path.exists() for path in kept)
