"""What the processes of a run tell each other besides gradients, so that none waits for ever.

In a run of one process every function answers for that process alone. All but `rank`, `world_size`,
`leave`, `first_to_say` and `said` are collective: to be called by every process, in the same order.
PyTorch is imported where a group is made and nowhere else, so a command that needs none starts
at once.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import ModuleType
from typing import Any, TypeVar

from llava.errors import UserError

T = TypeVar("T")
_SAID = "llava/errors said"


def _group() -> ModuleType | None:
    """`torch.distributed`, if this process belongs to a group; who has not loaded it does not."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def started() -> bool:
    """Whether this process belongs to a group of more than one."""
    dist = _group()
    return dist is not None and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process, from 0, which is the main one; of a launch before they met."""
    dist = _group()
    return dist.get_rank() if dist else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes work together, also before they have met."""
    dist = _group()
    return dist.get_world_size() if dist else int(os.environ.get("WORLD_SIZE", 1))


def join(timeout: timedelta) -> None:
    """Meet the other processes of this launch over gloo, unless they have met or there are none.

    `timeout` is the longest wait for the slowest of them; one that dies ends it at once.
    """
    if world_size() > 1 and _group() is None:
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=timeout)
        atexit.register(leave)  # for programs that are not `llava.launch.process`


def leave(after_error: bool = False) -> None:
    """End the process group, if there is one, as the last thing that a process does.

    A group that cycles still hold would end its threads while the interpreter ends: one of some
    forty runs of two processes aborted so after its work was done. After an error NCCL's is left
    as it is: it would wait for work that the other processes never start.
    """
    dist = _group()
    if dist and not (after_error and "nccl" in str(dist.get_backend())):
        dist.destroy_process_group()
        gc.collect()


def limit_waiting(seconds: float) -> None:
    """Let no process wait longer for another (P17); Trainer sets no limit on CPUs."""
    if started():
        _group().distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def total(counts: Sequence[int]) -> list[int]:
    """Each of `counts` summed over all processes."""
    return _summed(list(counts), "int64")


def total_float(value: float) -> float:
    """`value` summed over all processes, in double precision."""
    return _summed([value], "float64")[0]


def _summed(values: list, dtype: str) -> list:
    if not started():
        return values
    import torch

    nccl = "nccl" in str(_group().get_backend())
    device = torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
    summed = torch.tensor(values, dtype=getattr(torch, dtype), device=device)
    _group().all_reduce(summed)
    return summed.tolist()


def any_of(flag: bool) -> bool:
    """Whether `flag` is true on some process."""
    return bool(total([int(flag)])[0])


def barrier() -> None:
    """Wait until every process is here."""
    total([0])


def gathered(value: T) -> list[T]:
    """The value of every process, by rank."""
    if not started():
        return [value]
    values: list[Any] = [None] * world_size()
    _group().all_gather_object(values, value)
    return values


def share(value: T) -> T:
    """The main process's `value`, on every process."""
    if not started():
        return value
    box = [value]
    _group().broadcast_object_list(box, src=0)
    return box[0]


def from_main(work: Callable[[], T]) -> T:
    """What `work` gives, or the UserError it raises, on the main process; for all."""
    if not started():
        return work()
    result, error = None, None
    if rank() == 0:
        try:
            result = work()
        except UserError as raised:
            error = raised
    result, error = share((result, error))
    if error is not None:
        raise error
    return result


def agree(error: UserError | None) -> None:
    """Raise on all processes if one has an error: its own where it has one, else the first."""
    if not started() and error is not None:
        raise error
    errors = [other for other in gathered(error) if other is not None]
    if errors:
        raise error or errors[0]


def is_first_here() -> bool:
    """Whether this is the first process of its machine, also before the processes have met."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def first_to_say() -> bool:
    """Whether this process is the one that tells the user of an error that ends the run."""
    told = _told(1)
    return is_first_here() if told is None else told == 1


def said() -> bool:
    """Whether some process has told the user why the run ends."""
    return bool(_told(0))


def lost_another(error: BaseException) -> bool:
    """Whether `error` only says that another process did not answer."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and (
        isinstance(error, dist.DistError) or "gloo/transport" in str(error)
    )


def _told(more: int) -> int | None:
    """How many processes have told of an error, `more` counted in; None where none can know.

    They count in a store: torchrun's own, which is there before and without a group, or else the
    one that the group met in.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and _group() is None:
        return None
    import torch.distributed as dist

    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(*where, is_master=False, timeout=timedelta(seconds=10))
        else:
            store = dist.distributed_c10d._get_default_store()
        return store.add(f"{_SAID} {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", more)
    except RuntimeError:  # the process that keeps the store has ended: it told
        return 1 + (rank() > 0)
