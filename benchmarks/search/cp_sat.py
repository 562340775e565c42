"""The scheduling problem of docs/formats.md as a constraint program, for OR-Tools' CP-SAT.

Nothing is left out: the order of every rank, one strategy per stage pair, weight gradients as ops
of their own, latencies, memory. A backward in one piece needs no choice of its own: its split form
with the weight gradient right behind it is valid too and ends no later, so every weight gradient
is an op here. Memory is a cumulative resource with one optional interval per strategy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import gcd

from ortools.sat.python import cp_model

from megatron_pipeweaver.ir.problem import OpKey, OpKind, Pass, Problem, dependencies
from megatron_pipeweaver.ir.schedule import Schedule, ScheduledOp
from megatron_pipeweaver.ir.timeline import memory_peaks


@dataclass(frozen=True, slots=True, kw_only=True)
class Exact:
    """What an exact solver found: `schedule` is the best one, of proven optimum if `proven`."""

    proven: bool
    schedule: Schedule | None
    bound_ns: int
    seconds: float

    @property
    def makespan_ns(self) -> int | None:
        """That of the schedule."""
        return None if self.schedule is None else self.schedule.makespan_ns


def solve(
    problem: Problem,
    *,
    limit_s: float,
    threads: int,
    hint: Schedule | None = None,
    on_improvement: Callable[[int, float], None] | None = None,
) -> Exact:
    """The shortest schedule of `problem`, as far as `limit_s` seconds reach.

    Args:
        problem: what is to be scheduled.
        limit_s: wall-clock limit, building the model included.
        threads: search workers.
        hint: a schedule to start from.
        on_improvement: is told the makespan (ns) and the time (s) of every better schedule.
    """
    started = time.perf_counter()
    program = _Program(problem, hint)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = max(0.1, limit_s - (time.perf_counter() - started))
    solver.parameters.num_workers = threads
    listener = _Listener(program.unit_ns, started, on_improvement)
    status = solver.solve(program.model, listener)
    if status == cp_model.INFEASIBLE:
        raise AssertionError("CP-SAT calls a problem infeasible that has a schedule")
    bound_ns = round(solver.best_objective_bound) * program.unit_ns
    found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    return Exact(
        proven=status == cp_model.OPTIMAL,
        schedule=program.schedule(solver, bound_ns) if found else None,
        bound_ns=bound_ns,
        seconds=time.perf_counter() - started,
    )


class _Listener(cp_model.CpSolverSolutionCallback):
    """Hands every better schedule's makespan on."""

    def __init__(
        self, unit: int, started: float, listener: Callable[[int, float], None] | None
    ) -> None:
        super().__init__()
        self._unit = unit
        self._started = started
        self._listener = listener

    def on_solution_callback(self) -> None:
        """Called by CP-SAT."""
        if self._listener is not None:
            seconds = time.perf_counter() - self._started
            self._listener(round(self.objective_value) * self._unit, seconds)


class _Program:
    """The model and its variables, in units of the times' greatest common divisor."""

    def __init__(self, problem: Problem, hint: Schedule | None) -> None:
        self.model = cp_model.CpModel()
        self.unit_ns = unit_ns(problem)
        self._problem = problem
        self._horizon = horizon_ns(problem) // self.unit_ns
        self._starts: dict[OpKey, cp_model.IntVar] = {}
        self._ends: dict[OpKey, cp_model.IntVar] = {}
        self._busy: list[list[cp_model.IntervalVar]] = [[] for _ in range(problem.pipeline_size)]
        self._held: list[list[tuple[cp_model.IntervalVar, int]]] = [[] for _ in self._busy]
        self._chosen: dict[tuple[OpKey, str], cp_model.IntVar] = {}
        for key, one in problem.passes():
            for stage in range(len(one.stages)):
                self._add_pair(OpKey(OpKind.F, *key, stage), one)
        self._add_rules()
        if hint is not None:
            self._add_hint(hint)

    def _add_pair(self, forward: OpKey, one: Pass) -> None:
        strategies = one.stages[forward.stage]
        chosen = [self.model.new_bool_var("") for _ in strategies]
        self.model.add_exactly_one(chosen)
        ops = [(forward, "forward_ns")]
        if not one.frozen:
            ops.append((forward.with_kind(OpKind.B), "backward_ns"))
            ops.append((forward.with_kind(OpKind.W), "weight_grad_ns"))
        rank = self._problem.graph.rank_of(forward.stage)
        for op, what in ops:
            times = [getattr(strategy, what) // self.unit_ns for strategy in strategies]
            start = self.model.new_int_var(0, self._horizon, "")
            end = self.model.new_int_var(0, self._horizon, "")
            size = self.model.new_int_var(min(times), max(times), "")
            self.model.add(size == sum(x * t for x, t in zip(chosen, times, strict=True)))
            if any(times):
                self._busy[rank].append(self.model.new_interval_var(start, size, end, ""))
            else:
                self.model.add(end == start)
            self._starts[op], self._ends[op] = start, end
        start, end = self._starts[forward], self._ends[ops[-1][0]]
        for x, strategy in zip(chosen, strategies, strict=True):
            self._chosen[forward, strategy.name] = x
            size = self.model.new_int_var(0, self._horizon, "")
            held = self.model.new_optional_interval_var(start, size, end, x, "")
            self._held[rank].append((held, strategy.memory_bytes))

    def _add_rules(self) -> None:
        for op in self._starts:
            for wait in dependencies(self._problem.graph, op):
                latency = wait.latency_ns // self.unit_ns
                self.model.add(self._starts[op] >= self._ends[wait.op] + latency)
        for rank, capacity in enumerate(self._problem.memory_capacity_bytes):
            self.model.add_no_overlap(self._busy[rank])
            if self._held[rank]:
                intervals, bytes_ = zip(*self._held[rank], strict=True)
                self.model.add_cumulative(intervals, bytes_, capacity)
        makespan = self.model.new_int_var(0, self._horizon, "")
        self.model.add_max_equality(makespan, list(self._ends.values()))
        self.model.minimize(makespan)

    def schedule(self, solver: cp_model.CpSolver, bound_ns: int) -> Schedule:
        """The schedule that `solver` found."""
        names = {f: name for (f, name), x in self._chosen.items() if solver.boolean_value(x)}
        rows: list[list[ScheduledOp]] = [[] for _ in self._busy]
        for op, start in self._starts.items():
            rows[self._problem.graph.rank_of(op.stage)].append(
                ScheduledOp(
                    key=op,
                    strategy=names[op.with_kind(OpKind.F)],
                    start_ns=solver.value(start) * self.unit_ns,
                    end_ns=solver.value(self._ends[op]) * self.unit_ns,
                )
            )
        draft = Schedule(
            problem_sha256="",
            makespan_ns=max((one.end_ns for row in rows for one in row), default=0),
            lower_bound_ns=bound_ns,
            peak_memory_bytes=(),
            ranks=tuple(
                # Where one op of 0 ns stands beside another, chains of one stage keep their order.
                tuple(sorted(row, key=lambda one: (one.start_ns, one.end_ns, one.kind == OpKind.W)))
                for row in rows
            ),
        )
        return replace(draft, peak_memory_bytes=memory_peaks(self._problem, draft))

    def _add_hint(self, schedule: Schedule) -> None:
        placed = {op.key: op for rank in schedule.ranks for op in rank}
        for key, start in self._starts.items():
            op = placed.get(key)
            if op is not None:
                self.model.add_hint(start, op.start_ns // self.unit_ns)
        for (forward, name), x in self._chosen.items():
            self.model.add_hint(x, placed[forward].strategy == name)


def _times(problem: Problem) -> Mapping[str, list[int]]:
    strategies = [s for _, one in problem.passes() for stage in one.stages for s in stage]
    return {
        what: [getattr(one, what) for one in strategies]
        for what in ("forward_ns", "backward_ns", "weight_grad_ns")
    } | {"p2p_latency_ns": [one.p2p_latency_ns for _, one in problem.passes()]}


def unit_ns(problem: Problem) -> int:
    """The greatest common divisor of all times."""
    return gcd(*(time_ns for times in _times(problem).values() for time_ns in times)) or 1


def horizon_ns(problem: Problem) -> int:
    """A time by which one microbatch after another, at the slowest strategies, has ended."""
    total = 0
    for _, one in problem.passes():
        total += 2 * one.p2p_latency_ns * len(one.stages)
        for stage in one.stages:
            total += max(s.forward_ns + s.backward_ns + s.weight_grad_ns for s in stage)
    return total
