"""The plan that runs when no searched one is there."""

import pytest

from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.errors import InfeasibleError
from megatron_pipeweaver.planner.fallback import static_schedule
from megatron_pipeweaver.planner.planner import PlanOrigin, batch_digest
from megatron_pipeweaver.planner.wire import decode, encode
from megatron_pipeweaver.search.baselines import BASELINES
from tests.unit.planner.examples import QUICK, batch_of, make_planner


@pytest.mark.parametrize("images", [(0,), (3, 0, 5), (1, 2, 3, 4, 5, 0)])
@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize("capacity", [10_000, 900])
def test_it_is_a_valid_plan_of_the_same_batch_and_the_best_of_the_static_ones(
    images, forward_only, capacity
):
    planner = make_planner(capacity=capacity)
    batch = batch_of(*images)
    planned = planner.static_plan(batch, forward_only=forward_only)
    assert planned.origin is PlanOrigin.STATIC
    assert set(planned.baselines) == set(BASELINES)
    assert planned.schedule.makespan_ns == min(planned.baselines.values())
    check_schedule(planned.problem, planned.schedule)
    received = decode(encode(planned, batch_digest(batch)))
    assert received.origin is PlanOrigin.STATIC
    assert received.plan.plan.forward_only is forward_only
    searched = planner.plan(batch, forward_only=forward_only)
    assert searched.origin is PlanOrigin.SEARCHED
    assert searched.problem == planned.problem
    assert searched.schedule.makespan_ns <= planned.schedule.makespan_ns


def test_it_is_the_same_every_time():
    problem = make_planner().workload(batch_of(2, 0, 4)).problem
    assert static_schedule(problem, QUICK) == static_schedule(problem, QUICK)


def test_without_room_there_is_none_either():
    with pytest.raises(InfeasibleError, match="rank 0"):
        make_planner(capacity=1).static_plan(batch_of(2))
