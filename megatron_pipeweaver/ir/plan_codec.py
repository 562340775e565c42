"""Plans as bytes (`pipeweaver.plan/1`): how they travel, and what their fingerprint covers."""

from __future__ import annotations

from typing import Any

from megatron_pipeweaver.ir.codec import check_format, digest, to_bytes
from megatron_pipeweaver.ir.json_reader import JsonNode, is_whole, parse_json
from megatron_pipeweaver.ir.plan import (
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
from megatron_pipeweaver.ir.problem import OpKey, PassKey
from megatron_pipeweaver.ir.text import format_op, parse_op

PLAN_FORMAT = "pipeweaver.plan/1"
_KINDS = {kind.value: kind for kind in ActionKind}
_COMPUTE = frozenset({ActionKind.FW_STAGE, ActionKind.BW_STAGE, ActionKind.WG_STAGE})
_TRANSFERS = {name: kind for name, kind in _KINDS.items() if kind not in _COMPUTE}


def fingerprint(plan: Plan) -> str:
    """SHA-256 over the plan's bytes: equal on two ranks exactly when their plans are equal."""
    return digest(plan_to_json(plan))


def plan_to_json(plan: Plan) -> bytes:
    """`plan` as canonical bytes."""
    return to_bytes(
        {
            "format": PLAN_FORMAT,
            "pipeline_size": plan.pipeline_size,
            "modules": dict(plan.modules),
            "forward_only": plan.forward_only,
            "memory_capacity_bytes": list(plan.memory_capacity_bytes),
            "makespan_ns": plan.makespan_ns,
            "passes": [_pass_to_json(one) for one in plan.passes],
            "messages": [_message_to_json(one) for one in plan.messages],
            "ranks": [[_action_to_json(action) for action in rank] for rank in plan.ranks],
        }
    )


def plan_from_json(data: bytes, source: str = "plan") -> Plan:
    """The plan in `data`; it still has to be verified before it may run.

    Raises:
        ConfigError: the bytes are not a valid `pipeweaver.plan/1`.
    """
    root = check_format(
        parse_json(data, source),
        PLAN_FORMAT,
        {
            "pipeline_size",
            "modules",
            "forward_only",
            "memory_capacity_bytes",
            "makespan_ns",
            "passes",
            "messages",
            "ranks",
        },
    )
    pipeline_size = root["pipeline_size"].integer(minimum=1)
    capacities = root["memory_capacity_bytes"].array(pipeline_size)
    return Plan(
        pipeline_size=pipeline_size,
        modules={name: node.integer(minimum=1) for name, node in root["modules"].entries()},
        forward_only=root["forward_only"].boolean(),
        memory_capacity_bytes=tuple(node.integer() for node in capacities),
        makespan_ns=root["makespan_ns"].integer(),
        passes=tuple(_read_pass(node) for node in root["passes"].array()),
        messages=tuple(_read_message(node) for node in root["messages"].array()),
        ranks=tuple(
            tuple(_read_action(node) for node in rank.array())
            for rank in root["ranks"].array(pipeline_size)
        ),
    )


def _pass_to_json(one: PlanPass) -> list[Any]:
    payload = one.payload
    return [
        list(one.key),
        one.stages,
        [list(producer) for producer in one.after],
        one.frozen,
        [payload.item_start, payload.item_stop],
        list(payload.hidden_shape),
        list(payload.output_shape),
    ]


def _read_pass(node: JsonNode) -> PlanPass:
    key, stages, after, frozen, items, hidden, output = node.array(7)
    start, stop = items.array(2)
    return PlanPass(
        key=_read_key(key),
        stages=stages.integer(),
        after=tuple(_read_key(one) for one in after.array()),
        frozen=frozen.boolean(),
        payload=items.build(
            PassPayload,
            item_start=start.integer(),
            item_stop=stop.integer(),
            hidden_shape=_read_shape(hidden),
            output_shape=_read_shape(output),
        ),
    )


def _read_key(node: JsonNode) -> PassKey:
    microbatch, module, sub_microbatch = node.array(3)
    return PassKey(microbatch.integer(), module.text(), sub_microbatch.integer())


def _read_shape(node: JsonNode) -> tuple[int, ...]:
    return tuple(one.integer() for one in node.array())


def _message_to_json(one: Message) -> list[Any]:
    return [
        format_op(one.source),
        format_op(one.target),
        one.source_rank,
        one.target_rank,
        one.sequence,
        list(one.shape),
        one.dtype,
    ]


def _read_message(node: JsonNode) -> Message:
    source, target, source_rank, target_rank, sequence, shape, dtype = node.array(7)
    if dtype.text() not in ELEMENT_BYTES:
        dtype.fail(f"is {dtype.text()!r}; it must be one of {sorted(ELEMENT_BYTES)}")
    return Message(
        source=_read_op(source),
        target=_read_op(target),
        source_rank=source_rank.integer(),
        target_rank=target_rank.integer(),
        sequence=sequence.integer(),
        shape=_read_shape(shape),
        dtype=dtype.text(),
    )


def _action_to_json(action: Action) -> list[Any]:
    if isinstance(action, ComputeAction):
        return [action.kind.value, format_op(action.op), action.strategy, action.memory_bytes]
    return [action.kind.value, *action.messages]


def _read_action(node: JsonNode) -> Action:
    match node.plain:
        # Most of a plan, and so read without a node for each of its parts.
        case [str(name), int(number)] if name in _TRANSFERS and is_whole(number):
            return TransferAction(kind=_TRANSFERS[name], messages=(number,))
    parts = node.array()
    name = parts[0].text() if parts else ""
    if name not in _KINDS:
        node.fail(f"begins with {name!r}; it must be one of {list(_KINDS)}")
    kind = _KINDS[name]
    if kind not in _COMPUTE:
        messages = tuple(one.integer() for one in parts[1:])
        if not messages:
            node.fail(f"is {name!r} of no message; name one, or all of a group")
        return TransferAction(kind=kind, messages=messages)
    _, op, strategy, memory_bytes = node.array(4)
    return ComputeAction(
        kind=kind,
        op=_read_op(op),
        strategy=strategy.text(),
        memory_bytes=memory_bytes.integer(),
    )


def _read_op(node: JsonNode) -> OpKey:
    return node.build(parse_op, node.text())
