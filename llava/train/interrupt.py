"""SIGTERM and SIGUSR1: finish the step, write a checkpoint, end with 75: requeue (promise P16).

A signal to any process counts for all of them. A thread hears signals, so that the second one
ends a process at once even while it is stuck inside a collective.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from llava import children, ranks

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Launchers and schedulers both pass a signal on: what comes this soon is the first one again.
SAME_SIGNAL = 3.0  # seconds


class Interrupt:
    """Inside `with`, hears the signals. `received` is the name of the first, or None."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._since = 0.0

    def __enter__(self) -> Interrupt:
        self._listens = threading.current_thread() is threading.main_thread()
        if not self._listens:  # a program of its own decides what signals mean
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._former_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._former = {number: signal.signal(number, _nothing) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not self._listens:
            return
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_fd)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)
        # Then it was the launcher's word, which has seen the other end and waits for this one.
        if self.received == "SIGTERM" and error is not None and ranks.lost_another(error):
            signal.raise_signal(signal.SIGTERM)

    def _listen(self) -> None:
        while True:
            for number in os.read(self._read, 64):
                if number == 0:
                    return
                if number in SIGNALS:
                    self._hear(signal.Signals(number))

    def _hear(self, number: signal.Signals) -> None:
        if self.received is None:
            self.received, self._since = number.name, time.monotonic()
        elif time.monotonic() - self._since > SAME_SIGNAL:
            print(f"{number.name}, the second signal: ends at once", file=sys.stderr, flush=True)
            os._exit(128 + number)


def _nothing(number: int, frame: Any) -> None:
    """Stands as the handler; the thread is woken through the file descriptor."""


class LoaderProcess:
    """What a loader process does first: leave signals to its parent, and end when that ends.

    A scheduler signals every process of a job; PyTorch's loaders would end, and the run fail. They
    would also hear them through the pipe of the parent, which they inherit. SIGTERM of the parent
    itself still ends a loader: after an error Python sends it and waits, if need be for ever.
    """

    def __init__(self, then: Callable[[int], None] | None = None) -> None:
        self.parent, self.then = os.getpid(), then

    def __call__(self, worker: int) -> None:
        children.end_with(self.parent)
        signal.set_wakeup_fd(-1)
        if hasattr(signal, "sigwaitinfo"):  # macOS does not say who has sent a signal
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            threading.Thread(target=self._listen, daemon=True).start()
        if self.then is not None:
            self.then(worker)

    def _listen(self) -> None:
        while True:
            heard = signal.sigwaitinfo(SIGNALS)
            if (heard.si_signo, heard.si_pid) == (signal.SIGTERM, self.parent):
                os._exit(0)  # as PyTorch's own answer to it: any other code would be an error


class StopAtSignal(TrainerCallback):
    """Ends training after the step in which some process heard a signal, with a checkpoint.

    `stopped` is then True. At the end of an epoch its evaluation comes first, as in a run that
    nobody stops; within one, what the strategies do at an epoch's end is left out.
    """

    def __init__(self, interrupt: Interrupt) -> None:
        self.interrupt = interrupt
        self.stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        heard = ranks.any_of(self.interrupt.received is not None)
        if heard and state.global_step < state.max_steps:
            self.stopped = control.should_training_stop = True
            control.should_save = control.should_save or not _at_epoch_end(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped:
            control.should_save = _at_epoch_end(state)
            if not control.should_save:
                control.should_log = control.should_evaluate = False


def _at_epoch_end(state: Any) -> bool:
    return float(state.epoch).is_integer()
