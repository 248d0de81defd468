"""Errors a user can act on: one line with the place, the value and the remedy, and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Base of everything that is not a bug. `str(error)` is one clear line."""

    exit_code = 2


class UsageError(UserError):
    """A wrong flag, setting or combination of settings (exit 2)."""

    exit_code = 2


class DataError(UserError):
    """Input data that cannot be used, or more bad samples than allowed (exit 65)."""

    exit_code = 65


class NonFiniteError(UserError):
    """A loss, gradient or score that is NaN or infinite (exit 70)."""

    exit_code = 70


class StorageError(UserError):
    """The disk is full, read-only or returned an error, or stored bytes are damaged (exit 74)."""

    exit_code = 74


class RefusedError(UserError):
    """Refused for safety: a path that leaves its folder, code inside data or weights (exit 77)."""

    exit_code = 77


def run_main(main: Callable[[], None]) -> None:
    """Call `main` and turn a `UserError` into one line on stderr and its exit code.

    A reader that has gone, as in `... | head`, ends the program quietly (exit 141).
    """
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
