"""Schedules, traces and op names come back from their written forms as they went in."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.codec import (
    problem_from_json,
    problem_to_json,
    schedule_from_json,
    schedule_to_json,
    trace_from_json,
    trace_to_json,
)
from megatron_pipeweaver.ir.problem import OpKey, OpKind
from megatron_pipeweaver.ir.schedule import Schedule, ScheduledOp
from megatron_pipeweaver.ir.text import format_op, format_ops, parse_grid, parse_op
from megatron_pipeweaver.ir.trace import Trace, TraceKind, TraceRow
from tests.unit.ir.examples import problem

WHOLE = st.integers(0, 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
OPS = st.builds(
    OpKey,
    st.sampled_from(OpKind),
    st.integers(0, 10**6),
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6),
        st.text("a2:.F %|\n", min_size=1, max_size=6),
    ),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
)
RANKS = st.integers(0, 3)


def rows(element: st.SearchStrategy[object], count: int) -> st.SearchStrategy[tuple[object, ...]]:
    return st.tuples(*[st.lists(element, max_size=3).map(tuple)] * count)


SCHEDULES = RANKS.flatmap(
    lambda count: st.builds(
        Schedule,
        problem_sha256=TEXT,
        makespan_ns=WHOLE,
        lower_bound_ns=WHOLE,
        peak_memory_bytes=st.tuples(*[WHOLE] * count),
        ranks=rows(
            st.builds(ScheduledOp, key=OPS, strategy=TEXT, start_ns=WHOLE, end_ns=WHOLE), count
        ),
    )
)
TRACES = RANKS.flatmap(
    lambda count: st.builds(
        Trace,
        iteration=WHOLE,
        plan_sha256=TEXT,
        hosts=st.tuples(*[TEXT] * count),
        ranks=rows(
            st.builds(
                TraceRow,
                kind=st.sampled_from(TraceKind),
                key=OPS,
                strategy=TEXT,
                start_ns=WHOLE,
                end_ns=WHOLE,
                peer=st.none() | WHOLE,
                size_bytes=st.none() | WHOLE,
            ),
            count,
        ),
    )
)


@settings(max_examples=60, deadline=None)
@given(SCHEDULES)
def test_schedule_files_round_trip(schedule: Schedule) -> None:
    assert schedule_from_json(schedule_to_json(schedule)) == schedule


@settings(max_examples=60, deadline=None)
@given(TRACES)
def test_trace_files_round_trip(trace: Trace) -> None:
    assert trace_from_json(trace_to_json(trace)) == trace


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(OPS, max_size=3), max_size=3))
def test_op_names_and_grids_round_trip(ranks: list[list[OpKey]]) -> None:
    text = format_ops(ranks)
    assert [[parse_op(cell) for cell in row] for row in parse_grid(text)] == ranks
    assert len(text.splitlines()) == len(ranks)


@settings(max_examples=60, deadline=None)
@given(OPS, OPS)
def test_op_names_tell_ops_apart(one: OpKey, other: OpKey) -> None:
    assert (format_op(one) == format_op(other)) == (one == other)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(JSON, st.randoms(use_true_random=False))
def test_a_spoilt_problem_is_read_or_refused_in_one_line(value: object, random: object) -> None:
    root = json.loads(problem_to_json(problem()))
    spot, key = root, random.choice(sorted(root))  # type: ignore[attr-defined]
    while isinstance(spot[key], dict | list) and spot[key] and random.random() < 0.8:  # type: ignore[attr-defined]
        spot = spot[key]
        key = random.choice(sorted(spot) if isinstance(spot, dict) else range(len(spot)))  # type: ignore[attr-defined]
    spot[key] = value
    refusal = None
    try:
        problem_from_json(json.dumps(root).encode(), "p.json")
    except ConfigError as error:
        refusal = str(error)
    assert refusal is None or refusal.startswith("p.json: $")
    assert refusal is None or len(refusal.splitlines()) == 1
