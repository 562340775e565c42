from dataclasses import replace

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.problem import OpKind
from megatron_pipeweaver.ir.trace import TraceKind
from megatron_pipeweaver.view.layout import (
    Mark,
    draw_schedule,
    draw_trace,
    memory_curves,
    schedule_of_trace,
)
from tests.unit.ir.examples import problem, schedule, trace


def test_a_schedule_becomes_lanes_and_boxes():
    drawing = draw_schedule(schedule(), title="x")
    assert drawing.title == "x"
    assert (drawing.end_ns, drawing.modules, drawing.curves) == (50, ("language",), ())
    first, second = drawing.lanes
    assert [(box.start_ns, box.end_ns, box.kind) for box in first.boxes] == [
        (0, 10, OpKind.F),
        (38, 50, OpKind.B),
    ]
    assert first.idle == pytest.approx(0.56)
    assert second.idle == pytest.approx(0.40)
    assert "language1.W0: weight gradient of language stage 1" in second.boxes[2].title
    assert "\nkeep\n" in second.boxes[2].title


def test_the_bound_is_marked_when_there_is_one():
    drawing = draw_schedule(schedule())
    assert drawing.marks == (Mark(time_ns=40, label="proven bound"),)
    assert "proven bound 0.000 ms (gap 25.0 %)" in drawing.facts
    assert draw_schedule(replace(schedule(), lower_bound_ns=0)).marks == ()


def test_labels_fall_back_to_the_microbatch():
    op = schedule().ranks[0][0]
    sub = replace(op, key=op.key._replace(microbatch=3, sub_microbatch=1))
    drawing = draw_schedule(replace(schedule(), ranks=((op, sub), ())))
    assert [box.labels for box in drawing.lanes[0].boxes] == [("0",), ("3.1", "3")]


def test_a_problem_adds_memory_and_its_module_order():
    drawing = draw_schedule(schedule(), problem())
    assert drawing.modules == ("vision", "language")
    first, second = drawing.curves
    assert first.steps == ((0, 4), (50, 0))
    assert second.steps == ((13, 4), (43, 0))
    assert (first.peak_bytes, first.capacity_bytes, second.capacity_bytes) == (4, 100, 90)


def wrong_strategy(one):
    op = replace(one.ranks[0][0], strategy="offload")
    return replace(one, ranks=((op,), one.ranks[1]))


def wrong_op(**changes):
    def change(one):
        op = replace(one.ranks[0][0], key=one.ranks[0][0].key._replace(**changes))
        return replace(one, ranks=((op,), one.ranks[1]))

    return change


@pytest.mark.parametrize(
    "spoil",
    [
        wrong_strategy,
        wrong_op(module="audio"),
        wrong_op(microbatch=7),
        wrong_op(stage=9),
        lambda one: replace(one, ranks=one.ranks[:1]),
    ],
)
def test_another_problems_schedule_is_refused(spoil):
    with pytest.raises(ConfigError, match="give the problem that was solved"):
        memory_curves(spoil(schedule()), problem())


def test_a_trace_becomes_boxes_and_strips():
    drawing = draw_trace(trace())
    first, second = drawing.lanes
    assert [(box.start_ns, box.end_ns) for box in first.boxes] == [(0, 10)]
    assert [(one.kind, one.start_ns, one.end_ns) for one in first.strips] == [
        (TraceKind.SEND, 10, 12)
    ]
    assert first.strips[0].title.startswith("send language0.F0, rank 1, 64 B\n")
    assert (second.boxes, second.strips, second.idle) == ((), (), 1.0)
    assert drawing.facts[0] == "iteration 3"
    assert draw_trace(trace(), problem()).curves[0].steps == ((0, 4),)


def test_the_compute_rows_of_a_trace_make_a_schedule():
    ran = schedule_of_trace(trace())
    assert [len(rank) for rank in ran.ranks] == [1, 0]
    assert (ran.makespan_ns, ran.lower_bound_ns) == (12, 0)


def test_nothing_draws_as_nothing():
    empty = replace(schedule(), makespan_ns=0, lower_bound_ns=0, ranks=((), ()))
    drawing = draw_schedule(empty)
    assert drawing.end_ns == 0
    assert [lane.idle for lane in drawing.lanes] == [0.0, 0.0]
    assert draw_trace(replace(trace(), hosts=(), ranks=())).lanes == ()
