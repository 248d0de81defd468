"""How long a question waits before it is sent again; the rest: signals/test_judge.py."""

from __future__ import annotations

import time
from email.utils import formatdate

import tenacity

from selection.signals.judge import asking


def test_retry_after_in_each_of_its_forms():
    assert asking.retry_after("2.5") == 2.5 and asking.retry_after("-1") == 0
    assert asking.retry_after(None) is None and asking.retry_after("soon") is None
    assert asking.retry_after("inf") is None and asking.retry_after("nan") is None
    assert asking.retry_after("1e12") == 24 * 3600
    assert 8 < asking.retry_after(formatdate(time.time() + 10, usegmt=True)) <= 10


def test_pauses_grow_and_are_random():
    def pauses(attempt: int) -> list[float]:
        state = tenacity.RetryCallState(None, None, (), {})
        state.attempt_number = attempt
        state.set_exception((OSError, OSError(), None))
        return [asking.pause(state) for _ in range(200)]

    for attempt, longest in ((1, 1), (4, 8), (20, asking.LONGEST_WAIT)):
        found = pauses(attempt)
        assert 0.8 * longest < max(found) <= longest and min(found) < 0.2 * longest
        assert len(set(found)) > 100
