r"""From a schedule or a trace to lanes, boxes and curves: what to draw, not how.

Drawing
  lanes   one per rank   [F0 F1 ][B0 ]   [F2 ]     boxes on a time line; what is bare is bubble
  curves  one per rank   __/--\___/--\____        held memory below its capacity
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.problem import OpKey, OpKind, Problem
from megatron_pipeweaver.ir.schedule import Schedule, ScheduledOp
from megatron_pipeweaver.ir.text import format_op, format_share
from megatron_pipeweaver.ir.timeline import Timeline, memory_timeline, peak_bytes
from megatron_pipeweaver.ir.trace import Trace, TraceKind, TraceRow
from megatron_pipeweaver.view.units import milliseconds, percent, size

KIND_NAMES: Mapping[OpKind, str] = {
    OpKind.F: "forward",
    OpKind.B: "backward",
    OpKind.W: "weight gradient",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """One op on its lane: `module` indexes `Drawing.modules` (its colour), `kind` is its shade.

    `labels` are texts for the box itself, the fullest first; `title` is shown on hovering.
    """

    start_ns: int
    end_ns: int
    module: int
    kind: OpKind
    labels: tuple[str, ...]
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """A message or a wait, drawn thinly along the lower edge of its lane."""

    start_ns: int
    end_ns: int
    kind: TraceKind
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One rank's row; `idle` is its share of bubble, between 0 and 1."""

    name: str
    idle: float
    boxes: tuple[Box, ...]
    strips: tuple[Strip, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One rank's memory: `steps` hold from their time to the next; `capacity_bytes` is the limit.

    Both are bytes of activations; times are nanoseconds.
    """

    name: str
    steps: Timeline
    capacity_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The highest step."""
        return peak_bytes(self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A moment that matters, such as the proven lower bound."""

    time_ns: int
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Everything that a timeline shows; `facts` are short phrases under the title."""

    title: str
    facts: tuple[str, ...]
    end_ns: int
    modules: tuple[str, ...]
    lanes: tuple[Lane, ...]
    curves: tuple[Curve, ...] = ()
    marks: tuple[Mark, ...] = ()


def draw_schedule(
    schedule: Schedule, problem: Problem | None = None, *, title: str = "Schedule"
) -> Drawing:
    """The drawing of `schedule`; with its `problem`, memory curves and the module order too.

    Raises:
        ConfigError: the schedule is not one of this problem.
    """
    facts = [f"makespan {milliseconds(schedule.makespan_ns)}"]
    marks = []
    if schedule.lower_bound_ns:
        bound = milliseconds(schedule.lower_bound_ns)
        facts.append(f"proven bound {bound} (gap {percent(schedule.gap)})")
        marks.append(Mark(time_ns=schedule.lower_bound_ns, label="proven bound"))
    facts.append(f"bubble {percent(schedule.bubble())}")
    modules = _module_order((op.key for rank in schedule.ranks for op in rank), problem)
    end_ns = max([schedule.makespan_ns, *(op.end_ns for rank in schedule.ranks for op in rank)])
    return Drawing(
        title=title,
        facts=tuple(facts),
        end_ns=end_ns,
        modules=modules,
        lanes=tuple(
            Lane(
                name=f"rank {rank}",
                idle=_idle(ops, end_ns),
                boxes=tuple(_box(op, modules) for op in ops),
            )
            for rank, ops in enumerate(schedule.ranks)
        ),
        curves=memory_curves(schedule, problem),
        marks=tuple(marks),
    )


def draw_trace(trace: Trace, problem: Problem | None = None, *, title: str = "Trace") -> Drawing:
    """The drawing of `trace`: compute as boxes, messages and waits as strips below them.

    With the `problem` that was planned for, memory curves too: what the strategies that ran hold
    over the measured times.

    Raises:
        ConfigError: the trace is not one of this problem.
    """
    ran = schedule_of_trace(trace)
    modules = _module_order((op.key for rank in ran.ranks for op in rank), problem)
    end_ns = trace.duration_ns
    facts = [f"iteration {trace.iteration}", f"measured {milliseconds(end_ns)}"]
    if ran.ranks:
        idle = sum(_idle(ops, end_ns) for ops in ran.ranks) / len(ran.ranks)
        facts.append(f"bubble {percent(idle)}")
    return Drawing(
        title=title,
        facts=tuple(facts),
        end_ns=end_ns,
        modules=modules,
        lanes=tuple(
            Lane(
                name=f"rank {rank}",
                idle=_idle(ops, end_ns),
                boxes=tuple(_box(op, modules) for op in ops),
                strips=tuple(_strip(row) for row in rows if row.kind is not TraceKind.COMPUTE),
            )
            for rank, (ops, rows) in enumerate(zip(ran.ranks, trace.ranks, strict=True))
        ),
        curves=memory_curves(ran, problem),
    )


def schedule_of_trace(trace: Trace) -> Schedule:
    """The compute rows of `trace` as a schedule; it proves nothing, so its bound is 0."""
    return Schedule(
        problem_sha256="",
        makespan_ns=trace.duration_ns,
        lower_bound_ns=0,
        peak_memory_bytes=(0,) * len(trace.ranks),
        ranks=tuple(
            tuple(
                ScheduledOp(
                    key=row.key, strategy=row.strategy, start_ns=row.start_ns, end_ns=row.end_ns
                )
                for row in rows
                if row.kind is TraceKind.COMPUTE
            )
            for rows in trace.ranks
        ),
    )


def memory_curves(schedule: Schedule, problem: Problem | None) -> tuple[Curve, ...]:
    """Per rank, what `schedule` holds; none without its `problem`.

    Raises:
        ConfigError: the schedule is not one of this problem.
    """
    if problem is None:
        return ()
    try:
        timelines = memory_timeline(problem, schedule)
        return tuple(
            Curve(name=f"rank {rank}", steps=steps, capacity_bytes=capacity)
            for rank, (steps, capacity) in enumerate(
                zip(timelines, problem.memory_capacity_bytes, strict=True)
            )
        )
    except (KeyError, IndexError, ValueError):
        raise ConfigError(
            "the schedule or trace names ops, strategies or ranks that the problem does not have; "
            "give the problem that was solved"
        ) from None


def _module_order(keys: Iterable[OpKey], problem: Problem | None) -> tuple[str, ...]:
    """The modules in forward order: the problem's, or else that of their first appearance."""
    seen = dict.fromkeys(key.module for key in keys)
    if problem is None:
        return tuple(seen)
    return tuple(dict.fromkeys([*problem.modules, *seen]))


def _idle(ops: Sequence[ScheduledOp], end_ns: int) -> float:
    busy = sum(op.end_ns - op.start_ns for op in ops)
    return max(0.0, 1 - busy / end_ns) if end_ns else 0.0


def _box(op: ScheduledOp, modules: tuple[str, ...]) -> Box:
    key = op.key
    share = f"microbatch {key.microbatch}, sub-microbatch {key.sub_microbatch}"
    return Box(
        start_ns=op.start_ns,
        end_ns=op.end_ns,
        module=modules.index(key.module),
        kind=key.kind,
        labels=tuple(dict.fromkeys([format_share(key), str(key.microbatch)])),
        title=(
            f"{format_op(key)}: {KIND_NAMES[key.kind]} of {key.module} stage {key.stage}, {share}"
            f"\n{op.strategy}\n{_span(op.start_ns, op.end_ns)}"
        ),
    )


def _strip(row: TraceRow) -> Strip:
    peer = "" if row.peer is None else f", rank {row.peer}"
    moved = "" if row.size_bytes is None else f", {size(row.size_bytes)}"
    span = _span(row.start_ns, row.end_ns)
    return Strip(
        start_ns=row.start_ns,
        end_ns=row.end_ns,
        kind=row.kind,
        title=f"{row.kind} {format_op(row.key)}{peer}{moved}\n{span}",
    )


def _span(start_ns: int, end_ns: int) -> str:
    start, end, length = (milliseconds(one) for one in (start_ns, end_ns, end_ns - start_ns))
    return f"{start} to {end} ({length})"
