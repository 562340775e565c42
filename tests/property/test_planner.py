"""Plans for random batches: verified, complete, and in a fixed order of backwards where asked."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.ir.batch import BatchMetadata, Item, MicrobatchMetadata
from megatron_pipeweaver.ir.plan import ComputeAction
from megatron_pipeweaver.ir.problem import OpKind
from megatron_pipeweaver.planner.planner import batch_digest
from megatron_pipeweaver.planner.wire import decode, encode
from tests.unit.planner.examples import make_planner, vision_language

sizes = st.builds(Item, units=st.integers(1, 20), tokens=st.integers(0, 5))
batches = st.builds(
    BatchMetadata,
    microbatches=st.lists(
        st.builds(
            MicrobatchMetadata,
            sequence_length=st.integers(1, 64),
            samples=st.integers(1, 2),
            items=st.one_of(
                st.just({}),
                st.fixed_dictionaries({"vision": st.lists(sizes, max_size=5).map(tuple)}),
            ),
        ),
        min_size=1,
        max_size=5,
    ).map(tuple),
)


@settings(max_examples=60, deadline=None)
@given(
    batch=batches,
    pipeline_size=st.integers(1, 4),
    frozen=st.booleans(),
    split=st.booleans(),
    capacity=st.sampled_from([600, 1500, 10_000]),
    seed=st.integers(0, 9),
)
def test_backwards_of_every_stage_run_in_the_order_of_microbatches_and_their_shares(
    batch: BatchMetadata, pipeline_size: int, frozen: bool, split: bool, capacity: int, seed: int
) -> None:
    planned = make_planner(
        model=vision_language(frozen=frozen),
        pipeline_size=pipeline_size,
        segments={} if pipeline_size == 1 else {"language": 2},
        seed=seed,
        capacity=capacity * 6,
        search=SearchConfig(
            time_budget_ns=3_000_000,
            max_rounds=4,
            seed=seed,
            deterministic=True,
            split_weight_grad=split,
        ),
    ).plan(batch)
    orders = defaultdict(list)
    for rank in planned.plan.plan.ranks:
        for action in rank:
            if isinstance(action, ComputeAction) and action.op.kind is not OpKind.F:
                op = action.op
                orders[op.kind, op.module, op.stage].append((op.microbatch, op.sub_microbatch))
    trained = [one.key for one in planned.plan.plan.passes if not one.frozen]
    for (_, _module, _), order in orders.items():
        assert order == sorted(order)
    for stage in range(pipeline_size):
        assert orders[OpKind.B, "language", stage] == [
            (microbatch, sub) for microbatch, module, sub in trained if module == "language"
        ]
    received = decode(encode(planned, batch_digest(batch)))
    assert received.plan.plan == planned.plan.plan
    assert received.batch_digest == batch_digest(batch)


few = st.builds(Item, units=st.integers(1, 2), tokens=st.integers(0, 1))
close = st.builds(
    BatchMetadata,
    microbatches=st.lists(
        st.builds(
            MicrobatchMetadata,
            sequence_length=st.integers(2, 3),
            items=st.dictionaries(
                st.sampled_from(["a", "b"]), st.lists(few, max_size=2).map(tuple), max_size=2
            ),
            document_lengths=st.sampled_from([(), (1,), (1, 1), (2,)]),
        ),
        min_size=1,
        max_size=2,
    ).map(tuple),
)


@settings(max_examples=500, deadline=None)
@given(one=close, other=close)
def test_digests_are_equal_exactly_where_metadata_is(
    one: BatchMetadata, other: BatchMetadata
) -> None:
    assert (batch_digest(one) == batch_digest(other)) == (one == other)
