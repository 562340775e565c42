"""The choice of strategies for fixed orders (paper section 4.3): one candidate per stage pair.

On one rank, stage pair i is alive from its forward to its last op. With the rank's forwards as
slots 0, 1, ..., it is held in the slots `[begin, until)`: memory is only ever taken by a forward,
so what holds at every forward holds always. Choose one candidate per pair so that the sum of
latencies is least and the memory of the live pairs never exceeds the capacity: a multiple-choice
knapsack with one constraint per slot.

Two solvers. `native` (`csrc/knapsack.cpp`): greedy warm start, slot prices by Lagrangian dual
ascent for a proven bound, greedy again by the prices, until the gap is as small as asked for.
`highs`: the same as a mixed-integer program in HiGHS (Q. Huangfu and J. A. J. Hall, "Parallelizing
the dual revised simplex method", 2018), the exact reference; it needs the package `highspy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from megatron_pipeweaver._core import Timetable, choose_candidates
from megatron_pipeweaver.config import SECOND_NS, MemorySolver
from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.search.native import KINDS, NativeProblem

GAP = 0.05
"""The paper stops at this gap between a choice and its bound."""
ROUNDS = 200
"""Steps of the native solver's prices, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePair:
    """A stage pair alive in the slots `[begin, until)`; candidates are (latency, memory)."""

    begin: int
    until: int
    candidates: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.until:
            raise ConfigError(f"live pair: slots [{self.begin}, {self.until}) are no interval")
        if not self.candidates:
            raise ConfigError("live pair: no candidate; give at least one")


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryChoice:
    """Per stage pair the candidate chosen; the sum of latencies and a proven bound of it (ns)."""

    chosen: tuple[int, ...]
    latency_ns: int
    bound_ns: int

    @property
    def gap(self) -> float:
        """How far the sum may be from the least one, as a fraction of the bound."""
        return self.latency_ns / self.bound_ns - 1 if self.bound_ns else 0.0


def choose(
    pairs: Sequence[LivePair],
    capacity_bytes: int,
    *,
    solver: MemorySolver = MemorySolver.NATIVE,
    gap: float = GAP,
    time_limit_ns: int | None = None,
) -> MemoryChoice | None:
    """The candidates of one rank's stage pairs; None if the leanest do not fit together.

    Args:
        pairs: what is alive when.
        capacity_bytes: the rank's memory.
        solver: who solves it.
        gap: good enough: so close to the bound, as a fraction. 0 asks HiGHS for the optimum.
        time_limit_ns: HiGHS ends then with the best it has, or None if it has none yet.

    Raises:
        ConfigError: HiGHS is asked for and not installed.
    """
    if not pairs:
        return MemoryChoice(chosen=(), latency_ns=0, bound_ns=0)
    if solver is MemorySolver.HIGHS:
        return _highs(pairs, capacity_bytes, gap, time_limit_ns)
    found = choose_candidates(
        begin=[one.begin for one in pairs],
        until=[one.until for one in pairs],
        candidate_begin=[0, *accumulate(len(one.candidates) for one in pairs)],
        latency=[latency for one in pairs for latency, _ in one.candidates],
        memory=[memory for one in pairs for _, memory in one.candidates],
        capacity=capacity_bytes,
        gap=gap,
        rounds=ROUNDS,
    )
    if not found.feasible:
        return None
    return MemoryChoice(chosen=tuple(found.chosen), latency_ns=found.latency, bound_ns=found.bound)


def _highs(
    pairs: Sequence[LivePair], capacity: int, gap: float, time_limit_ns: int | None
) -> MemoryChoice | None:
    """`choose` as a mixed-integer program: a 0/1 variable per candidate."""
    model = _new_model()
    model.setOptionValue("mip_rel_gap", gap)
    model.setOptionValue("mip_abs_gap", 0.0)
    if time_limit_ns is not None:
        model.setOptionValue("time_limit", time_limit_ns / SECOND_NS)
    # Scaled to about 1, so that the solver's tolerances mean something.
    latency_unit = max((x for one in pairs for x, _ in one.candidates), default=0) or 1
    binary = [
        [model.addBinary(obj=latency / latency_unit) for latency, _ in one.candidates]
        for one in pairs
    ]
    slots = max((one.until for one in pairs), default=0)
    held: list[list[Any]] = [[] for _ in range(slots)]
    for one, variables in zip(pairs, binary, strict=True):
        model.addConstr(sum(variables) == 1)
        used = [
            variable * (memory / max(1, capacity))
            for variable, (_, memory) in zip(variables, one.candidates, strict=True)
            if memory > 0
        ]
        for slot in range(one.begin, one.until):
            held[slot] += used
    room = 1 if capacity > 0 else 0
    for terms in held:
        if terms:
            model.addConstr(sum(terms) <= room)
    model.run()
    values = list(model.getSolution().col_value)
    info = model.getInfo()
    if info.primal_solution_status != 2:  # HiGHS: a feasible point is known
        return None
    chosen: list[int] = []
    at = 0
    for one in pairs:
        count = len(one.candidates)
        chosen.append(max(range(count), key=lambda index: values[at + index]))
        at += count
    latency = sum(one.candidates[index][0] for one, index in zip(pairs, chosen, strict=True))
    bound = int(info.mip_dual_bound * latency_unit * (1 - 1e-6))
    return MemoryChoice(
        chosen=tuple(chosen), latency_ns=latency, bound_ns=max(0, min(bound, latency))
    )


def _new_model() -> Any:
    try:
        import highspy
    except ImportError:
        raise ConfigError(
            "memory solver highs: the package highspy is not installed; "
            "pip install highspy, or choose the native solver"
        ) from None
    model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    model.setOptionValue("threads", 1)
    return model


def live_pairs(native: NativeProblem, table: Timetable, rank: int) -> dict[int, LivePair]:
    """The stage pairs of `rank` by number, alive as `table` orders them; candidates are levels."""
    last = "W" if table.split else "B"
    begin: dict[int, int] = {}
    until: dict[int, int] = {}
    for op in table.order[rank]:
        pair, kind = op // 3, KINDS[op % 3]
        if kind == "F":
            begin[pair] = len(begin)
            until[pair] = len(begin)
        elif kind == last:
            until[pair] = len(begin)
    return {
        pair: LivePair(begin=slot, until=until[pair], candidates=native.level_costs(pair))
        for pair, slot in begin.items()
    }


def rechoose(
    native: NativeProblem, table: Timetable, solver: MemorySolver, time_limit_ns: int
) -> Timetable:
    """`table` with every rank's strategies chosen anew, if that makes it shorter; else `table`."""
    level = list(table.level)
    ranks = len(table.order)
    for rank in range(ranks):
        pairs = live_pairs(native, table, rank)
        found = choose(
            list(pairs.values()),
            native.problem.memory_capacity_bytes[rank],
            solver=solver,
            gap=0.0,
            time_limit_ns=time_limit_ns // ranks,
        )
        if found is None:
            return table
        for pair, chosen in zip(pairs, found.chosen, strict=True):
            level[pair] = chosen
    made = native.core.retime(table.order, level, table.split)
    fits = all(
        peak <= capacity
        for peak, capacity in zip(
            native.core.peak_memory(made), native.problem.memory_capacity_bytes, strict=True
        )
    )
    return made if fits and made.makespan < table.makespan else table
