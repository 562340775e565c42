"""One global order of all ops: what every rank's action list is cut from.

When all lists come from one linear extension of "waits for" and "stands before on its rank", a
wait can only be for something that stands earlier in it; so no ring of waits can exist.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

from megatron_pipeweaver.errors import PlanInvalidError
from megatron_pipeweaver.ir.problem import OpKey, PassGraph, dependencies
from megatron_pipeweaver.ir.schedule import ScheduledOp
from megatron_pipeweaver.ir.text import format_op


def linear_extension(
    graph: PassGraph, ranks: Sequence[Sequence[ScheduledOp]]
) -> tuple[ScheduledOp, ...]:
    """All ops by start time, consistent with their dependencies and with each rank's order.

    Ops of equal start (some may last 0 ns) come in the order that both demand; ties beyond that
    go to the lower rank.

    Raises:
        PlanInvalidError: an op waits for one that is not there, or for itself in a ring.
    """
    ops = {op.key: (op, rank) for rank, row in enumerate(ranks) for op in row}
    followers: defaultdict[OpKey, list[OpKey]] = defaultdict(list)
    waiting = dict.fromkeys(ops, 0)
    for row in ranks:
        for before, behind in pairwise(row):
            followers[before.key].append(behind.key)
            waiting[behind.key] += 1
    for key in ops:
        for wait in dependencies(graph, key):
            if wait.op not in ops:
                raise PlanInvalidError(
                    f"rank {ops[key][1]}: {format_op(key)} waits for {format_op(wait.op)}, which "
                    "the schedule does not have"
                )
            followers[wait.op].append(key)
            waiting[key] += 1
    ready = [
        (ops[key][0].start_ns, ops[key][1], key) for key, count in waiting.items() if not count
    ]
    heapq.heapify(ready)
    order: list[ScheduledOp] = []
    while ready:
        key = heapq.heappop(ready)[2]
        order.append(ops[key][0])
        for after in followers[key]:
            waiting[after] -= 1
            if not waiting[after]:
                heapq.heappush(ready, (ops[after][0].start_ns, ops[after][1], after))
    if len(order) != len(ops):
        key = next(key for key, count in waiting.items() if count)
        raise PlanInvalidError(
            f"rank {ops[key][1]}: {format_op(key)} waits for itself through the orders of the "
            "ranks; no order of all ops fits this schedule"
        )
    return tuple(order)
