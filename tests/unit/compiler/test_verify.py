"""verify: what it says of a broken plan, the ring it finds, and that nobody else vouches."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

import megatron_pipeweaver
from megatron_pipeweaver.compiler.grid import format_actions, parse_actions
from megatron_pipeweaver.errors import PlanInvalidError
from megatron_pipeweaver.ir.plan import Plan
from megatron_pipeweaver.ir.plan_codec import fingerprint
from megatron_pipeweaver.ir.problem import Microbatch, Pass, Problem, Strategy
from tests.unit.compiler.judge import judged as verify
from tests.unit.compiler.samples import Sample, draw_sample, draw_schedule, tightened


def _sample(microbatches: int) -> Sample:
    """One module of one segment on two ranks."""
    strategy = Strategy(
        name="keep", forward_ns=10, backward_ns=10, weight_grad_ns=0, memory_bytes=8
    )
    one = Pass(module="lm", sub_microbatch=0, stages=((strategy,),) * 2)
    problem = Problem(
        pipeline_size=2,
        memory_capacity_bytes=(100, 100),
        modules={"lm": 1},
        microbatches=(Microbatch(passes=(one,)),) * microbatches,
    )
    problem, schedule = tightened(problem, draw_schedule(problem, random.Random(0)))
    drawn = draw_sample(random.Random(0), pipeline_size=2)
    payload = next(iter(drawn.payloads.values()))
    return Sample(
        problem=replace(problem, memory_capacity_bytes=(100, 100)),
        schedule=schedule,
        payloads=dict.fromkeys(problem.graph.nodes, payload),
        dtypes={"lm": "float32"},
    )


GOOD = """
rank 0 | lm0.F0[keep] lm0.SEND_F0>1#0 lm0.F1[keep] lm0.SEND_F1>1#1 lm0.RECV_B0<1#0 lm0.RECV_B1<1#1 lm0.WAIT_SEND_F0>1#0 lm0.WAIT_SEND_F1>1#1 lm0.WAIT_RECV_B0<1#0 lm0.B0[keep] lm0.WAIT_RECV_B1<1#1 lm0.B1[keep]
rank 1 | lm1.RECV_F0<0#0 lm1.RECV_F1<0#1 lm1.WAIT_RECV_F0<0#0 lm1.F0[keep] lm1.B0[keep] lm1.SEND_B0>0#0 lm1.WAIT_RECV_F1<0#1 lm1.F1[keep] lm1.B1[keep] lm1.SEND_B1>0#1 lm1.WAIT_SEND_B0>0#0 lm1.WAIT_SEND_B1>0#1
"""  # noqa: E501


@pytest.fixture(name="plan")
def _plan() -> Plan:
    plan = _sample(2).plan()
    messages = sorted(plan.messages, key=lambda one: one.source[:2])
    by_pair = {"F": 0, "B": 0}
    numbered = []
    for message in messages:
        kind = message.source.kind.value
        numbered.append(replace(message, sequence=by_pair[kind]))
        by_pair[kind] += 1
    return parse_actions(GOOD, replace(plan, messages=tuple(numbered)))


def test_a_good_plan_gets_its_fingerprint(plan: Plan) -> None:
    assert verify(plan).fingerprint == fingerprint(plan)
    assert format_actions(plan).split() == GOOD.split()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            r"lm0\.SEND_F1>1#1 (.*) lm0\.WAIT_SEND_F1>1#1 ",
            r"\1 ",
            "rank 1, action 1: `lm1.RECV_F1<0#1` has no matching send",
        ),
        (
            r"lm1\.RECV_F1<0#1 (.*) lm1\.WAIT_RECV_F1<0#1 ",
            r"\1 ",
            "rank 0, action 3: `lm0.SEND_F1>1#1` has no matching receive",
        ),
        (
            r"lm0\.WAIT_SEND_F1>1#1 ",
            "",
            "rank 0, action 3: `lm0.SEND_F1>1#1` is never awaited",
        ),
        (
            r"lm1\.WAIT_RECV_F1<0#1 (lm1.F1\[keep\]) ",
            r"\1 lm1.WAIT_RECV_F1<0#1 ",
            "rank 1, action 6: `lm1.F1[keep]` uses a tensor before it is awaited (action 7)",
        ),
        (
            r"(lm1\.RECV_F0<0#0) (lm1\.RECV_F1<0#1)",
            r"\2 \1",
            "rank 1, action 0: `lm1.RECV_F1<0#1` is posted before #0 of the same ranks",
        ),
        (
            r"(lm0\.F0\[keep\]) (lm0\.SEND_F0>1#0)",
            r"\2 \1",
            "rank 0, action 0: `lm0.SEND_F0>1#0` stands before `lm0.F0`",
        ),
        (r"lm0\.F1\[keep\] ", "", "rank 0: `lm0.F1` is missing"),
        (
            r"lm0\.F1\[keep\]",
            "lm0.F1[keep] lm0.F1[keep]",
            "rank 0, action 3: `lm0.F1[keep]` stands twice; first as action 2",
        ),
    ],
)
def test_a_fault_is_told_by_rank_action_and_rule(
    plan: Plan, old: str, new: str, message: str
) -> None:
    broken = parse_actions(re.sub(old, new, GOOD), plan)
    assert broken != plan
    with pytest.raises(PlanInvalidError) as caught:
        verify(broken)
    first, *excerpt = str(caught.value).splitlines()
    assert first.startswith(message)
    if "action" in message:  # the arrow stands under the action
        assert excerpt[0][excerpt[1].index("^") :].startswith(first.split("`")[1])


def test_a_ring_of_waits_is_found_and_shown(plan: Plan) -> None:
    ring = GOOD.replace(
        "lm0.F1[keep] lm0.SEND_F1>1#1 lm0.RECV_B0<1#0 lm0.RECV_B1<1#1 lm0.WAIT_SEND_F0>1#0",
        "lm0.RECV_B0<1#0 lm0.RECV_B1<1#1 lm0.WAIT_RECV_B1<1#1 lm0.F1[keep] lm0.SEND_F1>1#1"
        " lm0.WAIT_SEND_F0>1#0",
    ).replace("lm0.WAIT_RECV_B1<1#1 lm0.B1[keep]", "lm0.B1[keep]")
    with pytest.raises(PlanInvalidError) as caught:
        verify(parse_actions(ring, plan))
    lines = str(caught.value).splitlines()
    assert lines[0] == "ranks [0, 1] wait for each other in a ring; each stands at its arrow"
    assert lines[1][lines[2].index("^") :].startswith("lm0.WAIT_RECV_B1<1#1")
    assert lines[3][lines[4].index("^") :].startswith("lm1.WAIT_RECV_F1<0#1")


def test_a_send_awaited_before_its_receive_can_be_posted_is_a_ring(plan: Plan) -> None:
    """Eager transports would let this pass; rendezvous ones hang."""
    ring = GOOD.replace("lm0.RECV_B0<1#0 lm0.RECV_B1<1#1 ", "").replace(
        "lm0.WAIT_RECV_B0<1#0", "lm0.RECV_B0<1#0 lm0.RECV_B1<1#1 lm0.WAIT_RECV_B0<1#0"
    )
    verify(parse_actions(ring, plan))
    ring = ring.replace("lm1.RECV_F0<0#0 lm1.RECV_F1<0#1", "lm1.RECV_F0<0#0").replace(
        "lm1.SEND_B0>0#0", "lm1.SEND_B0>0#0 lm1.WAIT_SEND_B0>0#0 lm1.RECV_F1<0#1"
    )
    ring = ring.replace("lm1.SEND_B1>0#1 lm1.WAIT_SEND_B0>0#0", "lm1.SEND_B1>0#1")
    with pytest.raises(PlanInvalidError, match="wait for each other in a ring"):
        verify(parse_actions(ring, plan))


GROUPED = (
    GOOD.replace("lm0.SEND_F0>1#0 lm0.F1[keep] lm0.SEND_F1>1#1", "lm0.F1[keep] lm0.SEND_F0>1#0+1")
    .replace("lm1.RECV_F0<0#0 lm1.RECV_F1<0#1", "lm1.RECV_F0<0#0+1")
)  # fmt: skip


def test_a_group_of_both_ends_is_one_step(plan: Plan) -> None:
    grouped = parse_actions(GROUPED, plan)
    assert format_actions(grouped).split() == GROUPED.split()
    verify(grouped)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "lm1.RECV_F0<0#0+1",
            "lm1.RECV_F0<0#0 lm1.RECV_F1<0#1",
            "rank 0, action 2: `lm0.SEND_F0>1#0+1` is one group here and another on rank 1 "
            "(action 0)",
        ),
        (
            "F0>1#0+1",
            "F1>1#1+0",
            "rank 0, action 2: `lm0.SEND_F1>1#1+0` posts as one what does not stand together",
        ),
        (
            "lm0.WAIT_SEND_F0>1#0 lm0.WAIT_SEND_F1>1#1",
            "lm0.WAIT_SEND_F0>1#0+1",
            "rank 0, action 5: `lm0.WAIT_SEND_F0>1#0+1` names 2 messages; it must name one",
        ),
        (
            "lm1.RECV_F0<0#0+1 lm1.WAIT_RECV_F0<0#0",
            "lm1.WAIT_RECV_F0<0#0 lm1.RECV_F0<0#0+1",
            "rank 1, action 0: `lm1.WAIT_RECV_F0<0#0` stands before its irecv",
        ),
    ],
)
def test_a_group_that_is_none_is_refused(plan: Plan, old: str, new: str, message: str) -> None:
    with pytest.raises(PlanInvalidError) as caught:
        verify(parse_actions(GROUPED.replace(old, new), plan))
    assert str(caught.value).startswith(message)


def test_a_group_that_waits_for_what_needs_one_of_its_messages_is_a_ring(plan: Plan) -> None:
    """Rank 0 sends F0 with F1, behind the backward that needs F0 to have arrived."""
    ring = GROUPED.replace(
        "lm0.F1[keep] lm0.SEND_F0>1#0+1 lm0.RECV_B0<1#0 lm0.RECV_B1<1#1",
        "lm0.F1[keep] lm0.RECV_B0<1#0 lm0.RECV_B1<1#1 lm0.WAIT_RECV_B0<1#0 lm0.B0[keep]"
        " lm0.SEND_F0>1#0+1",
    ).replace("lm0.WAIT_SEND_F1>1#1 lm0.WAIT_RECV_B0<1#0 lm0.B0[keep]", "lm0.WAIT_SEND_F1>1#1")
    with pytest.raises(PlanInvalidError, match="wait for each other in a ring"):
        verify(parse_actions(ring, plan))
    alone = ring.replace("lm0.SEND_F0>1#0+1", "lm0.SEND_F1>1#1").replace(
        "lm0.F1[keep]", "lm0.SEND_F0>1#0 lm0.F1[keep]"
    )
    verify(
        parse_actions(alone.replace("lm1.RECV_F0<0#0+1", "lm1.RECV_F0<0#0 lm1.RECV_F1<0#1"), plan)
    )


def test_memory_counts_in_the_order_of_execution(plan: Plan) -> None:
    verify(replace(plan, memory_capacity_bytes=(16, 8)))
    with pytest.raises(PlanInvalidError, match=r"rank 0, action 2: `lm0.F1\[keep\]` brings held"):
        verify(replace(plan, memory_capacity_bytes=(15, 8)))


def test_only_verify_makes_a_verified_plan() -> None:
    root = Path(megatron_pipeweaver.__file__).parent
    makers = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if re.search(r"\bVerifiedPlan\(", path.read_text())
        and "class VerifiedPlan" not in path.read_text()
    }
    assert makers == {"compiler/verify.py"}
