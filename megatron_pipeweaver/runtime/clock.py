"""When something happens: by the host's clock, or on the device, which runs behind the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Mark = Any
"""A point in time of a `Clock`; an opaque value that its `elapsed_ns` reads."""


class Clock(Protocol):
    """Marks points in time; tells how far they lie behind the start, when all has run."""

    def start(self) -> int:
        """Set the start to now; nanoseconds of the host's clock, one for all its processes."""

    def mark(self) -> Mark:
        """This point in time."""

    def elapsed_ns(self, mark: Mark) -> int:
        """Nanoseconds from the start to `mark`."""


class HostClock:
    """Points in time as the host comes past them: what it calls has happened when it returns.

    Args:
        now: nanoseconds, monotonic; one clock for all processes of a host.
    """

    def __init__(self, now: Callable[[], int] = time.perf_counter_ns) -> None:
        self._now = now
        self._start_ns = 0

    def start(self) -> int:
        """See `Clock`."""
        self._start_ns = self._now()
        return self._start_ns

    def mark(self) -> Mark:
        """See `Clock`."""
        return self._now()

    def elapsed_ns(self, mark: Mark) -> int:
        """See `Clock`."""
        elapsed: int = mark - self._start_ns
        return elapsed


class DeviceClock:
    """Points in time as a GPU's current stream comes past them.

    The host only gives work to the stream; what it took the host says nothing of how long the work
    is. An event in front of it and one behind it do, at a few microseconds each, and neither makes
    the host wait before someone reads them.
    """

    def __init__(self) -> None:
        self._first = self.mark()

    def start(self) -> int:
        """See `Clock`; waits for the device, so that its start and the host's are one."""
        torch.cuda.synchronize()
        self._first = self.mark()
        return time.perf_counter_ns()

    def mark(self) -> Mark:
        """See `Clock`."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def elapsed_ns(self, mark: Mark) -> int:
        """See `Clock`; waits until the stream has come past `mark`."""
        mark.synchronize()
        milliseconds: float = self._first.elapsed_time(mark)
        return round(milliseconds * 1e6)
