"""The searcher's front door: a valid schedule at once, better ones until the time is up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_pipeweaver._core import SearchOptions, Stop, Timetable
from megatron_pipeweaver.config import Exploration, MemorySolver, SearchConfig
from megatron_pipeweaver.ir.problem import Problem
from megatron_pipeweaver.ir.schedule import Schedule
from megatron_pipeweaver.search.baselines import BASELINES, best_level
from megatron_pipeweaver.search.bounds import lower_bounds
from megatron_pipeweaver.search.interleave import policy
from megatron_pipeweaver.search.memory import rechoose
from megatron_pipeweaver.search.native import NativeProblem

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Improvement:
    """A better schedule was found: how long it is, when, and by which thread."""

    makespan_ns: int
    elapsed_ns: int
    evaluations: int
    thread: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """What a search found.

    `bounds` are proven lower bounds by name and `baselines` the makespans of the static schedules,
    all in nanoseconds; `first_ns` is when the first valid schedule was there.

    `thread` found the best one in its round number `rounds` (0: it is the first or a static
    schedule). Threads do not influence one another, except in `mcts`, and thread t of seed s draws
    what the one thread of seed s + t draws; `seed` is that sum. So with `max_rounds` given, a
    search with `threads=1`, this `seed` and the same `max_rounds` ends with the same schedule.
    With a time budget alone, phases end by the clock, and only the schedule itself is the record.
    """

    schedule: Schedule
    bounds: Mapping[str, int]
    baselines: Mapping[str, int]
    elapsed_ns: int
    first_ns: int
    evaluations: int
    seed: int
    thread: int
    rounds: int


def solve(
    problem: Problem,
    config: SearchConfig,
    *,
    problem_sha256: str = "",
    on_improvement: Callable[[Improvement], None] | None = None,
    stop: Stop | None = None,
) -> SearchResult:
    """The best schedule of `problem` found within the configured time.

    Args:
        problem: what is to be scheduled.
        config: how long and how hard to search.
        problem_sha256: digest of the problem file, carried into the schedule.
        on_improvement: called whenever a better schedule is found.
        stop: ends the search early, from any thread, with the best found so far.

    Raises:
        InfeasibleError: one microbatch alone, at its leanest strategies, does not fit.
    """
    started = time.perf_counter_ns()
    native = NativeProblem(problem, in_order=config.deterministic)
    first = first_schedule(native, config)
    first_ns = time.perf_counter_ns() - started
    report = _Reporter(on_improvement)
    report(first.makespan, first_ns, 1, 0)
    baselines = {
        name: best_level(native, build, split=config.split_weight_grad)
        for name, build in BASELINES.items()
    }
    static = min(baselines.values(), key=lambda table: table.makespan)
    bounds = lower_bounds(native.core)
    options = search_options(config)
    options.stop = stop
    left_ns = max(0, deadline(problem, config) - (time.perf_counter_ns() - started))
    exact_ns = left_ns // 10 if config.memory_solver is MemorySolver.HIGHS else 0
    options.budget_ns = left_ns - exact_ns
    before_ns = time.perf_counter_ns() - started
    outcome = native.core.search(
        options,
        first,
        lambda makespan, elapsed, count, thread: report(
            makespan, before_ns + elapsed, count, thread
        ),
    )
    best = outcome.best
    if static.makespan < best.makespan:
        best = static
        report(best.makespan, time.perf_counter_ns() - started, outcome.evaluations, 0)
    stopped = stop is not None and stop.requested
    if config.memory_solver is MemorySolver.HIGHS and config.choose_memory and not stopped:
        best = rechoose(native, best, config.memory_solver, exact_ns)
        report(best.makespan, time.perf_counter_ns() - started, outcome.evaluations, outcome.thread)
    rounds = 0 if best is static else outcome.rounds
    schedule = native.schedule(
        best, lower_bound_ns=max(bounds.values()), problem_sha256=problem_sha256
    )
    return SearchResult(
        schedule=schedule,
        bounds=bounds,
        baselines={name: table.makespan for name, table in baselines.items()},
        elapsed_ns=time.perf_counter_ns() - started,
        first_ns=first_ns,
        evaluations=outcome.evaluations + 1 + len(baselines),
        seed=config.seed + outcome.thread,
        thread=outcome.thread,
        rounds=rounds,
    )


NS_PER_OP = 5_000
"""What turning one op of the best schedule into Python objects may take."""


def deadline(problem: Problem, config: SearchConfig) -> int:
    """When the native search has to end so that the result is there within the budget (ns)."""
    ops = sum(3 * len(one.stages) for _, one in problem.passes())
    return config.time_budget_ns - NS_PER_OP * ops


def first_schedule(native: NativeProblem, config: SearchConfig) -> Timetable:
    """A valid schedule at once: one decode at the fastest strategies that memory admits."""
    fastest = [count - 1 for count in native.level_counts()]
    made = policy(
        native.problem, fastest, split=config.split_weight_grad, in_order=config.deterministic
    )
    return native.core.decode(made)


def search_options(config: SearchConfig) -> SearchOptions:
    """`config` in the native core's form, but for the time."""
    options = SearchOptions()
    options.threads = config.threads
    options.seed = config.seed
    options.max_rounds = -1 if config.max_rounds is None else config.max_rounds
    options.split = config.split_weight_grad
    options.in_order = config.deterministic
    options.choose_memory = config.choose_memory
    options.exploration = list(Exploration).index(config.exploration)
    options.tree_alpha = config.tree_alpha
    options.tree_beta = config.tree_beta
    options.alternate = config.alternate
    options.grouped = config.group_segments
    return options


class _Reporter:
    """Passes improvements on to the caller and the log; only ever better ones."""

    def __init__(self, listener: Callable[[Improvement], None] | None) -> None:
        self._listener = listener
        self._best_ns: int | None = None

    def __call__(self, makespan_ns: int, elapsed_ns: int, evaluations: int, thread: int) -> None:
        if self._best_ns is not None and makespan_ns >= self._best_ns:
            return
        self._best_ns = makespan_ns
        logger.debug("schedule of %d ns after %d ns", makespan_ns, elapsed_ns)
        if self._listener is not None:
            self._listener(
                Improvement(
                    makespan_ns=makespan_ns,
                    elapsed_ns=elapsed_ns,
                    evaluations=evaluations,
                    thread=thread,
                )
            )
