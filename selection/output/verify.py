"""Check a finished run: every hash, the exact subset, scores that agree, the environment."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq

from llava.errors import StorageError, UsageError, UserError
from selection.output.environment import environment, environment_changes
from selection.output.folder import count, describe_file, ranking, subset_pieces, unseal
from selection.pool.pool import Pool

RUN_FILES = ("run.json", "subset.json", "manifest.json")  # claimed, chosen, finished


@dataclass
class Findings:
    """`problems` mean that the folder is not what the run wrote; `warnings` do not."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def verify_run(folder: str | Path) -> None:
    """Print what `inspect_run` finds.

    Raises StorageError when there is a problem, UsageError where no run ever was.
    """
    if not any((Path(folder) / name).is_file() for name in RUN_FILES):
        raise UsageError(f"{folder}: no run folder; name the one that holds subset.json")
    findings = inspect_run(folder)
    for text in findings.warnings:
        print(f"warning: {text}")
    for text in findings.problems:
        print(f"problem: {text}")
    if findings.problems:
        raise StorageError(
            f"{folder}: {count(len(findings.problems), 'problem')}: not what the run wrote; run "
            "the command in its config.yaml again into another folder"
        )
    print(f"{folder}: sound")


def inspect_run(folder: str | Path) -> Findings:
    """Check the run in `folder` against its manifest, and against the pool where it still is."""
    folder, findings = Path(folder), Findings()
    manifest = unseal(folder / "manifest.json")
    if manifest is None:
        absent = not (folder / "manifest.json").exists()
        state = "absent: the run is not finished, or lost it" if absent else "damaged or edited"
        findings.problems.append(f"manifest.json is {state}")
        return findings
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            findings.problems.append(f"{name} is missing")
        elif describe_file(path) != expected:
            findings.problems.append(f"{name} was changed")
    if not findings.problems:  # what follows reads those files
        _check_contents(folder, manifest, findings)
    changes = environment_changes(manifest["environment"], environment())
    findings.warnings += [f"environment changed: {line}" for line in changes]
    return findings


def _check_contents(folder: Path, manifest: dict[str, Any], findings: Findings) -> None:
    rows = np.array((folder / "subset_rows.txt").read_text().split(), np.int64)
    table = pq.read_table(folder / "scores.parquet", page_checksum_verification=True)
    column = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    n_pool, scores = manifest["pool"]["n"], column["score"].astype(np.float64)
    bad = [msgspec.json.decode(line)["row"] for line in (folder / "bad_samples.jsonl").open("rb")]
    ranks = table["rank"].fill_null(0).to_numpy()
    laws = {
        "subset_rows.txt is not ascending": len(rows) and (np.diff(rows) <= 0).any(),
        "subset_rows.txt has another size than the manifest": len(rows) != manifest["subset"]["n"],
        "scores.parquet is not one row a sample": not np.array_equal(
            column["row"], np.arange(n_pool)
        ),
        "scores.parquet marks other samples as chosen than subset_rows.txt": not np.array_equal(
            np.flatnonzero(column["chosen"]), rows
        ),
        "scores.parquet: ranks do not follow the scores": not np.array_equal(
            ranks, ranking(scores)
        ),
        "a sample without a score was chosen": np.isnan(scores[column["chosen"]]).any(),
        "a bad sample was chosen": np.isin(bad, rows).any(),
    }
    findings.problems += [law for law, broken in laws.items() if broken]
    _check_pool(manifest, rows, column["uid"], findings)


def _check_pool(
    manifest: dict[str, Any], rows: np.ndarray, uids: np.ndarray, findings: Findings
) -> None:
    """Compare subset and uids with the pool file, if it is still the same file."""
    path = manifest["pool"]["path"]
    try:
        pool = Pool.open(path, limit=manifest["pool"]["n"])
    except UserError as error:
        findings.warnings.append(f"the subset was not compared with its pool: {error}")
        return
    if pool.sha256 != manifest["pool"]["sha256"]:
        findings.warnings.append(f"{path} has changed since: the subset was not compared with it")
        return
    if uids.tolist() != [pool.uid(row) for row in range(len(pool))]:
        findings.problems.append("scores.parquet: uids are not the pool's")
    inside = rows[(rows >= 0) & (rows < len(pool))]
    digest = hashlib.sha256()
    for piece in subset_pieces(pool, inside.tolist()):
        digest.update(piece)
    if digest.hexdigest() != manifest["subset"]["sha256"]:
        findings.problems.append("subset.json is not the pool's records at subset_rows.txt")
