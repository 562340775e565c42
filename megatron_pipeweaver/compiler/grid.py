"""A plan's actions as text that people can read and edit, and that reads back.

One word per action, one line per rank:

    rank 0 | vision0.F3[keep] vision0.SEND_F3>1#0 vision0.WAIT_SEND_F3>1#0
    rank 1 | vision1.RECV_F3<0#0 vision1.WAIT_RECV_F3<0#0 vision1.F3[keep]

``[keep]`` is the strategy; ``>1`` and ``<0`` are the peer's rank; ``#0`` is the message's number
between the two ranks in that direction, ``#0+1`` a group of two that are posted as one. A send is
named by the op that made its tensor, a receive by the op that needs it, a group by its first
message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple
from urllib.parse import unquote

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.plan import (
    COMPUTE_KIND,
    Action,
    ComputeAction,
    Plan,
    TransferAction,
)
from megatron_pipeweaver.ir.plan_text import SENDING, VERBS, format_action
from megatron_pipeweaver.ir.problem import OpKey, OpKind
from megatron_pipeweaver.ir.text import format_grid, parse_grid, parse_op

_KIND_OF_VERB = {verb: kind for kind, verb in VERBS.items()}
_TRANSFER = re.compile(
    r".+\.(?P<verb>(?:WAIT_)?(?:SEND|RECV))_[FB][\d.]+[<>](?P<peer>\d+)"
    r"#(?P<sequences>\d+(?:\+\d+)*)",
    re.ASCII,
)
_COMPUTE = re.compile(r"(?P<op>.+)\[(?P<strategy>[^\[\]]*)\]")


def format_actions(plan: Plan) -> str:
    """All of `plan`'s actions, one line per rank."""
    return format_grid([[format_action(plan, action) for action in rank] for rank in plan.ranks])


def parse_actions(text: str, plan: Plan) -> Plan:
    """`plan` with the actions that `text` tells instead of its own.

    The words refer to `plan`'s messages, and to the memory that its stage pairs hold.

    Raises:
        ConfigError: a word is no action, or speaks of a message or strategy `plan` does not have.
    """
    rows = parse_grid(text)
    if len(rows) != plan.pipeline_size:
        raise ConfigError(f"grid: {len(rows)} lines; the plan has {plan.pipeline_size} ranks")
    words = _Words(
        messages={
            (one.source_rank, one.target_rank, one.sequence): index
            for index, one in enumerate(plan.messages)
        },
        memory={
            (action.op.with_kind(OpKind.F), action.strategy): action.memory_bytes
            for rank in plan.ranks
            for action in rank
            if isinstance(action, ComputeAction)
        },
    )
    ranks = tuple(
        tuple(_parse_action(word, rank, words) for word in row) for rank, row in enumerate(rows)
    )
    return replace(plan, ranks=ranks)


class _Words(NamedTuple):
    messages: Mapping[tuple[int, int, int], int]
    memory: Mapping[tuple[OpKey, str], int]


def _parse_action(word: str, rank: int, words: _Words) -> Action:
    transfer = _TRANSFER.fullmatch(word)
    if transfer is not None:
        kind = _KIND_OF_VERB[transfer["verb"]]
        peer = int(transfer["peer"])
        pair = (rank, peer) if kind in SENDING else (peer, rank)
        found = [words.messages.get((*pair, int(one))) for one in transfer["sequences"].split("+")]
        messages = tuple(one for one in found if one is not None)
        if len(messages) < len(found):
            raise ConfigError(
                f"rank {rank}: {word!r} names a message that the plan does not have; its peer and "
                "number must be those of one"
            )
        return TransferAction(kind=kind, messages=messages)
    compute = _COMPUTE.fullmatch(word)
    if compute is None:
        raise ConfigError(
            f"rank {rank}: {word!r} is not an action; write it like vision0.F3[keep] or "
            "vision0.SEND_F3>1#0"
        )
    op, strategy = parse_op(compute["op"]), unquote(compute["strategy"])
    memory = words.memory.get((op.with_kind(OpKind.F), strategy))
    if memory is None:
        raise ConfigError(f"rank {rank}: {word!r}: the plan has no such stage pair and strategy")
    return ComputeAction(kind=COMPUTE_KIND[op.kind], op=op, strategy=strategy, memory_bytes=memory)


def format_excerpt(plan: Plan, at: Mapping[int, int], reach: int = 3) -> str:
    """Some ranks' actions around ``at[rank]``, with an arrow under that action.

    A rank that has no action there (it is done) gets a line that says so.
    """
    return "\n".join(_excerpt_line(plan, rank, index, reach) for rank, index in at.items())


def _excerpt_line(plan: Plan, rank: int, index: int, reach: int) -> str:
    actions = plan.ranks[rank]
    head = f"rank {rank} | "
    if index >= len(actions):
        return f"{head}(done)"
    first = max(0, index - reach)
    before = "".join(f"{format_action(plan, one)} " for one in actions[first:index])
    shown = " ".join(format_action(plan, one) for one in actions[index : index + reach + 1])
    lead = f"{head}{'... ' if first else ''}{before}"
    tail = " ..." if index + reach + 1 < len(actions) else ""
    return f"{lead}{shown}{tail}\n{' ' * len(lead)}^"
