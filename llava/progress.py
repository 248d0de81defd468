"""How far a long loop is: a bar on a terminal and in a notebook, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

SECONDS = 30


class Progress:
    """Context that counts samples; `advance` reports rate, time left and unusable samples."""

    def __init__(self, name: str, total: int, shown: bool = True) -> None:
        self.name, self.total, self.shown = name, total, shown
        self.done = self.bad = 0
        self._bar: tqdm | None = None
        in_notebook = "ipykernel" in sys.modules  # its stderr says that it is no terminal
        if shown and (sys.stderr.isatty() or in_notebook):
            self._bar = tqdm(total=total, desc=name, unit=" samples", smoothing=0.1)

    def __enter__(self) -> Progress:
        self._start = self._told = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.shown and self.total:
            self._tell()

    def advance(self, n: int, bad: int = 0) -> None:
        """Count `n` more samples, `bad` of them unusable."""
        self.done += n
        self.bad += bad
        if self._bar is not None:
            if bad:
                self._bar.set_postfix(unusable=self.bad)
            self._bar.update(n)
        elif self.shown and time.monotonic() - self._told >= SECONDS:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        rate = self.done / max(self._told - self._start, 1e-6)
        left = (self.total - self.done) / rate if rate else float("inf")
        unusable = f", {self.bad} unusable" if self.bad else ""
        print(
            f"{self.name}: {self.done}/{self.total} samples, {rate:.1f}/s, "
            f"{left / 60:.0f} min left{unusable}",
            file=sys.stderr,
            flush=True,
        )
