"""Other sub-microbatch sizes as alternatives: one batch, several problems, the best schedule.

A `Problem` describes one split of the batch's items. B_i is chosen once (`partition.offline`); for
a batch that is fuller or emptier than the typical one another size may fit its bubbles better
(paper, section 7: smaller sizes narrow the gap between good and bad schedules, and cost
efficiency). Each split is searched briefly, the best one for the rest of the time:

    100 % |-- trial --|
     50 %             |-- trial --|
    200 %                         |-- trial --|
     best                                     |---------------- search ----------------|

What is offloaded may need more host memory than there is: then problems without the candidates
that offload most take its place (`planner.host`).

Whether weight gradients run apart is such an alternative too, for the whole iteration: what that
costs beyond its parts is in the times of its own problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from megatron_pipeweaver._core import Stop
from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.errors import ConfigError, InfeasibleError
from megatron_pipeweaver.ir.schedule import Schedule
from megatron_pipeweaver.partition.workload import Workload
from megatron_pipeweaver.search.anytime import SearchResult, solve

_T = TypeVar("_T")
Sizes = Mapping[str, int]
"""Items per sub-microbatch (B_i), by module."""
_TRIAL_PERCENT = 40
"""Of the search budget goes to trials, all splits together."""
STEPS = 3
"""Of an alternative and the leaner ones behind it, at most so many are tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """One problem of a batch: its sub-microbatch sizes, and whether weight gradients run apart.

    Where schedules may need more host memory than there is, ``leaner(schedule)`` is the alternative
    to try instead, or `None` where `schedule` fits; after `STEPS` alternatives one does.
    """

    sizes: Sizes
    workload: Workload
    apart: bool
    leaner: Callable[[Schedule], Alternative | None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitResult:
    """The best schedule found, and the alternative that it is of."""

    of: Alternative
    result: SearchResult


def check_percents(percents: Sequence[int], search: SearchConfig) -> None:
    """Returns when `percents` can be split sizes.

    Raises:
        ConfigError: there is none, or one below 1; or several with a deterministic search, though
            sums over sub-microbatches of other sizes round differently.
    """
    if not percents or min(percents) < 1:
        raise ConfigError(
            f"planner: sub-microbatch sizes of {list(percents)} percent; give at least one, "
            "each 1 or more"
        )
    if search.deterministic and len(percents) > 1:
        raise ConfigError(
            f"planner: sub-microbatch sizes of {list(percents)} percent with a deterministic "
            "search; give a single one"
        )


def split_sizes(sizes: Sizes, percents: Sequence[int]) -> tuple[Sizes, ...]:
    """The different sizes that so many percent of `sizes` are, in that order, each at least 1."""
    found: list[Sizes] = []
    for percent in percents:
        scaled = {name: max(1, round(size * percent / 100)) for name, size in sizes.items()}
        if scaled not in found:
            found.append(scaled)
    return tuple(found)


def search_alternatives(
    alternatives: Sequence[Alternative], search: SearchConfig, stop: Stop | None = None
) -> SplitResult:
    """The best schedule over `alternatives` within the search's budget; of equals the first one.

    Args:
        alternatives: what to choose from; those that cut the batch alike count once.
        search: how long and how hard to search, trials included.
        stop: ends all of it early, with the best found so far.

    Raises:
        InfeasibleError: a microbatch alone does not fit, whatever the alternative.
    """
    different = _different(alternatives)
    bounded = any(one.leaner is not None for one in different)
    if len(different) == 1 and not bounded:
        return _searched(different[0], search, stop)
    trial = _share(search, _TRIAL_PERCENT, len(different) * (STEPS if bounded else 1))
    best = min(
        fitting(different, lambda one: _searched(one, trial, stop), _schedule), key=_makespan_ns
    )
    again = _searched(best.of, _share(search, 100 - _TRIAL_PERCENT, 1), stop)
    fits = best.of.leaner is None or best.of.leaner(_schedule(again)) is None
    return min(again, best, key=_makespan_ns) if fits else best


def _different(alternatives: Sequence[Alternative]) -> list[Alternative]:
    """Alternatives that cut this batch differently, or run it differently."""
    found: list[Alternative] = []
    for one in alternatives:
        same = (one.apart, one.workload.payloads)
        if all(same != (other.apart, other.workload.payloads) for other in found):
            found.append(one)
    return found


def _searched(one: Alternative, search: SearchConfig, stop: Stop | None) -> SplitResult:
    search = replace(search, split_weight_grad=one.apart)
    result = solve(one.workload.problem, search, stop=stop)
    return SplitResult(of=one, result=result)


def _schedule(one: SplitResult) -> Schedule:
    return one.result.schedule


def _makespan_ns(one: SplitResult) -> int:
    return _schedule(one).makespan_ns


def fitting(
    alternatives: Sequence[Alternative],
    make: Callable[[Alternative], _T],
    schedule: Callable[[_T], Schedule],
) -> Iterator[_T]:
    """What `make` makes of each alternative; what does not fit is left out, unless nothing does.

    Raises:
        InfeasibleError: nothing fits; `make` has said why.
    """
    infeasible: InfeasibleError | None = None
    found = False
    for one in alternatives:
        try:
            yield _leanest(one, make, schedule)
        except InfeasibleError as error:
            infeasible = infeasible or error
        else:
            found = True
    if infeasible is not None and not found:
        raise infeasible


def _leanest(
    one: Alternative, make: Callable[[Alternative], _T], schedule: Callable[[_T], Schedule]
) -> _T:
    """What `make` makes of `one`, or of the first leaner one that fits into host memory."""
    made = make(one)
    while one.leaner is not None:
        following = one.leaner(schedule(made))
        if following is None:
            break
        one = following
        try:
            made = make(one)
        except InfeasibleError as error:
            raise InfeasibleError(
                f"{error}; as much more as that must be offloaded, a rank's host memory does not "
                "hold"
            ) from None
    return made


def _share(search: SearchConfig, percent: int, parts: int) -> SearchConfig:
    """`search` with so much of its time and rounds, divided by `parts`."""
    rounds = search.max_rounds
    return replace(
        search,
        time_budget_ns=search.time_budget_ns * percent // 100 // parts,
        max_rounds=None if rounds is None else max(1, rounds * percent // 100 // parts),
    )
