"""Which messages of a directed rank pair are posted as one (paper, section 6).

    alone   | B0 SEND#0 SEND#1 SEND#2     three transfers, each started by its own kernel on NCCL
    grouped | B0 SEND#0 SEND#1+2          #0 is waited for at once, the others are not yet

A group is atomic: none of its messages has arrived before all have. So only messages that one op
has made, and that nobody is planned to need before the last of them is there, go together; then
no op starts later than without groups. The two directions of a pair are never grouped: they have
communicators of their own and move at once, and a group would hold each of them back until the
other's op has run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from megatron_pipeweaver.ir.plan import Message
from megatron_pipeweaver.ir.problem import OpKey, PassGraph, dependencies
from megatron_pipeweaver.ir.schedule import ScheduledOp

Group = tuple[int, ...]  # indices of messages


def message_groups(
    graph: PassGraph,
    order: Sequence[ScheduledOp],
    messages: Sequence[Message],
    step: Mapping[OpKey, int],
    *,
    most: int,
    reach: int,
) -> tuple[Group, ...]:
    """All messages, each in one group (as a rule of its own), by their first ones.

    Args:
        graph: the passes, with the latencies of their messages.
        order: all ops, with their planned times.
        messages: in the order in which all ops are sent from.
        step: how many ops its rank runs before each op.
        most: a group holds at most so many messages.
        reach: so many ops of its rank a group's last consumer is at most behind the first.
    """
    ops = {op.key: op for op in order}
    runs: defaultdict[tuple[OpKey, int], list[int]] = defaultdict(list)
    for index, message in enumerate(messages):
        runs[message.source, message.target_rank].append(index)
    groups: list[Group] = []
    for run in runs.values():
        free_ns = ops[messages[run[0]].source].end_ns  # when the link has carried what was sent
        at = 0
        while at < len(run):
            first = messages[run[at]].target
            arrivals = _arrivals_ns(graph, [messages[index] for index in run[at:]], free_ns)
            size = 1
            for arrival_ns, index in zip(arrivals[1:most], run[at + 1 :], strict=False):
                late = arrival_ns > ops[first].start_ns
                if late or step[messages[index].target] > step[first] + reach:
                    break
                size += 1
            groups.append(tuple(run[at : at + size]))
            free_ns = arrivals[size - 1]
            at += size
    return tuple(sorted(groups))


def _arrivals_ns(graph: PassGraph, messages: Sequence[Message], start_ns: int) -> list[int]:
    """When each message has arrived, one behind the other on one link from `start_ns` on."""
    arrivals = []
    for message in messages:
        waits = dependencies(graph, message.target)
        start_ns += next(one.latency_ns for one in waits if one.op == message.source)
        arrivals.append(start_ns)
    return arrivals
