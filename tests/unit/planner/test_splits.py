"""Sub-microbatch sizes as alternatives of one batch."""

from dataclasses import dataclass, replace

import pytest

from megatron_pipeweaver.errors import ConfigError, InfeasibleError
from megatron_pipeweaver.ir.lmm import ModuleSpec
from megatron_pipeweaver.ir.problem import Strategy
from megatron_pipeweaver.planner.feedback import StageTime
from megatron_pipeweaver.planner.messages import Learnt, Measurement, PlanRequest, unpack
from megatron_pipeweaver.planner.process import PlanningDesk
from megatron_pipeweaver.planner.splits import split_sizes
from megatron_pipeweaver.semu.interface import Load, StageShape
from tests.unit.planner.examples import QUICK, batch_of, make_planner, make_settings


@dataclass(frozen=True, slots=True, kw_only=True)
class PerItem:
    """Every image costs `item_ns` and every pass `pass_ns`; memory grows with their square."""

    item_ns: int
    pass_ns: int

    def stage_strategies(
        self, module: ModuleSpec, stage: StageShape, load: Load
    ) -> tuple[Strategy, ...]:
        cost = self.pass_ns + self.item_ns * load.batch
        return (
            Strategy(
                name="keep",
                forward_ns=cost,
                backward_ns=cost,
                weight_grad_ns=cost,
                memory_bytes=load.batch**2,
            ),
        )

    def p2p_latency_ns(self, size_bytes: int) -> int:
        return 0


FREE = replace(QUICK, deterministic=False)


def sizes_of(planned):
    counts = [
        one.payload.item_stop - one.payload.item_start
        for one in planned.plan.plan.passes
        if one.key.module == "vision"
    ]
    return max(counts)


def test_sizes_are_shares_of_the_given_ones_and_differ():
    found = split_sizes({"vision": 3, "audio": 1}, (100, 50, 25, 10, 200))
    assert found == (
        {"vision": 3, "audio": 1},
        {"vision": 2, "audio": 1},
        {"vision": 1, "audio": 1},
        {"vision": 6, "audio": 2},
    )


@pytest.mark.parametrize(("item_ns", "pass_ns", "best"), [(100, 1, 1), (1, 100, 8)])
def test_the_best_size_for_the_batch_is_chosen(item_ns, pass_ns, best):
    # Small pieces fill the pipeline; where every pass costs a lot, one piece is better.
    planner = make_planner(
        pipeline_size=4,
        costs=PerItem(item_ns=item_ns, pass_ns=pass_ns),
        sub_microbatch={"vision": 4},
        splits_percent=(100, 25, 200),
        search=FREE,
    )
    planned = planner.plan(batch_of(8))
    assert sizes_of(planned) == best
    assert planned.sub_microbatch == {"vision": best}
    alone = [
        make_planner(
            pipeline_size=4,
            costs=PerItem(item_ns=item_ns, pass_ns=pass_ns),
            sub_microbatch={"vision": size},
            search=FREE,
        ).plan(batch_of(8))
        for size in (1, 4, 8)
    ]
    assert planned.schedule.makespan_ns == min(one.schedule.makespan_ns for one in alone)


def test_a_size_that_does_not_fit_is_left_out():
    settings = {"costs": PerItem(item_ns=1, pass_ns=100), "capacity": 6, "search": FREE}
    large = make_planner(**settings, sub_microbatch={"vision": 4})
    with pytest.raises(InfeasibleError):
        large.plan(batch_of(4))
    either = make_planner(**settings, sub_microbatch={"vision": 4}, splits_percent=(100, 25))
    assert sizes_of(either.plan(batch_of(4))) == 1
    with pytest.raises(InfeasibleError, match="microbatch 0"):
        either.plan(batch_of(8))


def test_evaluation_and_static_plans_keep_the_first_size():
    planner = make_planner(
        costs=PerItem(item_ns=100, pass_ns=1),
        sub_microbatch={"vision": 4},
        splits_percent=(100, 25),
        search=FREE,
    )
    assert sizes_of(planner.plan(batch_of(8), forward_only=True)) == 4
    assert sizes_of(planner.static_plan(batch_of(8))) == 4
    assert sizes_of(planner.plan(batch_of(8))) == 1


@pytest.mark.parametrize("percents", [(), (100, 0)])
def test_sizes_of_nothing_are_refused(percents):
    with pytest.raises(ConfigError, match="give at least one, each 1 or more"):
        make_planner(splits_percent=percents)


def test_a_deterministic_search_has_one_size():
    with pytest.raises(ConfigError, match="deterministic"):
        replace(make_settings(deterministic=True), splits_percent=(100, 50)).make()


def test_measured_times_are_held_against_the_split_that_ran():
    settings = replace(
        make_settings(deterministic=False),
        sub_microbatch={"vision": 4},
        splits_percent=(100, 25),
    )
    batch = batch_of(8)
    desk = PlanningDesk(settings=settings)
    desk.answer(PlanRequest(number=1, batch=batch, forward_only=False, budget_ns=10**7))
    ran = settings.make().plan(batch)
    assert ran.sub_microbatch is not None
    times = tuple(
        StageTime(
            kind=op.key.kind,
            microbatch=op.key.microbatch,
            module=op.key.module,
            sub_microbatch=op.key.sub_microbatch,
            stage=op.key.stage,
            strategy=op.strategy,
            duration_ns=op.end_ns - op.start_ns,
        )
        for rank in ran.schedule.ranks
        for op in rank
    )
    learnt, _ = unpack(desk.answer(Measurement(batch=batch, forward_only=False, times=times)))
    assert isinstance(learnt, Learnt)
    assert learnt.error_permille == 0
