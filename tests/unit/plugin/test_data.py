import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import MicrobatchMetadata
from megatron_pipeweaver.plugin.data import describe_batch, pull_microbatches


def test_exactly_the_asked_microbatches_leave_the_first_iterator() -> None:
    first, second = iter([{"x": i} for i in range(5)]), iter([{"x": 9}])
    pulled = pull_microbatches([first, second], 3)
    assert [one["x"] for one in pulled] == [0, 1, 2]  # type: ignore[index]
    assert next(first) == {"x": 3}
    assert next(second) == {"x": 9}


def test_a_single_iterator_needs_no_list() -> None:
    assert pull_microbatches(iter([{"x": 1}]), 1) == [{"x": 1}]


@pytest.mark.parametrize("source", [None, [None, None]])
def test_a_rank_without_data_gets_placeholders_and_has_no_metadata(source: object) -> None:
    pulled = pull_microbatches(source, 2)  # type: ignore[arg-type]
    assert pulled == [None, None]
    assert describe_batch(pulled, lambda one: pytest.fail("described nothing")) is None


def test_an_iterator_that_ends_early_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError, match="ended at microbatch 1 of 3"):
        pull_microbatches(iter([{"x": 1}]), 3)


def test_metadata_follows_the_order_of_the_microbatches() -> None:
    batch = describe_batch(
        [{"s": 4}, {"s": 7}], lambda one: MicrobatchMetadata(sequence_length=one["s"])
    )
    assert batch is not None
    assert [one.sequence_length for one in batch.microbatches] == [4, 7]
