"""Who shares a plan with whom, on jobs of 24 ranks, by Megatron's own rank order."""

import dataclasses

import pytest
from megatron.core.parallel_state import RankGenerator

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.plugin.communicators import RankPartition, partition_ranks


def job(*, order: str = "tp-cp-ep-dp-pp", tp: int = 1, cp: int = 1, dp: int = 1, pp: int = 1):
    """What every rank of a job tells of itself: its data-parallel rank, then its pipeline."""
    generator = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=order)
    rows: list[list[int]] = [[] for _ in range(tp * cp * dp * pp)]
    for group in generator.get_ranks("dp"):
        for place, rank in enumerate(group):
            rows[rank].append(place)
    for group in generator.get_ranks("pp"):
        for rank in group:
            rows[rank].extend(group)
    return rows


def test_tensor_2_data_2_pipeline_6():
    ranks = partition_ranks(job(tp=2, dp=2, pp=6))
    first = (0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21)
    assert ranks.replicas == (first, tuple(rank + 2 for rank in first))
    assert ranks.pipelines == tuple(tuple(range(start, 24, 4)) for start in range(4))
    assert [ranks.planning_rank(rank) for rank in range(24)] == [0, 0, 2, 2] * 6
    assert [ranks.pipeline_rank(rank) for rank in range(24)] == [rank // 4 for rank in range(24)]
    assert ranks.pipeline_of(7) == (3, 7, 11, 15, 19, 23)
    assert ranks.replica_of(7) == ranks.replica_of(2) == ranks.replicas[1]


def test_one_pipeline_of_24_shares_one_plan():
    ranks = partition_ranks(job(pp=24))
    assert ranks.replicas == ranks.pipelines == (tuple(range(24)),)
    assert [ranks.pipeline_rank(rank) for rank in range(24)] == list(range(24))
    assert {ranks.planning_rank(rank) for rank in range(24)} == {0}


def test_twenty_four_replicas_plan_for_themselves():
    ranks = partition_ranks(job(dp=24))
    assert [ranks.planning_rank(rank) for rank in range(24)] == list(range(24))
    assert all(ranks.pipeline_of(rank) == (rank,) for rank in range(24))


SIZES = [
    {"tp": 2, "dp": 2, "pp": 6},
    {"tp": 2, "cp": 2, "dp": 2, "pp": 3},
    {"cp": 3, "pp": 8},
    {"tp": 4, "pp": 6},
    {"dp": 6, "pp": 4},
    {"tp": 3, "cp": 2, "dp": 4},
]


@pytest.mark.parametrize("order", ["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_replicas_hold_all_pipelines_of_one_data_parallel_rank(sizes, order):
    ranks = partition_ranks(job(order=order, **sizes))
    generator = RankGenerator(**{"tp": 1, "cp": 1, "dp": 1, "pp": 1, **sizes}, ep=1, order=order)
    assert set(map(frozenset, ranks.replicas)) == set(
        map(frozenset, generator.get_ranks("tp-cp-pp"))
    )
    assert set(ranks.pipelines) == set(map(tuple, generator.get_ranks("pp")))
    for rank in range(24):
        assert set(ranks.pipeline_of(rank)) <= set(ranks.replica_of(rank))
        assert ranks.pipeline_of(rank)[ranks.pipeline_rank(rank)] == rank
        planning = ranks.planning_rank(rank)
        assert planning in ranks.replica_of(rank)
        assert ranks.pipeline_rank(planning) == 0, "the rank that plans loads data"
        assert ranks.planning_rank(planning) == planning


def expert_groups(*, dp: int, pp: int, tp: int = 1, cp: int = 1, ep: int):
    """Whom every rank exchanges tokens with; experts are divided as other matrices are.

    Megatron has experts in this order alone.
    """
    ranks = tp * cp * dp * pp
    order = "tp-cp-ep-dp-pp"
    generator = RankGenerator(tp=tp, ep=ep, dp=ranks // (tp * ep * pp), pp=pp, cp=1, order=order)
    groups: list[list[int]] = [[] for _ in range(ranks)]
    for group in generator.get_ranks("tp-ep"):
        for rank in group:
            groups[rank] = list(group)
    return groups


@pytest.mark.parametrize(
    ("sizes", "ep", "sharing"),
    [
        ({"dp": 6, "pp": 4}, 1, 1),
        ({"dp": 6, "pp": 4}, 2, 2),
        ({"dp": 6, "pp": 4}, 6, 6),
        ({"tp": 2, "dp": 4, "pp": 3}, 2, 2),
        ({"cp": 2, "dp": 4, "pp": 3}, 2, 1),  # context-parallel ranks are one replica
        ({"cp": 2, "dp": 4, "pp": 3}, 4, 2),
    ],
    ids=str,
)
def test_replicas_whose_stages_exchange_tokens_share_a_plan(sizes, ep, sharing):
    groups = expert_groups(ep=ep, **sizes)
    ranks = partition_ranks(job(**sizes), groups)
    assert ranks.replicas == partition_ranks(job(**sizes)).replicas
    for rank in range(24):
        assert set(groups[rank]) <= set(ranks.plan_of(rank))
        assert set(ranks.replica_of(rank)) <= set(ranks.plan_of(rank))
        replicas = ranks.replicas_of(rank)
        assert len(replicas) == sharing
        assert {one for replica in replicas for one in replica} == set(ranks.plan_of(rank))
        assert ranks.planning_rank(rank) == replicas[0][0]
        assert ranks.pipeline_rank(replicas[0][0]) == 0, "the rank that plans loads data"


def test_replicas_that_are_joined_twice_share_one_plan():
    rows = [[rank, rank] for rank in range(5)]
    ranks = partition_ranks(rows, [[0], [1, 2], [1, 2], [2, 4], [2, 4]])
    assert ranks.plans == ((0,), (1, 2, 4), (3,))


def test_rows_that_contradict_each_other_are_refused():
    rows = job(dp=2, pp=2)
    other = [*rows[:3], [0, 0, 3]]  # rank 3 takes itself for a peer of rank 0
    with pytest.raises(ConfigError, match=r"pipelines .* do not hold every rank once"):
        partition_ranks(other)


def test_a_pipeline_across_replicas_is_refused():
    rows = job(dp=2, pp=2)
    rows[2][0] = 1
    with pytest.raises(ConfigError, match=r"pipeline \(0, 2\) crosses replicas"):
        partition_ranks(rows)


def test_a_partition_does_not_change():
    ranks = RankPartition(plans=((0,),), replicas=((0,),), pipelines=((0,),))
    with pytest.raises(dataclasses.FrozenInstanceError):
        ranks.replicas = ()
