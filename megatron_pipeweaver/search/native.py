"""A problem in the native core's form, and what the core answers in ours.

The core knows flat arrays only: passes and stage pairs by number, strategies as levels (leanest
first, those that another one beats in both time and memory left out).
"""

from __future__ import annotations

from bisect import bisect_right
from graphlib import CycleError, TopologicalSorter
from itertools import accumulate, chain, pairwise

from megatron_pipeweaver._core import Core, RawProblem, Timetable
from megatron_pipeweaver.errors import ConfigError, InfeasibleError
from megatron_pipeweaver.ir.problem import OpKey, OpKind, PassKey, Problem
from megatron_pipeweaver.ir.schedule import Schedule, ScheduledOp

KINDS = (OpKind.F, OpKind.B, OpKind.W)


def raw_problem(problem: Problem) -> RawProblem:
    """`problem` as flat arrays; passes in file order, stage pairs by pass and stage."""
    passes = list(problem.passes())
    number = {key: index for index, (key, _) in enumerate(passes)}
    modules = {name: index for index, name in enumerate(problem.modules)}
    pairs = [stage for _, one in passes for stage in one.stages]
    strategies = list(chain.from_iterable(pairs))
    raw = RawProblem()
    raw.ranks = problem.pipeline_size
    raw.microbatches = len(problem.microbatches)
    raw.capacity = list(problem.memory_capacity_bytes)
    raw.pass_microbatch = [key.microbatch for key, _ in passes]
    raw.pass_module = [modules[key.module] for key, _ in passes]
    raw.pass_sub = [key.sub_microbatch for key, _ in passes]
    raw.pass_stages = [len(one.stages) for _, one in passes]
    raw.pass_latency = [one.p2p_latency_ns for _, one in passes]
    raw.pass_frozen = [int(one.frozen) for _, one in passes]
    raw.producer_begin = [0, *accumulate(len(one.after) for _, one in passes)]
    raw.producers = [
        number[PassKey(key.microbatch, *name)] for key, one in passes for name in one.after
    ]
    raw.strategy_begin = [0, *accumulate(map(len, pairs))]
    # Lists of plain numbers: tuples by the ten thousand would wake the garbage collector.
    raw.forward = [one.forward_ns for one in strategies]
    raw.backward = [one.backward_ns for one in strategies]
    raw.weight = [one.weight_grad_ns for one in strategies]
    raw.memory = [one.memory_bytes for one in strategies]
    return raw


def check_order(problem: Problem) -> None:
    """Returns when backwards can run in the order of microbatches and sub-microbatches.

    Raises:
        ConfigError: a pass comes after a later sub-microbatch of its own module, or the like.
    """
    graph = problem.graph
    by_module: dict[tuple[int, str], list[PassKey]] = {}
    for key, node in graph.nodes.items():
        if not node.frozen:
            by_module.setdefault((key.microbatch, key.module), []).append(key)
    waits = {
        key: {c for c in graph.consumers[key] if not graph.nodes[c].frozen}
        for keys in by_module.values()
        for key in keys
    }
    for keys in by_module.values():
        for before, after in pairwise(sorted(keys)):
            waits[after].add(before)
    try:
        TopologicalSorter(waits).prepare()
    except CycleError as error:
        raise ConfigError(
            f"deterministic mode: backwards of {error.args[1][0]} cannot run in the order of "
            "sub-microbatches, since a later one needs them first; renumber the sub-microbatches"
        ) from None


class NativeProblem:
    """A problem inside the native core.

    Args:
        problem: what is to be scheduled.
        in_order: each stage's backwards keep the order of microbatches and sub-microbatches.

    Raises:
        InfeasibleError: one microbatch alone, at its leanest strategies, does not fit.
        ConfigError: `in_order` is asked for and sub-microbatches depend on one another against it.
    """

    __slots__ = ("core", "in_order", "passes", "problem")

    def __init__(self, problem: Problem, *, in_order: bool = False) -> None:
        self.problem = problem
        self.in_order = in_order
        self.passes = list(problem.passes())
        if in_order:
            check_order(problem)
        self.core = Core(raw_problem(problem), in_order)
        short = self.core.shortage()
        if short is not None:
            microbatch, rank, needed, proven = short
            capacity = problem.memory_capacity_bytes[rank]
            what = (
                f"needs at least {needed} bytes there"
                if proven
                else f"fits in none of the orders tried, the best of which needs {needed} bytes"
            )
            raise InfeasibleError(
                f"microbatch {microbatch}, rank {rank}: alone at its leanest strategies it {what}, "
                f"and the capacity is {capacity}; give it a leaner strategy, make the microbatch "
                "smaller, or raise the capacity"
            )

    def level_counts(self) -> list[int]:
        """How many levels each stage pair has."""
        return [after - before for before, after in pairwise(self.core.level_begin)]

    def level_costs(self, pair: int) -> tuple[tuple[int, int], ...]:
        """(latency, memory) of the levels of stage pair `pair` in ns and bytes, leanest first."""
        owner = bisect_right(self.core.pair_begin, pair) - 1
        one = self.passes[owner][1]
        strategies = one.stages[pair - self.core.pair_begin[owner]]
        begin = self.core.level_begin
        levels = [strategies[i] for i in self.core.strategy[begin[pair] : begin[pair + 1]]]
        return tuple(
            (
                s.forward_ns + (0 if one.frozen else s.backward_ns + s.weight_grad_ns),
                s.memory_bytes,
            )
            for s in levels
        )

    def schedule(self, table: Timetable, *, lower_bound_ns: int, problem_sha256: str) -> Schedule:
        """`table` as a `Schedule`."""
        names = self._level_names(table.level)
        stage_keys = [(key, stage) for key, one in self.passes for stage in range(len(one.stages))]
        start, end = table.start, table.end
        ranks = tuple(
            tuple(
                ScheduledOp(
                    key=OpKey(KINDS[op % 3], *stage_keys[op // 3][0], stage_keys[op // 3][1]),
                    strategy=names[op // 3],
                    start_ns=start[op],
                    end_ns=end[op],
                )
                for op in ops
            )
            for ops in table.order
        )
        return Schedule(
            problem_sha256=problem_sha256,
            makespan_ns=table.makespan,
            lower_bound_ns=lower_bound_ns,
            peak_memory_bytes=tuple(self.core.peak_memory(table)),
            ranks=ranks,
        )

    def _level_names(self, level: list[int]) -> list[str]:
        begin, strategy = self.core.level_begin, self.core.strategy
        pairs = [strategies for _, one in self.passes for strategies in one.stages]
        return [
            strategies[strategy[begin[pair] + level[pair]]].name
            for pair, strategies in enumerate(pairs)
        ]
