"""Plans that replicas share: every replica's part is valid, in the shared order, and its own."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pipeweaver.compiler.narrow import narrow
from megatron_pipeweaver.compiler.verify import verify
from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import BatchMetadata, Item, MicrobatchMetadata
from megatron_pipeweaver.ir.plan import ComputeAction, PassPayload, Plan
from megatron_pipeweaver.ir.problem import PassKey
from megatron_pipeweaver.planner.messages import Measurement, Ran, unpack
from megatron_pipeweaver.planner.ran import measurement_of, pack_ran
from megatron_pipeweaver.planner.sharing import merge_batches, own_part
from megatron_pipeweaver.planner.source import PlanAnswer, RanPlan
from megatron_pipeweaver.planner.wire import encode
from tests.unit.compiler.samples import draw_sample
from tests.unit.planner.examples import IMAGE, batch_of, make_planner, ran

SEEDS = st.integers(0, 2**32 - 1)


def _order(plan: Plan, payloads: dict[PassKey, PassPayload]) -> list[list[ComputeAction]]:
    """Every rank's ops of these passes."""
    return [
        [one for one in rank if isinstance(one, ComputeAction) and one.op.owner in payloads]
        for rank in plan.ranks
    ]


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_what_is_left_of_a_plan_is_valid_and_in_order(seed: int) -> None:
    rng = random.Random(seed)
    plan = draw_sample(rng).plan(forward_only=rng.random() < 0.2)
    payloads = {}
    for one in plan.passes:
        if not one.after and rng.random() < 0.4:
            continue
        rows = rng.randint(0, 3)
        payloads[one.key] = replace(one.payload, hidden_shape=(rows, 2), output_shape=(rows, 3))
    verified = verify(narrow(plan, payloads))
    part = verified.plan
    assert {one.key: one.payload for one in part.passes} == payloads
    assert _order(part, payloads) == _order(plan, payloads)
    assert sum(map(len, _order(part, payloads))) == sum(
        isinstance(one, ComputeAction) for rank in part.ranks for one in rank
    )
    assert all(
        own <= whole
        for own, whole in zip(
            verified.peak_memory_bytes, verify(plan).peak_memory_bytes, strict=True
        )
    )
    assert narrow(plan, {one.key: one.payload for one in plan.passes}) == plan


@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_every_replica_finds_its_own_items_in_the_shared_plan(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 4)
    replicas = [
        batch_of(*(rng.choice([0, 1, 2, 3, 5]) for _ in range(count)), length=rng.choice([32, 48]))
        for _ in range(rng.randint(1, 3))
    ]
    planner = make_planner(seed=seed % 1000)
    shared = planner.plan(merge_batches(replicas)).plan
    for batch in replicas:
        own = own_part(shared, batch, planner.model, None)
        items = defaultdict(list)
        for one in own.plan.passes:
            items[one.key.microbatch, one.key.module] += range(
                one.payload.item_start, one.payload.item_stop
            )
            if one.key.module == "language":
                length = batch.microbatches[one.key.microbatch].sequence_length
                assert one.payload.hidden_shape == (length, 1, 12)
        for index, microbatch in enumerate(batch.microbatches):
            assert items[index, "vision"] == list(range(microbatch.count("vision")))
            assert items[index, "language"] == [0]
    if len(replicas) == 1:
        assert own is shared


def test_shapes_are_those_of_a_plan_of_its_own() -> None:
    """Clips of different lengths are packed in one row, equal ones stand side by side."""
    model = make_planner().model
    short, long = Item(units=8, tokens=2), Item(units=32, tokens=8)

    def holding(*items: Item) -> BatchMetadata:
        return BatchMetadata(
            microbatches=(MicrobatchMetadata(sequence_length=32, items={"vision": items}),)
        )

    mine, other = holding(short, short), holding(short, long, IMAGE)
    planner = make_planner(sub_microbatch={"vision": 2})
    shared = planner.plan(merge_batches([mine, other])).plan
    alone = planner.plan(mine).plan.plan.passes
    part = own_part(shared, mine, model, None).plan.passes
    assert [one.payload for one in part] == [one.payload for one in alone]


def test_the_largest_microbatch_is_planned_for_place_by_place() -> None:
    def microbatch(*units: int, **more: object) -> MicrobatchMetadata:
        items = tuple(Item(units=one, tokens=one // 4) for one in units)
        return MicrobatchMetadata(
            **{"sequence_length": 32, "items": {"vision": items} if items else {}, **more}
        )

    first = BatchMetadata(microbatches=(microbatch(16, 8), microbatch(sequence_length=40)))
    second = BatchMetadata(
        microbatches=(microbatch(8, 8, 4, samples=2), microbatch(document_lengths=(8, 24)))
    )
    merged = merge_batches([first, second])
    assert merged == merge_batches([second, first])
    assert merged.microbatches == (
        microbatch(16, 8, 4, samples=2),
        microbatch(sequence_length=40),  # one long sequence costs more than two documents
    )
    packed = [
        BatchMetadata(microbatches=(microbatch(document_lengths=one),))
        for one in [(16, 16), (4, 28)]
    ]
    assert merge_batches(packed) == packed[1]
    with pytest.raises(ConfigError, match=r"have \[2, 1\] microbatches"):
        merge_batches([first, packed[0]])


def test_nothing_is_learnt_from_passes_that_were_planned_larger() -> None:
    planner = make_planner()
    mine, other = batch_of(3, 0), batch_of(4, 2)
    shared = planner.plan(merge_batches([mine, other]))
    own = own_part(shared.plan, mine, planner.model, None)
    whole = ran(PlanAnswer(data=encode(shared, ""), received=None, planned=lambda: None), len)
    alone = replace(
        whole,
        made=shared.plan,
        own=own,
        times=replace(
            whole.times,
            spans=tuple(
                span[: 16 * len(actions)]
                for span, actions in zip(whole.times.spans, own.plan.ranks, strict=True)
            ),
        ),
    )
    told = _measured(mine, alone)
    assert {(one.microbatch, one.module, one.sub_microbatch) for one in told.times} == {
        PassKey(0, "vision", 0),  # two images of two; the second pass has one of two
        PassKey(0, "language", 0),
        PassKey(1, "language", 0),
    }
    ops = sum(isinstance(one, ComputeAction) for rank in shared.plan.plan.ranks for one in rank)
    assert len(_measured(mine, whole).times) == ops


def _measured(batch: BatchMetadata, one: RanPlan) -> Measurement:
    message, data = unpack(pack_ran(batch, False, one))
    assert isinstance(message, Ran)
    return measurement_of(message, data)
