"""P8: a file appears whole or not at all, whichever system call fails; P12: clear disk errors."""

from __future__ import annotations

import ast
import errno
import hashlib
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file

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


def test_what_a_library_writes_appears_whole_too(target):
    """`writing` is the same protocol, from the library's own write on; its folder is made."""
    below = target.parent / "below" / "weights.bin"

    def work():
        with files.writing(below) as temp:
            temp.write_bytes(NEW)

    assert count_calls(work) == ["makedirs", "open", "fsync", "replace", "open", "fsync"]
    assert below.read_bytes() == NEW and os.listdir(below.parent) == [below.name]
    for at in range(1, 6):
        below.write_bytes(OLD)
        with faulty_os(at), pytest.raises(StorageError, match="weights.bin: cannot write"):
            work()
        assert below.read_bytes() == (OLD if at < 4 else NEW)
        assert os.listdir(below.parent) == [below.name]
    with pytest.raises(KeyboardInterrupt), files.writing(below) as temp:
        temp.write_bytes(OLD)
        raise KeyboardInterrupt
    assert below.read_bytes() == NEW and os.listdir(below.parent) == [below.name]


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_a_disk_that_is_full_for_a_library(tmp_path, save):
    """Neither raises an OSError: one error of safetensors' own, one RuntimeError of PyTorch."""
    with tiny_disk(tmp_path / "disk", 64 * 1024) as disk:
        with pytest.raises(StorageError, match="disk/w: cannot write: (the disk is full|PyTorch)"):
            with files.writing(disk / "w") as temp:
                save({"x": torch.zeros(100_000)}, temp)
        assert not os.listdir(disk)


def test_an_error_that_is_no_disks_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), files.writing(tmp_path / "w"):
        raise RuntimeError("a bug")


def test_a_folder_appears_whole(tmp_path):
    def work():
        with files.writing_folder(tmp_path / "out", "give another") as folder:
            (folder / "a").write_bytes(NEW)

    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "of a killed one").touch()
    with faulty_os(1), pytest.raises(StorageError, match="/out: cannot write: .*; give another"):
        work()
    assert not os.listdir(tmp_path)
    work()
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["a"]


def test_every_write_goes_through_this_module():
    """No other module of `llava` and `selection` renames, syncs or opens a file to write; what a
    library saves, it saves to a name that `writing` or `writing_folder` gives."""
    banned = ("os.replace", "os.fsync", ".write_bytes(", ".write_text(", '"w"', '"wb"', '"ab"')
    root = Path(files.__file__).parents[1]
    modules = [p for package in ("selection", "llava") for p in (root / package).rglob("*.py")]
    modules.remove(Path(files.__file__))
    lines = [(p.name, line) for p in modules for line in p.read_text().splitlines()]
    written = [(name, line) for name, line in lines if any(word in line for word in banned)]
    assert not [line for line in written if "with writing(" not in line[1]]
    assert not [f"{p.name}:{line}" for p in modules for line in bare_saves(p.read_text())]
    assert list(bare_saves("torch.save(x, path)\nwith writing(path) as t: save_file(x, t)")) == [1]


def bare_saves(source: str) -> Iterator[int]:
    """Lines that let a library save a file outside of `with writing(...)`."""
    tree = ast.parse(source)
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.With)]
    given = [b for b in blocks if any("writing" in ast.unparse(item) for item in b.items)]
    inside = {id(node) for block in given for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and id(node) not in inside:
            if ast.unparse(node.func) in ("save_file", "torch.save"):
                yield node.lineno


def test_a_digest_is_that_of_all_bytes(tmp_path):
    data = os.urandom(3 * 2**20 + 1)
    (tmp_path / "file").write_bytes(data)
    assert files.digest_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()
    xxh3 = xxhash.xxh3_128_hexdigest(data)
    assert files.digest_of(tmp_path / "file", xxhash.xxh3_128) == xxh3


def test_the_digest_of_files_tells_where_one_ends_and_how_it_is_called(tmp_path):
    """As fingerprints of checkpoints have always been made."""
    for name, data in (("a", b"one"), ("b", b"two")):
        (tmp_path / name).write_bytes(data)
    digest = xxhash.xxh3_128()
    files.add_files(digest, [tmp_path / "a", tmp_path / "b"])
    assert digest.hexdigest() == xxhash.xxh3_128_hexdigest(b"a\x003\x00oneb\x003\x00two")
