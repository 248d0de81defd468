"""P8: a file appears whole or not at all, whichever system call fails; P12: clear disk errors."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest

from llava import files
from llava.errors import StorageError
from tests.faults import faulty_os, in_child, tiny_disk

OLD, NEW = b"old" * 1000, b"new" * 2000


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "file.json"
    files.atomic_write(path, OLD)
    return path


def count_calls(work) -> list[str]:
    with faulty_os() as shim:
        work()
    return shim.calls


def test_protocol_is_write_sync_rename_sync_folder(target):
    calls = count_calls(lambda: files.atomic_write(target, NEW))
    assert calls == ["open", "write", "fsync", "replace", "open", "fsync"]
    assert target.read_bytes() == NEW and os.listdir(target.parent) == [target.name]


@pytest.mark.parametrize("fault", [errno.EIO, errno.ENOSPC, errno.EDQUOT, "short"])
@pytest.mark.parametrize("at", range(6))
def test_fault_at_every_call_leaves_old_or_new(target, at, fault):
    with faulty_os(at, fault), pytest.raises(StorageError) as caught:
        files.atomic_write(target, NEW)
    assert str(target) in str(caught.value) and caught.value.exit_code == 74
    assert target.read_bytes() == (OLD if at < 4 else NEW)
    assert os.listdir(target.parent) == [target.name]  # the temporary file is gone


@pytest.mark.parametrize("at", range(6))
def test_kill_at_every_call_leaves_old_or_new(target, at):
    def work():
        with faulty_os(at, "kill"):
            files.atomic_write(target, NEW)

    assert in_child(work) == -signal.SIGKILL
    assert target.read_bytes() == (OLD if at < 4 else NEW)
    files.sweep(target.parent)
    assert os.listdir(target.parent) == [target.name]


def test_sweep_removes_only_our_temporary_files(tmp_path):
    kept = ["a.tmp", ".a.tmp", "a.0123.tmp", "block-000001.safetensors", "x.0123456789abcdeg.tmp"]
    (tmp_path / "below").mkdir()
    for name in [*kept, "block-000001.safetensors.0123456789abcdef.tmp"]:
        (tmp_path / name).touch()
        (tmp_path / "below" / name).touch()
    files.sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "below"])
    assert sorted(os.listdir(tmp_path / "below")) == sorted(kept)


def test_appended_line_survives_a_cut_one(tmp_path):
    path = tmp_path / "journal"
    files.append_line(path, b"one")
    with faulty_os(1, "short"), pytest.raises(StorageError):
        files.append_line(path, b"a line that is cut")
    files.append_line(path, b"two")
    lines = path.read_bytes().splitlines()
    assert b"one" in lines and b"two" in lines and b"a line that is cut" not in lines


def test_partial_writes_are_continued(target, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
    files.atomic_write(target, NEW)
    assert target.read_bytes() == NEW


def test_full_disk(tmp_path):
    with tiny_disk(tmp_path / "disk", 64 * 1024) as disk:
        files.atomic_write(disk / "a", OLD)
        with pytest.raises(StorageError, match="disk is full: free some space"):
            files.atomic_write(disk / "a", b"x" * 100_000)
        assert os.listdir(disk) == ["a"] and (disk / "a").read_bytes() == OLD
        files.atomic_write(disk / "a", NEW)
        assert (disk / "a").read_bytes() == NEW


def test_read_only_disk(tmp_path):
    with tiny_disk(tmp_path / "disk", 64 * 1024) as disk:
        files.atomic_write(disk / "a", OLD)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(StorageError, match="read-only: choose another folder"):
            files.atomic_write(disk / "a", NEW)
        with pytest.raises(StorageError, match="read-only"):
            files.make_folder(disk / "b")
        assert (disk / "a").read_bytes() == OLD


def test_file_size_limit(target):
    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        with pytest.raises(StorageError, match="ulimit -f"):
            files.atomic_write(target, NEW)

    assert in_child(work) == 0
    assert target.read_bytes() == OLD and os.listdir(target.parent) == [target.name]


def test_every_write_goes_through_this_module():
    """No other module of `selection` and `llava.eval` renames, syncs or opens a file to write."""
    banned = ("os.replace", "os.fsync", ".write_bytes(", ".write_text(", '"w"', '"wb"')
    root = Path(files.__file__).parents[1]
    found = [
        f"{path.name}: {word}"
        for package in ("selection", "llava/eval")
        for path in (root / package).rglob("*.py")
        for word in banned
        if word in path.read_text()
    ]
    assert not found
