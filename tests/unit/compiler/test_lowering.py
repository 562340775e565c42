"""compile_plan: messages only where needed, windows kept, evaluation plans, clear refusals."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from megatron_pipeweaver.compiler.lowering import Windows, compile_plan
from megatron_pipeweaver.errors import ConfigError, PlanInvalidError
from megatron_pipeweaver.ir.plan import ActionKind, ComputeAction, Plan, TransferAction
from megatron_pipeweaver.ir.problem import OpKind, dependencies
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
