"""`python -m llava.train`, in whose second process a bug shows after some steps."""

from __future__ import annotations

import os
import signal
from typing import Any

from llava.launch import process
from llava.train.__main__ import main


def fail(*_: Any) -> None:
    raise ValueError("a bug in the second process")


def failing() -> None:
    if os.environ["RANK"] == "1":
        signal.signal(signal.SIGUSR2, fail)
    main()


process(failing)
