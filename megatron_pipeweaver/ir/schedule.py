"""Who runs what, and when: the result of a search (`pipeweaver.schedule/1`)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_pipeweaver.ir.problem import OpKey, OpKind


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledOp:
    """One op with its strategy and its place in time (nanoseconds from the iteration's start)."""

    key: OpKey
    strategy: str
    start_ns: int
    end_ns: int

    @property
    def kind(self) -> OpKind:
        """``F``, ``B`` or ``W``."""
        return self.key.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """`ranks[r]` is what rank r runs, in execution order.

    `lower_bound_ns` is proven: no valid schedule of the problem is shorter. A `Schedule` is only a
    claim until `compiler.check.check_schedule` has held it against its problem.
    """

    problem_sha256: str
    makespan_ns: int
    lower_bound_ns: int
    peak_memory_bytes: tuple[int, ...]
    ranks: tuple[tuple[ScheduledOp, ...], ...]

    @property
    def gap(self) -> float:
        """How far the makespan may be from the best one, as a fraction of the bound."""
        if self.lower_bound_ns == 0:
            return 0.0
        return self.makespan_ns / self.lower_bound_ns - 1.0

    def bubble(self) -> float:
        """Idle share of all ranks over the makespan, between 0 and 1."""
        if self.makespan_ns == 0 or not self.ranks:
            return 0.0
        busy = sum(op.end_ns - op.start_ns for rank in self.ranks for op in rank)
        return 1.0 - busy / (self.makespan_ns * len(self.ranks))
