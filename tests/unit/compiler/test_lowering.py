"""compile_plan: messages only where needed, windows kept, evaluation plans, clear refusals."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megatron_pipeweaver.compiler.grid import format_actions
from megatron_pipeweaver.compiler.lowering import Windows, compile_plan
from megatron_pipeweaver.compiler.verify import verify
from megatron_pipeweaver.errors import ConfigError, PlanInvalidError
from megatron_pipeweaver.ir.plan import (
    ActionKind,
    ComputeAction,
    PassPayload,
    Plan,
    TransferAction,
)
from megatron_pipeweaver.ir.problem import (
    Microbatch,
    OpKind,
    Pass,
    Problem,
    Strategy,
    dependencies,
)
from megatron_pipeweaver.ir.schedule import Schedule, ScheduledOp
from megatron_pipeweaver.ir.text import parse_op
from tests.unit.compiler.samples import draw_sample


def _actions(plan: Plan, rank: int, kind: ActionKind) -> list[int]:
    return [
        index
        for index, action in enumerate(plan.ranks[rank])
        if isinstance(action, TransferAction) and action.kind is kind
    ]


def test_one_rank_needs_no_messages() -> None:
    plan = draw_sample(random.Random(5), pipeline_size=1).plan()
    assert plan.messages == ()
    assert all(isinstance(action, ComputeAction) for action in plan.ranks[0])


def test_a_message_for_every_tensor_that_changes_rank_and_no_other() -> None:
    frozen_producers = 0
    for seed in range(40):
        plan = draw_sample(random.Random(seed)).plan()
        graph = plan.graph()
        edges = [(message.source, message.target) for message in plan.messages]
        wanted = [
            (wait.op, op)
            for op in graph.ops()
            for wait in dependencies(graph, op)
            if wait.carries_data
            and wait.op.stage % plan.pipeline_size != op.stage % plan.pipeline_size
        ]
        assert sorted(edges) == sorted(wanted)
        for message in plan.messages:
            frozen = graph.nodes[message.target.owner].frozen
            frozen_producers += frozen
            assert not (frozen and message.target.kind is OpKind.B)
    assert frozen_producers


def test_shapes_follow_the_activation() -> None:
    sample = draw_sample(random.Random(3), pipeline_size=2, microbatches=1)
    shapes = {
        (one.source.owner == one.target.owner, one.source.kind): one.shape[0]
        - sample.payloads[
            (one.source if one.source.kind is OpKind.F else one.target).owner
        ].item_stop
        + sample.payloads[
            (one.source if one.source.kind is OpKind.F else one.target).owner
        ].item_start
        for one in sample.plan().messages
    }
    # The samples' outputs are one longer than what moves between a pass's own stages.
    assert shapes == {
        (True, OpKind.F): 0,
        (True, OpKind.B): 0,
        (False, OpKind.F): 1,
        (False, OpKind.B): 1,
    }


def test_receives_are_posted_within_their_window() -> None:
    sample = draw_sample(random.Random(8), pipeline_size=3, microbatches=4)
    eager = sample.plan(windows=Windows(receive=10**6, send=0))
    lazy = sample.plan(windows=Windows(receive=0, send=0))
    for rank in range(3):
        posted = _actions(eager, rank, ActionKind.IRECV)
        assert posted == list(range(len(posted)))  # all of them, before anything else
        for index in _actions(lazy, rank, ActionKind.IRECV):
            behind = lazy.ranks[rank][index + 1]
            assert not isinstance(behind, ComputeAction)


def _groups(plan: Plan, kind: ActionKind) -> set[tuple[int, ...]]:
    return {
        action.messages
        for row in plan.ranks
        for action in row
        if isinstance(action, TransferAction) and action.kind is kind
    }


def test_what_one_op_sends_to_one_rank_goes_as_one_where_nobody_waits_for_it_sooner() -> None:
    """The times are the schedule's: a group arrives as a whole, one message after the other."""
    grouped = alone = 0
    for seed in range(60):
        sample = draw_sample(random.Random(seed))
        plan = sample.plan(windows=Windows(receive=3, group=3))
        times = {op.key: op for row in sample.schedule.ranks for op in row}
        graph = sample.problem.graph
        assert _groups(plan, ActionKind.ISEND) == _groups(plan, ActionKind.IRECV)
        for group in _groups(plan, ActionKind.ISEND):
            members = [plan.messages[one] for one in group]
            ends = {(one.source, one.source_rank, one.target_rank) for one in members}
            assert len(ends) == 1
            assert len(group) <= 3
            if len(group) == 1:
                alone += 1
                continue
            grouped += 1
            arrived_ns = times[members[0].source].end_ns + sum(
                next(w.latency_ns for w in dependencies(graph, one.target) if w.op == one.source)
                for one in members
            )
            assert arrived_ns <= min(times[one.target].start_ns for one in members)
    assert grouped > 20
    assert alone > 20


def _two_decoders(latency_ns: int, second_ns: int) -> Plan:
    """Language on two ranks hands one tensor to two passes of a decoder on rank 0."""

    def one(module: str, index: int, after: tuple[tuple[str, int], ...]) -> Pass:
        strategy = Strategy(
            name="keep", forward_ns=10, backward_ns=10, weight_grad_ns=0, memory_bytes=0
        )
        return Pass(
            module=module,
            sub_microbatch=index,
            after=after,
            p2p_latency_ns=latency_ns,
            stages=((strategy,),) * 2,
            frozen=True,
        )

    problem = Problem(
        pipeline_size=2,
        memory_capacity_bytes=(0, 0),
        modules={"language": 1, "decoder": 1},
        microbatches=(
            Microbatch(
                passes=(
                    one("language", 0, ()),
                    *(one("decoder", index, (("language", 0),)) for index in range(2)),
                )
            ),
        ),
    )

    def run(key: str, start_ns: int) -> ScheduledOp:
        return ScheduledOp(
            key=parse_op(key), strategy="keep", start_ns=start_ns, end_ns=start_ns + 10
        )

    first_ns, last_ns = 20 + 2 * latency_ns, second_ns + 10 + latency_ns
    schedule = Schedule(
        problem_sha256="",
        makespan_ns=last_ns + 10,
        lower_bound_ns=0,
        peak_memory_bytes=(0, 0),
        ranks=(
            (run("language0.F0", 0), run("decoder0.F0", first_ns), run("decoder0.F0.1", second_ns)),
            (
                run("language1.F0", 10 + latency_ns),
                run("decoder1.F0", first_ns + 10 + latency_ns),
                run("decoder1.F0.1", last_ns),
            ),
        ),
    )
    payload = PassPayload(item_start=0, item_stop=1, hidden_shape=(1,), output_shape=(1,))
    return compile_plan(
        problem,
        schedule,
        dict.fromkeys(problem.graph.nodes, payload),
        {"language": "float32", "decoder": "float32"},
    )


@pytest.mark.parametrize(("latency_ns", "word"), [(0, ">0#0+1"), (5, ">0#0")])
def test_a_group_never_holds_back_an_op_that_waits_for_its_first_message(
    latency_ns: int, word: str
) -> None:
    plan = _two_decoders(latency_ns, 20 + 2 * latency_ns + 10)
    sends = [one for one in format_actions(plan).splitlines()[1].split() if "1.SEND_F0>" in one]
    assert sends[0] == f"language1.SEND_F0{word}"
    verify(plan)


def test_sends_are_awaited_at_the_end_when_the_window_says_so() -> None:
    sample = draw_sample(random.Random(8), pipeline_size=3, microbatches=4)
    late = sample.plan(windows=Windows(receive=2, send=10**6))
    for rank in range(3):
        awaited = _actions(late, rank, ActionKind.WAIT_ISEND)
        total = len(late.ranks[rank])
        assert awaited == list(range(total - len(awaited), total))


def test_evaluation_plans_hold_forwards_alone() -> None:
    sample = draw_sample(random.Random(8), pipeline_size=3, microbatches=4)
    whole, plan = sample.plan(), sample.plan(forward_only=True)
    kinds = {one.op.kind for row in plan.ranks for one in row if isinstance(one, ComputeAction)}
    assert kinds == {OpKind.F}
    assert {message.source.kind for message in plan.messages} == {OpKind.F}
    assert 0 < plan.makespan_ns < whole.makespan_ns


def test_what_is_missing_is_named() -> None:
    sample = draw_sample(random.Random(3), pipeline_size=2, microbatches=1)
    payloads = {k: v for k, v in sample.payloads.items() if k.module != "language"}
    with pytest.raises(PlanInvalidError, match="pass 'language' sub-microbatch 0 has no payload"):
        compile_plan(sample.problem, sample.schedule, payloads, sample.dtypes)
    with pytest.raises(PlanInvalidError, match="module 'vision': element type None; it must be"):
        compile_plan(sample.problem, sample.schedule, sample.payloads, {"language": "float32"})
    empty = replace(sample.schedule, ranks=(sample.schedule.ranks[0], ()))
    with pytest.raises(PlanInvalidError, match="which the schedule does not have"):
        compile_plan(sample.problem, empty, sample.payloads, sample.dtypes)
    with pytest.raises(ConfigError, match="receive=-1"):
        Windows(receive=-1)
