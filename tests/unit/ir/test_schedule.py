from dataclasses import replace

import pytest

from tests.unit.ir.examples import schedule, trace


def test_gap_is_measured_from_the_bound():
    assert schedule().gap == pytest.approx(0.25)
    assert replace(schedule(), lower_bound_ns=0).gap == 0.0


def test_bubble_is_the_idle_share():
    assert schedule().bubble() == pytest.approx(1 - (22 + 30) / 100)


def test_bubble_of_an_empty_schedule_is_zero():
    empty = replace(schedule(), ranks=(), peak_memory_bytes=())
    assert empty.bubble() == 0.0
    assert replace(schedule(), ranks=((), ()), makespan_ns=0).bubble() == 0.0


def test_trace_lasts_until_its_last_row():
    assert trace().duration_ns == 12
    assert replace(trace(), ranks=((), ())).duration_ns == 0
