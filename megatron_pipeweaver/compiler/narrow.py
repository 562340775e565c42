"""One replica's part of a plan that several replicas share.

    shared     | v0 v1 l0 v2 l1 ...      every replica's work, at most so much of each pass
    replica 0  | v0 v1 l0    l1 ...      what a replica has not, it leaves out, with its messages;
    replica 1  | v0    l0 v2 l1 ...      the rest keeps its order

So replicas whose stages talk to each other (expert parallelism) meet there in one order, though
their batches differ. They cannot wait for each other in a ring either: every wait of a replica,
and every meeting, is one of the shared plan's, whose waits make no ring.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count

from megatron_pipeweaver.compiler.messages import message_shape
from megatron_pipeweaver.ir.plan import Action, ComputeAction, Message, PassPayload, Plan
from megatron_pipeweaver.ir.problem import PassKey


def narrow(plan: Plan, payloads: Mapping[PassKey, PassPayload]) -> Plan:
    """The passes of `plan` that `payloads` names, on these payloads; verify it before it runs.

    Args:
        plan: a plan for at least as much.
        payloads: items and shapes of every pass that stays.
    """
    passes = tuple(
        replace(
            one,
            after=tuple(key for key in one.after if key in payloads),
            payload=payloads[one.key],
        )
        for one in plan.passes
        if one.key in payloads
    )
    kept = [
        index
        for index, one in enumerate(plan.messages)
        if one.source.owner in payloads and one.target.owner in payloads
    ]
    places = {index: place for place, index in enumerate(kept)}
    return replace(
        plan,
        passes=passes,
        messages=_renumbered([plan.messages[index] for index in kept], payloads),
        ranks=tuple(_kept_actions(rank, payloads, places) for rank in plan.ranks),
    )


def _renumbered(
    messages: list[Message], payloads: Mapping[PassKey, PassPayload]
) -> tuple[Message, ...]:
    """Messages of each directed rank pair counted from 0 again, in their own shapes."""
    numbers: defaultdict[tuple[int, int], count[int]] = defaultdict(count)
    order = sorted(range(len(messages)), key=lambda index: messages[index].sequence)
    sequence = {
        index: next(numbers[messages[index].source_rank, messages[index].target_rank])
        for index in order
    }
    return tuple(
        replace(
            one,
            sequence=sequence[index],
            shape=message_shape(payloads, one.source, one.target),
        )
        for index, one in enumerate(messages)
    )


def _kept_actions(
    actions: Sequence[Action],
    payloads: Mapping[PassKey, PassPayload],
    places: Mapping[int, int],
) -> tuple[Action, ...]:
    found: list[Action] = []
    for one in actions:
        if isinstance(one, ComputeAction):
            if one.op.owner in payloads:
                found.append(one)
            continue
        # Both ends post the same group, so it shrinks to the same one on both.
        messages = tuple(places[index] for index in one.messages if index in places)
        if messages:
            found.append(replace(one, messages=messages))
    return tuple(found)
