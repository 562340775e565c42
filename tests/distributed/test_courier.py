"""Rounds of the courier: what is offered comes to all ranks, what is not holds nobody up."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_pipeweaver.errors import ConfigError, TransferError
from megatron_pipeweaver.runtime.courier import Round
from tests.distributed.harness import RankContext, outcomes_of_ranks, run_on_ranks

SOURCE = 1
PATIENCE = timedelta(seconds=20)


def read(data: bytes) -> str:
    if data == b"damaged":
        raise ConfigError("damaged on its way")
    return data.decode()


def rounds(ctx: RankContext) -> list[Any]:
    """Rounds one after another, and collectives of training beside them."""
    group = dist.new_group([0, 1, 2], backend="gloo")
    assert group is not None
    offers: list[list[bytes]] = [[b"a"], [], [b"x" * 3_000_000], [b"b", b"c"], [b"damaged"], [b"d"]]
    found: list[Any] = []
    last: Round[str] | None = None
    for number, offered in enumerate(offers):
        ctx.note(f"round {number}")
        last = Round(group, SOURCE, read, last)
        for one in offered if ctx.rank == SOURCE else ():
            last.offer(one)
        trained = torch.ones(1)
        dist.all_reduce(trained)
        last.close()
        if ctx.rank == SOURCE:
            found.append([last.brought(one) for one in [*offered, b"", b"other"]])
            continue
        try:
            found.append(last.result(PATIENCE))
        except (ConfigError, TransferError) as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_what_is_offered_in_a_round_comes_to_all_and_the_rest_to_nobody() -> None:
    ranks = run_on_ranks(rounds, 3)
    assert ranks[SOURCE] == [
        [True, False, False],
        [False, False],
        [True, False, False],
        [True, False, False, False],
        [True, False, False],
        [True, False, False],
    ]
    for rank in (0, 2):
        assert ranks[rank] == [
            "a",
            f"TransferError: the plan that rank {SOURCE} has sent ahead did not come",
            "x" * 3_000_000,
            "b",
            "ConfigError: damaged on its way",
            "d",
        ]


def source_dies(ctx: RankContext) -> str:
    """The source is gone in the middle of a round."""
    group = dist.new_group([0, 1], backend="gloo")
    assert group is not None
    made = Round(group, SOURCE, read)
    dist.barrier()
    if ctx.rank == SOURCE:
        os._exit(9)
    started = time.monotonic()
    try:
        made.result(PATIENCE)
    except TransferError as error:
        return f"{time.monotonic() - started < PATIENCE.total_seconds()}: {error}"
    return "nothing was amiss"


def test_a_source_that_is_gone_ends_the_round() -> None:
    first, second = outcomes_of_ranks(source_dies, 2)
    assert second.exit_code == 9
    assert first.value.startswith(f"True: broadcast of the plan from rank {SOURCE}: "), first
