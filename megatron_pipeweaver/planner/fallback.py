"""The static schedule that is taken when no searched one is there in time.

It is made for exactly the batch in hand, so it is a plan like any other: the better of the static
schedules that the search competes with, at the recompute level that suits it best. A few decodes
of the native core make it, in milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.ir.problem import Problem
from megatron_pipeweaver.ir.schedule import Schedule
from megatron_pipeweaver.search.baselines import BASELINES, best_level
from megatron_pipeweaver.search.bounds import lower_bounds
from megatron_pipeweaver.search.native import NativeProblem


def static_schedule(problem: Problem, config: SearchConfig) -> tuple[Schedule, Mapping[str, int]]:
    """The best static schedule of `problem`, and the makespan (ns) of every one by name.

    Raises:
        InfeasibleError: one microbatch alone, at its leanest strategies, does not fit.
    """
    native = NativeProblem(problem, in_order=config.deterministic)
    tables = {
        name: best_level(native, build, split=config.split_weight_grad)
        for name, build in BASELINES.items()
    }
    best = min(tables.values(), key=lambda table: table.makespan)
    schedule = native.schedule(
        best,
        lower_bound_ns=max(lower_bounds(native.core).values()),
        problem_sha256="",
    )
    return schedule, {name: table.makespan for name, table in tables.items()}
