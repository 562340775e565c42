"""What ranks that run one plan know of each other's batches; the exchange itself is played."""

from types import SimpleNamespace

import pytest

from megatron_pipeweaver.planner.sharing import merge_batches
from megatron_pipeweaver.plugin import sharing
from megatron_pipeweaver.plugin.sharing import SharedBatch, share_batch
from tests.unit.planner.examples import batch_of

REPLICAS = ((0, 2), (1, 3))
FIRST, SECOND = batch_of(3, 0), batch_of(1, 2)


class GatheredError(Exception):
    """Stands where a rank would wait for the others."""


@pytest.fixture
def exchange(monkeypatch):
    """`share_batch` on four ranks, each with its batch and its failure."""

    def run(*loads: tuple) -> list[SharedBatch]:
        told = []

        def tell(data, group):
            told.append(data)
            raise GatheredError

        found = []
        for gather in (tell, lambda data, group: tuple(told)):
            monkeypatch.setattr(sharing, "gather_bytes", gather)
            for rank, (batch, failure) in enumerate(loads):
                alone = SimpleNamespace(
                    get_rank=lambda rank=rank: rank, get_process_group_ranks=lambda _: range(4)
                )
                monkeypatch.setattr(sharing, "dist", alone)
                ranks = SimpleNamespace(replicas=REPLICAS, control=None)
                try:
                    found.append(share_batch(batch, failure, ranks))
                except GatheredError:
                    continue
        return found

    return run


def test_all_ranks_plan_for_the_same_and_know_their_own(exchange):
    # The last pipeline ranks of the second replica load nothing.
    found = exchange((FIRST, ""), (SECOND, ""), (FIRST, ""), (None, ""))
    merged = merge_batches([FIRST, SECOND])
    assert found == [SharedBatch(planned=merged, own=own) for own in (FIRST, SECOND, FIRST, SECOND)]


def test_a_failure_reaches_all_ranks_with_the_name_of_its_own(exchange):
    found = exchange((FIRST, ""), (None, "StopIteration: the end"), (FIRST, ""), (SECOND, ""))
    assert [one.failure for one in found] == ["rank 1: StopIteration: the end"] * 4
    assert all(one.planned is None for one in found)


def test_ranks_of_one_replica_load_one_batch(exchange):
    found = exchange((FIRST, ""), (SECOND, ""), (SECOND, ""), (SECOND, ""))
    assert [bool(one.failure) for one in found] == [False, False, True, False]
    assert "another batch than rank 0" in found[2].failure


def test_replicas_have_as_many_microbatches(exchange):
    found = exchange((FIRST, ""), (batch_of(1), ""), (FIRST, ""), (None, ""))
    assert all("have [2, 1] microbatches" in one.failure for one in found)


def test_a_replica_that_shares_nothing_tells_nothing():
    alone = SimpleNamespace(replicas=((0, 1),), control=None)
    assert share_batch(FIRST, "", alone) == SharedBatch(planned=FIRST, own=FIRST)
