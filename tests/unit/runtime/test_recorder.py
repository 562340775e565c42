"""The recorder: times on its own clock, and what it calls on the way."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from megatron_pipeweaver.runtime.clock import DeviceClock, HostClock
from megatron_pipeweaver.runtime.recorder import Recorder


def test_times_count_from_the_start() -> None:
    ticks = count(100, 10)
    entered: list[int] = []
    recorder = Recorder(3, clock=HostClock(lambda: next(ticks)), on_action=entered.append)
    recorder.start()  # at 110
    recorder.leave(recorder.enter(0), computes=True)
    recorder.leave(recorder.enter(1), computes=False)
    assert list(recorder.times_ns) == [10, 20, 30, 40]
    assert entered == [0, 1]


class Stream:
    """A GPU's stream of work: the host gives it work, and it runs later."""

    def __init__(self) -> None:
        self.queue: list[int | Event] = []
        self.now_ms = 5.0
        self.waited = 0

    def synchronize(self) -> None:
        for one in self.queue:
            if isinstance(one, Event):
                one.at_ms = self.now_ms
            else:
                self.now_ms += one
        self.queue.clear()
        self.waited += 1


class Event:
    """A CUDA event on a `Stream`."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.at_ms: float | None = None

    def record(self) -> None:
        self.stream.queue.append(self)

    def synchronize(self) -> None:
        if self.at_ms is None:
            self.stream.synchronize()

    def elapsed_time(self, later: Event) -> float:
        assert self.at_ms is not None
        assert later.at_ms is not None
        return later.at_ms - self.at_ms


def test_on_a_gpu_rows_tell_of_the_work_and_not_of_how_soon_the_host_gave_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(stream))
    monkeypatch.setattr(torch.cuda, "synchronize", stream.synchronize)
    recorder = Recorder(3, clock=DeviceClock())
    stream.queue.append(1000)  # of the iteration in front, say its optimizer's step
    recorder.start()
    waited = stream.waited
    for milliseconds in (40, 7):
        began = recorder.enter(0)
        stream.queue.append(milliseconds)
        recorder.leave(began, computes=True)
    assert stream.waited == waited  # the host went on
    assert list(recorder.times_ns) == [0, 40_000_000, 40_000_000, 47_000_000]
