"""Offloaded activations never take more of a rank's host memory than it may have."""

import dataclasses

import pytest

from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.errors import InfeasibleError
from megatron_pipeweaver.ir.problem import OpKind
from megatron_pipeweaver.ir.strategy import LayerStrategy, layer_strategies
from megatron_pipeweaver.partition.workload import loads
from megatron_pipeweaver.planner.host import HostUse
from megatron_pipeweaver.planner.settings import settings_from_json, settings_to_json
from megatron_pipeweaver.semu.stages import module_stages
from tests.unit.planner.examples import batch_of, make_planner, make_settings

BATCH = batch_of(3, 0, 1, 5, 2, length=64)
STRATEGIES = (LayerStrategy.KEEP, LayerStrategy.RECOMPUTE, LayerStrategy.OFFLOAD)


def _settings(host_memory_bytes=None, *, capacity=150_000, strategies=STRATEGIES, **search):
    settings = make_settings(capacity=capacity, **search)
    return dataclasses.replace(
        settings,
        costs=dataclasses.replace(settings.costs, strategies=strategies),
        host_memory_bytes=host_memory_bytes,
    )


def _use(settings):
    return HostUse(
        settings.make().workload(BATCH).problem,
        BATCH,
        settings.model,
        settings.layout,
        settings.sub_microbatch,
        settings.costs.make(),
    )


def _peaks(planned):
    """Counted apart from what the planner counts: every offloaded layer holds the same."""
    settings = _settings()
    costs = settings.costs.make()
    loads_of = dict(
        zip(
            (one.key for one in planned.plan.plan.passes),
            (load for _, load in loads(BATCH, settings.model, settings.sub_microbatch)),
            strict=True,
        )
    )
    shapes = {cut.module: list(module_stages(cut)) for cut in settings.layout.modules}
    peaks = []
    for ops in planned.schedule.ranks:
        alive, most = {}, 0
        for op in ops:
            pair = (op.key.owner, op.key.stage)
            shape = shapes[op.key.module][op.key.stage]
            away = layer_strategies(op.strategy, shape.layers).count(LayerStrategy.OFFLOAD)
            if op.key.kind is OpKind.F:
                module = settings.model.module(op.key.module)
                whole = costs.host_bytes(module, shape, loads_of[op.key.owner], "offload")
                alive[pair] = whole * away // shape.layers
            if op.key.kind is OpKind.B:
                del alive[pair]
            most = max(most, sum(alive.values()))
        peaks.append(most)
    return tuple(peaks)


def _offloaded(planned):
    names = {op.strategy for ops in planned.schedule.ranks for op in ops}
    return any("offload" in name for name in names)


def test_without_a_bound_offloaded_activations_take_what_they_take():
    planned = _settings().make().plan(BATCH)
    assert _offloaded(planned)
    assert max(_peaks(planned)) > 100_000


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2, 0.0])
@pytest.mark.parametrize("static", [False, True])
def test_no_plan_takes_more_than_it_may(share, static):
    free = _settings().make()
    most = max(_peaks(free.plan(BATCH)))
    limit = int(most * share)
    planner = _settings(limit).make()
    planned = planner.static_plan(BATCH) if static else planner.plan(BATCH)
    check_schedule(planned.problem, planned.schedule)
    assert max(_peaks(planned)) <= limit
    if share in (0.9, 0.0) and not static:
        assert _offloaded(planned) is (share > 0)


def test_a_bound_that_is_never_reached_changes_nothing():
    free, bounded = _settings().make(), _settings(1 << 40).make()
    assert bounded.plan(BATCH).schedule == free.plan(BATCH).schedule


@pytest.mark.parametrize("permille", [0, 100, 250, 500, 999])
def test_every_schedule_of_lean_candidates_holds_its_share(permille):
    settings = _settings()
    most = max(_use(settings).most_bytes())
    lean = dataclasses.replace(settings.costs).make().within(permille)
    planner = make_planner(
        costs=lean, capacity=150_000, dtypes=settings.dtypes, sub_microbatch={"vision": 2}
    )
    planned = planner.plan(BATCH)
    peak = max(_use(settings).peak_bytes(planned.schedule))
    assert peak <= most * permille // 1000
    assert (peak > 0) is (permille >= 500)
    assert peak == max(_peaks(planned))


def test_what_fits_neither_device_nor_host_is_told():
    with pytest.raises(InfeasibleError, match="a rank's host memory does not hold"):
        _settings(
            0, strategies=(LayerStrategy.OFFLOAD, LayerStrategy.KEEP), capacity=40_000
        ).make().plan(BATCH)


def test_where_everything_must_be_offloaded_the_bound_is_told():
    settings = _settings(1000, strategies=(LayerStrategy.OFFLOAD,))
    with pytest.raises(InfeasibleError, match="a rank's host memory, and it may take 1000; give"):
        settings.make().plan(BATCH)


def test_evaluation_holds_nothing_on_the_host():
    planned = _settings(0).make().plan(BATCH, forward_only=True)
    assert planned.plan.plan.forward_only


def test_the_bound_travels_to_the_planners_process():
    settings = _settings(12_345)
    assert settings_from_json(settings_to_json(settings)) == settings
    assert settings_from_json(settings_to_json(_settings())) == _settings()
