"""The rank runner itself: what it returns, and that failures and hangs end in seconds."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import (
    RankContext,
    RanksFailedError,
    outcomes_of_ranks,
    run_on_ranks,
)


def _sum_of_ranks(ctx: RankContext, offset: int) -> float:
    value = torch.tensor([float(ctx.rank + offset)])
    dist.all_reduce(value)
    return float(value)


def _one_raises(ctx: RankContext) -> None:
    if ctx.rank == 1:
        raise ValueError("rank 1 has had enough")
    ctx.note("rank 0 waits for ever")
    time.sleep(60)


def _one_dies(ctx: RankContext) -> int:
    if ctx.rank == 1:
        os._exit(7)
    return os.getpid()


def _one_leaves_a_child(ctx: RankContext) -> int:
    return subprocess.Popen(["sleep", "600"]).pid


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_run_leaves_no_process_behind() -> None:
    children = run_on_ranks(_one_leaves_a_child, 2, initialise=False)
    until = time.monotonic() + 10
    while any(map(_runs, children)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(_runs, children))


def test_every_rank_returns() -> None:
    assert run_on_ranks(_sum_of_ranks, 2, 10) == [21.0, 21.0]


def test_a_raising_rank_and_a_hanging_one_are_told_apart() -> None:
    first, second = outcomes_of_ranks(_one_raises, 2, grace_s=0.3)
    assert first.hung
    assert first.note == "rank 0 waits for ever"
    assert isinstance(second.error, ValueError)
    assert "had enough" in second.describe()


def test_a_dead_rank_is_reported() -> None:
    with pytest.raises(RanksFailedError, match=r"rank 1 .* died with exit code 7"):
        run_on_ranks(_one_dies, 2, initialise=False)
