"""Processes of a run: how they are started, and how each of them ends.

    python -m llava.launch [torchrun's flags] -m MODULE [its flags]

is torchrun for schedulers. torchrun itself ends with 1 whatever its ranks ended with, and answers a
signal by killing them half a minute later. Here SIGTERM and SIGUSR1 are handed on to the ranks of
this machine, which finish their step, write a checkpoint and end with 75 (promise P16), and the
exit code is that of the rank that said why the run ends. A crash ends in torchrun's summary with
the traceback of the rank that failed first (P17). Ranks end with their launcher, however it ends.

`launch` does the same from Python, `process` is the other side: what a rank, or a program alone,
does around its work. PyTorch is loaded only where ranks are started or counted by GPUs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

from llava import children, ranks
from llava.errors import Interrupted, Preempted, UsageError, UserError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

READER_GONE = 141
"""Exit code of a program whose output nobody reads any more, as in `... | head`."""
_HANDED_ON = (signal.SIGTERM, signal.SIGUSR1)
_STOPPING = "SIGINT,SIGHUP,SIGQUIT"  # torchrun goes on to end the ranks on these
_AFTER_TERMINAL = 5  # seconds that a child has to end by itself
_AFTER_OTHERS = 2  # seconds: the launcher names the process that it sees end first as the cause


# ---- starting ------------------------------------------------------------------------------------


def n_processes(without_gpu: int = 1) -> int:
    """How many processes a launch on this machine has: NPROC, else one a GPU, else `without_gpu`.

    Raises UsageError if NPROC is not a positive number.
    """
    told = os.environ.get("NPROC")
    if told is None or told == "":
        import torch

        return torch.cuda.device_count() or without_gpu
    if not told.isdecimal() or int(told) < 1:
        raise UsageError(f"NPROC={told}: give a number of at least 1")
    return int(told)


def launch(
    module: str,
    argv: Sequence[str],
    processes: int | None = None,
    environ: Mapping[str, str] = os.environ,
) -> int:
    """Run `python -m module argv` in `processes` processes, by default `n_processes()`.

    TORCHRUN_ARGS of `environ`, in which they run, are torchrun's flags, for several machines;
    without them a single process needs no torchrun. Returns the exit code, 128 and its number after
    a signal. SIGTERM and SIGUSR1 are handed on, and what runs ends with this process.
    """
    flags = environ.get("TORCHRUN_ARGS", "").split()
    processes = processes or n_processes()
    words = ["-m", module, *argv]
    if processes > 1 or flags:
        flags = [*(flags or ["--standalone"]), "--nproc_per_node", str(processes)]
        words = ["-m", "llava.launch", *flags, *words]
    with subprocess.Popen(children.bound([sys.executable, *words]), env=environ) as child:
        with _handing_on(lambda number, _: child.send_signal(number)):
            code = _ended(child)
    return code if code >= 0 else 128 - code


def _ended(child: subprocess.Popen) -> int:
    """Wait for the end of `child`, also past an interrupt."""
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            # A terminal has told the child too, which ends by itself; `kill` told only this one.
            with suppress(subprocess.TimeoutExpired):
                return child.wait(_AFTER_TERMINAL)
            child.send_signal(signal.SIGINT)


@contextmanager
def _handing_on(hand_on: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, `hand_on` hears SIGTERM and SIGUSR1; threads cannot listen, and leave it be."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, hand_on) for number in _HANDED_ON}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def main(argv: Sequence[str]) -> int:
    """Run torchrun with `argv`; the exit code of the run."""
    import logging

    import psutil
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    args = run.parse_args(argv)
    args.signals_to_handle = _STOPPING
    title = args.training_script
    # torchrun starts a command of its own making: here that command becomes one that ends with us.
    if not args.run_path and not (args.no_python and args.module):
        python = [] if args.no_python else [os.environ.get("PYTHON_EXEC", sys.executable), "-u"]
        command = [*python, *["-m"][: args.module], title, *args.training_script_args]
        args.training_script, *args.training_script_args = children.bound(command)
        args.no_python, args.module = True, False

    heard: set[int] = set()

    def hand_on(number: int, frame: FrameType | None) -> None:
        heard.add(number)
        for rank in psutil.Process().children():  # the ranks, not their loader processes
            with suppress(psutil.NoSuchProcess):  # it has just ended
                rank.send_signal(number)

    with _handing_on(hand_on):
        try:
            run.run(args)
        except ChildFailedError as error:
            error.name = title
            return _exit_code(error, heard)
        except SignalException as error:
            return 128 + error.sigval
    return 0


def _exit_code(error: ChildFailedError, heard: set[int]) -> int:
    """What the ranks say why they ended, in a line of their own; 1 and a summary if none does.

    One that lost another may have been seen first, so all are asked.
    """
    spoken = {READER_GONE, *(cls.exit_code for cls in UserError.__subclasses__())}
    for failure in error.failures.values():
        if failure.exitcode in spoken:
            return failure.exitcode
    first = -error.get_first_failure()[1].exitcode
    if first in heard:
        return Preempted.exit_code  # before the rank could listen: nothing is lost but the start
    if first == signal.SIGINT:
        return Interrupted.exit_code
    print(error.format_msg(), file=sys.stderr)
    return 1


# ---- ending --------------------------------------------------------------------------------------


def process(main: Callable[[], None]) -> None:
    """Run `main` as a program, alone or as one process of a run; an error decides the exit code.

    A UserError is one line on stderr, said by one process, and its exit code. Any other error is a
    traceback, which torchrun shows again in its summary; processes that only fail because of
    another's error are silent. A reader that has gone, as in `... | head`, ends the program quietly
    (exit 141).
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    spoken = partial(_spoken, main)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun reads there what its summary shows
        from torch.distributed.elastic.multiprocessing.errors import record

        spoken = record(spoken)
    spoken()


def _spoken(main: Callable[[], None]) -> None:
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _end(error)
    except KeyboardInterrupt:
        _end(Interrupted("interrupted; run the same command again to continue"))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
        ranks.leave(after_error=True)
        sys.exit(READER_GONE)
    except Exception as error:
        if ranks.lost_another(error):
            time.sleep(_AFTER_OTHERS)
        if ranks.said():
            sys.exit(1)
        raise
    ranks.leave()


def _end(error: UserError) -> None:
    if ranks.first_to_say():
        print(f"{error.prefix}{error}", file=sys.stderr, flush=True)
    ranks.leave(after_error=True)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
