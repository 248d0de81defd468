"""GPUs by name: memory and peak speed, for plans. Numbers of the vendor's data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llava.errors import UsageError

GIB = 2**30
_TERA = 1e12


@dataclass(frozen=True)
class Device:
    """One GPU. Speeds are dense matrix products, without the doubling by sparsity."""

    name: str
    memory_gib: float
    """Data sheets say GB; what CUDA reports is within 2 % of as many GiB."""
    tflops_16: float
    """16-bit inputs, accumulated in float32 on tensor cores."""
    tflops_32: float
    """float32 without TF32."""
    has_bf16: bool = True

    def peak(self, compute_bytes: int) -> float:
        """FLOP/s of matrix products whose inputs take `compute_bytes` each (2 or 4)."""
        return _TERA * (self.tflops_16 if compute_bytes == 2 else self.tflops_32)


DEVICES = (
    Device("A100-40G", 40, 312, 19.5),
    Device("A100-80G", 80, 312, 19.5),
    Device("A800", 80, 312, 19.5),
    Device("H100", 80, 989, 66.9),  # SXM
    Device("H200", 141, 989, 66.9),
    Device("H20", 96, 148, 44.0),
    Device("V100-32G", 32, 125, 15.7, has_bf16=False),
    Device("L40S", 48, 362, 91.6),
    Device("RTX 4090", 24, 165, 82.6),
    Device("RTX 3090", 24, 71, 35.6),
)


def find_device(name: str) -> Device:
    """The device that `name` means, written in any case and with any separators.

    Raises UsageError with the known names.
    """
    bare_name = _plain(name)
    for device in DEVICES:
        if _plain(device.name) == bare_name:
            return device
    known = ", ".join(device.name for device in DEVICES)
    raise UsageError(f"--gpu {name}: not in the table of GPUs; known: {known}")


def _plain(name: str) -> str:
    bare = re.sub(r"[^a-z0-9]", "", name.lower())
    bare = re.sub(r"^(nvidia|geforce)+", "", bare)
    return re.sub(r"gb$", "g", bare)
