"""The scheduling problem of docs/formats.md as one mixed-integer program, for HiGHS.

The disjunctive form: one binary for every two ops of a rank whose order nothing fixes, with big-M
constraints; one binary per strategy; memory at the start of every forward, where it can only grow.
Every weight gradient is an op of its own, see `cp_sat`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import combinations, permutations
from typing import Any

import highspy

from benchmarks.search.cp_sat import horizon_ns, unit_ns
from megatron_pipeweaver.ir.problem import OpKey, OpKind, Pass, Problem, dependencies

Improved = Callable[[int, float], None]


def solve(
    problem: Problem, *, limit_s: float, threads: int, on_improvement: Improved
) -> tuple[int | None, int, bool, float]:
    """The shortest schedule as far as `limit_s` seconds, building the model included, reach.

    Returns:
        Makespan (ns; None if no schedule was found), proven bound (ns), whether the optimum is
        proven, seconds.
    """
    started = time.perf_counter()
    program = _Program(problem)
    solver = program.solver
    solver.setOptionValue("threads", threads)
    solver.setOptionValue("time_limit", max(0.1, limit_s - (time.perf_counter() - started)))

    def improved(event: Any) -> None:
        makespan = round(event.data_out.objective_function_value) * program.unit_ns
        on_improvement(makespan, time.perf_counter() - started)

    solver.cbMipImprovingSolution += improved
    solver.minimize(program.makespan)
    info = solver.getInfo()
    found = info.primal_solution_status == 2  # feasible
    bound = max(0.0, info.mip_dual_bound)
    return (
        round(info.objective_function_value) * program.unit_ns if found else None,
        round(min(bound, 2**62)) * program.unit_ns,
        solver.getModelStatus() == highspy.HighsModelStatus.kOptimal,
        time.perf_counter() - started,
    )


class _Program:
    """The model and its variables; times in units of their greatest common divisor."""

    def __init__(self, problem: Problem) -> None:
        self.solver = highspy.Highs()
        self.solver.setOptionValue("output_flag", False)
        self.unit_ns = unit_ns(problem)
        self._problem = problem
        self._horizon = horizon_ns(problem) // self.unit_ns
        self._start: dict[OpKey, Any] = {}
        self._time: dict[OpKey, Any] = {}
        self._bytes: dict[OpKey, tuple[Any, int]] = {}
        self._before: dict[tuple[OpKey, OpKey], Any] = {}
        self.makespan = self.solver.addVariable(0, self._horizon)
        for key, one in problem.passes():
            for stage in range(len(one.stages)):
                self._add_pair(OpKey(OpKind.F, *key, stage), one)
        behind = _behind(problem, list(self._start))
        self._add_rules()
        for rank in range(problem.pipeline_size):
            ops = [op for op in self._start if problem.graph.rank_of(op.stage) == rank]
            self._add_order(ops, behind)
            self._add_memory(rank, [op for op in ops if op.kind is OpKind.F])

    def _add_pair(self, forward: OpKey, one: Pass) -> None:
        strategies = one.stages[forward.stage]
        chosen = [self.solver.addBinary() for _ in strategies]
        self.solver.addConstr(self.solver.qsum(chosen) == 1)
        kinds = {OpKind.F: "forward_ns"}
        if not one.frozen:
            kinds |= {OpKind.B: "backward_ns", OpKind.W: "weight_grad_ns"}
        for kind, what in kinds.items():
            op = forward.with_kind(kind)
            self._start[op] = self.solver.addVariable(0, self._horizon)
            self._time[op] = self.solver.qsum(
                x * (getattr(each, what) // self.unit_ns)
                for x, each in zip(chosen, strategies, strict=True)
            )
        held = self.solver.qsum(
            x * each.memory_bytes / 2**20 for x, each in zip(chosen, strategies, strict=True)
        )
        self._bytes[forward] = held, max(each.memory_bytes for each in strategies)

    def _add_rules(self) -> None:
        for op, start in self._start.items():
            self.solver.addConstr(self.makespan >= start + self._time[op])
            for wait in dependencies(self._problem.graph, op):
                latency = wait.latency_ns // self.unit_ns
                self.solver.addConstr(start >= self._start[wait.op] + self._time[wait.op] + latency)

    def _add_order(self, ops: list[OpKey], behind: dict[OpKey, set[OpKey]]) -> None:
        for a, b in combinations(ops, 2):
            if b in behind[a] or a in behind[b]:
                self._before[a, b] = int(b in behind[a])
                self._before[b, a] = int(a in behind[b])
                continue
            first = self.solver.addBinary()
            self._before[a, b], self._before[b, a] = first, 1 - first
            for x, y in ((a, b), (b, a)):
                slack = self._horizon * (1 - self._before[x, y])
                self.solver.addConstr(self._start[y] >= self._start[x] + self._time[x] - slack)

    def _add_memory(self, rank: int, forwards: list[OpKey]) -> None:
        capacity = self._problem.memory_capacity_bytes[rank] / 2**20
        frozen = {key for key, one in self._problem.passes() if one.frozen}
        alive: dict[OpKey, list[Any]] = {op: [] for op in forwards}
        for other, now in permutations(forwards, 2):
            if other.owner in frozen:
                continue  # it gives its memory back when its forward ends
            held, most = self._bytes[other]
            share = self.solver.addVariable(0, most / 2**20)
            last = other.with_kind(OpKind.W)
            outside = 2 - self._before[other, now] - self._before[now, last]
            self.solver.addConstr(share >= held - most / 2**20 * outside)
            alive[now].append(share)
        for now, shares in alive.items():
            self.solver.addConstr(self.solver.qsum(shares) + self._bytes[now][0] <= capacity)


def _behind(problem: Problem, ops: list[OpKey]) -> dict[OpKey, set[OpKey]]:
    """By op, those that can only run after it."""
    followers: dict[OpKey, list[OpKey]] = {op: [] for op in ops}
    for op in ops:
        for wait in dependencies(problem.graph, op):
            followers[wait.op].append(op)
    found: dict[OpKey, set[OpKey]] = {}

    def visit(op: OpKey) -> set[OpKey]:
        if op not in found:
            found[op] = set().union(*({each} | visit(each) for each in followers[op]))
        return found[op]

    for op in ops:
        visit(op)
    return found
