from dataclasses import replace
from itertools import count

import pytest

from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.errors import ConfigError, InfeasibleError
from megatron_pipeweaver.ir.batch import BatchMetadata, Item, MicrobatchMetadata
from megatron_pipeweaver.ir.plan import ComputeAction, VerifiedPlan
from megatron_pipeweaver.ir.problem import OpKind, PassKey
from megatron_pipeweaver.planner.planner import batch_digest
from tests.unit.planner.examples import (
    IMAGE,
    SeededCosts,
    batch_of,
    make_planner,
    make_settings,
    vision_language,
)


def ops(plan, kind=None):
    return [
        action.op
        for rank in plan.ranks
        for action in rank
        if isinstance(action, ComputeAction) and kind in (None, action.op.kind)
    ]


def test_a_plan_holds_every_pass_of_the_batch():
    planned = make_planner().plan(batch_of(3, 0, 1))
    assert isinstance(planned.plan, VerifiedPlan)
    plan = planned.plan.plan
    assert [one.key for one in plan.passes] == [
        PassKey(0, "vision", 0),
        PassKey(0, "vision", 1),
        PassKey(0, "language", 0),
        PassKey(1, "language", 0),
        PassKey(2, "vision", 0),
        PassKey(2, "language", 0),
    ]
    first = plan.passes[0].payload
    assert (first.item_start, first.item_stop) == (0, 2)
    assert first.hidden_shape == (16, 2, 8)
    assert first.output_shape == (4, 2, 12)
    assert plan.passes[2].after == (PassKey(0, "vision", 0), PassKey(0, "vision", 1))
    assert plan.passes[3].after == ()
    assert len(ops(plan)) == len(set(ops(plan))) == 6 * 2 * 2
    assert planned.schedule.makespan_ns >= planned.schedule.lower_bound_ns > 0
    assert planned.problem.memory_capacity_bytes == (10_000, 10_000)


def test_layers_of_a_stage_may_do_different_things():
    settings = make_settings()
    for candidates, names in ((10, 4), (2, 2)):
        costs = replace(settings.costs, candidates=candidates)
        workload = replace(settings, costs=costs).make().workload(batch_of(1))
        stages = workload.problem.microbatches[0].passes[-1].stages
        assert [len(strategies) for strategies in stages] == [names, names]
    mixed = ["keep", "recompute*1+keep*2", "recompute*2+keep*1", "recompute"]
    workload = settings.make().workload(batch_of(1))
    assert [one.name for one in workload.problem.microbatches[0].passes[-1].stages[0]] == mixed


def test_the_plan_is_never_slower_than_a_static_schedule():
    planned = make_planner(pipeline_size=4).plan(batch_of(5, 0, 2, 8))
    assert planned.baselines
    assert planned.schedule.makespan_ns <= min(planned.baselines.values())


@pytest.mark.parametrize("images", [(0,), (0, 0, 0)])
def test_text_alone_has_no_vision_pass(images):
    plan = make_planner().plan(batch_of(*images)).plan.plan
    assert {one.key.module for one in plan.passes} == {"language"}
    assert len(plan.passes) == len(images)
    assert plan.modules == {"vision": 1, "language": 1}


def test_an_empty_list_of_items_is_as_none():
    empty = BatchMetadata(
        microbatches=(MicrobatchMetadata(sequence_length=32, items={"vision": ()}),)
    )
    planner = make_planner()
    assert planner.plan(empty).plan.fingerprint == planner.plan(batch_of(0)).plan.fingerprint


def test_evaluation_has_no_backward_and_no_gradient_on_its_way():
    plan = make_planner().plan(batch_of(3, 0), forward_only=True).plan.plan
    assert plan.forward_only
    assert {op.kind for op in ops(plan)} == {OpKind.F}
    assert len(ops(plan)) == 4 * 2
    assert {message.source.kind for message in plan.messages} == {OpKind.F}


def test_a_frozen_encoder_has_no_backward():
    plan = make_planner(model=vision_language(frozen=True)).plan(batch_of(2, 1)).plan.plan
    assert {op.module for op in ops(plan, OpKind.B)} == {"language"}
    assert {op.module for op in ops(plan, OpKind.F)} == {"language", "vision"}


def test_items_of_an_unknown_module_are_refused_by_name():
    batch = BatchMetadata(
        microbatches=(
            MicrobatchMetadata(sequence_length=8),
            MicrobatchMetadata(sequence_length=8, items={"audio": (IMAGE,)}),
        )
    )
    with pytest.raises(ConfigError, match="microbatch 1 has items of \\['audio'\\]"):
        make_planner().plan(batch)


def test_a_microbatch_that_fits_nowhere_is_infeasible():
    with pytest.raises(InfeasibleError, match="bytes") as caught:
        make_planner(capacity=1).plan(batch_of(0, 6))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ({"vision": "bfloat16"}, "module 'language' is None"),
        ({"vision": "int8", "language": "bfloat16"}, "module 'vision' is 'int8'"),
    ],
)
def test_element_types_are_checked_when_the_planner_is_made(dtypes, message):
    with pytest.raises(ConfigError, match=message):
        make_planner(dtypes=dtypes)


def test_latencies_follow_the_element_type():
    def latencies(dtype):
        planner = make_planner(dtypes={"vision": "bfloat16", "language": dtype})
        return [one.p2p_latency_ns for _, one in planner.plan(batch_of(0)).problem.passes()]

    # 32 tokens, 12 wide, one nanosecond for 64 bytes.
    assert latencies("bfloat16") == [32 * 12 * 2 // 64]
    assert latencies("float64") == [32 * 12 * 8 // 64]


def test_messages_are_of_the_module_that_made_the_tensor():
    planner = make_planner(dtypes={"vision": "float16", "language": "float32"})
    plan = planner.plan(batch_of(2)).plan.plan
    for message in plan.messages:
        maker = message.source if message.source.kind is OpKind.F else message.target
        assert message.dtype == {"vision": "float16", "language": "float32"}[maker.module]
    assert {message.dtype for message in plan.messages} == {"float16", "float32"}


def test_the_time_from_metadata_to_plan_is_taken_from_the_clock():
    ticks = count(100, 7)
    planner = make_planner(clock=lambda: next(ticks))
    assert planner.plan(batch_of(1)).search_ns == 7


def test_the_same_metadata_gives_the_same_plan():
    planners = [make_planner(seed=3) for _ in range(2)]
    prints = [one.plan(batch_of(3, 0, 5)).plan.fingerprint for one in [*planners, planners[0]]]
    assert len(set(prints)) == 1
    other = make_planner(costs=SeededCosts(seed=4)).plan(batch_of(3, 0, 5)).plan.fingerprint
    assert other not in prints


def test_twenty_four_ranks():
    search = SearchConfig(time_budget_ns=1_000_000, max_rounds=1, split_weight_grad=False)
    planner = make_planner(pipeline_size=24, segments={"language": 2}, search=search)
    plan = planner.plan(batch_of(3, 0)).plan.plan
    assert len(plan.ranks) == 24
    for rank, actions in enumerate(plan.ranks):
        places = planner.layout.chunks_of_rank(rank)
        for action in actions:
            if isinstance(action, ComputeAction):
                op = action.op
                place = places[planner.layout.virtual_stage(op.module, op.stage)]
                assert (place.module, place.stage) == (op.module, op.stage)
    assert len(ops(plan)) == 2 * 24 * (2 + 2 + 2)


# --- digests -------------------------------------------------------------------------------------


def test_a_digest_does_not_depend_on_the_order_of_modules():
    items = {"vision": (IMAGE,), "audio": (IMAGE, IMAGE)}
    one = MicrobatchMetadata(sequence_length=9, items=items)
    other = replace(one, items=dict(reversed(items.items())))
    assert batch_digest(BatchMetadata(microbatches=(one,))) == batch_digest(
        BatchMetadata(microbatches=(other,))
    )


def test_a_digest_tells_every_field():
    base = MicrobatchMetadata(sequence_length=9, items={"vision": (IMAGE,)})
    others = [
        replace(base, sequence_length=10),
        replace(base, samples=2),
        replace(base, document_lengths=(9,)),
        replace(base, items={}),
        replace(base, items={"vision": (IMAGE, IMAGE)}),
        replace(base, items={"audio": (IMAGE,)}),
        replace(base, items={"vision": (Item(units=17, tokens=4),)}),
        replace(base, items={"vision": (Item(units=16, tokens=5),)}),
    ]
    batches = [(base,), (base, base), *((other,) for other in others)]
    assert len({batch_digest(BatchMetadata(microbatches=one)) for one in batches}) == 10
