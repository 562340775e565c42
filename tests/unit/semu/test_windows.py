"""Query-key pairs of sliding windows, counted one by one."""

import pytest

from megatron_pipeweaver.semu.attention import pairs
from megatron_pipeweaver.semu.interface import Load
from megatron_pipeweaver.semu.options import Attention


@pytest.mark.parametrize("window", [None, 1, 3, 7, 8, 50])
@pytest.mark.parametrize("lengths", [(1,), (8,), (3, 20, 7)], ids=str)
def test_causal_windows_slide(lengths: tuple[int, ...], window: int | None) -> None:
    load = Load(sequence=sum(lengths), batch=1, lengths=lengths)
    counted = sum(
        key <= query and (window is None or query - key < window)
        for length in lengths
        for query in range(length)
        for key in range(length)
    )
    assert pairs(load, Attention.FLASH, causal=True, window=window) == counted
