"""What split backwards cost beyond their parts, and that batches are split only where it pays."""

import csv
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.lmm import ModuleSpec
from megatron_pipeweaver.ir.problem import OpKind, Strategy
from megatron_pipeweaver.planner.feedback import (
    CorrectedCosts,
    CorrectionRow,
    Corrections,
    StageTime,
)
from megatron_pipeweaver.planner.messages import (
    Launch,
    Learnt,
    Measurement,
    PlanRequest,
    pack,
    unpack,
)
from megatron_pipeweaver.planner.process import PlanningDesk
from megatron_pipeweaver.planner.settings import SPLIT_OVERHEAD_PERMILLE
from megatron_pipeweaver.semu.interface import Load, StageShape
from tests.unit.planner.examples import (
    QUICK,
    SeededCosts,
    batch_of,
    even_cut,
    make_planner,
    make_settings,
    vision_language,
)

BATCH = batch_of(2, 2, 2)
EITHER = replace(QUICK, split_weight_grad=True, max_rounds=30, time_budget_ns=100_000_000)
HERE = StageShape(layers=1, is_first=False, is_last=False)
LOAD = Load(sequence=16, batch=1, lengths=(16,))
VISION = vision_language().modules[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Even:
    """Every op takes as long as every other, so that W fills the bubbles of 1F1B."""

    ns: int = 1000

    def stage_strategies(
        self, module: ModuleSpec, stage: StageShape, load: Load
    ) -> tuple[Strategy, ...]:
        ns = self.ns
        return (
            Strategy(name="keep", forward_ns=ns, backward_ns=ns, weight_grad_ns=ns, memory_bytes=1),
        )

    def p2p_latency_ns(self, size_bytes: int) -> int:
        return 0


def planner(overhead_permille, search=EITHER):
    costs = Even()
    return make_planner(
        pipeline_size=4,
        costs=costs,
        apart_costs=CorrectedCosts(costs, overhead_permille=overhead_permille),
        search=search,
    )


def is_split(planned):
    return any(op.key.kind is OpKind.W for rank in planned.schedule.ranks for op in rank)


def makespan_ns(planned):
    return planned.schedule.makespan_ns


def test_batches_are_split_where_it_pays_and_only_there():
    whole = planner(0, replace(EITHER, split_weight_grad=False)).plan(BATCH)
    free, cheap, dear = (planner(permille).plan(BATCH) for permille in (0, 50, 2000))
    assert not is_split(whole)
    assert is_split(free)
    assert makespan_ns(free) < makespan_ns(whole)
    assert is_split(cheap)
    assert makespan_ns(free) < makespan_ns(cheap) < makespan_ns(whole)
    assert not is_split(dear)
    assert makespan_ns(dear) == makespan_ns(whole)


def test_the_times_of_the_plan_hold_the_overhead_of_a_split_alone():
    for permille, weight_grad_ns in ((50, 1000 + 100), (2000, 1000)):
        planned = planner(permille).plan(BATCH)
        for _, one in planned.problem.passes():
            assert {each.weight_grad_ns for stage in one.stages for each in stage} == {
                weight_grad_ns
            }


def test_static_plans_are_split_only_where_it_pays():
    whole = planner(0, replace(EITHER, split_weight_grad=False)).static_plan(BATCH)
    dear = planner(2000).static_plan(BATCH)
    assert not is_split(dear)
    assert makespan_ns(dear) == makespan_ns(whole)
    assert makespan_ns(planner(0).static_plan(BATCH)) <= makespan_ns(whole)


def test_the_same_overhead_gives_the_same_plan():
    first, again = (planner(84).plan(BATCH) for _ in range(2))
    assert first.schedule == again.schedule


def test_evaluation_is_not_split():
    assert not is_split(planner(0).plan(BATCH, forward_only=True))


def corrected(rows, overhead_permille):
    costs = CorrectedCosts(Even(), Corrections(rows), overhead_permille=overhead_permille)
    return costs.stage_strategies(VISION, HERE, LOAD)[0]


def row(kind, permille):
    return CorrectionRow(module="vision", role="", kind=kind, size=0, permille=permille)


def test_a_measured_split_takes_what_it_took_and_an_unmeasured_one_its_default():
    # One piece took twice as long as emulated.
    rows = [row("B", 2000)]
    whole = corrected(rows, None)
    assert (whole.backward_ns, whole.weight_grad_ns) == (2000, 2000)
    default = corrected(rows, 100)
    assert (default.backward_ns, default.weight_grad_ns) == (2000, 2000 + 400)
    measured = corrected([*rows, row("S", 2500), row("W", 3000)], 100)
    assert (measured.backward_ns, measured.weight_grad_ns) == (2500, 3000)
    # What was learnt of splits leaves backwards in one piece as they are.
    assert corrected([*rows, row("S", 2500), row("W", 3000)], None) == whole


def test_layers_that_leave_nothing_out_have_no_overhead():
    frozen = vision_language(frozen=True).modules[0]
    found = CorrectedCosts(SeededCosts(), overhead_permille=500).stage_strategies(
        frozen, HERE, LOAD
    )
    assert found == SeededCosts().stage_strategies(frozen, HERE, LOAD)


def test_what_splits_cost_is_learnt_and_travels():
    model = vision_language()
    settings = replace(
        make_settings(split_weight_grad=True, max_rounds=30, time_budget_ns=10**8),
        layout=even_cut(model, 4),
        memory_capacity_bytes=(1 << 30,) * 4,
        split_overhead_permille=0,
    )
    desk = PlanningDesk(settings=settings)
    ran = settings.make().plan(BATCH)
    assert is_split(ran)
    desk.answer(PlanRequest(number=1, batch=BATCH, forward_only=False, budget_ns=10**8))

    def times(weight_grad_factor):
        return tuple(
            StageTime(
                kind=op.key.kind,
                microbatch=op.key.microbatch,
                module=op.key.module,
                sub_microbatch=op.key.sub_microbatch,
                stage=op.key.stage,
                strategy=op.strategy,
                duration_ns=(op.end_ns - op.start_ns)
                * (weight_grad_factor if op.key.kind is OpKind.W else 1),
            )
            for rank in ran.schedule.ranks
            for op in rank
        )

    message = pack(Measurement(batch=BATCH, forward_only=False, times=times(20)))
    measured, _ = unpack(message)
    for _ in range(20):
        learnt, _ = unpack(desk.answer(measured))
    assert isinstance(learnt, Learnt)
    assert {"S", "W"} <= {one.kind for one in learnt.rows}
    # Another process that starts from it does not split either.
    launch, _ = unpack(pack(Launch(settings=settings, rows=learnt.rows)))
    assert launch == Launch(settings=settings, rows=learnt.rows)
    again = launch.settings.make(corrections=Corrections(launch.rows)).plan(BATCH)
    assert not is_split(again)


def test_the_default_is_what_the_benchmark_measured():
    path = Path(__file__).parents[3] / "benchmarks" / "runtime" / "results" / "split.csv"
    with path.open() as file:
        measured = [int(row["overhead_permille"]) for row in csv.DictReader(file)]
    assert median(measured) == SPLIT_OVERHEAD_PERMILLE
    assert make_settings().split_overhead_permille == SPLIT_OVERHEAD_PERMILLE


def test_an_overhead_below_nothing_is_refused():
    with pytest.raises(ConfigError, match="a split overhead of -1 permille; need >= 0"):
        replace(make_settings(), split_overhead_permille=-1)
