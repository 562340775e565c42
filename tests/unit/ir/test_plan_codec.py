import copy
import json
from dataclasses import replace

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.plan import (
    ActionKind,
    ComputeAction,
    Message,
    PassPayload,
    Plan,
    PlanPass,
    TransferAction,
)
from megatron_pipeweaver.ir.plan_codec import fingerprint, plan_from_json, plan_to_json
from megatron_pipeweaver.ir.problem import OpKind, PassKey
from tests.unit.ir.examples import op


def plan() -> Plan:
    """One language pass over two ranks: an activation there, a gradient back."""

    def message(kind, source, target):
        return Message(
            source=op(kind, source),
            target=op(kind, target),
            source_rank=source,
            target_rank=target,
            sequence=0,
            shape=(8, 2, 16),
            dtype="bfloat16",
        )

    def run(kind, name, stage):
        return ComputeAction(kind=kind, op=op(name, stage), strategy="keep", memory_bytes=4)

    def move(kind, index):
        return TransferAction(kind=kind, messages=(index,))

    kinds = ActionKind
    return Plan(
        pipeline_size=2,
        modules={"language": 1},
        forward_only=False,
        memory_capacity_bytes=(100, 90),
        makespan_ns=50,
        passes=(
            PlanPass(
                key=PassKey(0, "language", 0),
                stages=2,
                after=(),
                frozen=False,
                payload=PassPayload(
                    item_start=0, item_stop=2, hidden_shape=(8, 2, 16), output_shape=()
                ),
            ),
        ),
        messages=(message("F", 0, 1), message("B", 1, 0)),
        ranks=(
            (
                run(kinds.FW_STAGE, "F", 0),
                move(kinds.ISEND, 0),
                move(kinds.IRECV, 1),
                move(kinds.WAIT_IRECV, 1),
                run(kinds.BW_STAGE, "B", 0),
                move(kinds.WAIT_ISEND, 0),
            ),
            (
                move(kinds.IRECV, 0),
                move(kinds.WAIT_IRECV, 0),
                run(kinds.FW_STAGE, "F", 1),
                run(kinds.BW_STAGE, "B", 1),
                move(kinds.ISEND, 1),
                run(kinds.WG_STAGE, "W", 1),
                move(kinds.WAIT_ISEND, 1),
            ),
        ),
    )


VALUE = json.loads(plan_to_json(plan()))


def test_round_trip():
    assert plan_from_json(plan_to_json(plan())) == plan()


def test_a_group_is_all_its_messages_in_one_action():
    first, *others = plan().ranks
    group = TransferAction(kind=ActionKind.IRECV, messages=(1, 0))
    grouped = replace(plan(), ranks=((*first, group), *others))
    value = json.loads(plan_to_json(grouped))
    assert value["ranks"][0][-1] == ["irecv", 1, 0]
    assert value["ranks"][0][:-1] == VALUE["ranks"][0]  # plans without groups are as ever
    assert plan_from_json(plan_to_json(grouped)) == grouped


def test_the_fingerprint_covers_every_part():
    base = plan()
    passed, message = base.passes[0], base.messages[0]
    others = [
        replace(base, modules={"language": 1, "vision": 1}),
        replace(base, forward_only=True),
        replace(base, memory_capacity_bytes=(100, 91)),
        replace(base, makespan_ns=51),
        replace(base, passes=(replace(passed, frozen=True),)),
        replace(base, passes=(replace(passed, payload=replace(passed.payload, item_stop=3)),)),
        replace(base, messages=(replace(message, shape=(8, 2, 17)), base.messages[1])),
        replace(base, messages=(replace(message, sequence=1), base.messages[1])),
        replace(base, ranks=(base.ranks[0][:-1], base.ranks[1])),
        replace(base, ranks=base.ranks[::-1]),
    ]
    assert len({fingerprint(one) for one in [base, *others]}) == 1 + len(others)
    assert fingerprint(plan()) == fingerprint(base)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "pipeweaver.plan/9", "$.format: is 'pipeweaver.plan/9'; this reader takes"),
        (("pipeline_size",), 0, "$.pipeline_size: is 0; it must be at least 1"),
        (("pipeline_size",), 3, "$.memory_capacity_bytes: has 2 entries; it must have 3"),
        (("forward_only",), 0, "$.forward_only: is 0; it must be true or false"),
        (("modules", "language"), 0, "$.modules.language: is 0; it must be at least 1"),
        (("ranks",), [[]], "$.ranks: has 1 entries; it must have 2"),
        (("ranks", 0, 0), [], "$.ranks[0][0]: begins with ''; it must be one of"),
        (("ranks", 0, 0, 0), "send", "$.ranks[0][0]: begins with 'send'; it must be one of"),
        (("ranks", 0, 0, 1), "language.F0", "$.ranks[0][0][1]: 'language.F0' is not an op; write"),
        (("ranks", 0, 1), ["isend", -1], "$.ranks[0][1][1]: is -1; it must be at least 0"),
        (("ranks", 0, 1), ["isend"], "$.ranks[0][1]: is 'isend' of no message; name one, or all"),
        (("ranks", 0, 1), ["isend", 0, True], "$.ranks[0][1][2]: is true; it must be a whole"),
        (("messages", 0, 6), "int8", "$.messages[0][6]: is 'int8'; it must be one of ['bfloat16'"),
        (("messages", 0, 5, 1), 2.0, "$.messages[0][5][1]: is 2.0; it must be a whole number"),
        (("passes", 0, 4, 0), 3, "$.passes[0][4]: pass payload: items 3:2 run backward"),
        (("passes", 0, 0), [0, "language"], "$.passes[0][0]: has 2 entries; it must have 3"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_refusals_name_file_path_and_mend(path, value, message):
    root = copy.deepcopy(VALUE)
    *way, last = path
    spot = root
    for step in way:
        spot = spot[step]
    spot[last] = value
    with pytest.raises(ConfigError) as caught:
        plan_from_json(json.dumps(root).encode(), "plan.json")
    assert str(caught.value).startswith(f"plan.json: {message}")
    assert "\n" not in str(caught.value)


def test_message_size():
    assert plan().messages[0].size_bytes == 8 * 2 * 16 * 2


def test_the_graph_of_a_forward_only_plan_has_no_backward():
    root = copy.deepcopy(VALUE) | {"forward_only": True}
    graph = plan_from_json(json.dumps(root).encode()).graph()
    assert {one.kind for one in graph.ops(split=True)} == {OpKind.F}
    assert {one.kind for one in plan().graph().ops(split=True)} == {*OpKind}
