"""The run folder: the subset, the score of every sample, and all that is needed to replay.

`manifest.json` is written last, lists every other file with its length and sha256 and carries a
checksum of itself, so a folder that has one is complete. `verify.py` checks it again.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llava import files
from llava.errors import UsageError
from selection.methods.base import Method
from selection.output.environment import environment
from selection.pool.pool import Pool

SCHEMA = 1
_SEAL = b'  "checksum": "'


class Run:
    """A finished run: its folder, and what stands in it."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Raises UsageError when `folder` holds no finished run."""
        folder = Path(folder)
        manifest = unseal(folder / "manifest.json")
        if manifest is None:
            raise UsageError(
                f"{folder}: holds no finished run; name folders that `select` has written"
            )
        return cls(folder, manifest)

    @property
    def name(self) -> str:
        """What its folder is called."""
        return self.folder.name

    @cached_property
    def scores(self) -> pa.Table:
        """row, uid, source, score, rank (1 = best) and chosen of every sample of the pool."""
        return pq.read_table(self.folder / "scores.parquet")

    @property
    def rows(self) -> np.ndarray:
        """Pool rows of the subset, ascending, (k,) int64."""
        return np.loadtxt(self.folder / "subset_rows.txt", dtype=np.int64, ndmin=1)

    @property
    def subset(self) -> Path:
        """The chosen records, a LLaVA JSON list."""
        return self.folder / "subset.json"

    def artefact(self, name: str) -> Any:
        """One of the method's own results: an array, or what JSON holds; KeyError if absent."""
        path = self.folder / "artefacts" / name
        if path.with_suffix(".npy").is_file():
            return np.load(path.with_suffix(".npy"), allow_pickle=False)
        if path.with_suffix(".json").is_file():
            return json.loads(path.with_suffix(".json").read_bytes())
        raise KeyError(f"{self.folder}: no artefact {name!r}")

    def __repr__(self) -> str:
        method, subset, pool = (self.manifest[key] for key in ("method", "subset", "pool"))
        return f"<Run {self.folder}: {method['name']}, {subset['n']} of {pool['n']} samples>"


def write_run(
    out: str | Path,
    *,
    pool: Pool,
    method: Any,
    scored: Any,
    rows: np.ndarray,
    config: str,
    identity: Mapping[str, Any] | None,
    signals: Mapping[str, Any],
    bad: Iterable[Mapping[str, Any]],
    seed: int,
    times: Mapping[str, float],
    command: Sequence[str] = (),
) -> Run:
    """Write a finished selection into `out`, `manifest.json` last.

    `scored` has `scores` (N,) float64, `artefacts` and `notes`; `rows` (k,) int64 are the chosen
    pool rows, ascending; `config` is the YAML that replays the run; `identity` is the proxy's (None
    if no model was used); `signals` maps names to what identifies them; `bad` lists samples that
    could not be scored as `{"row", "reason", ...}`, those that the pool lists are added; `times`
    are seconds by stage; `command` is how the run was asked for. Raises StorageError when the disk
    refuses.
    """
    out, scores = Path(out), np.asarray(scored.scores, np.float64)
    files.make_folder(out)
    bad = all_bad(pool, bad)
    check_rows(pool, scores, rows, [entry["row"] for entry in bad])
    names, table = write_subset(pool, rows, out), score_table(pool, scores, rows)
    names += [write_scores(table, out), write_bad(bad, out)]
    files.atomic_write(out / "config.yaml", config.encode())
    names += ["config.yaml", *write_artefacts(scored.artefacts, out)]
    digests = {name: describe_file(out / name) for name in names}
    manifest = {
        "schema": SCHEMA,
        "method": {
            "name": method.name,
            "settings": plain_settings(method.settings),
            **described_code(method),
        },
        "pool": {
            "path": str(pool.path.resolve()),
            "n": len(pool),
            "sha256": pool.sha256,
            "duplicate_ids": pool.duplicate_ids,
        },
        "subset": {
            "n": len(rows),
            "sha256": digests["subset.json"]["sha256"],
            **cut_facts(scores, rows),
        },
        "n_bad": len(bad),
        "proxy": identity,
        "signals": dict(signals),
        "seed": seed,
        "command": list(command),
        "environment": environment(),
        "times": dict(times),
        "notes": list(scored.notes),
        "warnings": warnings_of(pool, scores, rows, bad),
        "files": digests,
    }
    files.atomic_write(out / "manifest.json", seal(manifest))
    files.sweep(out)
    run = Run(out, manifest)
    run.scores = table
    return run


def check_rows(pool: Pool, scores: np.ndarray, rows: np.ndarray, bad_rows: Sequence[int]) -> None:
    """A method that breaks the subset's law (promise P2) has a bug: ValueError."""
    if len(rows) and (np.diff(rows) <= 0).any():
        raise ValueError("chosen rows are not ascending and unique")
    if len(rows) and not 0 <= rows[0] <= rows[-1] < len(pool):
        raise ValueError(f"chosen rows are outside the pool's {len(pool)}")
    if len(scores) != len(pool) or np.isnan(scores[rows]).any() or np.isin(rows, bad_rows).any():
        raise ValueError("a sample without a score was chosen")


def subset_pieces(pool: Pool, rows: Iterable[int]) -> Iterator[bytes]:
    """A JSON list of the records as they stand in the pool file, about a megabyte at a time."""
    separator, piece = b"[\n", bytearray()
    for row in rows:
        piece += separator + pool.raw(row)
        separator = b",\n"
        if len(piece) > 2**20:
            yield bytes(piece)
            piece.clear()
    yield bytes(piece) + (b"\n]\n" if separator == b",\n" else b"[]\n")


def write_subset(pool: Pool, rows: np.ndarray, out: Path) -> list[str]:
    """Write `subset.json` (records unchanged, in pool order) and `subset_rows.txt`."""
    files.atomic_write(out / "subset.json", subset_pieces(pool, rows.tolist()))
    listing = "".join(f"{row}\n" for row in rows.tolist())
    files.atomic_write(out / "subset_rows.txt", listing.encode())
    return ["subset.json", "subset_rows.txt"]


def ranking(scores: np.ndarray) -> np.ndarray:
    """Rank of every sample, (N,) int64: 1 is best, ties by pool position, 0 = no score."""
    scored = np.flatnonzero(~np.isnan(scores))
    ranks = np.zeros(len(scores), np.int64)
    ranks[scored[np.argsort(-scores[scored], kind="stable")]] = np.arange(1, len(scored) + 1)
    return ranks


def score_table(pool: Pool, scores: np.ndarray, rows: np.ndarray) -> pa.Table:
    """row, uid, source, score, rank (1 = best), chosen; a row a sample.

    A sample that could not be scored has neither score nor rank.
    """
    chosen = np.zeros(len(pool), bool)
    chosen[rows] = True
    ranks = ranking(scores)
    return pa.table(
        {
            "row": pa.array(np.arange(len(pool))),
            "uid": pa.array([pool.uid(row) for row in range(len(pool))]),
            "source": pa.DictionaryArray.from_arrays(pool.source_codes, list(pool.source_names)),
            "score": pa.array(scores, mask=np.isnan(scores)),
            "rank": pa.array(ranks, mask=ranks == 0),
            "chosen": pa.array(chosen),
        }
    )


def write_scores(table: pa.Table, out: Path) -> str:
    """Write `scores.parquet`."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, write_page_checksum=True)
    files.atomic_write(out / "scores.parquet", buffer.getvalue())
    return "scores.parquet"


def all_bad(pool: Pool, bad: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Samples without numbers, one entry a row, ascending: those of the pool and of the signals."""
    entries = {row: {"row": row, "reason": reason} for row, reason in pool.bad.items()}
    for entry in bad:
        entries.setdefault(int(entry["row"]), dict(entry))
    return [{**entries[row], "uid": pool.uid(row), "id": pool.id(row)} for row in sorted(entries)]


def write_bad(bad: Iterable[Mapping[str, Any]], out: Path) -> str:
    """Write `bad_samples.jsonl`: row, uid, id and reason, a sample a line."""
    lines = [msgspec.json.encode(entry) + b"\n" for entry in bad]
    files.atomic_write(out / "bad_samples.jsonl", b"".join(lines))
    return "bad_samples.jsonl"


def write_artefacts(artefacts: Mapping[str, Any], out: Path) -> list[str]:
    """Keep a method's own results: arrays as `.npy`, bytes, which are safetensors, as they are,
    everything else as `.json`."""
    names = []
    for name, value in artefacts.items():
        files.make_folder(out / "artefacts")
        if isinstance(value, np.ndarray):
            buffer = io.BytesIO()
            np.save(buffer, value, allow_pickle=False)
            names.append(f"artefacts/{name}.npy")
            files.atomic_write(out / names[-1], buffer.getvalue())
        elif isinstance(value, bytes):
            names.append(f"artefacts/{name}.safetensors")
            files.atomic_write(out / names[-1], value)
        else:
            names.append(f"artefacts/{name}.json")
            files.atomic_write(out / names[-1], msgspec.json.encode(value))
    return names


def cut_facts(scores: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """The lowest chosen score, how many samples have just it and how many of those are chosen."""
    if not len(rows):
        return {"cut": None, "n_tied": 0, "n_tied_chosen": 0}
    cut = scores[rows].min()
    tied = {"n_tied": int((scores == cut).sum()), "n_tied_chosen": int((scores[rows] == cut).sum())}
    return {"cut": float(cut), **tied}


def warnings_of(
    pool: Pool, scores: np.ndarray, rows: np.ndarray, bad: Sequence[Mapping[str, Any]]
) -> list[str]:
    """What a user should know before trusting the subset."""
    warnings, facts = [], cut_facts(scores, rows)
    if bad:
        warnings.append(f"{count(len(bad), 'sample')} could not be scored: see bad_samples.jsonl")
    if pool.duplicate_ids:
        warnings.append(
            f"{count(pool.duplicate_ids, 'sample')} with a repeated id: name samples by row or uid"
        )
    if facts["n_tied_chosen"] < facts["n_tied"]:
        warnings.append(
            f"{facts['n_tied']} samples tie at the lowest chosen score; {facts['n_tied_chosen']} "
            "of them are chosen, by pool position"
        )
    return warnings


def described_code(method: Any) -> dict[str, Any]:
    """Of a method from elsewhere: what it is found by, and the digest of its code."""
    code = method.content() if isinstance(method, Method) else {}
    return {"origin": method.origin, **code} if code else {}


def plain_settings(settings: Any) -> dict[str, Any]:
    """A settings dataclass as JSON values."""
    return asdict(settings) if is_dataclass(settings) else {}


def describe_file(path: Path) -> dict[str, Any]:
    """Length and sha256 of what is on disk."""
    return {"bytes": path.stat().st_size, "sha256": files.digest_of(path)}


def seal(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as JSON that ends with a checksum of all that stands before it."""
    body = json.dumps(manifest, indent=2, ensure_ascii=False).encode()[:-2] + b",\n"
    return body + _SEAL + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def unseal(path: Path) -> dict[str, Any] | None:
    """The fields of a sealed manifest; None when it is absent, damaged or edited."""
    try:
        data = path.read_bytes()
        manifest = json.loads(data)
        digest = hashlib.sha256(data[: data.rindex(_SEAL)]).hexdigest()
    except (OSError, ValueError):
        return None
    return manifest if manifest.pop("checksum", None) == digest else None


def count(n: int, noun: str) -> str:
    """`n` and the noun: 1 sample, 2 samples."""
    return f"{n} {noun}{'s' * (n != 1)}"
