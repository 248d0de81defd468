"""What the processes of a run tell each other besides gradients, so that none waits for ever.

In a run of one process every function answers for that process alone. All but `first_to_say` and
`said` are collective: to be called by every process, in the same order.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llava.errors import UserError

T = TypeVar("T")
_SAID = "llava/errors said"


def started() -> bool:
    """Whether this process belongs to a group of more than one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def leave() -> None:
    """End the process group, if there is one, as the last thing that a process does.

    A group that cycles still hold would end its threads while the interpreter ends: one of some
    forty runs of two processes aborted so after its work was done.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def rank() -> int:
    """The number of this process, from 0; 0 is the main one."""
    return dist.get_rank() if started() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if started() else 1


def _device() -> torch.device:
    nccl = "nccl" in str(dist.get_backend())
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


def limit_waiting(seconds: float) -> None:
    """Let no process wait longer for another (P17); Trainer sets no limit on CPUs."""
    if started():
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def total(counts: Sequence[int]) -> list[int]:
    """Each of `counts` summed over all processes."""
    if not started():
        return list(counts)
    summed = torch.tensor(counts, dtype=torch.int64, device=_device())
    dist.all_reduce(summed)
    return summed.tolist()


def total_float(value: float) -> float:
    """`value` summed over all processes, in double precision."""
    if not started():
        return value
    summed = torch.tensor(value, dtype=torch.float64, device=_device())
    dist.all_reduce(summed)
    return summed.item()


def any_of(flag: bool) -> bool:
    """Whether `flag` is true on some process."""
    return bool(total([int(flag)])[0])


def gathered(value: T) -> list[T]:
    """The value of every process, by rank."""
    if not started():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(work: Callable[[], T]) -> T:
    """What `work` gives, or the UserError it raises, on the main process; for all."""
    if not started():
        return work()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = work()
        except UserError as error:
            box[1] = str(error), error.exit_code
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise _rebuilt(*box[1])
    return box[0]


def agree(error: UserError | None) -> None:
    """Raise on all processes if one has an error: its own where it has one, else the first."""
    if not started() and error is not None:
        raise error
    told = gathered(error and (str(error), error.exit_code))
    if error is not None:
        raise error
    for found in told:
        if found:
            raise _rebuilt(*found)


def _rebuilt(text: str, exit_code: int) -> UserError:
    error = UserError(text)
    error.exit_code = exit_code
    return error


def barrier() -> None:
    """Wait until every process is here."""
    total([0])


def is_first_here() -> bool:
    """Whether this is the first process of its machine, also before the processes have met."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def first_to_say() -> bool:
    """Whether this process is the one that tells the user of an error that ends the run."""
    if not (dist.is_available() and dist.is_initialized()):
        return is_first_here()
    return _counted(1) == 1


def said() -> bool:
    """Whether some process has told the user why the run ends."""
    return dist.is_available() and dist.is_initialized() and _counted(0) > 0


def lost_another(error: Exception) -> bool:
    """Whether `error` only says that another process did not answer."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _counted(more: int) -> int:
    """Errors that were told, in the store that the processes met in."""
    try:
        return dist.distributed_c10d._get_default_store().add(_SAID, more)
    except RuntimeError:  # the process that keeps the store has ended: it told
        return 1 + (dist.get_rank() > 0)
