import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.partition.sub_microbatch import split


def test_pieces_are_uniform_and_longer_ones_first() -> None:
    assert split(10, 4) == ((0, 4), (4, 7), (7, 10))
    assert split(8, 4) == ((0, 4), (4, 8))
    assert split(3, 4) == ((0, 3),)


def test_no_items_make_no_piece() -> None:
    assert split(0, 4) == ()


@pytest.mark.parametrize(("count", "size"), [(-1, 1), (1, 0)])
def test_sizes_below_the_least_are_refused(count: int, size: int) -> None:
    with pytest.raises(ConfigError, match="sub-microbatches"):
        split(count, size)
