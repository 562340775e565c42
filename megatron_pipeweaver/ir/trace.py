"""What really happened in one iteration (`pipeweaver.trace/1`)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

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
