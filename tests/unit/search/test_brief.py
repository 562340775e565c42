"""Brief searches: what they find, and that they always find it."""

from __future__ import annotations

from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.search.anytime import solve
from megatron_pipeweaver.search.brief import brief
from tests.unit.search.test_anytime import example

HOUR_NS = 3600 * 10**9


def test_a_brief_search_is_the_search_of_so_many_rounds_without_static_schedules() -> None:
    problem = example()
    for rounds in (1, 40, 200):
        config = SearchConfig(time_budget_ns=HOUR_NS, max_rounds=rounds)
        whole = solve(problem, config)
        found = brief(problem, SearchConfig(), rounds)
        assert whole.schedule.makespan_ns == min(found.makespan_ns, *whole.baselines.values())


def test_threads_and_time_do_not_count() -> None:
    problem = example()
    slow = SearchConfig(time_budget_ns=0, threads=4, max_rounds=1)
    assert brief(problem, slow) == brief(problem, SearchConfig())


def test_ranks_are_busy_with_the_ops_of_the_schedule() -> None:
    problem = example(microbatches=2, capacity=10**6)
    found = brief(problem, SearchConfig())
    fastest_ns = [0] * problem.pipeline_size
    for _, one in problem.passes():
        for stage, strategies in enumerate(one.stages):
            keep = strategies[0]
            fastest_ns[stage] += keep.forward_ns + keep.backward_ns + keep.weight_grad_ns
    assert found.busy_ns == tuple(fastest_ns)
    assert max(found.busy_ns) <= found.makespan_ns
