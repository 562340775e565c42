"""What is compared: static systems, and the method's parts one after another.

A system gives the makespan of every batch of a run. What a static system sets, it sets once for
the run: of its settings the one that all batches fit into and that is fastest over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from benchmarks.ablation.chains import (
    Chain,
    chain_capacity,
    chain_problem,
    cut_chain,
    megatron_order,
    parameter_weights,
    time_weights,
)
from benchmarks.ablation.jobs import Bench, capacity, partition, separated_problem
from megatron_pipeweaver._core import SearchOptions, Timetable
from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.config import Exploration, SearchConfig
from megatron_pipeweaver.errors import InfeasibleError
from megatron_pipeweaver.ir.batch import BatchMetadata
from megatron_pipeweaver.ir.problem import Microbatch, Problem, Strategy
from megatron_pipeweaver.partition.offline import Partition
from megatron_pipeweaver.search.anytime import solve
from megatron_pipeweaver.search.baselines import (
    encoders_first_policy,
    interleaved_1f1b_policy,
)
from megatron_pipeweaver.search.native import NativeProblem

SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
"""Shares of a stage's layers that are recomputed, of which a run has one."""
MOST_SEGMENTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A system's makespans (ns), batch by batch, and the setting that it ran with.

    `orders` are reordering's: what memory optimization starts from.
    """

    setting: str
    makespans_ns: tuple[int, ...]
    orders: tuple[list[list[int]], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A bench and its partition, made once for all systems that share it."""

    bench: Bench
    cut: Partition
    capacity_bytes: tuple[int, ...]
    search: SearchConfig

    def problem(self, batch: BatchMetadata, recomputed: float | None = None) -> Problem:
        """See `separated_problem`."""
        return separated_problem(self.bench, batch, self.cut, self.capacity_bytes, recomputed)


def load_case(bench: Bench, search: SearchConfig) -> Case:
    """`bench` under the paper's partitioner."""
    cut = partition(bench)
    return Case(bench=bench, cut=cut, capacity_bytes=capacity(bench, cut), search=search)


def _fastest(settings: Iterable[tuple[str, Callable[[BatchMetadata], int]]], case: Case) -> Run:
    """The run with the setting that is fastest over all batches, of those that fit them all."""
    best: Run | None = None
    for name, makespan_ns in settings:
        try:
            found = tuple(makespan_ns(batch) for batch in case.bench.batches)
        except InfeasibleError:
            continue
        if best is None or sum(found) < sum(best.makespans_ns):
            best = Run(setting=name, makespans_ns=found)
    if best is None:
        raise InfeasibleError("no setting fits every batch")
    return best


def megatron(case: Case) -> Run:
    """Megatron-LM as it is run (re-implemented): VPP, chunks of equal parameters, one setting.

    The best number of chunks per rank and the least recomputation that fits.
    """
    weights = parameter_weights(case.bench)
    segments = range(1, MOST_SEGMENTS + 1)
    return _fastest(_chains(case, weights, segments), case)


def nnscaler_like(case: Case) -> Run:
    """A plan for a representative batch, run on every batch (re-implemented).

    After Z. Lin et al., nnScaler (OSDI 2024), as the paper runs it: the contiguous cut that
    balances time over a representative batch, 1F1B, one setting.
    """
    return _fastest(_chains(case, time_weights(case.bench), (1,)), case)


def balanced_vpp(case: Case) -> Run:
    """What static cuts could be: Megatron's VPP, but chunks that balance a representative batch."""
    segments = range(1, MOST_SEGMENTS + 1)
    return _fastest(_chains(case, time_weights(case.bench), segments), case)


def optimus_like(case: Case) -> Run:
    """All encoder forwards first, then the backbone in interleaved 1F1B (re-implemented).

    The coarse form of Optimus (W. Feng et al., ATC 2025), at the best whole-run setting. It is
    given PipeWeaver's partition, sub-microbatches, admission and this batch's times.
    """
    return _fastest(
        ((_name(share), _decoded(case, share, encoders_first_policy))
         for share in SHARES),
        case,
    )  # fmt: skip


def partitioner(case: Case) -> Run:
    """The paper's partitioner, in an order made for microbatches that are all alike."""
    return _fastest(((_name(share), _static(case, share)) for share in SHARES), case)


def interleaving(case: Case) -> Run:
    """Besides, ranks choose by the batch's own times: the dual queue, microbatches in order."""
    return _fastest(
        ((_name(share), _decoded(case, share, interleaved_1f1b_policy))
         for share in SHARES),
        case,
    )  # fmt: skip


def reordering(case: Case) -> Run:
    """Besides, MCTS over the order of segments (paper, section 4.1), at interleaving's setting."""
    share = _share_of(interleaving(case))
    makespans, orders = [], []
    for batch in case.bench.batches:
        native = NativeProblem(case.problem(batch, share))
        levels = [0] * _pairs(native.problem)
        start = native.core.decode(interleaved_1f1b_policy(native.problem, levels))
        found = _searched(native, start, case.search, choose_memory=False)
        makespans.append(_checked(native, found))
        orders.append(found.order)
    return Run(setting=_name(share), makespans_ns=tuple(makespans), orders=tuple(orders))


def memory(case: Case, reordered: Run | None = None) -> Run:
    """Besides, a candidate per stage pair, layer by layer: the paper's whole method.

    The strategies are chosen anew for the orders that reordering ended with, then MCTS goes on with
    the choice in every evaluation (section 4.3). What reordering found stands if it is better.
    """
    before = reordered or reordering(case)
    makespans = []
    for batch, order, without in zip(
        case.bench.batches, before.orders, before.makespans_ns, strict=True
    ):
        native = NativeProblem(case.problem(batch))
        leanest = [0] * _pairs(native.problem)
        start = native.core.refill(native.core.retime(order, leanest, False), False)
        found = _searched(native, start, case.search, choose_memory=True)
        makespans.append(min(without, _checked(native, found)))
    return Run(setting="candidates layer by layer", makespans_ns=tuple(makespans))


def _share_of(run: Run) -> float:
    return next(share for share in SHARES if _name(share) == run.setting)


def _name(share: float) -> str:
    return f"recompute {share:.1%}"


def pipeweaver(case: Case) -> Run:
    """The full search: recipes, local search, weight gradients apart."""
    makespans = []
    for batch in case.bench.batches:
        problem = case.problem(batch)
        schedule = solve(problem, case.search).schedule
        check_schedule(problem, schedule)
        makespans.append(schedule.makespan_ns)
    return Run(setting="full search", makespans_ns=tuple(makespans))


def bound(case: Case) -> Run:
    """The proven lower bound of the separated problem."""
    quick = replace(case.search, time_budget_ns=0)
    return Run(
        setting="lower bound",
        makespans_ns=tuple(
            solve(case.problem(batch), quick).schedule.lower_bound_ns
            for batch in case.bench.batches
        ),
    )


SYSTEMS: Mapping[str, Callable[[Case], Run]] = {
    "megatron": megatron,
    "nnscaler_like": nnscaler_like,
    "balanced_vpp": balanced_vpp,
    "optimus_like": optimus_like,
    "partitioner": partitioner,
    "interleaving": interleaving,
    "reordering": reordering,
    "memory": memory,
    "pipeweaver": pipeweaver,
    "bound": bound,
}


# --- how makespans are found ---------------------------------------------------------------------


def _chains(
    case: Case, weights: list[int], segments: Iterable[int]
) -> Iterator[tuple[str, Callable[[BatchMetadata], int]]]:
    for count in segments:
        chain = cut_chain(case.bench, count * case.bench.pipeline_size, weights)
        try:
            room = chain_capacity(case.bench, chain)
        except InfeasibleError:
            continue
        for share in SHARES:
            yield (
                f"VPP {count}, recompute {share:.0%}",
                _in_megatrons_order(case.bench, chain, room, share),
            )


def _in_megatrons_order(
    bench: Bench, chain: Chain, room: tuple[int, ...], share: float
) -> Callable[[BatchMetadata], int]:
    def makespan_ns(batch: BatchMetadata) -> int:
        problem = chain_problem(bench, batch, chain, room, share)
        native = NativeProblem(problem)
        order = megatron_order(
            bench.pipeline_size, problem.modules["model"], len(batch.microbatches)
        )
        return _checked(native, native.core.retime(order, [0] * _pairs(problem), False))

    return makespan_ns


def _static(case: Case, share: float) -> Callable[[BatchMetadata], int]:
    """Orders of interleaved 1F1B, made for mean times and run with the batch's own."""

    def makespan_ns(batch: BatchMetadata) -> int:
        problem = case.problem(batch, share)
        alike = NativeProblem(_with_mean_times(problem))
        levels = [0] * _pairs(problem)
        order = alike.core.decode(interleaved_1f1b_policy(alike.problem, levels)).order
        native = NativeProblem(problem)
        return _checked(native, native.core.retime(order, levels, False))

    return makespan_ns


def _decoded(
    case: Case, share: float, build: Callable[[Problem, list[int]], object]
) -> Callable[[BatchMetadata], int]:
    def makespan_ns(batch: BatchMetadata) -> int:
        problem = case.problem(batch, share)
        native = NativeProblem(problem)
        made = build(problem, [0] * _pairs(problem))
        return _checked(native, native.core.decode(made))  # type: ignore[arg-type]

    return makespan_ns


def _searched(
    native: NativeProblem, start: Timetable, search: SearchConfig, *, choose_memory: bool
) -> Timetable:
    """MCTS alone, from `start`; no static schedule competes and backwards stay whole."""
    options = SearchOptions()
    options.budget_ns = search.time_budget_ns
    options.threads = search.threads
    options.seed = search.seed
    options.max_rounds = -1
    options.split = False
    options.choose_memory = choose_memory
    options.exploration = list(Exploration).index(Exploration.MCTS)
    options.tree_alpha, options.tree_beta = search.tree_alpha, search.tree_beta
    return native.core.search(options, start, None).best


def _checked(native: NativeProblem, table: Timetable) -> int:
    """The makespan of a schedule that fits.

    Raises:
        InfeasibleError: memory is exceeded.
    """
    capacity_bytes = native.problem.memory_capacity_bytes
    peaks = native.core.peak_memory(table)
    if any(peak > room for peak, room in zip(peaks, capacity_bytes, strict=True)):
        raise InfeasibleError(f"peaks of {peaks} bytes do not fit into {capacity_bytes}")
    schedule = native.schedule(table, lower_bound_ns=0, problem_sha256="")
    check_schedule(native.problem, schedule)
    return schedule.makespan_ns


def _with_mean_times(problem: Problem) -> Problem:
    """`problem` with every stage at the mean time of its module's stages; memory stays."""
    total: dict[tuple[str, int], list[int]] = {}
    for key, one in problem.passes():
        for stage, (strategy,) in enumerate(one.stages):
            sums = total.setdefault((key.module, stage), [0, 0, 0, 0])
            times = (strategy.forward_ns, strategy.backward_ns, strategy.weight_grad_ns, 1)
            total[key.module, stage] = [a + b for a, b in zip(sums, times, strict=True)]

    def alike(module: str, stage: int, strategy: Strategy) -> Strategy:
        forward, backward, weight, count = total[module, stage]
        return replace(
            strategy,
            forward_ns=forward // count,
            backward_ns=backward // count,
            weight_grad_ns=weight // count,
        )

    microbatches = tuple(
        Microbatch(
            passes=tuple(
                replace(
                    one,
                    stages=tuple(
                        (alike(one.module, stage, strategy),)
                        for stage, (strategy,) in enumerate(one.stages)
                    ),
                )
                for one in microbatch.passes
            )
        )
        for microbatch in problem.microbatches
    )
    return replace(problem, microbatches=microbatches)


def _pairs(problem: Problem) -> int:
    return sum(len(one.stages) for _, one in problem.passes())
