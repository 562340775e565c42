"""The choice of strategies: against brute force, against HiGHS, and its proven bound."""

from __future__ import annotations

import itertools
import random
import sys

import pytest

from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.config import MemorySolver, SearchConfig
from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.search.anytime import solve
from megatron_pipeweaver.search.memory import GAP, LivePair, MemoryChoice, choose
from tests.unit.search.test_anytime import example


def instance(seed: int, count: int, candidates: int, alive: int) -> list[LivePair]:
    """Pairs that begin one after another, each alive for up to `alive` slots."""
    draw = random.Random(seed)
    made = []
    for begin in range(count):
        lean, size = draw.randrange(1, 5), draw.randrange(20, 200)
        made.append(
            LivePair(
                begin=begin,
                until=min(count, begin + draw.randrange(1, alive)),
                candidates=tuple(
                    (1000 + size * (candidates - k) + draw.randrange(10), lean + size * k // 2)
                    for k in range(candidates)
                ),
            )
        )
    return made


def fits(pairs: list[LivePair], chosen: tuple[int, ...], capacity: int) -> bool:
    slots = max(one.until for one in pairs)
    return all(
        sum(
            one.candidates[index][1]
            for one, index in zip(pairs, chosen, strict=True)
            if one.begin <= slot < one.until
        )
        <= capacity
        for slot in range(slots)
    )


def check(pairs: list[LivePair], choice: MemoryChoice, capacity: int) -> None:
    assert fits(pairs, choice.chosen, capacity)
    assert choice.latency_ns == sum(
        one.candidates[index][0] for one, index in zip(pairs, choice.chosen, strict=True)
    )
    assert choice.bound_ns <= choice.latency_ns


@pytest.mark.parametrize("seed", range(30))
def test_both_solvers_against_every_choice_there_is(seed: int) -> None:
    pairs = instance(seed, count=5, candidates=3, alive=4)
    capacity = 20 + 30 * (seed % 8)
    sums = [
        sum(one.candidates[index][0] for one, index in zip(pairs, chosen, strict=True))
        for chosen in itertools.product(range(3), repeat=5)
        if fits(pairs, chosen, capacity)
    ]
    native = choose(pairs, capacity, gap=0)
    highs = choose(pairs, capacity, solver=MemorySolver.HIGHS, gap=0)
    if not sums:
        assert native is None
        assert highs is None
        return
    assert native is not None
    assert highs is not None
    check(pairs, native, capacity)
    check(pairs, highs, capacity)
    assert highs.latency_ns == min(sums)
    assert native.bound_ns <= min(sums) <= native.latency_ns


@pytest.mark.parametrize("seed", range(4))
def test_native_is_within_its_gap_and_bounds_the_optimum_of_highs(seed: int) -> None:
    pairs = instance(seed, count=60, candidates=4, alive=12)
    capacity = 400 + 300 * seed
    native = choose(pairs, capacity)
    highs = choose(pairs, capacity, solver=MemorySolver.HIGHS, gap=0.001)
    assert native is not None
    assert highs is not None
    check(pairs, native, capacity)
    check(pairs, highs, capacity)
    assert native.gap <= GAP
    assert native.bound_ns <= highs.latency_ns
    assert highs.bound_ns <= native.latency_ns


@pytest.mark.parametrize("capacity", [700, 2500, 9000, 40000])
def test_large_instances_stay_within_the_gap(capacity: int) -> None:
    pairs = instance(1, count=512, candidates=10, alive=40)
    choice = choose(pairs, capacity)
    assert choice is not None
    check(pairs, choice, capacity)
    assert choice.gap <= GAP


def test_what_does_not_fit_is_none_and_nothing_is_nothing() -> None:
    pair = LivePair(begin=0, until=1, candidates=((5, 10),))
    for solver in MemorySolver:
        assert choose([pair], 9, solver=solver) is None
        empty = choose([], 9, solver=solver)
        assert empty is not None
        assert (empty.chosen, empty.latency_ns) == ((), 0)


def test_highs_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(ConfigError, match="highspy is not installed"):
        choose([LivePair(begin=0, until=1, candidates=((5, 1),))], 1, solver=MemorySolver.HIGHS)


def test_a_search_may_end_with_highs() -> None:
    problem = example(microbatches=4)
    config = SearchConfig(max_rounds=40, time_budget_ns=10**11, memory_solver=MemorySolver.HIGHS)
    plain = solve(problem, SearchConfig(max_rounds=40, time_budget_ns=10**11))
    result = solve(problem, config)
    check_schedule(problem, result.schedule)
    assert result.schedule.makespan_ns <= plain.schedule.makespan_ns
