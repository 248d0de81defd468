"""`python -m llava.launch [torchrun's flags] -m MODULE [its flags]`: torchrun for schedulers.

torchrun itself ends with 1 whatever its ranks ended with, and answers a signal by killing them half
a minute later. Here SIGTERM and SIGUSR1 are handed on to the ranks of this machine, which finish
their step, write a checkpoint and end with 75 (promise P16), and the exit code is that of the rank
that failed first. A crash ends in torchrun's summary with the traceback of that rank (P17).
"""

from __future__ import annotations

import logging
import signal
import sys
from contextlib import suppress
from types import FrameType

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from llava.errors import UserError

PREEMPTED = 75
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
_STOPPING = "SIGINT,SIGHUP,SIGQUIT"  # torchrun goes on to end the ranks on these
_seen: set[int] = set()


def main(argv: list[str]) -> int:
    """Run torchrun with `argv`; the exit code of the run."""
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    args = run.parse_args(argv)
    args.signals_to_handle = _STOPPING
    for number in _FORWARDED:
        signal.signal(number, _forward)
    try:
        run.run(args)
    except ChildFailedError as error:
        return _exit_code(error)
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _forward(number: int, frame: FrameType | None) -> None:
    """Hand the signal on to the ranks: the direct children, not their loader processes."""
    _seen.add(number)
    for rank in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it has just ended
            rank.send_signal(number)


def _exit_code(error: ChildFailedError) -> int:
    """What the rank that failed first says; ranks say a user's error in a line of their own."""
    _, failure = error.get_first_failure()
    if failure.exitcode in _spoken_codes():
        return failure.exitcode
    if -failure.exitcode in _seen:
        return PREEMPTED  # before the rank could listen: nothing is lost but the start
    print(error, file=sys.stderr)
    return 1


def _spoken_codes() -> set[int]:
    return {PREEMPTED, *(cls.exit_code for cls in UserError.__subclasses__())}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
