"""From a schedule to one action list per rank, in small passes (paper, section 6).

    schedule ─► one order of all ops ─► messages, numbered per directed rank pair ─► action lists

    rank 0 | F0 SEND>1 F1 SEND>1      RECV<1      WAIT_RECV<1 B0 WAIT_SEND>1 ...
    rank 1 | RECV<0 RECV<0 WAIT_RECV<0 F0 B0 SEND>0 WAIT_RECV<0 F1 ...

A send is posted right after the op that made its tensor; a receive a bounded number of ops before
the op that needs it; its wait right before that op. A send is awaited only where the order of all
ops says that its tensor was used by then, so that the buffer can go; at the end at the latest.
Messages that may go together are posted as one on both ends (`compiler.groups`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

from megatron_pipeweaver.compiler.groups import message_groups
from megatron_pipeweaver.compiler.messages import activation_of, message_shape, remote_sources
from megatron_pipeweaver.compiler.order import linear_extension
from megatron_pipeweaver.errors import ConfigError, PlanInvalidError
from megatron_pipeweaver.ir.plan import (
    COMPUTE_KIND,
    ELEMENT_BYTES,
    Action,
    ActionKind,
    ComputeAction,
    Message,
    PassPayload,
    Plan,
    PlanPass,
    TransferAction,
)
from megatron_pipeweaver.ir.problem import (
    OpKey,
    OpKind,
    PassGraph,
    PassKey,
    Problem,
    dependencies,
)
from megatron_pipeweaver.ir.schedule import Schedule, ScheduledOp
from megatron_pipeweaver.ir.text import format_op
from megatron_pipeweaver.ir.timeline import StrategyTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """How far posts and waits stray from the ops they serve, in ops of their rank.

    `receive` ops before its consumer a receive is posted: a pending NCCL receive holds streaming
    multiprocessors, so few; gloo may post them all. A send is awaited `send` ops after the order
    of all ops has passed its consumer. `group` messages at most are posted as one, whose receives
    may stand another `receive` ops early; 1 posts each message alone.
    """

    receive: int = 4
    send: int = 2
    group: int = 8

    def __post_init__(self) -> None:
        if self.receive < 0 or self.send < 0 or self.group < 1:
            raise ConfigError(
                f"windows: receive={self.receive}, send={self.send}, group={self.group}; "
                "need >= 0, >= 0 and >= 1"
            )


def compile_plan(
    problem: Problem,
    schedule: Schedule,
    payloads: Mapping[PassKey, PassPayload],
    dtypes: Mapping[str, str],
    *,
    forward_only: bool = False,
    windows: Windows | None = None,
) -> Plan:
    """The plan that runs `schedule`; verify it before anything else.

    Args:
        problem: what was scheduled.
        schedule: a schedule that `compiler.check.check_schedule` has passed.
        payloads: items and shapes of every pass of `problem`.
        dtypes: per module, the element type of what its stages hand on, by torch's name.
        forward_only: leave out every backward, and run the forwards in the same order.
        windows: how early to post receives, how late to await sends, how many to post as one.

    Raises:
        PlanInvalidError: a pass has no payload, a module no known element type, or the schedule
            is not one of this problem.
    """
    passes = _plan_passes(problem, payloads)
    ranks = _kept_ops(schedule, forward_only)
    plan = Plan(
        pipeline_size=problem.pipeline_size,
        modules=dict(problem.modules),
        forward_only=forward_only,
        memory_capacity_bytes=problem.memory_capacity_bytes,
        makespan_ns=schedule.makespan_ns,
        passes=passes,
        messages=(),
        ranks=(),
    )
    graph = plan.graph()
    order = linear_extension(graph, ranks)
    if forward_only:
        order = _started_at_once(problem.graph, order)
        plan = replace(plan, makespan_ns=max((op.end_ns for op in order), default=0))
    messages = _messages(graph, order, payloads, _checked_dtypes(problem, dtypes))
    memory = _memory(problem, order)
    actions = _action_lists(problem.graph, order, messages, memory, windows or Windows())
    return replace(plan, messages=messages, ranks=actions)


def _plan_passes(problem: Problem, payloads: Mapping[PassKey, PassPayload]) -> tuple[PlanPass, ...]:
    passes = []
    for key, node in problem.graph.nodes.items():
        if key not in payloads:
            raise PlanInvalidError(
                f"microbatch {key.microbatch}: pass {key.module!r} sub-microbatch "
                f"{key.sub_microbatch} has no payload; give items and shapes for every pass"
            )
        passes.append(
            PlanPass(
                key=key,
                stages=node.stages,
                after=node.after,
                frozen=node.frozen,
                payload=payloads[key],
            )
        )
    return tuple(passes)


def _checked_dtypes(problem: Problem, dtypes: Mapping[str, str]) -> Mapping[str, str]:
    for module in problem.modules:
        if dtypes.get(module) not in ELEMENT_BYTES:
            raise PlanInvalidError(
                f"module {module!r}: element type {dtypes.get(module)!r}; it must be one of "
                f"{sorted(ELEMENT_BYTES)}"
            )
    return dtypes


def _kept_ops(schedule: Schedule, forward_only: bool) -> tuple[tuple[ScheduledOp, ...], ...]:
    return tuple(
        tuple(op for op in rank if op.kind is OpKind.F or not forward_only)
        for rank in schedule.ranks
    )


def _started_at_once(graph: PassGraph, order: Sequence[ScheduledOp]) -> tuple[ScheduledOp, ...]:
    """`order`, forwards alone, with the times at which each can start without the backwards."""
    free = [0] * graph.pipeline_size
    ended: dict[OpKey, int] = {}
    timed = []
    for op in order:
        rank = graph.rank_of(op.key.stage)
        waits = (ended[one.op] + one.latency_ns for one in dependencies(graph, op.key))
        start_ns = max(free[rank], *waits, 0)
        ended[op.key] = free[rank] = start_ns + op.end_ns - op.start_ns
        timed.append(replace(op, start_ns=start_ns, end_ns=ended[op.key]))
    return tuple(timed)


def _memory(problem: Problem, order: Sequence[ScheduledOp]) -> Mapping[OpKey, int]:
    table = StrategyTable(problem)
    memory = {}
    for op in order:
        strategy = table.find(op.key, op.strategy)
        if strategy is None:
            raise PlanInvalidError(
                f"{format_op(op.key)} has strategy {op.strategy!r}; the problem has "
                f"{table.names(op.key)}"
            )
        memory[op.key] = strategy.memory_bytes
    return memory


# --- messages ------------------------------------------------------------------------------------


def _messages(
    graph: PassGraph,
    order: Sequence[ScheduledOp],
    payloads: Mapping[PassKey, PassPayload],
    dtypes: Mapping[str, str],
) -> tuple[Message, ...]:
    """Every message, in the order in which all ops are sent from, numbered per rank pair."""
    position = {op.key: index for index, op in enumerate(order)}
    edges = sorted(
        (position[source], position[op.key])
        for op in order
        for source in remote_sources(graph, op.key)
    )
    numbers: defaultdict[tuple[int, int], count[int]] = defaultdict(count)
    messages = []
    for source_position, target_position in edges:
        source, target = order[source_position].key, order[target_position].key
        pair = graph.rank_of(source.stage), graph.rank_of(target.stage)
        messages.append(
            Message(
                source=source,
                target=target,
                source_rank=pair[0],
                target_rank=pair[1],
                sequence=next(numbers[pair]),
                shape=message_shape(payloads, source, target),
                dtype=dtypes[activation_of(source, target).module],
            )
        )
    return tuple(messages)


# --- action lists --------------------------------------------------------------------------------


def _action_lists(
    graph: PassGraph,
    order: Sequence[ScheduledOp],
    messages: Sequence[Message],
    memory: Mapping[OpKey, int],
    windows: Windows,
) -> tuple[tuple[Action, ...], ...]:
    """Each rank's ops in their order, with the transfers of `messages` around them."""
    step = _steps_on_rank(graph, order)
    around = _Around()
    posted = _receive_steps(messages, step, windows.receive)
    groups = message_groups(graph, order, messages, step, most=windows.group, reach=windows.receive)
    for group in groups:
        first = messages[group[0]]
        around.add(first.target_rank, posted[group[0]], _BEFORE, ActionKind.IRECV, *group)
        around.add(first.source_rank, step[first.source], _AFTER, ActionKind.ISEND, *group)
    sends_due = _send_wait_steps(graph, order, messages, step, windows.send)
    for index, message in enumerate(messages):
        around.add(message.target_rank, step[message.target], _NEED, ActionKind.WAIT_IRECV, index)
        around.add(message.source_rank, sends_due[index], _FREE, ActionKind.WAIT_ISEND, index)
    lists: list[list[Action]] = [[] for _ in range(graph.pipeline_size)]
    for op in order:
        rank = graph.rank_of(op.key.stage)
        here = step[op.key]
        for slot in (_FREE, _BEFORE, _NEED):
            lists[rank] += around.at(rank, here, slot)
        lists[rank].append(
            ComputeAction(
                kind=COMPUTE_KIND[op.kind],
                op=op.key,
                strategy=op.strategy,
                memory_bytes=memory[op.key],
            )
        )
        lists[rank] += around.at(rank, here, _AFTER)
    for rank, actions in enumerate(lists):
        steps = sum(isinstance(action, ComputeAction) for action in actions)
        actions += around.at(rank, steps, _FREE)
    return tuple(tuple(actions) for actions in lists)


_FREE, _BEFORE, _NEED, _AFTER = range(4)  # where a transfer stands relative to an op, in order


class _Around:
    """Transfers by rank, op and place around it, in the order in which they were added."""

    def __init__(self) -> None:
        self._slots: defaultdict[tuple[int, int, int], list[Action]] = defaultdict(list)

    def add(self, rank: int, step: int, slot: int, kind: ActionKind, *messages: int) -> None:
        self._slots[rank, step, slot].append(TransferAction(kind=kind, messages=messages))

    def at(self, rank: int, step: int, slot: int) -> Sequence[Action]:
        return self._slots.get((rank, step, slot), ())


def _steps_on_rank(graph: PassGraph, order: Sequence[ScheduledOp]) -> dict[OpKey, int]:
    """How many ops its rank runs before each op."""
    done = [0] * graph.pipeline_size
    steps = {}
    for op in order:
        rank = graph.rank_of(op.key.stage)
        steps[op.key] = done[rank]
        done[rank] += 1
    return steps


def _receive_steps(
    messages: Sequence[Message], step: Mapping[OpKey, int], window: int
) -> tuple[int, ...]:
    """Before which op of its rank each receive is posted.

    The receives of a pair stand in the sender's order, so one is posted no later than any that
    its sender posts after it.
    """
    posted = [0] * len(messages)
    latest: dict[tuple[int, int], int] = {}
    for index in reversed(range(len(messages))):
        message = messages[index]
        pair = message.source_rank, message.target_rank
        latest[pair] = min(step[message.target], latest.get(pair, step[message.target]))
        posted[index] = max(0, latest[pair] - window)
    return tuple(posted)


def _send_wait_steps(
    graph: PassGraph,
    order: Sequence[ScheduledOp],
    messages: Sequence[Message],
    step: Mapping[OpKey, int],
    window: int,
) -> tuple[int, ...]:
    """Before which op of its rank each send is awaited; the op count stands for the end.

    It is `window` ops after the first op of the sender's that the order of all ops has behind the
    message's consumer: the receive is posted by then, so the wait cannot close a ring.
    """
    totals = [0] * graph.pipeline_size
    for op in order:
        totals[graph.rank_of(op.key.stage)] += 1
    by_target: defaultdict[OpKey, list[int]] = defaultdict(list)
    for index, message in enumerate(messages):
        by_target[message.target].append(index)
    done = [0] * graph.pipeline_size
    due = [0] * len(messages)
    for op in order:
        done[graph.rank_of(op.key.stage)] += 1
        for index in by_target[op.key]:
            sender = messages[index].source_rank
            due[index] = min(done[sender] + window, totals[sender])
    return tuple(due)
