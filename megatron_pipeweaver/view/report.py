"""What goes to a terminal: tables of schedules, a line per iteration, planned against measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_pipeweaver.ir.problem import OpKey, OpKind, Problem
from megatron_pipeweaver.ir.schedule import Schedule
from megatron_pipeweaver.ir.trace import Trace
from megatron_pipeweaver.view.layout import KIND_NAMES, schedule_of_trace
from megatron_pipeweaver.view.units import milliseconds, percent, size


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleRow:
    """One line of a comparison: a schedule, or the mean of several, by name.

    `peak_memory_bytes` is the highest of all ranks; `bubble` lies between 0 and 1.
    """

    name: str
    makespan_ns: int
    bubble: float
    peak_memory_bytes: int

    @classmethod
    def of(cls, name: str, schedule: Schedule) -> ScheduleRow:
        """The line of `schedule`."""
        return cls(
            name=name,
            makespan_ns=schedule.makespan_ns,
            bubble=schedule.bubble(),
            peak_memory_bytes=max(schedule.peak_memory_bytes, default=0),
        )


def comparison_table(rows: Sequence[ScheduleRow], *, lower_bound_ns: int = 0) -> str:
    """The `rows` side by side; the ratio is to the proven bound, or else to the first row.

    Columns: schedule, makespan, ratio, bubble, peak memory.
    """
    base_ns = lower_bound_ns or (rows[0].makespan_ns if rows else 0)
    against = "/ bound" if lower_bound_ns else f"/ {rows[0].name}" if rows else "ratio"
    return format_table(
        ["schedule", "makespan", against, "bubble", "peak memory"],
        [
            [
                row.name,
                milliseconds(row.makespan_ns),
                f"{row.makespan_ns / base_ns:.4f}" if base_ns else "-",
                percent(row.bubble),
                size(row.peak_memory_bytes),
            ]
            for row in rows
        ],
    )


def schedule_facts(schedule: Schedule, problem: Problem | None = None) -> str:
    """Makespan, proven bound and gap, bubble, and the peak memory of every rank, line by line.

    A bound of 0 proves nothing and is left out, and so are peaks of a schedule that tells none.
    """
    lines = [f"makespan      {milliseconds(schedule.makespan_ns)} ({schedule.makespan_ns} ns)"]
    if schedule.lower_bound_ns:
        lines.append(
            f"lower bound   {milliseconds(schedule.lower_bound_ns)} ({schedule.lower_bound_ns} ns)"
        )
        lines.append(f"gap           {percent(schedule.gap)}")
    lines.append(f"bubble        {percent(schedule.bubble())}")
    capacities = [None] * len(schedule.ranks) if problem is None else problem.memory_capacity_bytes
    if any(schedule.peak_memory_bytes):
        for rank, (peak, capacity) in enumerate(
            zip(schedule.peak_memory_bytes, capacities, strict=True)
        ):
            limit = "" if capacity is None else f" of {size(capacity)}"
            lines.append(
                f"{'peak memory' if rank == 0 else '':13} rank {rank}: {size(peak)}{limit}"
            )
    return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One training iteration as it went; `items` counts e.g. the images of every microbatch.

    `loss` is `None` on ranks that do not know it; `bubble` lies between 0 and 1.
    """

    iteration: int
    iterations: int
    loss: float | None
    items: Sequence[int]
    planned_ns: int
    measured_ns: int
    search_ns: int
    bubble: float


def progress_line(progress: Progress, *, items_name: str = "images") -> str:
    """One line: iteration, loss, items per microbatch, planned and measured time, search, bubble.

    ``iteration   7/200 | loss 2.3026 | images 0 12 3 5 | planned ... | bubble 12.3 %``
    """
    width = len(str(progress.iterations))
    loss = "-" if progress.loss is None else f"{progress.loss:.4f}"
    return " | ".join(
        [
            f"iteration {progress.iteration:>{width}}/{progress.iterations}",
            f"loss {loss:>7}",
            f"{items_name} " + " ".join(f"{count:2}" for count in progress.items),
            f"planned {milliseconds(progress.planned_ns):>10}",
            f"measured {milliseconds(progress.measured_ns):>10}",
            f"search {milliseconds(progress.search_ns):>8}",
            f"bubble {percent(progress.bubble):>6}",
        ]
    )


def planned_against_measured(planned: Schedule, measured: Trace) -> str:
    """How long each module's ops and each rank took, planned and measured.

    Two tables: the mean time of an op per module and kind, and the end of every rank; the ratio
    is measured over planned.
    """
    ran = schedule_of_trace(measured)
    was, now = _mean_ns(planned), _mean_ns(ran)
    ops = [
        [
            f"{module} {KIND_NAMES[kind]}",
            *_pair(was.get((module, kind)), now.get((module, kind))),
        ]
        for module, kind in dict.fromkeys([*was, *now])
    ]
    ranks = [
        [f"rank {rank}", *_pair(_end_ns(planned, rank), _end_ns(ran, rank))]
        for rank in range(max(len(planned.ranks), len(ran.ranks)))
    ]
    ranks.append(["iteration", *_pair(planned.makespan_ns, measured.duration_ns)])
    columns = ["planned", "measured", "ratio"]
    return (
        format_table(["mean time of an op", *columns], ops)
        + "\n\n"
        + format_table(["end of the last op", *columns], ranks)
    )


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """`rows` under `header`, the first column to the left, all others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    printed = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    printed.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(printed)


def _mean_ns(schedule: Schedule) -> dict[tuple[str, OpKind], int]:
    """Mean time per module and kind, in order of appearance.

    A backward whose weight gradient is split off counts together with it, so that schedules that
    split differently can be compared.
    """
    times: dict[OpKey, int] = {}
    for rank in schedule.ranks:
        for op in rank:
            whole = op.key.with_kind(OpKind.B) if op.kind is OpKind.W else op.key
            times[whole] = times.get(whole, 0) + op.end_ns - op.start_ns
    groups: defaultdict[tuple[str, OpKind], list[int]] = defaultdict(list)
    for key, time_ns in times.items():
        groups[key.module, key.kind].append(time_ns)
    return {name: sum(group) // len(group) for name, group in groups.items()}


def _end_ns(schedule: Schedule, rank: int) -> int | None:
    if rank >= len(schedule.ranks):
        return None
    return max((op.end_ns for op in schedule.ranks[rank]), default=0)


def _pair(planned_ns: int | None, measured_ns: int | None) -> list[str]:
    ratio = f"{measured_ns / planned_ns:.3f}" if planned_ns and measured_ns is not None else "-"
    shown = ["-" if one is None else milliseconds(one) for one in (planned_ns, measured_ns)]
    return [*shown, ratio]
