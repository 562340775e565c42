"""The searcher's front door: a valid schedule at once, better ones until the time is up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_pipeweaver._core import Timetable
from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.ir.problem import Problem
from megatron_pipeweaver.ir.schedule import Schedule
from megatron_pipeweaver.search.baselines import BASELINES, best_level
from megatron_pipeweaver.search.bounds import lower_bounds
from megatron_pipeweaver.search.interleave import policy
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
    all in nanoseconds; `first_ns` is when the first valid schedule was there; `thread` of `seed`
    found the best one.
    """

    schedule: Schedule
    bounds: Mapping[str, int]
    baselines: Mapping[str, int]
    elapsed_ns: int
    first_ns: int
    evaluations: int
    seed: int
    thread: int


def solve(
    problem: Problem,
    config: SearchConfig,
    *,
    problem_sha256: str = "",
    on_improvement: Callable[[Improvement], None] | None = None,
) -> SearchResult:
    """The best schedule of `problem` found within the configured time.

    Args:
        problem: what is to be scheduled.
        config: how long and how hard to search.
        problem_sha256: digest of the problem file, carried into the schedule.
        on_improvement: called whenever a better schedule is found.

    Raises:
        InfeasibleError: one microbatch alone, at its leanest strategies, does not fit.
    """
    started = time.perf_counter_ns()
    native = NativeProblem(problem, in_order=config.deterministic)
    fastest = [count - 1 for count in native.level_counts()]
    best: tuple[Timetable, bool] = (
        native.core.decode(
            policy(
                problem,
                fastest,
                split=config.split_weight_grad,
                in_order=config.deterministic,
            )
        ),
        config.split_weight_grad,
    )
    first_ns = time.perf_counter_ns() - started
    evaluations = 1
    _report(on_improvement, best[0], first_ns, evaluations)
    baselines = {}
    for name, build in BASELINES.items():
        table = best_level(native, build)
        baselines[name] = table.makespan
        evaluations += 1
        if table.makespan < best[0].makespan:
            best = (table, False)
            _report(on_improvement, table, time.perf_counter_ns() - started, evaluations)
    bounds = lower_bounds(native.core)
    schedule = native.schedule(
        best[0],
        split=best[1],
        lower_bound_ns=max(bounds.values()),
        problem_sha256=problem_sha256,
    )
    return SearchResult(
        schedule=schedule,
        bounds=bounds,
        baselines=baselines,
        elapsed_ns=time.perf_counter_ns() - started,
        first_ns=first_ns,
        evaluations=evaluations,
        seed=config.seed,
        thread=0,
    )


def _report(
    listener: Callable[[Improvement], None] | None,
    table: Timetable,
    elapsed_ns: int,
    evaluations: int,
) -> None:
    logger.info("schedule of %d ns after %d ns", table.makespan, elapsed_ns)
    if listener is not None:
        listener(
            Improvement(
                makespan_ns=table.makespan,
                elapsed_ns=elapsed_ns,
                evaluations=evaluations,
                thread=0,
            )
        )
