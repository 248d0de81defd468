"""What the numbers of a run depend on besides its inputs: versions, device, commit."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    "torch transformers tokenizers sentencepiece safetensors peft accelerate numpy faiss-cpu "
    "faiss-gpu scikit-learn pillow msgspec pyarrow xxhash"
).split()


def environment() -> dict[str, Any]:
    """`python`, `platform`, `device`, `git_commit` and the `versions` of installed packages."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(),
        "git_commit": git_commit(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


@cache
def device_name() -> str:
    """The GPU's name, else the processor's."""
    import torch  # here, because it takes seconds and most of this package does without

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


@cache
def git_commit() -> str | None:
    """Commit of this source tree, with "+changes" when it was edited; None outside git."""
    tree = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*tree, "rev-parse", "HEAD"], capture_output=True, text=True)
        status = subprocess.run([*tree, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:  # git is not installed
        return None
    if commit.returncode != 0:
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def environment_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line per difference that can change numbers; the platform string is not one."""
    before = {**old["versions"], "python": old["python"], "device": old["device"]}
    after = {**new["versions"], "python": new["python"], "device": new["device"]}
    return [
        f"{name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
