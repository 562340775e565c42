"""Local search among orders: valid from any start, times as a fresh longest path gives them."""

from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.problem import Problem
from megatron_pipeweaver.search.interleave import policy
from megatron_pipeweaver.search.native import NativeProblem
from tests.property.problems import problems


@settings(max_examples=120, deadline=None)
@given(problems(), st.booleans(), st.booleans(), st.integers(0, 99), st.sampled_from([0, 1, 5]))
def test_local_search_keeps_schedules_valid_and_their_times_exact(
    problem: Problem, in_order: bool, split: bool, seed: int, warmth: float
) -> None:
    try:
        native = NativeProblem(problem, in_order=in_order)
    except ConfigError:
        assume(False)
    levels = [count - 1 for count in native.level_counts()]
    start = native.core.decode(policy(problem, levels, split=split, in_order=in_order))
    better = native.core.improve(start, moves=300, seed=seed, warmth=warmth)
    assert better.makespan <= native.core.retime(start.order, start.level, split).makespan
    check_schedule(problem, native.schedule(better, lower_bound_ns=0, problem_sha256=""))
    again = native.core.retime(better.order, better.level, split)
    assert (again.makespan, again.start) == (better.makespan, better.start)
    if in_order:
        for ops in better.order:
            for kind in (1, 2):
                seen: dict[tuple[str, int], tuple[int, int]] = {}
                for op in (one for one in ops if one % 3 == kind):
                    pair = op // 3
                    owner = next(
                        index
                        for index, begin in enumerate(native.core.pair_begin[1:])
                        if pair < begin
                    )
                    key = native.passes[owner][0]
                    stage = (key.module, pair - native.core.pair_begin[owner])
                    place = (key.microbatch, key.sub_microbatch)
                    assert seen.get(stage, (-1, -1)) < place
                    seen[stage] = place


@settings(max_examples=30, deadline=None)
@given(problems(most_microbatches=3))
def test_local_search_is_the_same_every_time(problem: Problem) -> None:
    native = NativeProblem(problem)
    start = native.core.decode(policy(problem, [0] * len(native.level_counts())))
    once, twice = (native.core.improve(start, moves=200, seed=3, warmth=1) for _ in range(2))
    assert (once.order, once.level) == (twice.order, twice.level)
