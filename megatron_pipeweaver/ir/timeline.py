"""How much activation memory each rank holds, when: from a problem and a schedule of it.

A stage pair holds its strategy's memory over the half-open interval from the start of its forward
to the end of its backward (of its ``W`` where that stands; of its forward where the pass is
frozen). At one instant releases therefore come before acquisitions.

    bytes |      ____
          |  ___|    |___
          |_|            |____ time
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from megatron_pipeweaver.ir.problem import OpKey, OpKind, Problem, Strategy
from megatron_pipeweaver.ir.schedule import Schedule, ScheduledOp

Timeline = tuple[tuple[int, int], ...]
"""``(time_ns, bytes)`` steps: from that time on, until the next step, so many bytes are held."""


class StrategyTable:
    """The strategies of every stage pair of a problem, by op and name."""

    __slots__ = ("_passes",)

    def __init__(self, problem: Problem) -> None:
        self._passes = {
            key: tuple({one.name: one for one in stage} for stage in a_pass.stages)
            for key, a_pass in problem.passes()
        }

    def find(self, op: OpKey, name: str) -> Strategy | None:
        """The strategy `name` of `op`'s stage pair, if there is one."""
        return self._passes[op.owner][op.stage].get(name)

    def names(self, op: OpKey) -> list[str]:
        """What the strategies of `op`'s stage pair are called."""
        return list(self._passes[op.owner][op.stage])


def memory_timeline(problem: Problem, schedule: Schedule) -> tuple[Timeline, ...]:
    """Per rank, the steps of held activation memory in bytes over time in nanoseconds.

    The ops must name passes and strategies of `problem`; what is never released is held to the
    end. Steps have rising times, and no two neighbours the same bytes.

    Raises:
        KeyError: an op or its strategy is not in the problem.
    """
    table = StrategyTable(problem)
    return tuple(rank_timeline(problem, table, rank) for rank in schedule.ranks)


def rank_timeline(problem: Problem, table: StrategyTable, ops: Iterable[ScheduledOp]) -> Timeline:
    """The steps of one rank that runs `ops`; see `memory_timeline`."""
    forwards: list[ScheduledOp] = []
    released_at: dict[OpKey, int] = {}
    for op in ops:
        if op.kind is OpKind.F:
            forwards.append(op)
        if op.kind is not OpKind.F or problem.graph.nodes[op.key.owner].frozen:
            forward = op.key.with_kind(OpKind.F)
            released_at[forward] = max(op.end_ns, released_at.get(forward, 0))
    changes: defaultdict[int, int] = defaultdict(int)
    for op in forwards:
        strategy = table.find(op.key, op.strategy)
        if strategy is None:
            raise KeyError((op.key, op.strategy))
        changes[op.start_ns] += strategy.memory_bytes
        if op.key in released_at:
            changes[released_at[op.key]] -= strategy.memory_bytes
    steps: list[tuple[int, int]] = []
    held = 0
    for time_ns in sorted(changes):
        if changes[time_ns]:
            held += changes[time_ns]
            steps.append((time_ns, held))
    return tuple(steps)


def peak_bytes(timeline: Timeline) -> int:
    """The most bytes held at any time; 0 for an empty timeline."""
    return max((held for _, held in timeline), default=0)


def memory_peaks(problem: Problem, schedule: Schedule) -> tuple[int, ...]:
    """Per rank, the most activation bytes that `schedule` holds at any time."""
    return tuple(peak_bytes(one) for one in memory_timeline(problem, schedule))
