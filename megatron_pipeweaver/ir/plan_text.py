"""The word for one action of a plan: in grids, in errors of the verifier and of the executor.

``vision0.F3[keep]`` runs an op under a strategy; ``vision0.SEND_F3>1#0`` posts the message that
its output makes to rank 1, the first (0) from here to there; ``vision1.WAIT_RECV_F3<0#0`` awaits
it. A send is named by the op that made its tensor, a receive by the op that needs it. A group
that is posted as one has the word of its first message and the others' numbers: ``#0+1+2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import quote

from megatron_pipeweaver.ir.plan import Action, ActionKind, ComputeAction, Plan
from megatron_pipeweaver.ir.text import format_op, format_share, format_stage

VERBS: Mapping[ActionKind, str] = {
    ActionKind.ISEND: "SEND",
    ActionKind.IRECV: "RECV",
    ActionKind.WAIT_ISEND: "WAIT_SEND",
    ActionKind.WAIT_IRECV: "WAIT_RECV",
}
"""How transfers are written."""

SENDING = frozenset({ActionKind.ISEND, ActionKind.WAIT_ISEND})
"""The transfers that stand on a message's source rank."""


def format_action(plan: Plan, action: Action) -> str:
    """The word for `action` of `plan`, e.g. ``vision0.SEND_F3>1#0``."""
    if isinstance(action, ComputeAction):
        return f"{format_op(action.op)}[{quote(action.strategy, safe='')}]"
    verb = VERBS.get(action.kind, action.kind.value)
    if not all(0 <= one < len(plan.messages) for one in action.messages) or not action.messages:
        return f"{verb}?{'+'.join(map(str, action.messages))}"
    message, *others = (plan.messages[one] for one in action.messages)
    sending = action.kind in SENDING
    op = message.source if sending else message.target
    arrow = f">{message.target_rank}" if sending else f"<{message.source_rank}"
    return (
        f"{format_stage(op.module, op.stage)}.{verb}_{op.kind}{format_share(op)}"
        f"{arrow}#{message.sequence}{''.join(f'+{one.sequence}' for one in others)}"
    )
