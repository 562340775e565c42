"""Whatever the problem: the schedule is valid, and infeasible is said only when it is so."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.errors import ConfigError, InfeasibleError
from megatron_pipeweaver.ir.problem import Microbatch, OpKind, PassKey, Problem
from megatron_pipeweaver.search.anytime import SearchResult, solve
from tests.property.problems import problems

QUICK = SearchConfig(max_rounds=20, time_budget_ns=20_000_000)


def checked(problem: Problem, config: SearchConfig = QUICK) -> SearchResult:
    result = solve(problem, config, problem_sha256="digest")
    check_schedule(problem, result.schedule, problem_sha256="digest")
    assert result.schedule.makespan_ns <= min(result.baselines.values())
    assert result.schedule.lower_bound_ns <= result.schedule.makespan_ns
    return result


@settings(max_examples=1000, deadline=None)
@given(problems())
def test_every_schedule_is_valid(problem: Problem) -> None:
    checked(problem)


@settings(max_examples=1000, deadline=None)
@given(problems(tight=True))
def test_no_deadlock_at_the_tightest_memory(problem: Problem) -> None:
    checked(problem)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_no_weight_gradient_ops_when_not_asked_for(problem: Problem) -> None:
    config = SearchConfig(max_rounds=20, time_budget_ns=20_000_000, split_weight_grad=False)
    result = checked(problem, config)
    assert not any(op.kind is OpKind.W for rank in result.schedule.ranks for op in rank)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_deterministic_mode_keeps_the_order_of_backwards(problem: Problem) -> None:
    config = SearchConfig(max_rounds=20, time_budget_ns=20_000_000, deterministic=True)
    try:
        result = checked(problem, config)
    except ConfigError:  # sub-microbatches that depend on one another against their order
        return
    for rank in result.schedule.ranks:
        for kind in (OpKind.B, OpKind.W):
            seen: dict[tuple[str, int], tuple[int, int]] = {}
            for op in rank:
                if op.kind is kind:
                    place = (op.key.microbatch, op.key.sub_microbatch)
                    stage = (op.key.module, op.key.stage)
                    assert seen.get(stage, (-1, -1)) < place
                    seen[stage] = place


def fits_alone(problem: Problem, index: int) -> bool:
    """Brute force over the orders of single forwards of microbatch `index`, backwards at once."""
    graph = problem.graph
    passes = {
        PassKey(index, one.module, one.sub_microbatch): one
        for one in problem.microbatches[index].passes
    }

    def lean(key: PassKey, stage: int) -> int:
        return min(strategy.memory_bytes for strategy in passes[key].stages[stage])

    def closed(state: dict[PassKey, tuple[int, int]]) -> dict[PassKey, tuple[int, int]]:
        state = dict(state)  # pass -> forwards done, backwards done
        changed = True
        while changed:
            changed = False
            for key, one in passes.items():
                forwards, backwards = state[key]
                if one.frozen or forwards < len(one.stages) or backwards == len(one.stages):
                    continue
                if all(
                    graph.nodes[c].frozen or state[c][1] == len(passes[c].stages)
                    for c in graph.consumers[key]
                ):
                    state[key] = (forwards, len(one.stages))
                    changed = True
        return state

    seen = set()
    todo = [closed(dict.fromkeys(passes, (0, 0)))]
    while todo:
        state = todo.pop()
        frozen_state = tuple(state.values())
        if frozen_state in seen:
            continue
        seen.add(frozen_state)
        if all(state[key][0] == len(one.stages) for key, one in passes.items()):
            return True
        held = [0] * problem.pipeline_size
        for key, one in passes.items():
            if not one.frozen and state[key][1] == 0:
                for stage in range(state[key][0]):
                    held[stage % problem.pipeline_size] += lean(key, stage)
        for key, one in passes.items():
            done = state[key][0]
            producers = graph.nodes[key].after
            if done == len(one.stages) or any(
                state[p][0] < len(passes[p].stages) for p in producers
            ):
                continue
            rank = done % problem.pipeline_size
            if held[rank] + lean(key, done) <= problem.memory_capacity_bytes[rank]:
                todo.append(closed({**state, key: (done + 1, state[key][1])}))
    return not passes


@settings(max_examples=100, deadline=None)
@given(problems(most_microbatches=2), st.lists(st.integers(0, 40), min_size=4, max_size=4))
def test_infeasible_exactly_when_one_microbatch_alone_does_not_fit(
    problem: Problem, less: list[int]
) -> None:
    microbatches = tuple(
        Microbatch(passes=one.passes[:5]) if _closed(one.passes[:5]) else one
        for one in problem.microbatches
    )
    squeezed = Problem(
        pipeline_size=problem.pipeline_size,
        memory_capacity_bytes=tuple(
            max(0, capacity - cut)
            for capacity, cut in zip(problem.memory_capacity_bytes, less, strict=False)
        ),
        modules=problem.modules,
        microbatches=microbatches,
    )
    everything_fits = all(fits_alone(squeezed, index) for index in range(len(microbatches)))
    if everything_fits:
        checked(squeezed)
    else:
        with pytest.raises(InfeasibleError, match=r"rank \d+: alone .* bytes"):
            checked(squeezed)


def _closed(passes: tuple) -> bool:
    names = {(one.module, one.sub_microbatch) for one in passes}
    return set(itertools.chain.from_iterable(one.after for one in passes)) <= names
