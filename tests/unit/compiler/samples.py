"""Random small problems, and schedules of them by a scheduler that only knows the rules.

Everything follows from one `random.Random`; memory is as tight as the schedule that was drawn.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, replace

from megatron_pipeweaver.compiler.lowering import Windows, compile_plan
from megatron_pipeweaver.ir.plan import PassPayload, Plan
from megatron_pipeweaver.ir.problem import (
    Dependency,
    Microbatch,
    OpKey,
    OpKind,
    Pass,
    PassKey,
    Problem,
    Strategy,
    dependencies,
)
from megatron_pipeweaver.ir.schedule import Schedule, ScheduledOp
from megatron_pipeweaver.ir.timeline import StrategyTable, memory_peaks

WIDTH = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A problem, a valid schedule of it, and what its passes carry."""

    problem: Problem
    schedule: Schedule
    payloads: dict[PassKey, PassPayload]
    dtypes: dict[str, str]

    def plan(self, *, forward_only: bool = False, windows: Windows | None = None) -> Plan:
        return compile_plan(
            self.problem,
            self.schedule,
            self.payloads,
            self.dtypes,
            forward_only=forward_only,
            windows=windows,
        )


def draw_sample(rng: random.Random, *, ordered: bool = False, **shape: int) -> Sample:
    """A random sample; `ordered` keeps each stage's backwards in the order of microbatches."""
    problem = draw_problem(rng, **shape)
    problem, schedule = tightened(problem, draw_schedule(problem, rng, ordered=ordered))
    payloads, start = {}, defaultdict(int)
    for key in problem.graph.nodes:
        items = rng.randint(1, 3)
        where = (key.microbatch, key.module)
        payloads[key] = PassPayload(
            item_start=start[where],
            item_stop=start[where] + items,
            hidden_shape=(items, WIDTH),
            output_shape=(items + 1, WIDTH),
        )
        start[where] += items
    return Sample(
        problem=problem,
        schedule=schedule,
        payloads=payloads,
        dtypes=dict.fromkeys(problem.modules, "float64"),
    )


def draw_problem(
    rng: random.Random,
    *,
    pipeline_size: int | None = None,
    microbatches: int | None = None,
    max_segments: int = 2,
) -> Problem:
    """Vision (0 to 3 sub-microbatches, at times frozen) and audio into language, into a decoder."""
    pipeline_size = pipeline_size or rng.randint(1, 4)
    modules = {
        name: rng.randint(1, max_segments)
        for name in ("vision", "audio", "language", "decoder")
        if name == "language" or rng.random() < 0.5
    }
    frozen = {name: rng.random() < 0.25 for name in modules}
    latency = {name: rng.choice([0, 0, 2, 7]) for name in modules}
    zero_work = rng.random() < 0.2

    def stage() -> tuple[Strategy, ...]:
        forward = 0 if zero_work and rng.random() < 0.3 else rng.randint(1, 9)
        weight = rng.randint(0, forward)
        memory = rng.randint(1, 50)
        return tuple(
            Strategy(
                name=name,
                forward_ns=forward,
                backward_ns=forward * (level + 1),
                weight_grad_ns=weight,
                memory_bytes=memory // (level + 1),
            )
            for level, name in enumerate(["keep", "recompute"][: rng.randint(1, 2)])
        )

    def one(module: str, index: int, after: tuple[tuple[str, int], ...]) -> Pass:
        return Pass(
            module=module,
            sub_microbatch=index,
            after=after,
            p2p_latency_ns=latency[module],
            stages=tuple(stage() for _ in range(pipeline_size * modules[module])),
            frozen=frozen[module],
        )

    def draw_microbatch() -> Microbatch:
        encoders = tuple(
            one(name, index, ())
            for name in ("vision", "audio")
            if name in modules
            for index in range(rng.randint(0, 3))
        )
        names = tuple((each.module, each.sub_microbatch) for each in encoders)
        passes = [*encoders, one("language", 0, names)]
        if "decoder" in modules:
            passes += [one("decoder", i, (("language", 0),)) for i in range(rng.randint(0, 2))]
        return Microbatch(passes=tuple(passes))

    return Problem(
        pipeline_size=pipeline_size,
        memory_capacity_bytes=(10**9,) * pipeline_size,
        modules=modules,
        microbatches=tuple(draw_microbatch() for _ in range(microbatches or rng.randint(1, 4))),
    )


def draw_schedule(problem: Problem, rng: random.Random, *, ordered: bool = False) -> Schedule:
    """A random valid schedule: again and again a random op of those that are ready."""
    graph, table = problem.graph, StrategyTable(problem)
    chosen: dict[OpKey, str] = {}
    keys = []
    for key in graph.ops():
        if key.kind is OpKind.F:
            chosen[key] = rng.choice(table.names(key))
        if key.kind is OpKind.B and rng.random() < 0.3:
            keys.append(key.with_kind(OpKind.W))
        keys.append(key)
    split = {key.with_kind(OpKind.B) for key in keys if key.kind is OpKind.W}
    waits = {key: [*dependencies(graph, key)] for key in keys}
    if ordered:
        _keep_backward_order(keys, waits)
    ended: dict[OpKey, int] = {}
    rows: list[list[ScheduledOp]] = [[] for _ in range(problem.pipeline_size)]
    while len(ended) < len(keys):
        ready = [k for k in keys if k not in ended and all(w.op in ended for w in waits[k])]
        key = rng.choice(ready)
        rank = graph.rank_of(key.stage)
        strategy = table.find(key, chosen[key.with_kind(OpKind.F)])
        assert strategy is not None
        weight = 0 if key in split else strategy.weight_grad_ns
        length = {
            OpKind.F: strategy.forward_ns,
            OpKind.B: strategy.backward_ns + weight,
            OpKind.W: strategy.weight_grad_ns,
        }[key.kind]
        free = rows[rank][-1].end_ns if rows[rank] else 0
        start = max([free, *(ended[w.op] + w.latency_ns for w in waits[key])])
        ended[key] = start + length
        rows[rank].append(
            ScheduledOp(key=key, strategy=strategy.name, start_ns=start, end_ns=start + length)
        )
    return Schedule(
        problem_sha256="0" * 64,
        makespan_ns=max(ended.values()),
        lower_bound_ns=0,
        peak_memory_bytes=(0,) * problem.pipeline_size,
        ranks=tuple(tuple(row) for row in rows),
    )


def _keep_backward_order(keys: list[OpKey], waits: dict[OpKey, list[Dependency]]) -> None:
    """Each stage sums up its gradients by microbatch and sub-microbatch.

    What sums is a stage's ``W``, or its ``B`` where no ``W`` stands.
    """
    last: dict[tuple[str, int], OpKey] = {}
    for key in sorted(keys, key=lambda one: one[1:]):
        if key.kind is OpKind.F or (key.with_kind(OpKind.W) in waits and key.kind is OpKind.B):
            continue
        if (key.module, key.stage) in last:
            waits[key].append(Dependency(last[key.module, key.stage], 0, False))
        last[key.module, key.stage] = key


def tightened(problem: Problem, schedule: Schedule) -> tuple[Problem, Schedule]:
    """The problem with no more memory than the schedule needs, and the schedule's peaks right."""
    in_order = _peaks_in_order(problem, schedule)
    problem = replace(problem, memory_capacity_bytes=in_order)
    return problem, replace(schedule, peak_memory_bytes=memory_peaks(problem, schedule))


def _peaks_in_order(problem: Problem, schedule: Schedule) -> tuple[int, ...]:
    """As `memory_peaks`, but stage pairs that last 0 ns count too."""
    table = StrategyTable(problem)
    peaks = []
    for ops in schedule.ranks:
        held = peak = 0
        split = {op.key.with_kind(OpKind.B) for op in ops if op.kind is OpKind.W}
        for op in ops:
            strategy = table.find(op.key, op.strategy)
            assert strategy is not None
            if op.kind is OpKind.F:
                held += strategy.memory_bytes
                peak = max(peak, held)
            frozen = problem.graph.nodes[op.key.owner].frozen
            if (op.kind is OpKind.F and frozen) or op.kind is OpKind.W:
                held -= strategy.memory_bytes
            if op.kind is OpKind.B and op.key not in split:
                held -= strategy.memory_bytes
        peaks.append(peak)
    return tuple(peaks)
