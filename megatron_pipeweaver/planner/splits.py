"""Other sub-microbatch sizes as alternatives: one batch, several problems, the best schedule.

A `Problem` describes one split of the batch's items. B_i is chosen once (`partition.offline`); for
a batch that is fuller or emptier than the typical one another size may fit its bubbles better
(paper, section 7: smaller sizes narrow the gap between good and bad schedules, and cost
efficiency). Each split is searched briefly, the best one for the rest of the time:

    100 % |-- trial --|
     50 %             |-- trial --|
    200 %                         |-- trial --|
     best                                     |---------------- search ----------------|

Whether weight gradients run apart is such an alternative too, for the whole iteration: what that
costs beyond its parts is in the times of its own problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.errors import ConfigError, InfeasibleError
from megatron_pipeweaver.partition.workload import Workload
from megatron_pipeweaver.search.anytime import SearchResult, solve

Sizes = Mapping[str, int]
"""Items per sub-microbatch (B_i), by module."""
_TRIAL_PERCENT = 40
"""Of the search budget goes to trials, all splits together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """One problem of a batch: its sub-microbatch sizes, and whether weight gradients run apart."""

    sizes: Sizes
    workload: Workload
    apart: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitResult:
    """The best schedule found, and the alternative that it is of."""

    sizes: Sizes
    workload: Workload
    apart: bool
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


def search_alternatives(alternatives: Sequence[Alternative], search: SearchConfig) -> SplitResult:
    """The best schedule over `alternatives` within the search's budget; of equals the first one.

    Args:
        alternatives: what to choose from; those that cut the batch alike count once.
        search: how long and how hard to search, trials included.

    Raises:
        InfeasibleError: a microbatch alone does not fit, whatever the alternative.
    """
    different = _different(alternatives)
    if len(different) == 1:
        return _searched(different[0], search)
    trials = list(_trials(different, _share(search, _TRIAL_PERCENT, len(different))))
    best = min(trials, key=_makespan_ns)
    again = _searched(best, _share(search, 100 - _TRIAL_PERCENT, 1))
    return min(again, best, key=_makespan_ns)


def _different(alternatives: Sequence[Alternative]) -> list[Alternative]:
    """Alternatives that cut this batch differently, or run it differently."""
    found: list[Alternative] = []
    for one in alternatives:
        same = (one.apart, one.workload.payloads)
        if all(same != (other.apart, other.workload.payloads) for other in found):
            found.append(one)
    return found


def _searched(one: Alternative | SplitResult, search: SearchConfig) -> SplitResult:
    result = solve(one.workload.problem, replace(search, split_weight_grad=one.apart))
    return SplitResult(sizes=one.sizes, workload=one.workload, apart=one.apart, result=result)


def _makespan_ns(one: SplitResult) -> int:
    return one.result.schedule.makespan_ns


def _trials(different: Sequence[Alternative], search: SearchConfig) -> Iterator[SplitResult]:
    """A short search of each; what does not fit is left out, unless nothing fits."""
    infeasible: InfeasibleError | None = None
    found = False
    for one in different:
        try:
            tried = _searched(one, search)
        except InfeasibleError as error:
            infeasible = infeasible or error
            continue
        found = True
        yield tried
    if infeasible is not None and not found:
        raise infeasible


def _share(search: SearchConfig, percent: int, parts: int) -> SearchConfig:
    """`search` with so much of its time and rounds, divided by `parts`."""
    rounds = search.max_rounds
    return replace(
        search,
        time_budget_ns=search.time_budget_ns * percent // 100 // parts,
        max_rounds=None if rounds is None else max(1, rounds * percent // 100 // parts),
    )
