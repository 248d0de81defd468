"""What to change when a run does not fit a GPU: the mildest change that makes it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llava.train.plan.devices import Device
from llava.train.plan.footprint import Setup, memory, shrunk, usable
from llava.train.plan.lengths import Batch
from llava.train.plan.outline import Outline

ZERO3 = "--deepspeed scripts/zero3.json"
OFFLOAD = "--deepspeed scripts/zero3_offload.json"
CHECKPOINTING = "--gradient_checkpointing True"
NOTHING = "no setting is enough: more GPUs, --lora_enable True (with --bits 4), or a smaller model"


@dataclass(frozen=True)
class Fit:
    """Whether a run fits one kind of GPU."""

    device: str
    usable: float
    """Bytes."""
    peak: float
    """Bytes, with the largest of the simulated micro-batches."""
    worst: float
    """Bytes, if every row of a micro-batch had the maximum length."""
    advice: str
    """Empty, or the flags to change."""
    computes: bool
    """Whether the GPU has the type of the computation."""

    @property
    def fits(self) -> bool:
        return self.peak <= self.usable


def fit(outline: Outline, setup: Setup, largest: Batch, worst: Batch, device: Device) -> Fit:
    """Compare a run with a GPU; with advice where it does not fit, or only almost."""
    room = usable(device)
    peak, bound = (memory(outline, setup, batch).peak for batch in (largest, worst))
    needed = largest if peak > room else worst
    advice = "" if bound <= room else remedy(outline, setup, needed, room) or NOTHING
    return Fit(device.name, room, peak, bound, advice, device.has_bf16 or not setup.bf16)


def remedy(outline: Outline, setup: Setup, batch: Batch, room: float) -> str | None:
    """The first of `candidates` whose peak fits into `room` bytes, as flags; None if none does."""
    for flags, changed, smaller in candidates(setup, batch):
        if memory(outline, changed, smaller).peak <= room:
            return flags
    return None


def candidates(setup: Setup, batch: Batch) -> Iterator[tuple[str, Setup, Batch]]:
    """Changes that keep the global batch, from the mildest: the batch smaller and accumulated more
    (costs nothing that padding does not give back); checkpointing (a third more computation);
    ZeRO-3 (more communication); offloading (much more). Each with and without the ones before."""
    zero3 = replace(setup, zero_stage=3, max_live=min(setup.max_live, 10**9))
    offload = replace(zero3, offload_optimizer=True, offload_parameters=True)
    stages = [("", setup)]
    splits = setup.bits == 16  # ZeRO-3 cannot split quantised weights
    if splits and setup.zero_stage < 3 and setup.world_size > 1:
        stages.append((ZERO3, zero3))
    if splits and not (setup.offload_optimizer and setup.offload_parameters):
        stages.append((OFFLOAD, offload))
    for stage_flags, staged in stages:
        for more_checkpointing in (False, True):
            if more_checkpointing and setup.checkpointing:
                continue
            ready = replace(staged, checkpointing=setup.checkpointing or more_checkpointing)
            flags = [CHECKPOINTING] * more_checkpointing + [stage_flags] * bool(stage_flags)
            for shares, batch_flags in _smaller(setup):
                changed = replace(
                    ready,
                    batch_size=setup.batch_size // shares,
                    accumulation=setup.accumulation * shares,
                )
                n_rows = max(batch.n_rows // shares, 1)
                smaller = shrunk(batch, n_rows, changed.batch_size)
                yield " ".join([*batch_flags, *flags]), changed, smaller


def _smaller(setup: Setup) -> Iterator[tuple[int, list[str]]]:
    """Ways to share a micro-batch out over more accumulated steps, the batch itself first."""
    yield 1, []
    for shares in range(2, setup.batch_size + 1):
        if setup.batch_size % shares == 0:
            yield (
                shares,
                [
                    f"--per_device_train_batch_size {setup.batch_size // shares}",
                    f"--gradient_accumulation_steps {setup.accumulation * shares}",
                ],
            )
