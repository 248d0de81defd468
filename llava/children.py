"""Children that end with their parent: `python children.py PARENT COMMAND...` runs COMMAND so.

Linux kills a process whose parent has ended if that process has asked for it. It has to ask by
itself, and the wish outlives `exec`: so a launcher starts this file, which asks at once and becomes
the command, whatever the command is and however long it takes to load. A process that is killed
cannot end its children; without this they would go on, or wait for ever, on GPUs nobody frees.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


def end_with(parent: int) -> None:
    """Let SIGKILL end this process when `parent` ends, or now if it has; only Linux can.

    Strictly, when the thread of `parent` ends that has made this process.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the wish was told
        os.kill(os.getpid(), signal.SIGKILL)


def bound(command: Sequence[str]) -> list[str]:
    """`command` as a child of this process that ends with it: the words to start."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
