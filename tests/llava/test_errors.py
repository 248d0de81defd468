"""Settings that are too small are told by flag and value."""

from types import SimpleNamespace

import pytest

from llava.errors import UsageError, at_least


def test_the_first_setting_that_is_too_small_is_named_with_its_value():
    settings = SimpleNamespace(a=1, b=0, c=-2.5, absent=None)
    at_least(0, settings, "a", "b", "absent")
    with pytest.raises(UsageError, match=r"^--b 0: give a number of at least 1$"):
        at_least(1, settings, "a", "absent", "b", "c")
    with pytest.raises(UsageError, match=r"^c -2\.5: give a number of at least 0$"):
        at_least(0, settings, "a", "c", prefix="")
