"""Errors a user can act on: one line with the place, the value and the remedy, and an exit code.

`llava.launch.process` says that line and ends with that code.
"""

from __future__ import annotations


class UserError(Exception):
    """Base of everything that is not a bug. `str(error)` is one clear line."""

    exit_code = 2
    prefix = "error: "


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


class Preempted(UserError):
    """Ended by a signal with everything saved; the same command goes on (exit 75)."""

    exit_code = 75
    prefix = ""


class Interrupted(UserError):
    """Ended from the keyboard (exit 130)."""

    exit_code = 130
    prefix = ""


def at_least(least: float, settings: object, *names: str, prefix: str = "--") -> None:
    """Raise UsageError for the first of the fields `names` of `settings` below `least`.

    None is no value. `prefix` stands before the name; that of a flag is the default.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise UsageError(f"{prefix}{name} {value}: give a number of at least {least}")
