"""A brief search: how long the schedule is and how busy ranks are in it, not the schedule itself.

What is compared by many brief searches (layouts, say) needs neither static schedules nor ops as
Python objects, and numbers that scatter little: a search that begins with the classic recipes and
ends soon behind them scatters by a few thousandths from seed to seed, one that goes on searching
by some hundredths, since what it finds then is luck.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_pipeweaver.config import SECOND_NS, SearchConfig
from megatron_pipeweaver.ir.problem import Problem
from megatron_pipeweaver.partition.balance import Outcome, Probes
from megatron_pipeweaver.search.anytime import first_schedule, search_options
from megatron_pipeweaver.search.native import NativeProblem

BRIEF_ROUNDS = 64
"""Enough for the classic recipes, and little more."""
VERDICT_ROUNDS = 256
"""Of a search by which layouts are told apart in the end."""
_HOUR_NS = 3600 * SECOND_NS
"""Rounds end the search, never the clock: the same problem has the same outcome."""


def brief(problem: Problem, config: SearchConfig, rounds: int = BRIEF_ROUNDS) -> Outcome:
    """What so many rounds of one thread find for `problem`; the same for the same arguments.

    Args:
        problem: what is to be scheduled.
        config: what the search may do; its time and threads do not count.
        rounds: evaluations.

    Raises:
        InfeasibleError: one microbatch alone, at its leanest strategies, does not fit.
    """
    config = replace(config, time_budget_ns=_HOUR_NS, threads=1, max_rounds=rounds)
    native = NativeProblem(problem, in_order=config.deterministic)
    options = search_options(config)
    options.budget_ns = config.time_budget_ns
    best = native.core.search(options, first_schedule(native, config), None).best
    start, end = best.start, best.end
    return Outcome(
        makespan_ns=best.makespan,
        busy_ns=tuple(sum(end[op] - start[op] for op in ops) for ops in best.order),
    )


def brief_searches(config: SearchConfig) -> Probes:
    """What layouts are walked by and judged by (`partition.balance`)."""
    return Probes(
        walk=lambda problem: brief(problem, config),
        verdict=lambda problem: brief(problem, config, VERDICT_ROUNDS),
    )
