"""Chrome trace events: JSON that https://ui.perfetto.dev and chrome://tracing open.

One process per rank, in it one thread for compute and one per kind of communication; arrows join
a send to its receive; with a problem, a counter of the activation memory held.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_pipeweaver.ir.codec import to_bytes
from megatron_pipeweaver.ir.problem import OpKey, Problem
from megatron_pipeweaver.ir.schedule import Schedule
from megatron_pipeweaver.ir.text import format_op
from megatron_pipeweaver.ir.trace import Trace, TraceKind, TraceRow
from megatron_pipeweaver.view.layout import KIND_NAMES, memory_curves, schedule_of_trace

_THREADS: Mapping[TraceKind, int] = {kind: index for index, kind in enumerate(TraceKind)}

Event = dict[str, Any]


def chrome_of_schedule(schedule: Schedule, problem: Problem | None = None) -> bytes:
    """`schedule` as a Chrome trace; memory counters where its `problem` is given.

    Raises:
        ConfigError: the schedule is not one of this problem.
    """
    ranks = tuple(
        tuple(
            TraceRow(
                kind=TraceKind.COMPUTE,
                key=op.key,
                strategy=op.strategy,
                start_ns=op.start_ns,
                end_ns=op.end_ns,
            )
            for op in ops
        )
        for ops in schedule.ranks
    )
    events = [*_processes([f"rank {rank}" for rank in range(len(ranks))], ranks), *_slices(ranks)]
    about = {"lower_bound_ns": schedule.lower_bound_ns, "makespan_ns": schedule.makespan_ns}
    return _file([*events, *_counters(schedule, problem)], about)


def chrome_of_trace(trace: Trace, problem: Problem | None = None) -> bytes:
    """`trace` as a Chrome trace; memory counters where its `problem` is given.

    Raises:
        ConfigError: the trace is not one of this problem.
    """
    names = [f"rank {rank} ({host})" for rank, host in enumerate(trace.hosts)]
    events = [
        *_processes(names, trace.ranks),
        *_slices(trace.ranks),
        *_arrows(trace.ranks),
        *_counters(schedule_of_trace(trace), problem),
    ]
    return _file(events, {"iteration": trace.iteration, "plan_sha256": trace.plan_sha256})


Rows = Sequence[Sequence[TraceRow]]


def _file(events: list[Event], about: Mapping[str, object]) -> bytes:
    return to_bytes({"traceEvents": events, "displayTimeUnit": "ms", "otherData": dict(about)})


def _microseconds(time_ns: int) -> int | float:
    """The unit of the format; whole where it can be."""
    return time_ns // 1000 if time_ns % 1000 == 0 else time_ns / 1000


def _processes(names: Sequence[str], ranks: Rows) -> Iterator[Event]:
    for rank, name in enumerate(names):
        yield {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": name}}
        yield {"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}}
        for kind in sorted({row.kind for row in ranks[rank]}, key=_THREADS.__getitem__):
            spot = {"ph": "M", "pid": rank, "tid": _THREADS[kind]}
            yield {**spot, "name": "thread_name", "args": {"name": kind.value}}
            yield {**spot, "name": "thread_sort_index", "args": {"sort_index": _THREADS[kind]}}


def _slices(ranks: Rows) -> Iterator[Event]:
    for rank, rows in enumerate(ranks):
        for row in rows:
            key = row.key
            args: Event = {
                "op": KIND_NAMES[key.kind],
                "module": key.module,
                "stage": key.stage,
                "microbatch": key.microbatch,
                "sub_microbatch": key.sub_microbatch,
                **({"strategy": row.strategy} if row.strategy else {}),
                **({} if row.peer is None else {"peer": row.peer}),
                **({} if row.size_bytes is None else {"bytes": row.size_bytes}),
            }
            yield {
                "ph": "X",
                "pid": rank,
                "tid": _THREADS[row.kind],
                "ts": _microseconds(row.start_ns),
                "dur": _microseconds(row.end_ns - row.start_ns),
                "name": format_op(key),
                "cat": f"{row.kind},{key.module}",
                "args": args,
            }


def _arrows(ranks: Rows) -> Iterator[Event]:
    """From each send to the receive of the same tensor on the peer, in the order they stand."""
    receives: defaultdict[tuple[OpKey, int, int], deque[TraceRow]] = defaultdict(deque)
    for rank, rows in enumerate(ranks):
        for row in rows:
            if row.kind is TraceKind.RECV and row.peer is not None:
                receives[row.key, row.peer, rank].append(row)
    number = 0
    for rank, rows in enumerate(ranks):
        for row in rows:
            if row.kind is not TraceKind.SEND or row.peer is None:
                continue
            waiting = receives[row.key, rank, row.peer]
            if not waiting:
                continue
            number += 1
            for spot, phase, there in ((rank, "s", row), (row.peer, "f", waiting.popleft())):
                yield {
                    "ph": phase,
                    "id": number,
                    "pid": spot,
                    "tid": _THREADS[there.kind],
                    "ts": _microseconds(there.start_ns if phase == "s" else there.end_ns),
                    "name": "message",
                    "cat": "message",
                    **({"bp": "e"} if phase == "f" else {}),
                }


def _counters(schedule: Schedule, problem: Problem | None) -> Iterator[Event]:
    for rank, curve in enumerate(memory_curves(schedule, problem)):
        for time_ns, held_bytes in curve.steps:
            yield {
                "ph": "C",
                "pid": rank,
                "ts": _microseconds(time_ns),
                "name": "activation memory",
                "args": {"bytes": held_bytes},
            }
