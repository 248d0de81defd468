"""Downloads: what is pinned arrives whole, what is absent is reported, nothing in it can harm."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import stat
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from llava.errors import DataError, RefusedError
from mini.fetch import Sources, fetch, load_arrays
from mini.packages import PACKAGES, Package


def _tgz(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """An `npm` on the PATH that serves one archive and counts its calls; returns the package."""
    served = tmp_path / "served.tgz"
    served.write_bytes(_tgz(("package/a.txt", b"alpha"), ("package/b.txt", b"beta")))
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    script = bin_folder / "npm"
    script.write_text(f"#!/bin/sh\necho call >> {tmp_path}/calls\ncp {served} thing-1.0.tgz\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
    digest = hashlib.sha256(served.read_bytes()).hexdigest()
    return Package("thing", "npm", "thing", "1.0", digest, "MIT")


def _calls(tmp_path: Path) -> int:
    return (tmp_path / "calls").read_text().count("call")


def test_download_once_then_read_in_the_order_asked_for(registry, tmp_path):
    for _ in range(2):
        found = fetch(tmp_path / "cache", packages=[registry])
    assert _calls(tmp_path) == 1
    assert found.read("thing", "package/b.txt", "package/a.txt") == [b"beta", b"alpha"]
    assert found.report() == []
    with pytest.raises(DataError, match="no member 'package/c.txt'"):
        found.read("thing", "package/c.txt")


def test_damaged_archive_is_replaced(registry, tmp_path):
    path = fetch(tmp_path / "cache", packages=[registry]).files["thing"]
    path.write_bytes(path.read_bytes()[:-9])  # as a full disk or a bad sector would leave it
    found = fetch(tmp_path / "cache", packages=[registry])
    assert _calls(tmp_path) == 2
    assert found.read("thing", "package/a.txt") == [b"alpha"]


def test_another_content_than_pinned_is_never_used(registry, tmp_path):
    other = Package("thing", "npm", "thing", "1.0", "0" * 64, "MIT")
    found = fetch(tmp_path / "cache", packages=[other])
    assert not found.has("thing")
    assert "sha256 is" in found.report()[0]
    assert list((tmp_path / "cache" / "packages").iterdir()) == []


def test_missing_client_leaves_its_group_absent(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    found = fetch(tmp_path / "cache", packages=[p for p in PACKAGES if p.registry != "pypi"])
    assert found.files == {}
    assert [line.rsplit("(", 1)[1] for line in found.report()] == [
        "npm: npm is not installed)",
        "debian: dpkg-deb is not installed)",
    ]


def test_failing_client_is_reported_in_one_line(registry, tmp_path):
    npm = tmp_path / "bin" / "npm"
    npm.write_text("#!/bin/sh\necho first >&2\necho 'ENOTFOUND the registry' >&2\nexit 1\n")
    (line,) = fetch(tmp_path / "cache", packages=[registry]).report()
    assert line == "without thing (npm: npm failed: ENOTFOUND the registry)"


def test_pypi_is_indispensable(tmp_path):
    nothing = Package("nope", "pypi", "no such name!", "1.0", "0" * 64, "MIT")
    with pytest.raises(DataError, match="from PyPI"):
        fetch(tmp_path, packages=[nothing])


def test_leftovers_of_a_killed_download_are_swept(registry, tmp_path):
    folder = tmp_path / "cache" / "packages"
    dead, alive = folder / ".999999999-abc", folder / f".{os.getpid()}-abc"
    dead.mkdir(parents=True)
    alive.mkdir()
    fetch(tmp_path / "cache", packages=[registry])
    assert not dead.exists() and alive.exists()


@pytest.mark.parametrize("name", ["../up.txt", "/etc/passwd", "a/../../b", "a\\..\\b"])
def test_members_that_leave_their_folder_are_refused(name, tmp_path):
    tar, wheel = tmp_path / "x.tgz", tmp_path / "x.whl"
    tar.write_bytes(_tgz((name, b"x")))
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(name, b"x")
    for path in (tar, wheel):
        with pytest.raises(RefusedError, match="leaves its folder"):
            list(Sources(tmp_path, {"x": path}).members("x", lambda _: True))


def test_arrays_load_and_code_does_not_run(tmp_path):
    array = np.arange(6, dtype="u1").reshape(2, 3)
    raw = pickle.dumps(array, protocol=3).replace(b"numpy._core", b"numpy.core")
    assert np.array_equal(load_arrays(gzip.compress(raw)), array)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    with pytest.raises(RefusedError, match="posix.mkdir; refused"):
        load_arrays(gzip.compress(pickle.dumps(Evil())))
    assert not (tmp_path / "canary").exists()


def test_pins_are_complete():
    assert len({p.key for p in PACKAGES}) == len(PACKAGES) == 11
    assert all(len(p.sha256) == 64 and p.licence for p in PACKAGES)
