"""Proves a plan safe to run, or says which action of which rank is at fault.

What is proven: every pass stands once; order is respected; every send meets its receive in the
same order on both ends, with the right shape, ranks and ops; every receive is awaited before its
tensor is used; no wait is cyclic under rendezvous semantics; memory stays under capacity in the
order of execution. Messages that are posted as one are one step, which completes when all of them
can. The verifier knows nothing of how plans are made: it reads the dependency rule of `ir.problem`
and the plan.

What stands here is the proof that people read, and that words every fault. The native core has its
twin (`csrc/plan_check.cpp`, the same checks in the same order), which says yes or nothing within a
millisecond or two; what it does not say yes to is for the proof here to judge.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import NoReturn

from megatron_pipeweaver.compiler.grid import format_excerpt
from megatron_pipeweaver.compiler.messages import activation_of, message_shape
from megatron_pipeweaver.compiler.packed import PackedPlan
from megatron_pipeweaver.errors import ConfigError, PlanInvalidError
from megatron_pipeweaver.ir.plan import (
    COMPUTE_KIND,
    ELEMENT_BYTES,
    Action,
    ActionKind,
    ComputeAction,
    Message,
    Plan,
    TransferAction,
    VerifiedPlan,
)
from megatron_pipeweaver.ir.plan_codec import fingerprint
from megatron_pipeweaver.ir.plan_text import format_action
from megatron_pipeweaver.ir.problem import Dependency, OpKey, OpKind, PassGraph, dependencies
from megatron_pipeweaver.ir.text import format_op

_Place = tuple[int, int]  # rank, index of the action there
_ON_SOURCE = (ActionKind.ISEND, ActionKind.WAIT_ISEND)
_ON_TARGET = (ActionKind.IRECV, ActionKind.WAIT_IRECV)
_TRANSFERS = (*_ON_SOURCE, *_ON_TARGET)
_Waits = Mapping[OpKey, tuple[Dependency, ...]]


def verify(plan: Plan | PackedPlan) -> VerifiedPlan:
    """`plan`, proven safe to run.

    Raises:
        PlanInvalidError: a rule is broken: rank, action and rule on the first line, then the
            actions around it with an arrow.
    """
    if isinstance(plan, PackedPlan):
        peaks = plan.peak_memory_bytes()
        if peaks is not None:
            return VerifiedPlan(plan.plan, plan.fingerprint, peaks)
        plan = plan.plan
    graph = _graph(plan)
    ops = _op_places(plan, graph)
    _check_stage_pairs(plan, ops)
    waits = {op: dependencies(graph, op) for op in ops}
    transfers = _transfer_places(plan)
    _check_messages(plan, graph, waits)
    _check_transfers(plan, transfers)
    _check_groups(plan, transfers)
    _check_order(plan, waits, ops, transfers)
    _check_pair_order(plan, transfers)
    _check_progress(plan)
    return VerifiedPlan(plan, fingerprint(plan), _peaks(plan, graph, ops))


def _fail(plan: Plan, place: _Place, what: str) -> NoReturn:
    rank, index = place
    word = format_action(plan, plan.ranks[rank][index])
    raise PlanInvalidError(
        f"rank {rank}, action {index}: `{word}` {what}\n{format_excerpt(plan, {rank: index})}"
    )


def _actions(plan: Plan) -> Iterator[tuple[_Place, Action]]:
    for rank, actions in enumerate(plan.ranks):
        for index, action in enumerate(actions):
            yield (rank, index), action


# --- passes and ops ------------------------------------------------------------------------------


def _graph(plan: Plan) -> PassGraph:
    """The plan's passes, each with as many stages as ranks and segments make."""
    for what, found in (
        ("ranks", len(plan.ranks)),
        ("memory_capacity_bytes", len(plan.memory_capacity_bytes)),
    ):
        if found != plan.pipeline_size:
            raise PlanInvalidError(
                f"plan: {what} has {found} entries; the pipeline has {plan.pipeline_size} ranks"
            )
    for one in plan.passes:
        stages = plan.pipeline_size * plan.modules.get(one.key.module, 0)
        if one.stages != stages or stages < 1:
            raise PlanInvalidError(
                f"plan: microbatch {one.key.microbatch}, pass {one.key.module!r} has {one.stages} "
                f"stages; its module makes {stages}"
            )
    try:
        return plan.graph()
    except ConfigError as error:
        raise PlanInvalidError(f"plan: {error}") from None


def _op_places(plan: Plan, graph: PassGraph) -> dict[OpKey, _Place]:
    """Where each op stands: once, on its rank; no forward or backward is missing."""
    places: dict[OpKey, _Place] = {}
    for place, action in _actions(plan):
        if not isinstance(action, ComputeAction):
            continue
        op = action.op
        node = graph.nodes.get(op.owner)
        if node is None or not 0 <= op.stage < node.stages:
            _fail(plan, place, "is an op of a pass or stage that the plan does not have")
        if action.kind is not COMPUTE_KIND[op.kind]:
            _fail(plan, place, f"is of kind {action.kind}; its op asks for {COMPUTE_KIND[op.kind]}")
        if node.frozen and op.kind is not OpKind.F:
            _fail(plan, place, "is a backward of a pass that has none (frozen or forward only)")
        if graph.rank_of(op.stage) != place[0]:
            _fail(plan, place, f"belongs on rank {graph.rank_of(op.stage)}")
        if op in places:
            _fail(plan, place, f"stands twice; first as action {places[op][1]}")
        places[op] = place
    for op in graph.ops():
        if op not in places:
            raise PlanInvalidError(
                f"rank {graph.rank_of(op.stage)}: `{format_op(op)}` is missing; every forward and "
                "every backward of a pass that is not frozen stands once"
            )
    return places


def _check_stage_pairs(plan: Plan, ops: Mapping[OpKey, _Place]) -> None:
    """Forward, backward and weight gradient of a stage agree on strategy and memory."""
    for op, place in ops.items():
        action, forward = _compute(plan, place), _compute(plan, ops[op.with_kind(OpKind.F)])
        if (action.strategy, action.memory_bytes) != (forward.strategy, forward.memory_bytes):
            _fail(
                plan,
                place,
                f"has strategy {action.strategy!r} of {action.memory_bytes} bytes, but its "
                f"forward has {forward.strategy!r} of {forward.memory_bytes}",
            )


def _compute(plan: Plan, place: _Place) -> ComputeAction:
    action = plan.ranks[place[0]][place[1]]
    assert isinstance(action, ComputeAction)  # `_op_places` holds no others
    return action


# --- messages and transfers ----------------------------------------------------------------------


def _transfer_places(plan: Plan) -> tuple[dict[ActionKind, _Place], ...]:
    """Per message, where each of its transfers stands: at most once, on its rank."""
    places: tuple[dict[ActionKind, _Place], ...] = tuple({} for _ in plan.messages)
    for place, action in _actions(plan):
        if not isinstance(action, TransferAction):
            continue
        if action.kind not in _TRANSFERS:
            _fail(plan, place, f"is of kind {action.kind}, which moves no message")
        if len(action.messages) != 1 and (not action.messages or action.kind in _WAIT.values()):
            _fail(plan, place, f"names {len(action.messages)} messages; it must name one")
        for number in action.messages:
            if not 0 <= number < len(plan.messages):
                _fail(plan, place, f"names message {number} of {len(plan.messages)}")
            message = plan.messages[number]
            rank = message.source_rank if action.kind in _ON_SOURCE else message.target_rank
            if rank != place[0]:
                _fail(plan, place, f"belongs on rank {rank}")
            found = places[number]
            if action.kind in found:
                _fail(plan, place, f"stands twice; first as action {found[action.kind][1]}")
            found[action.kind] = place
    return places


def _told(message: Message) -> str:
    return (
        f"message {format_op(message.source)} > {format_op(message.target)} (rank "
        f"{message.source_rank} > {message.target_rank}, #{message.sequence})"
    )


def _check_messages(plan: Plan, graph: PassGraph, waits: _Waits) -> None:
    """Exactly the messages that the dependencies ask for, with their ranks, shapes and types."""
    wanted = {
        (wait.op, target)
        for target, found in waits.items()
        for wait in found
        if wait.carries_data and graph.rank_of(wait.op.stage) != graph.rank_of(target.stage)
    }
    payloads = {one.key: one.payload for one in plan.passes}
    dtypes: dict[str, str] = {}
    seen = set()
    for message in plan.messages:
        edge = (message.source, message.target)
        if edge not in wanted or edge in seen:
            fault = "stands twice" if edge in seen else "is one that no dependency asks for"
            raise PlanInvalidError(f"plan: {_told(message)} {fault}")
        seen.add(edge)
        source_rank, target_rank = graph.rank_of(edge[0].stage), graph.rank_of(edge[1].stage)
        shape = message_shape(payloads, *edge)
        dtype = dtypes.setdefault(activation_of(*edge).module, message.dtype)
        for what, found, value in (
            ("source_rank", message.source_rank, source_rank),
            ("target_rank", message.target_rank, target_rank),
            ("shape", message.shape, shape),
            ("dtype", message.dtype, dtype),
        ):
            if found != value:
                raise PlanInvalidError(
                    f"plan: {_told(message)} has {what} {found}; it must be {value}"
                )
        if message.dtype not in ELEMENT_BYTES or (message.shape and min(message.shape) < 0):
            raise PlanInvalidError(f"plan: {_told(message)} has no size: {message.dtype}")
    for source, target in sorted(wanted - seen):
        raise PlanInvalidError(
            f"rank {graph.rank_of(target.stage)}: `{format_op(target)}` needs the tensor of "
            f"`{format_op(source)}`, which no message brings"
        )


_PARTNER = {  # what must stand where a transfer stands, and how to say that it does not
    ActionKind.ISEND: (ActionKind.IRECV, "has no matching receive"),
    ActionKind.IRECV: (ActionKind.ISEND, "has no matching send"),
    ActionKind.WAIT_ISEND: (ActionKind.ISEND, "waits for a send that is never posted"),
    ActionKind.WAIT_IRECV: (ActionKind.IRECV, "waits for a receive that is never posted"),
}
_WAIT = {
    ActionKind.ISEND: ActionKind.WAIT_ISEND,
    ActionKind.IRECV: ActionKind.WAIT_IRECV,
}


def _check_transfers(plan: Plan, transfers: tuple[dict[ActionKind, _Place], ...]) -> None:
    """Every message is posted and awaited on both ends, first posted, then awaited."""
    for message, found in zip(plan.messages, transfers, strict=True):
        if not found:
            raise PlanInvalidError(f"plan: {_told(message)} is neither sent nor received")
        for kind, place in found.items():
            partner, fault = _PARTNER[kind]
            if partner not in found:
                _fail(plan, place, fault)
        for post, wait in _WAIT.items():
            if wait not in found:
                _fail(plan, found[post], "is never awaited")
            if found[wait] < found[post]:
                _fail(plan, found[wait], f"stands before its {post}")


def _check_groups(plan: Plan, transfers: tuple[dict[ActionKind, _Place], ...]) -> None:
    """What one end posts as one, the other end posts as one, of one directed rank pair, in order.

    Backends may match messages of a group and messages of their own on different channels.
    """
    for place, action in _actions(plan):
        if not isinstance(action, TransferAction) or len(action.messages) == 1:
            continue
        members = [plan.messages[number] for number in action.messages]
        if len({(one.source_rank, one.target_rank) for one in members}) > 1:
            _fail(plan, place, "posts messages of several rank pairs as one")
        first = members[0].sequence
        if [one.sequence for one in members] != list(range(first, first + len(members))):
            _fail(plan, place, "posts as one what does not stand together in its ranks' order")
        partner = _PARTNER[action.kind][0]
        rank, index = transfers[action.messages[0]][partner]
        other = plan.ranks[rank][index]
        assert isinstance(other, TransferAction)  # `_transfer_places` holds no others
        if other.messages != action.messages:
            _fail(plan, place, f"is one group here and another on rank {rank} (action {index})")


# --- order and progress --------------------------------------------------------------------------


def _check_order(
    plan: Plan,
    waits: _Waits,
    ops: Mapping[OpKey, _Place],
    transfers: tuple[dict[ActionKind, _Place], ...],
) -> None:
    """On its rank each op stands behind what it needs, each send behind what it sends."""
    for op, place in ops.items():
        for wait in waits[op]:
            other = ops[wait.op]
            if other[0] == place[0] and other > place:
                _fail(plan, place, f"stands before `{format_op(wait.op)}`, which it waits for")
            assert other[0] == place[0] or wait.carries_data  # else no message would order them
    for message, found in zip(plan.messages, transfers, strict=True):
        if found[ActionKind.ISEND] < ops[message.source]:
            _fail(plan, found[ActionKind.ISEND], f"stands before `{format_op(message.source)}`")
        if ops[message.target] < found[ActionKind.WAIT_IRECV]:
            _fail(
                plan,
                ops[message.target],
                f"uses a tensor before it is awaited (action {found[ActionKind.WAIT_IRECV][1]})",
            )


def _check_pair_order(plan: Plan, transfers: tuple[dict[ActionKind, _Place], ...]) -> None:
    """Both ends of a directed rank pair post its messages in the order of their numbers."""
    pairs: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for index, message in enumerate(plan.messages):
        pairs[message.source_rank, message.target_rank].append(index)
    for pair, indices in pairs.items():
        indices.sort(key=lambda index: plan.messages[index].sequence)
        numbers = [plan.messages[index].sequence for index in indices]
        if numbers != list(range(len(numbers))):
            raise PlanInvalidError(
                f"plan: the messages of ranks {pair[0]} > {pair[1]} are numbered {numbers[:8]}...; "
                "they must count from 0"
            )
        for kind in (ActionKind.ISEND, ActionKind.IRECV):
            for before, after in pairwise(indices):
                if transfers[after][kind] < transfers[before][kind]:
                    _fail(
                        plan,
                        transfers[after][kind],
                        f"is posted before #{plan.messages[before].sequence} of the same ranks; "
                        "both ends must post in one order",
                    )


def _check_progress(plan: Plan) -> None:
    """All ranks run to their ends where each wait needs the other side to have posted.

    Sends and receives are posted without blocking; a send's wait ends once the receive is posted,
    a receive's once the send is; of a group, once all its members can end, which its other end
    posts in one step as well. No weaker transport can be relied upon (gloo is just so).
    """
    needs = {
        ActionKind.WAIT_ISEND: ActionKind.IRECV,
        ActionKind.WAIT_IRECV: ActionKind.ISEND,
    }
    posted: dict[ActionKind, set[int]] = {kind: set() for kind in needs.values()}
    following = dict.fromkeys(range(plan.pipeline_size), 0)
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(plan.ranks):
            start = index = following[rank]
            while index < len(actions):
                action = actions[index]
                if isinstance(action, TransferAction):
                    if action.kind in posted:
                        posted[action.kind].update(action.messages)
                    elif not posted[needs[action.kind]].issuperset(action.messages):
                        break
                index += 1
            following[rank] = index
            moved = moved or index > start
    stuck = [rank for rank, index in following.items() if index < len(plan.ranks[rank])]
    if stuck:
        raise PlanInvalidError(
            f"ranks {stuck} wait for each other in a ring; each stands at its arrow\n"
            + format_excerpt(plan, following)
        )


# --- memory --------------------------------------------------------------------------------------


def _peaks(plan: Plan, graph: PassGraph, ops: Mapping[OpKey, _Place]) -> tuple[int, ...]:
    """What each rank holds at most in the order of execution: no more than its capacity."""
    split = {op.with_kind(OpKind.B) for op in ops if op.kind is OpKind.W}
    peaks = []
    for rank, (actions, capacity) in enumerate(
        zip(plan.ranks, plan.memory_capacity_bytes, strict=True)
    ):
        held = peak = 0
        for index, action in enumerate(actions):
            if not isinstance(action, ComputeAction):
                continue
            op = action.op
            if op.kind is OpKind.F:
                held += action.memory_bytes
                peak = max(peak, held)
                if held > capacity:
                    _fail(
                        plan,
                        (rank, index),
                        f"brings held memory to {held} bytes; the capacity is {capacity}",
                    )
                ends = graph.nodes[op.owner].frozen
            else:
                ends = op.kind is OpKind.W or op not in split
            if ends:
                held -= action.memory_bytes
        peaks.append(peak)
    return tuple(peaks)
