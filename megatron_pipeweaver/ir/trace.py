"""What really happened in one iteration (`pipeweaver.trace/1`).

A plan says everything about its actions but when they ran. So ranks tell each other `ActionTimes`,
two numbers for an action; rows are made of them where someone wants to read them.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from megatron_pipeweaver.ir.plan import ActionKind, ComputeAction, Plan
from megatron_pipeweaver.ir.problem import OpKey


class TraceKind(StrEnum):
    """What a row of a trace measures."""

    COMPUTE = "compute"
    SEND = "send"
    RECV = "recv"
    WAIT = "wait"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRow:
    """One action as it ran; times in nanoseconds from the iteration's common start.

    `key` is the op that ran or, for a communication row, the op whose tensor moved. `strategy` is
    empty, `peer` and `size_bytes` are `None`, where they do not apply.
    """

    kind: TraceKind
    key: OpKey
    strategy: str
    start_ns: int
    end_ns: int
    peer: int | None = None
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """All ranks of one pipeline in one iteration."""

    iteration: int
    plan_sha256: str
    hosts: tuple[str, ...]
    ranks: tuple[tuple[TraceRow, ...], ...]

    @property
    def duration_ns(self) -> int:
        """From the common start to the end of the last row."""
        return max((row.end_ns for rank in self.ranks for row in rank), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionTimes:
    """When the actions of all ranks of one pipeline ran in one iteration.

    `spans[r]` are rank r's, start and end by turns, as signed 64-bit nanoseconds from its own
    start, which is `offsets_ns[r]` behind the iteration's common one. `busy_ns` is how long each
    rank computed, `peak_bytes` the most it held where memory was measured.
    """

    iteration: int
    hosts: tuple[str, ...]
    offsets_ns: tuple[int, ...]
    spans: tuple[bytes, ...]
    busy_ns: tuple[int, ...]
    peak_bytes: tuple[int | None, ...]

    @property
    def duration_ns(self) -> int:
        """From the common start to the end of the last action."""
        ends = (
            offset_ns + array(TIME_CODE, span[-_TIME_BYTES:])[0]
            for offset_ns, span in zip(self.offsets_ns, self.spans, strict=True)
            if span
        )
        return max(ends, default=0)

    def bubble(self) -> float:
        """Idle share of all ranks over the duration, between 0 and 1, as `Schedule.bubble`."""
        available_ns = self.duration_ns * len(self.spans)
        return 1.0 - sum(self.busy_ns) / available_ns if available_ns else 0.0

    def trace(self, plan: Plan, plan_sha256: str) -> Trace:
        """The rows of `plan` in these times."""
        return Trace(
            iteration=self.iteration,
            plan_sha256=plan_sha256,
            hosts=self.hosts,
            ranks=tuple(
                trace_rows(plan, rank, array(TIME_CODE, span), offset_ns)
                for rank, (span, offset_ns) in enumerate(
                    zip(self.spans, self.offsets_ns, strict=True)
                )
            ),
        )


TIME_CODE = "q"
"""How `array` calls a time."""
_TIME_BYTES = array(TIME_CODE).itemsize

_TRANSFER_ROWS: Mapping[ActionKind, TraceKind] = {
    ActionKind.ISEND: TraceKind.SEND,
    ActionKind.IRECV: TraceKind.RECV,
    ActionKind.WAIT_ISEND: TraceKind.WAIT,
    ActionKind.WAIT_IRECV: TraceKind.WAIT,
}


def trace_rows(
    plan: Plan, rank: int, times_ns: Sequence[int], offset_ns: int = 0
) -> tuple[TraceRow, ...]:
    """The actions of `rank` of `plan` as far as they ran: `times_ns` are starts and ends by turns.

    A row of a group tells of its first message, and of the bytes of all.
    """
    rows = []
    spans = zip(times_ns[::2], times_ns[1::2], strict=True)
    for action, (start_ns, end_ns) in zip(plan.ranks[rank], spans, strict=False):
        start_ns, end_ns = start_ns + offset_ns, end_ns + offset_ns
        if isinstance(action, ComputeAction):
            row = TraceRow(
                kind=TraceKind.COMPUTE,
                key=action.op,
                strategy=action.strategy,
                start_ns=start_ns,
                end_ns=end_ns,
            )
        else:
            messages = [plan.messages[one] for one in action.messages]
            first = messages[0]
            row = TraceRow(
                kind=_TRANSFER_ROWS[action.kind],
                key=first.source,
                strategy="",
                start_ns=start_ns,
                end_ns=end_ns,
                peer=first.target_rank if first.source_rank == rank else first.source_rank,
                size_bytes=sum(one.size_bytes for one in messages),
            )
        rows.append(row)
    return tuple(rows)
