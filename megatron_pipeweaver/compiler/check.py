"""Holds a schedule against its problem: every rule of the schedule format, one by one.

A `Schedule` is a claim; what passes `check_schedule` is a fact. The rules are those of
``docs/formats.md``; who waits for whom comes from `ir.problem.dependencies` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

from megatron_pipeweaver.compiler.order import linear_extension
from megatron_pipeweaver.errors import PlanInvalidError
from megatron_pipeweaver.ir.problem import OpKey, OpKind, Problem, Strategy, dependencies
from megatron_pipeweaver.ir.schedule import Schedule, ScheduledOp
from megatron_pipeweaver.ir.text import format_op
from megatron_pipeweaver.ir.timeline import StrategyTable, peak_bytes, rank_timeline


def check_schedule(
    problem: Problem, schedule: Schedule, *, problem_sha256: str | None = None
) -> None:
    """Returns when `schedule` is a valid schedule of `problem`.

    Args:
        problem: what was to be scheduled.
        schedule: the claim.
        problem_sha256: digest of the problem file's bytes; if given, the schedule must name it.

    Raises:
        PlanInvalidError: a rule is broken; one line names the rank, the op and what is wrong.
    """
    if problem_sha256 is not None and schedule.problem_sha256 != problem_sha256:
        raise PlanInvalidError(
            f"schedule: problem_sha256 is {schedule.problem_sha256!r}, but the problem's bytes "
            f"have {problem_sha256!r}; use the problem that was solved"
        )
    _check_rank_counts(problem, schedule)
    table = StrategyTable(problem)
    placed = _check_places(problem, schedule)
    _check_strategies(placed, table)
    _check_order(schedule)
    _check_waits(problem, placed)
    linear_extension(problem.graph, schedule.ranks)  # ops of 0 ns could still form a ring
    _check_memory(problem, schedule, table)
    _check_totals(schedule)


def _check_rank_counts(problem: Problem, schedule: Schedule) -> None:
    for what, found in (
        ("ranks", len(schedule.ranks)),
        ("peak_memory_bytes", len(schedule.peak_memory_bytes)),
    ):
        if found != problem.pipeline_size:
            raise PlanInvalidError(
                f"schedule: {what} has {found} entries; the problem has "
                f"{problem.pipeline_size} ranks"
            )


def _positions(schedule: Schedule) -> Iterator[tuple[int, int, ScheduledOp]]:
    for rank, ops in enumerate(schedule.ranks):
        for position, op in enumerate(ops):
            yield rank, position, op


def _fail(rank: int, position: int, key: OpKey, what: str) -> NoReturn:
    raise PlanInvalidError(f"rank {rank}, op {position}: {format_op(key)} {what}")


class _Placed(dict[OpKey, tuple[int, int, ScheduledOp]]):
    """Every op of a schedule with its rank and its position there."""

    def fail(self, key: OpKey, what: str) -> NoReturn:
        rank, position, _ = self[key]
        _fail(rank, position, key, what)


def _check_places(problem: Problem, schedule: Schedule) -> _Placed:
    """Every op is one of the problem's, stands once, on its rank; none is missing."""
    graph = problem.graph
    placed = _Placed()
    for rank, position, op in _positions(schedule):
        key = op.key
        node = graph.nodes.get(key.owner)
        if node is None:
            _fail(rank, position, key, "belongs to a pass that the problem does not have")
        if not 0 <= key.stage < node.stages:
            _fail(rank, position, key, f"names a stage that is not one of {node.stages}")
        if node.frozen and key.kind is not OpKind.F:
            _fail(rank, position, key, "is a backward of a frozen pass; frozen passes have none")
        if graph.rank_of(key.stage) != rank:
            _fail(rank, position, key, f"belongs on rank {graph.rank_of(key.stage)}")
        if key in placed:
            _fail(rank, position, key, f"stands twice; first as op {placed[key][1]}")
        placed[key] = (rank, position, op)
    for key in graph.ops():
        if key not in placed:
            raise PlanInvalidError(
                f"rank {graph.rank_of(key.stage)}: {format_op(key)} is missing; every forward and "
                "every backward of a pass that is not frozen stands once"
            )
    return placed


def _check_strategies(placed: _Placed, table: StrategyTable) -> None:
    """One strategy per stage pair, and its times."""
    for key, (_, _, op) in placed.items():
        strategy = table.find(key, op.strategy)
        if strategy is None:
            placed.fail(key, f"has strategy {op.strategy!r}; it may be {table.names(key)}")
        forward = placed[key.with_kind(OpKind.F)][2]
        if op.strategy != forward.strategy:
            placed.fail(
                key, f"has strategy {op.strategy!r}, but its forward has {forward.strategy!r}"
            )
        expected = _duration(key, strategy, split=key.with_kind(OpKind.W) in placed)
        if op.end_ns - op.start_ns != expected or op.start_ns < 0:
            placed.fail(
                key,
                f"runs from {op.start_ns} to {op.end_ns} ns; strategy {op.strategy!r} takes "
                f"{expected} ns",
            )


def _duration(key: OpKey, strategy: Strategy, *, split: bool) -> int:
    if key.kind is OpKind.F:
        return strategy.forward_ns
    if key.kind is OpKind.W:
        return strategy.weight_grad_ns
    return strategy.backward_ns + (0 if split else strategy.weight_grad_ns)


def _check_order(schedule: Schedule) -> None:
    """Each rank's ops are in execution order and do not overlap."""
    for rank, ops in enumerate(schedule.ranks):
        for position in range(1, len(ops)):
            before, op = ops[position - 1], ops[position]
            if op.start_ns < before.end_ns:
                _fail(
                    rank,
                    position,
                    op.key,
                    f"starts at {op.start_ns} ns, before {format_op(before.key)} in front of it "
                    f"ends at {before.end_ns} ns",
                )


def _check_waits(problem: Problem, placed: _Placed) -> None:
    """Every dependency has ended, and its latency has passed, before an op starts."""
    for key, (rank, position, op) in placed.items():
        for wait in dependencies(problem.graph, key):
            other_rank, other_position, other = placed[wait.op]
            ready_ns = other.end_ns + wait.latency_ns
            if op.start_ns < ready_ns:
                placed.fail(
                    key,
                    f"starts at {op.start_ns} ns; it waits for {format_op(wait.op)} (rank "
                    f"{other_rank}) until {other.end_ns} + {wait.latency_ns} = {ready_ns} ns",
                )
            if other_rank == rank and other_position > position:  # both may last 0 ns
                placed.fail(key, f"stands before {format_op(wait.op)}, which it waits for")


def _check_memory(problem: Problem, schedule: Schedule, table: StrategyTable) -> None:
    """No rank ever holds more than its capacity, and the peaks are told right."""
    for rank, ops in enumerate(schedule.ranks):
        timeline = rank_timeline(problem, table, ops)
        capacity = problem.memory_capacity_bytes[rank]
        for time_ns, held in timeline:
            if held > capacity:
                position, op = next(
                    (index, op)
                    for index, op in enumerate(ops)
                    if op.start_ns == time_ns and op.kind is OpKind.F
                )
                _fail(
                    rank,
                    position,
                    op.key,
                    f"brings held memory to {held} bytes at {time_ns} ns; the capacity is "
                    f"{capacity}",
                )
        if schedule.peak_memory_bytes[rank] != peak_bytes(timeline):
            raise PlanInvalidError(
                f"rank {rank}: peak_memory_bytes is {schedule.peak_memory_bytes[rank]}, but its "
                f"ops hold up to {peak_bytes(timeline)} bytes"
            )


def _check_totals(schedule: Schedule) -> None:
    makespan_ns = max((op.end_ns for _, _, op in _positions(schedule)), default=0)
    if schedule.makespan_ns != makespan_ns:
        raise PlanInvalidError(
            f"schedule: makespan_ns is {schedule.makespan_ns}, but the last op ends at "
            f"{makespan_ns} ns"
        )
    if not 0 <= schedule.lower_bound_ns <= makespan_ns:
        raise PlanInvalidError(
            f"schedule: lower_bound_ns is {schedule.lower_bound_ns}, which the makespan of "
            f"{makespan_ns} ns disproves"
        )
