"""Run folders: one folder belongs to one run, and says which (promise P10)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from llava import files
from llava.errors import UsageError


def claim_folder(asked: tuple[Path, bool], identity: Mapping[str, Any]) -> tuple[Path, bool]:
    """The run folder for `identity`, and whether the run in it is finished.

    `asked` is the folder and whether a new one beside it may be taken if it holds another run;
    otherwise UsageError lists what differs. A folder is claimed by its `run.json`; processes of one
    run may claim it at the same time.
    """
    folder, force_new = asked
    identity = json.loads(json.dumps(msgspec.to_builtins(identity)))  # as it will be read again
    number = 1
    while True:
        out = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        held = _held_by(out)
        if held is None:
            files.make_folder(out)
            files.atomic_write(out / "run.json", json.dumps(identity, indent=1).encode())
            return out, False
        if held == identity:
            return out, (out / "manifest.json").exists()
        if not force_new and not held:
            raise UsageError(
                f"--out {out}: is not empty and holds no run: choose another --out, or "
                "--force-new to write beside it"
            )
        if not force_new:
            changes = "; ".join(differences(held, identity))
            raise UsageError(
                f"{out} holds another run ({changes}): choose another --out, or --force-new to "
                f"write beside it"
            )
        number += 1


def _held_by(out: Path) -> dict[str, Any] | None:
    """Identity of the run that claimed `out`: None if the folder is absent or empty, {} if it
    holds other things."""
    claim = out / "run.json"
    if claim.exists():
        try:
            return json.loads(claim.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"run.json": "unreadable"}
    if out.is_dir() and not all(files.is_temporary(path) for path in out.iterdir()):
        return {}
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file")
    return None


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """One line per value that differs between two identities, such as `model.sha256: a -> b`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [
            line
            for key in sorted({*old, *new})
            for line in differences(
                old.get(key, "absent"), new.get(key, "absent"), f"{path}.{key}" if path else key
            )
        ]
    return [] if old == new else [f"{path}: {old} -> {new}"]
